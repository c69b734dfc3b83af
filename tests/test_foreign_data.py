"""Other people's data: what would silently give a wrong number is mapped by name, reported, or refused."""

from __future__ import annotations

import io
import json
import logging
import os
import struct
import time
import unicodedata
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_experiment
import torch
from PIL import Image

import capsae.features.extract
from capsae import detectors, metrics
from capsae.__main__ import main
from capsae.caps import ClassActivationProfiles
from capsae.data import image_files
from capsae.data.asarray import as_labels, as_numpy
from capsae.data.images import BadImage, read_encoded
from capsae.data.open import by_name, open_source
from capsae.detectors import Observations
from capsae.evaluation.evaluate import evaluate
from capsae.features.backbone import Backbone, BackboneSpec
from capsae.features.featureset import FeatureSet, LinearHead
from capsae.features.probe import fit_linear_probe
from capsae.pipeline.arrays import discriminant_head, evaluate_arrays
from capsae.pipeline.arrays_io import arrays_from
from capsae.pipeline.own_images import find_images
from capsae.pipeline.run import Run
from capsae.sae import SAEConfig, TopKSAE, train_sae

NAMES = ("ant", "bee", "crane", "dög")
COLOUR = dict(zip(NAMES, ((200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30)), strict=True))


def png(image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def drawn(name: str, seed) -> Image.Image:
    name = unicodedata.normalize("NFC", name)
    noise = np.random.default_rng([*map(ord, name), seed]).integers(-25, 25, (8, 8, 3))
    return Image.fromarray((np.array(COLOUR.get(name, (90, 90, 90))) + noise).clip(0, 255).astype(np.uint8))


def folder(root, names=NAMES, n=6, seed=0):
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        for row in range(n):
            drawn(name, 100 * seed + row).save(root / name / f"{row}.png")
    return {"kind": "folder", "path": str(root)}


def parquet(path, names, rows, seed=9, **columns):
    """Rows are class names; their labels count along ``names``."""
    blobs = [png(drawn(name, 100 * seed + i)) for i, name in enumerate(rows)]
    labels = [None if name is None else names.index(name) for name in rows]
    table = pa.table({"image": blobs, "label": pa.array(labels, pa.int64())} | columns)
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(names)}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), path)
    return {"kind": "parquet", "path": str(path)}


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """``experiment(test=spec, ...)`` gives a Run on drawn images; features are mean colours."""

    def extract(source, backbone, out_dir, *, name, **_):
        both = [source.measured(i) for i in range(len(source))]
        cls = np.stack([np.tile(np.asarray(image).mean((0, 1)), 6)[:16] for image, _ in both])
        rest = {"class_names": source.class_names, "pixels": np.stack([pixels for _, pixels in both])}
        return FeatureSet(cls + 1e-3 * np.arange(16), source.labels, source.ids, name=name, **rest)

    monkeypatch.setattr(capsae.features.extract, "extract", extract)

    def make(**sources):
        given = {"train": lambda: folder(tmp_path / "train"), "test": lambda: folder(tmp_path / "test", seed=1)}
        given |= {"ood.near/shifted": lambda: folder(tmp_path / "n", ("x",), seed=2)}
        given |= {"ood.far/noise": lambda: folder(tmp_path / "f", ("y",), seed=3)}
        (tmp_path / "own.toml").write_text(small_experiment.TOML.format(pack='"none"'))
        overrides = {key: sources[key] if key in sources else make() for key, make in given.items()}
        overrides |= {key: value for key, value in sources.items() if key not in given}
        return Run(tmp_path / "own.toml", overrides, tmp_path / "store", device="cpu", progress=False)

    return make


def accuracy(run, set_name="test") -> float:
    features = run.features(set_name)
    known = features.labels >= 0
    return float((features.logits.argmax(1) == features.labels)[known].mean())


# --- classes go by name


def without_a_class(root):
    return folder(root, NAMES[1:], seed=1)


def beside_a_file_servers_folders(root):
    for name in ("@eaDir", ".ipynb_checkpoints", "empty", "none/b"):
        (root / name).mkdir(parents=True)
    drawn("ant", 5).save(root / ".ipynb_checkpoints" / "0-checkpoint.png")
    drawn("ant", 6).save(root / "@eaDir" / "0.png")
    return folder(root, seed=1)


def of_another_unicode_form(root):
    return folder(root, [unicodedata.normalize("NFD", name) for name in NAMES], seed=1)


def names_in_another_order(root):
    return parquet(root, NAMES[::-1], NAMES * 3)


def more_names_than_train(root):
    return parquet(root, ("zebra", *NAMES), NAMES * 3)


def files_of_two_orders(root):
    root.mkdir()
    parquet(root / "0.parquet", NAMES[::-1], NAMES)
    parquet(root / "1.parquet", NAMES[1:], NAMES[1:], seed=8)
    return {"kind": "parquet", "path": str(root)}


def some_labels_unknown(root):
    spec = parquet(root, NAMES[::-1], NAMES * 3)
    table = pq.read_table(root)
    labels = [None, -1, *table["label"].to_pylist()[2:]]
    pq.write_table(table.set_column(1, "label", pa.array(labels, pa.int64())), root)
    return spec


LISTED = [
    without_a_class,
    beside_a_file_servers_folders,
    of_another_unicode_form,
    names_in_another_order,
    more_names_than_train,
    files_of_two_orders,
    some_labels_unknown,
]


@pytest.mark.parametrize("role", ["test", "val", "shifted.shifted/other"])
@pytest.mark.parametrize("listed", LISTED)
def test_classes_go_by_name(listed, role, experiment, tmp_path):
    run = experiment(**{role: listed(tmp_path / "theirs")})
    name = role.removeprefix("shifted.")
    assert run.features(name).class_names == run.features("train").class_names == tuple(sorted(NAMES))
    assert accuracy(run, name) == 1.0
    if role == "test":
        rows = run.table(["msp"]).set_index(["method", "set"])
        assert rows.loc[("head", "test"), "value"] == 1.0, "an accuracy is over the rows that have a label"


def test_what_is_missing_unknown_or_named_twice_is_an_error(experiment, tmp_path, caplog):
    run = experiment(test=without_a_class(tmp_path / "less"))
    with caplog.at_level(logging.WARNING):
        run.inputs.source("test")
    assert "test: no image of 1 of 4 classes: 'ant'" in caplog.text
    with pytest.raises(ValueError, match=r"test: 2 of 3 images are of 2 classes that train does not.*'Ant', 'bat'"):
        experiment(test=parquet(tmp_path / "m.parquet", ("bat", "bee", "Ant"), ("bat", "Ant", "bee"))).features("test")
    twice = parquet(tmp_path / "t.parquet", ("crane", "bee", "crane"), ("crane", "bee"))
    for spec in (twice, twice | {"classes": ["crane"]}):
        with pytest.raises(ValueError, match="classes 0 and 2 are both 'crane'; give each its own name"):
            open_source(spec)
    (tmp_path / "list.txt").write_text("ant/0.png 4\n")
    listed = {"kind": "imglist", "list": str(tmp_path / "list.txt"), "root": str(tmp_path / "train")}
    with pytest.raises(ValueError, match="label 4 has no name, there are 4"):
        open_source(listed | {"class_names": NAMES})


def test_train_leaves_out_what_has_no_class(experiment, tmp_path, caplog):
    spec = folder(tmp_path / "loose")
    drawn("ant", 77).save(tmp_path / "loose" / "beside.png")
    run = experiment(train=spec)
    with caplog.at_level(logging.WARNING):
        assert len(run.inputs.source("train")) == 24
    assert "train: 1 images have no class and are left out, the first is beside.png" in caplog.text
    assert accuracy(run) == 1.0


WRONG_LABELS = {
    "fraction": ([0, 2.7], "holds 2.7, .*row 1"),
    "NaN": ([0.0, float("nan")], "holds nan"),
    "infinite": ([float("inf"), 0.0], "holds inf"),
    "text": (["0", "1"], "holds '0'"),
    "mixed": (["cat", 0], "holds 'cat'"),
    "under -1": ([0, -2], "holds -2, .*-1 for none"),
    "too large": (np.array([0, 2**63], np.uint64), "holds 9223372036854775808"),
    "far too large": ([0, 2**70], "holds 1180591620717411303424, .*row 1"),
    "categories": (pd.Categorical(["cat", "dog"]), "holds 'cat'"),
    "complex": (np.array([0, 1j]), "holds 0j"),
    "a structure": (np.zeros(2, [("label", int)]), r"holds \(0,\)"),
    "none and text": ([None, "cat"], "holds 'cat', .*row 1"),
    "ragged": ([[0], [1, 2]], r"holds \[0\]"),
}
NO_PARQUET = ("mixed", "too large", "categories", "far too large", "complex", "a structure", "none and text", "ragged")


@pytest.mark.parametrize("case", WRONG_LABELS)
def test_labels_are_whole_numbers(case, tmp_path):
    labels, message = WRONG_LABELS[case]
    cls = np.zeros((2, 3), np.float32)
    uses = [as_labels, lambda labels: FeatureSet(cls, labels, ["a", "b"])]
    uses.append(lambda labels: fit_linear_probe(cls, labels, 2))
    if case not in NO_PARQUET:
        blob = png(drawn("ant", 0))
        pq.write_table(pa.table({"image": [blob] * 2, "label": pa.array(labels)}), tmp_path / "x.parquet")
        uses.append(lambda _: open_source({"kind": "parquet", "path": str(tmp_path / "x.parquet")}))
    for use in uses:
        with pytest.raises(ValueError, match=message):
            use(labels)


NONE = [np.array([0, None, 3], object), torch.tensor([0, -1, 3]), list(torch.tensor([0, -1, 3])), pd.Series([0, -1, 3])]


@pytest.mark.parametrize("labels", [[0, None, 3], [0.0, -1.0, 3.0], np.array([0, -1, 3], np.int8), [0, -1, 3], *NONE])
def test_labels_that_are_whole_numbers_are_taken(labels):
    assert as_labels(labels).tolist() == [0, -1, 3] and as_labels(labels).dtype == np.int64


def test_rows_without_a_label_count_neither_as_right_nor_as_wrong():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(40, 3)).astype(np.float32), rng.integers(0, 3, 40)
    ood = {"far/x": Observations(rng.normal(size=(9, 2)), logits=rng.normal(size=(9, 3)))}

    class Norm:
        def score(self, obs):
            return np.linalg.norm(obs.cls, axis=1)

    cls = rng.normal(size=(40, 2))
    part = np.where(np.arange(40) < 10, -1, labels)
    some = evaluate({"n": Norm()}, Observations(cls, logits, part), ood, n_boot=0).set_index("metric")["value"]
    few = Observations(cls[10:], logits[10:], labels[10:])
    right = evaluate({"n": Norm()}, few, ood, n_boot=0).set_index("metric")["value"]
    for metric in ("accuracy", "aurc", "errors_flagged"):
        assert some[metric] == right[metric]
    assert "oscr" not in some and "oscr" in right


def test_by_name_says_when_only_one_side_has_names(caplog):
    one = FeatureSet(np.zeros((2, 1)), [0, 1], ["a", "b"], class_names=("x", "y"))
    assert by_name(one, ("y", "x"), "here").labels.tolist() == [1, 0]
    with caplog.at_level(logging.WARNING):
        assert by_name(one, (), "here") is one and by_name(replace(one, class_names=()), ("y", "x"), "there")
    assert "here: classes have names here alone; labels are taken by number" in caplog.text
    assert "there: classes have names in train" in caplog.text


# --- the same image twice


def test_a_row_is_found_by_its_id_whatever_the_file_calls_it(experiment, tmp_path):
    names = ["same.png"] * 5 + ["own.png", "same.png"]
    spec = parquet(tmp_path / "s.parquet", NAMES, [*NAMES, "ant", "bee", "crane"], source=names)
    run = experiment(**{"ood.near/shifted": spec, "test": spec})
    features = run.inputs.features("test")
    assert len(set(features.ids)) == 7 and "own.png" in features.ids
    for row in range(7):
        assert np.asarray(run.image("test", row)).mean((0, 1)) == pytest.approx(features.cls[row, :3], abs=1e-2)
    few = open_source(spec | {"limit": 3})
    assert set(few.ids) <= set(features.ids), "an id is that of the row in the whole file"
    (tmp_path / "exclude.txt").write_text("same.png\n")
    assert open_source(spec | {"exclude": str(tmp_path / "exclude.txt")}).ids.tolist() == ["own.png"]


@pytest.mark.parametrize(
    ("role", "of", "message"),
    [
        ("test", "train", "test: 24 of 24 images are images of train, the first is 'ant/0.png', 'ant/0.png' there"),
        ("ood.near/shifted", "test", "near/shifted: 24 of 24 images are images of test"),
        ("ood.far/noise", "train", "far/noise: 24 of 24 images are images of"),
        ("shifted.shifted/a", "train", "shifted/a: 24 of 24 images are images of train"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "parquet", "renamed"])
def test_a_set_that_is_another_is_refused(role, of, message, kind, experiment, tmp_path):
    seed = {"train": 0, "test": 1}[of]
    spec = folder(tmp_path / "copy", seed=seed)
    if kind == "renamed":
        message = message.partition(", the first")[0]
        for path in (tmp_path / "copy").glob("*/*.png"):
            path.rename(path.with_name(f"new {path.name}"))
    if kind == "parquet":
        message = message.partition(", the first")[0]
        source = open_source(spec)
        labels, blobs = source.labels.tolist(), [(tmp_path / "copy" / name).read_bytes() for name in source.ids]
        spec = parquet(tmp_path / "c.parquet", NAMES, [NAMES[label] for label in labels])
        table = pq.read_table(tmp_path / "c.parquet")
        pq.write_table(table.set_column(0, "image", pa.array(blobs, pa.binary())), tmp_path / "c.parquet")
    run = experiment(**{role: spec}, val=folder(tmp_path / "val", seed=7))
    with pytest.raises(ValueError, match=message):
        for name in run.experiment.sets:
            run.features(name)


def test_a_few_copies_are_logged(experiment, tmp_path, caplog):
    spec = folder(tmp_path / "copy", seed=1)
    drawn("ant", 3).save(tmp_path / "copy" / "ant" / "of train.png")
    drawn("ant", 101).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "copy" / "bee" / "mirrored.png")
    drawn("ant", 101).save(tmp_path / "copy" / "ant" / "twice.png")
    run = experiment(test=spec, val=folder(tmp_path / "val", seed=7))
    with caplog.at_level(logging.WARNING):
        for name in run.experiment.sets:
            run.features(name)
    assert "test: 1 of 27 images are images of train, the first is 'ant/of train.png'" in caplog.text
    assert "test: 1 of 27 images are there twice, the first is 'ant/twice.png'" in caplog.text
    assert caplog.text.count("images are") == 2


# --- content decides


def bitmap(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path, "BMP")


def of_kind(kind, root, colour):
    """A source of two images of one size; the first has the colour."""
    for row in range(2):
        bitmap(root / "a" / f"{row}.bmp", colour if row == 0 else "white")
    if kind == "folder":
        return {"kind": "folder", "path": str(root)}
    if kind == "imglist":
        (root / "list.txt").write_text("a/0.bmp 0\na/1.bmp 0\n")
        return {"kind": "imglist", "list": str(root / "list.txt"), "root": str(root)}
    blobs = [(root / "a" / f"{row}.bmp").read_bytes() for row in range(2)]
    (root / "hub").mkdir(exist_ok=True)
    path = root / "hub" / "train-00000-of-00001.parquet"
    columns = {"image": pa.array([{"bytes": blob, "path": None} for blob in blobs]), "label": [0, 0]}
    columns["image"] = columns["image"].cast(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table(columns), path, compression="none", use_dictionary=False, write_statistics=False)
    if kind == "hub":
        return {"kind": "hub", "name": str(root / "hub"), "split": "train", "image": "image"}
    return {"kind": "parquet", "path": str(path)}


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("kind", ["folder", "imglist", "parquet", "hub"])
def test_other_images_of_one_name_and_size_are_other_images(kind, known, tmp_path, monkeypatch):
    if kind == "hub":
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    if known:  # with an account of hashes on the disk
        monkeypatch.setattr(image_files, "_WORTH", 0)
        monkeypatch.setattr(image_files, "_SETTLED", -1)
        monkeypatch.setenv("CAPSAE_HOME", str(tmp_path / "home"))
    spec = of_kind(kind, tmp_path / "x", "red")
    before = open_source(spec).digest()
    assert open_source(spec).digest() == before
    times = {path: os.stat(path) for path in (tmp_path / "x").rglob("*") if path.is_file()}
    time.sleep(0.02)  # a tick of the file system's clock
    of_kind(kind, tmp_path / "x", "blue")
    for path, stat in times.items():
        assert path.stat().st_size == stat.st_size
        if kind != "hub":  # there, datasets itself goes by it
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a copying program may
    assert open_source(spec).digest() != before
    time.sleep(0.02)
    of_kind(kind, tmp_path / "x", "red")
    assert open_source(spec).digest() == before, "the same images are the same, whenever they were written"


def test_what_is_known_is_not_read_again_and_what_is_fresh_is(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "_WORTH", 0)
    monkeypatch.setenv("CAPSAE_HOME", str(tmp_path / "home"))
    read = []
    monkeypatch.setattr(image_files.hashlib, "file_digest", lambda file, _: read.append(file.name) or _Digest())
    spec = of_kind("folder", tmp_path / "x", "red")
    for _ in range(2):
        open_source(spec)
    assert len(read) == 4, "files changed within the last seconds are read each time"
    monkeypatch.setattr(image_files, "_SETTLED", -1)
    for _ in range(3):
        open_source(spec)
    assert len(read) == 6
    for path in (tmp_path / "home" / "hashes").iterdir():
        path.write_text("{")  # a damaged account is none
    assert open_source(spec) and len(read) == 8


class _Digest:
    def hexdigest(self):
        return "00"


# --- every image


def test_what_pillow_opens_is_an_image(tmp_path):
    made = {}
    picture = drawn("ant", 1)
    for suffix, kind in sorted(Image.registered_extensions().items()):
        if kind not in Image.SAVE or kind not in Image.OPEN or kind in ("EPS", "IM"):
            continue
        try:
            picture.convert("1" if suffix in (".xbm", ".msp") else "RGB").save(tmp_path / f"x{suffix}", kind)
        except (OSError, ValueError):
            (tmp_path / f"x{suffix}").unlink(missing_ok=True)  # a kind that holds no colours, or a missing library
            continue
        made[f"x{suffix}"] = kind
    assert {".jfif", ".jpe", ".avif", ".jp2", ".tga", ".jpg", ".png", ".webp"} <= {f".{n.split('.')[1]}" for n in made}
    picture.save(tmp_path / "X.JPG", "JPEG")
    picture.save(tmp_path / "without a suffix", "PNG")
    picture.save(tmp_path / "photo.of_mine", "JPEG")
    picture.save(tmp_path / "x.mpo", "MPO", save_all=True, append_images=[picture])
    source = open_source(tmp_path)
    assert set(source.ids) == {*made, "X.JPG", "without a suffix", "photo.of_mine", "x.mpo"}
    assert source.left_out == () and source.labels.max() == -1
    usable = [str(id) for i, id in enumerate(source.ids) if source.image(i).mode == "RGB"]
    assert len(usable) == len(source)
    assert find_images([tmp_path]) == [tmp_path / id for id in source.ids]


def test_what_is_left_out_is_counted_and_named(tmp_path, caplog, monkeypatch):
    root = tmp_path / "theirs"
    folder(root, ("ant", "bee"), n=2)
    folder(tmp_path / "elsewhere", ("crane",), n=2)
    (root / "crane").symlink_to(tmp_path / "elsewhere" / "crane")
    (root / "ant" / "around").symlink_to(root)
    (root / "ant" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (root / "bee" / "linked.png").symlink_to(root / "ant" / "0.png")
    (root / "bee" / "deep" / "er").mkdir(parents=True)
    drawn("bee", 44).save(root / "bee" / "deep" / "er" / "0.png")
    drawn("bee", 45).save(root / "loose.png")
    for name in ("._0.png", ".DS_Store", "labels.txt", "phone.heic", "data.npy", "P6.txt"):
        (root / "ant" / name).write_bytes(b"P6 1 1 255 xxx" if name == "P6.txt" else b"hello")
    os.mkfifo(root / "bee" / "pipe.png")
    (root / "bee" / ".ipynb_checkpoints").mkdir()
    (root / "locked").mkdir()
    (root / "empty").mkdir()
    scandir = os.scandir

    def locked(path):
        if os.path.basename(os.fspath(path)) == "locked":
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    with caplog.at_level(logging.WARNING):
        source = open_source(root)
    ids = ["ant/0.png", "ant/1.png", "bee/0.png", "bee/1.png", "bee/deep/er/0.png", "bee/linked.png"]
    assert source.ids.tolist() == [*ids, "crane/0.png", "crane/1.png", "loose.png"]
    assert source.class_names == ("ant", "bee", "crane")
    assert source.labels.tolist() == [0, 0, 1, 1, 1, 1, 2, 2, -1]
    why = dict(source.left_out)
    assert why["ant/gone.png"] == "broken link" and why["bee/pipe.png"] == "no regular file"
    assert why["locked"] in ("unreadable folder (Permission denied)", "folder without an image")
    assert why["ant/._0.png"] == "hidden file" and why["bee/.ipynb_checkpoints"] == "hidden folder"
    assert why["ant/phone.heic"] == "needs pillow-heif" or "HEIF" in Image.OPEN
    assert why["ant/around"] == "link to a folder that holds it" and why["empty"] == "folder without an image"
    assert "3 x no image that Pillow opens (ant/P6.txt, ...)" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert len(find_images([root])) == len(source)
    assert "unreadable folder (Permission denied) (locked)" in caplog.text


def test_the_number_left_out_goes_with_the_features(tmp_path):
    spec = folder(tmp_path / "x", ("ant",), n=2)
    (tmp_path / "x" / "ant" / "notes.txt").write_text("hello")
    settings = {"model": "vit_tiny_patch16_224", "image_size": 16}
    found = capsae.features.extract.extract(spec, settings, tmp_path / "out", progress=False)
    assert found.meta["left_out"] == 1


# --- arrays as others lay them out

ODD = {
    "bfloat16": lambda x: torch.from_numpy(x.copy()).bfloat16(),
    "needs a gradient": lambda x: torch.from_numpy(x.copy()).requires_grad_(),
    "negative strides": lambda x: x[::-1].copy()[::-1],
    "mirrored columns": lambda x: np.ascontiguousarray(x[..., ::-1])[..., ::-1],
    "big-endian": lambda x: x.astype(">f4"),
    "Fortran": np.asfortranarray,
    "a transpose": lambda x: np.ascontiguousarray(x.T).T,
    "every other": lambda x: np.repeat(x, 2, axis=0)[::2],
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
    "nested lists": lambda x: x.tolist(),
    "float64": lambda x: x.astype(np.float64),
    "sparse": lambda x: torch.from_numpy(x.copy()).to_sparse(),
}


@pytest.fixture(scope="module")
def plain():
    rng = np.random.default_rng(0)
    x = np.round(rng.normal(size=(24, 6)) * 8).astype(np.float32) / 8  # bfloat16 holds them exactly
    return x, np.arange(24) % 3


@pytest.mark.parametrize("odd", ODD)
def test_an_array_is_what_it_says_however_it_lies_in_memory(odd, plain, tmp_path):
    x, labels = plain
    given = ODD[odd](x)
    found = as_numpy(given)
    assert np.array_equal(found, x) and found.flags.c_contiguous and found.flags.writeable and found.dtype.isnative
    ids = np.arange(24).astype(str)
    features = FeatureSet(given, labels, ids, logits=given, pixels=given)
    features = FeatureSet.load(features.save(tmp_path / "f.safetensors"))
    assert all(np.array_equal(getattr(features, key), x) for key in ("cls", "logits", "pixels"))
    caps = ClassActivationProfiles(given, np.asfortranarray(labels.reshape(12, 2)), labels[::-1])
    caps.save(tmp_path / "c.safetensors")
    caps = ClassActivationProfiles.load(tmp_path / "c.safetensors")
    assert np.array_equal(caps.sums, x) and np.array_equal(caps.active, labels.reshape(12, 2))
    assert np.array_equal(caps.counts, labels[::-1])
    head = LinearHead(ODD[odd](x[:3]), ODD[odd](x[:3, 0]))
    head = LinearHead.load(head.save(tmp_path / "h.safetensors"))
    assert np.array_equal(head.weight, x[:3]) and np.array_equal(head.bias, x[:3, 0])
    probe, expected = (fit_linear_probe(rows, labels, 3, strengths=(0.1,)) for rows in (given, x))
    np.testing.assert_array_equal(probe.weight, expected.weight)
    raw = {f"{name}/features": given for name in ("train", "test", "far/x")} | {"train/labels": labels[::-1]}
    arrays = arrays_from(raw | {"head/weight": ODD[odd](x[:3]), "test/logits": ODD[odd](x[:, :3])} | _more(x, odd))
    assert np.array_equal(arrays.sets["train"].cls, x) and np.array_equal(arrays.sets["test"].logits, x @ x[:3].T)
    for name in ("mds", "knn", "msp", "she"):
        options = {"k": 3} if name == "knn" else {}
        both = []
        for rows in (given, x):
            obs = Observations(rows, logits=None, labels=labels, head=head)
            both.append(detectors.create(name, **options).fit(obs).score(Observations(rows, head=head)))
        np.testing.assert_allclose(both[0], both[1], rtol=1e-5, atol=1e-6)
    if odd not in ("nested lists", "sparse"):
        sae = TopKSAE.load(_an_sae(tmp_path / "sae", x))
        np.testing.assert_array_equal(as_numpy(sae.encode(given).values), as_numpy(sae.encode(x).values))


def _more(x, odd):
    logits = x @ x[:3].T
    given = logits if odd == "bfloat16" else ODD[odd](logits)
    return {f"{name}/logits": given for name in ("train", "test", "far/x")}


def _an_sae(path, x):
    sae, _ = train_sae(x, SAEConfig(12, 2, epochs=1, batch_size=8), "cpu", progress=False)
    sae.save(path)
    return path


def test_masked_values_are_no_values():
    masked = np.ma.masked_array(np.ones((3, 2), np.float32), mask=[[0, 0], [1, 0], [0, 0]])
    with pytest.raises(ValueError, match="NaN or infinity in 1 rows, the first is row 1"):
        Observations(masked)
    with pytest.raises(ValueError, match="holds nan"):
        as_labels(np.ma.masked_array([0, 1], mask=[0, 1]))


@pytest.mark.parametrize("dtype", [complex, "U3", "M8[D]", [("x", float)], object])
def test_what_is_no_real_number_is_no_score_and_no_feature(dtype):
    given = np.zeros(4, dtype) if dtype is not object else np.array([0, 1, "x", {}], object)
    with pytest.raises(ValueError, match="id_scores holds .*real numbers"):
        metrics.auroc(given, np.arange(4))
    with pytest.raises(ValueError, match="features or logits holds .*real numbers"):
        FeatureSet(given[:, None], np.arange(4), list("abcd"))


# --- the model's own preprocessing

FAMILIES = (
    "deit_tiny_patch16_224.fb_in1k",
    "vit_base_patch16_clip_224.openai",
    "vit_small_patch14_dinov2.lvd142m",
    "vit_base_patch16_siglip_224.webli",  # squash
    "beit_base_patch16_224.in22k_ft_in22k_in1k",
    "eva02_base_patch14_448.mim_in22k_ft_in22k_in1k",  # squash
    "convnext_tiny.fb_in1k",
    "swin_tiny_patch4_window7_224.ms_in1k",
    "resnet50.a1_in1k",
    "efficientnet_b0.ra_in1k",
    "mobilenetv4_conv_small.e2400_r224_in1k",
    "vit_base_patch16_224.orig_in21k",
    "an example with a border",
)
SHAPES = {"portrait": (61, 97), "landscape": (150, 71), "square": (64, 64), "own": (32, 32), "tiny": (3, 2)}
SHAPES |= {"thin": (900, 9)}


class _Pixels(torch.nn.Module):
    """A network whose feature is what it is shown."""

    def __init__(self, config):
        super().__init__()
        self.pretrained_cfg = config

    def forward_features(self, x):
        return x

    def forward_head(self, x, pre_logits=False):
        return x.flatten(1)


@pytest.mark.parametrize("family", FAMILIES)
def test_preparation_is_timms_own(family):
    import timm
    from timm.data import create_transform, resolve_model_data_config

    border = "border" in family
    config = {"crop_mode": "border", "crop_pct": 0.9, "mean": (0.1, 0.5, 0.9)} if border else {}
    config = config or timm.get_pretrained_cfg(family).to_dict()
    net = _Pixels(config)
    backbone = Backbone(net, BackboneSpec(model=family, pooling="avg", image_size=32))
    theirs = create_transform(**resolve_model_data_config(net) | {"input_size": (3, 32, 32)})
    for width, height in list(SHAPES.values())[: -1 if border else None]:  # a thin one would be less than a pixel
        pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        ours = backbone.forward(torch.from_numpy(backbone.prepare(image)[None].copy()))[0]
        if height == 9 and backbone.crop_mode == "center":  # its ends are cut off before it is enlarged
            theirs_of = image.crop((450 - 144, 0, 450 + 144, 9))
        else:
            theirs_of = image
        torch.testing.assert_close(ours, theirs(theirs_of).reshape(1, -1), atol=1e-5, rtol=0)
    assert ("crop_mode" in backbone.describe()) == (backbone.crop_mode != "center")


def test_a_line_of_pixels_is_no_memory_bomb(tmp_path):
    import tracemalloc

    backbone = Backbone(_Pixels({"crop_pct": 1.0}), BackboneSpec(model="pixels", pooling="avg", image_size=32))
    tracemalloc.start()
    assert backbone.prepare(Image.new("RGB", (2_000_000, 1))).shape == (32, 32, 3)
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()
    border = Backbone(_Pixels({"crop_mode": "border"}), BackboneSpec(model="pixels", pooling="avg", image_size=32))
    Image.new("RGB", (4000, 1)).save(tmp_path / "line.png")
    drawn("ant", 1).save(tmp_path / "a.png")
    found = capsae.features.extract.extract(tmp_path, border, tmp_path / "out", max_bad=0.5, progress=False)
    assert len(found) + len(found.meta["bad_images"]) == 2 and "a.png" in found.ids


@pytest.mark.parametrize("model", ["deit_tiny_distilled_patch16_224", "pit_ti_distilled_224"])
def test_the_feature_of_a_distilled_model_is_its_first_token(model):
    import timm

    torch.manual_seed(0)
    net = timm.create_model(model).eval()
    backbone = Backbone(net, BackboneSpec(model=model))
    image = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8)
    with torch.inference_mode():
        cls, logits = backbone.forward(image)
        x = (image.permute(0, 3, 1, 2) / 255 - _column(backbone.mean)) / _column(backbone.std)
        tokens = net.forward_features(x)
        torch.testing.assert_close(cls, tokens[:, 0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(logits, net.forward_head(tokens), atol=1e-4, rtol=1e-4)


def _column(values):
    return torch.tensor(values).view(3, 1, 1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_images_stand_as_a_viewer_shows_them(kind, orientation, tmp_path):
    upright = Image.new("RGB", (24, 16), "black")
    upright.paste((250, 250, 250), (0, 0, 12, 8))  # the upper left quarter is white
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # how a camera that was held so stores it
    stored = upright.transpose(Image.Transpose(back[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"x.{kind.lower()}", kind, exif=exif)
    image = np.asarray(open_source(tmp_path).image(0))
    assert image.shape == (16, 24, 3) and image[3, 3].min() > 200 and image[12, 20].max() < 60
    if kind not in ("TIFF", "AVIF"):  # which Pillow turns by itself
        as_stored = open_source({"kind": "folder", "path": str(tmp_path), "exif": False})
        assert as_stored.image(0).size == stored.size
        assert as_stored.digest() != open_source(tmp_path).digest()


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int16, np.float32])
@pytest.mark.parametrize("largest", [200, 60_000, 2**31 - 1])
def test_a_tiff_of_unknown_scale_is_bad_and_not_black(dtype, largest, tmp_path):
    if dtype == np.int16 and largest > 2**15:
        return
    tifffile = _tiff(np.linspace(0, largest, 64).reshape(8, 8).astype(dtype))
    (tmp_path / "x.tif").write_bytes(tifffile)
    with pytest.raises(BadImage, match="scale is unknown|not an image"):
        open_source(tmp_path).image(0)


def _tiff(values: np.ndarray) -> bytes:
    """The least that a grey TIFF needs."""
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    tags = [(256, 8), (257, 8), (258, values.itemsize * 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 8)]
    tags += [(279, values.nbytes), (339, kind)]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = b"II*\0" + struct.pack("<I", 8 + values.nbytes)
    return head + values.tobytes() + struct.pack("<H", len(tags)) + directory + b"\0" * 4


def test_sixteen_bits_are_still_taken(tmp_path):
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    Image.fromarray(ramp).save(tmp_path / "b.tif")
    (tmp_path / "c.pgm").write_bytes(b"P5 8 8 65535\n" + ramp.astype(">u2").tobytes())
    source = open_source(tmp_path)
    for i in range(3):
        assert np.array_equal(np.asarray(source.image(i))[..., 0], ramp >> 8), source.ids[i]


# --- scales


def gaussian(n, seed, shift=0.0, d=12):
    rng = np.random.default_rng([seed, 1])
    labels = np.arange(n) % 3
    mix = np.random.default_rng(5).normal(size=(d, d))
    return (np.random.default_rng(7).normal(size=(3, d))[labels] * 3 + rng.normal(size=(n, d)) + shift) @ mix, labels


UNITS = {"1e6": 10.0 ** np.array([6, *[0] * 11]), "1e-6": 10.0 ** np.array([-6, *[0] * 11])}
UNITS["all kinds"] = 10.0 ** np.linspace(-7, 7, 12)


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("name", ["mds", "rmds", "neco"])
def test_a_columns_unit_does_not_matter(name, units):
    (train, labels), (test, _), (ood, _) = gaussian(300, 0), gaussian(60, 1), gaussian(60, 2, shift=2.0)
    found = []
    for scale in (1.0, UNITS[units]):
        logits = train[:, :3]
        given = {"logits": logits, "labels": labels}
        detector = detectors.create(name).fit(Observations((train * scale).astype(np.float32), **given))
        others = [Observations((x * scale).astype(np.float32), logits=x[:, :3]) for x in (test, ood)]
        found.append(np.concatenate([detector.score(other) for other in others]))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("units", UNITS)
def test_heads_are_fitted_whatever_the_units(units):
    train, labels = gaussian(300, 0)
    scaled = (train * UNITS[units]).astype(np.float32)
    for fit in (fit_linear_probe, discriminant_head):
        plain, other = fit(train.astype(np.float32), labels, 3), fit(scaled, labels, 3)
        right = [float((head.logits(x).argmax(1) == labels).mean()) for head, x in ((plain, train), (other, scaled))]
        assert right[0] > 0.95 and abs(right[1] - right[0]) < 0.01


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4])
@pytest.mark.parametrize("name", ["blocks", "faiss"])
def test_the_neighbour_is_the_nearest_whatever_the_offset(name, offset):
    if name == "faiss":
        pytest.importorskip("faiss")
    (train, labels), (test, _) = gaussian(300, 0), gaussian(80, 1)
    train, test = (x + offset for x in (train, test))
    found = detectors.create("knn", k=7, backend=name).fit(Observations(train, labels=labels)).score(Observations(test))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test)]
    exact = np.sort(((unit[1][:, None] - unit[0]) ** 2).sum(-1), axis=1)[:, 6]
    np.testing.assert_allclose(found, exact, rtol=1e-4)


def test_a_right_head_is_right_where_one_class_holds_most_rows():
    rng = np.random.default_rng(0)
    labels = np.array([0] * 80 + [1] * 20 + [2] * 20)
    centres = 6 * np.eye(3, 5)
    raw = {"train/features": centres[labels] + rng.normal(size=(120, 5)) / 3, "train/labels": labels}
    raw |= {"test/features": centres[labels] + rng.normal(size=(120, 5)) / 3, "test/labels": labels}
    raw |= {"far/x/features": rng.normal(size=(30, 5)), "head/weight": centres, "head/bias": np.zeros(3)}
    found = evaluate_arrays(arrays_from(raw), ["msp"], n_boot=0, progress=False)
    assert "accuracy on train: 100.0%" in found.notes
    for weight, bias in ((np.roll(centres, 1, axis=0), np.zeros(3)), (np.zeros((3, 5)), np.array([1.0, 0, 0]))):
        with pytest.raises(ValueError, match="Is it the right head"):
            given = raw | {"head/weight": weight, "head/bias": bias}
            evaluate_arrays(arrays_from(given), ["msp"], n_boot=0, progress=False)


# --- extraction on a slow machine


def test_a_killed_shard_goes_on_where_it_was_written(tmp_path, monkeypatch):
    from capsae.features import extract as module

    rng = np.random.default_rng(0)
    (tmp_path / "x").mkdir()
    for row in range(10):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / "x" / f"{row}.png")
    (tmp_path / "x" / "1.png").write_bytes(b"")
    backbone = Backbone(_Pixels({"crop_pct": 1.0}), BackboneSpec(model="pixels", pooling="avg", image_size=8))
    source, seen = open_source(tmp_path / "x"), []
    given = {"batch_size": 2, "workers": 1, "progress": False, "max_bad": 0.5}
    whole = module.extract(source, backbone, tmp_path / "whole", **given)
    monkeypatch.setattr(module, "_SECONDS", 0.0)
    forward = backbone.forward

    def killed(batch, logits=True):
        seen.append(len(batch))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return forward(batch, logits)

    monkeypatch.setattr(backbone, "forward", killed)
    with pytest.raises(KeyboardInterrupt):
        module.extract(source, backbone, tmp_path / "out", **given)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["shard-00000.safetensors"]
    resumed = module.extract(source, backbone, tmp_path / "out", **given)
    assert sum(seen) == 8 + 4, "three batches of two images were not made again"
    assert resumed.digest() == whole.digest() and resumed.meta["bad_images"] == whole.meta["bad_images"]
    assert len(resumed) == 9 and resumed.meta["resumed_shards"] == 0


def test_dtype_and_batch_size_of_an_extraction(experiment, monkeypatch, tmp_path):
    seen = {}
    run = experiment()
    extract = capsae.features.extract.extract
    monkeypatch.setattr(
        capsae.features.extract, "extract", lambda *a, **given: seen.update(given) or extract(*a, **given)
    )
    monkeypatch.setenv("CAPSAE_HOME", str(tmp_path / "home"))
    plain = run.inputs.digest("train")
    command = ["extract", str(tmp_path / "own.toml"), "-q", *_set(run)]
    assert main([*command, "--batch-size", "7", "--dtype", "bfloat16"]) == 0
    assert (seen["batch_size"], seen["dtype"]) == (7, "bfloat16")
    other = Run(run.experiment, {"backbone.dtype": "bfloat16"}, tmp_path / "home", device="cpu")
    assert other.inputs.digest("train") != plain, "features of another precision are others"
    assert main([*command, "--batch-size", "0"]) == 2


def _set(run):
    paths = {"train": run.experiment.train, "test": run.experiment.test}
    paths |= {f"ood.{key}": source for key, source in run.experiment.ood.items()}
    return [text for key, source in paths.items() for text in ("--set", f"{key}.path={source.path}")]


# --- what was found by trying similar inputs


def test_folders_that_link_to_each_other_are_read_once(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.png").write_bytes(png(drawn("ant", ord(name))))
    os.symlink(tmp_path / "a", tmp_path / "b" / "to_a")
    os.symlink(tmp_path / "b", tmp_path / "a" / "to_b")
    os.symlink(tmp_path / "self", tmp_path / "self")
    source = open_source(tmp_path)
    assert source.ids.tolist() == ["a/a.png", "a/to_b/b.png", "b/b.png", "b/to_a/a.png"]
    why = "link to a folder that holds it"
    assert source.left_out[:2] == (("a/to_b/to_a", why), ("b/to_a/to_b", why)) and source.left_out[2][0] == "self"


def _parquet(tmp_path, columns, metadata=None):
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata(metadata) if metadata else table, tmp_path / "x.parquet")
    return {"kind": "parquet", "path": str(tmp_path / "x.parquet")}


ODD_COLUMNS = {
    "numbers, which open as file descriptors": ({"image": [{"bytes": 1}, {"bytes": 2}]}, "holds struct<bytes: int64>"),
    "paths, which open any file": ({"image": [{"bytes": "/etc/hosts"}] * 2}, "holds struct<bytes: string>"),
    "lists of images": ({"image": [[b"x"], [b"y"]]}, "holds list<element: binary>"),
    "lists of labels": ({"label": [[0], [1]]}, r"holds \[0\], expected whole numbers"),
    "text categories": ({"label": pa.array(["a", "b"]).dictionary_encode()}, "holds 'a', expected whole numbers"),
    "times": ({"label": pa.array([1, 2], pa.timestamp("s"))}, "expected whole numbers"),
}


@pytest.mark.parametrize("odd", ODD_COLUMNS)
def test_odd_columns_of_a_parquet_are_refused_by_name(odd, tmp_path):
    columns, message = ODD_COLUMNS[odd]
    with pytest.raises(ValueError, match=f"{next(iter(columns))} column .*{message}"):
        open_source(_parquet(tmp_path, {"image": [b"x", b"y"], "label": [0, 1]} | columns))


@pytest.mark.parametrize("found", [3, None, 1.5, "a\0b"])
def test_what_is_no_path_is_a_bad_image_and_no_file_descriptor(found):
    with pytest.raises(BadImage, match="cannot be read"):
        read_encoded(found, "x")


def test_a_name_that_looks_numbered_is_another_name(tmp_path):
    columns = {"image": [b"x"] * 4, "label": [0, 1, 0, 1], "source": ["a", "a", "a#1", "b"]}
    ids = open_source(_parquet(tmp_path, columns)).ids.tolist()
    assert len(set(ids)) == 4 and ids[0] == "a#0" and ids[3] == "b"


@pytest.mark.parametrize("written", [b"{bad", b"[]"])
def test_a_damaged_description_of_a_parquet_is_named(written, tmp_path):
    with pytest.raises(ValueError, match="metadata 'huggingface' is no description"):
        open_source(_parquet(tmp_path, {"image": [b"x"], "label": [0]}, {b"huggingface": written}))
    assert len(open_source(_parquet(tmp_path, {"image": [b"x"], "label": [0]}, {b"huggingface": b'{"info": null}'})))


@pytest.mark.parametrize(
    "spec, message",
    [
        (3, "a source is 3"),
        ({"kind": ["folder"]}, "kind of source is"),
        ({"kind": "folder", "path": 3}, "path of a folder source is 3, expected text"),
        ({"kind": "builtin", "name": ["x"]}, "name of a builtin source"),
        ({"kind": "builtin", "name": "letters", "seed": -1}, "seed is -1"),
        ({"kind": "builtin", "name": "digits/test", "classes": "01"}, "classes is '01', expected a list"),
    ],
)
def test_odd_settings_of_a_source_are_refused_by_key(spec, message):
    with pytest.raises(ValueError, match=message):
        open_source(spec)
