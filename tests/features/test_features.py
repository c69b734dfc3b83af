"""Extraction: right, resumable after kill -9, flat in memory, honest about bad images; feature files; the probe."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import ranks
import torch
from PIL import Image

from capsae.data.open import open_source
from capsae.data.sources import ImageSource
from capsae.features import extract as features_module
from capsae.features.backbone import Backbone, BackboneSpec, load_backbone
from capsae.features.extract import BadImagesError, extract
from capsae.features.featureset import FeatureSet, LinearHead, write_tensors
from capsae.features.probe import fit_linear_probe


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A ViT of 32 x 32 pixels with random weights, as a file."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", img_size=32)
    torch.nn.init.normal_(net.head.weight)
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(net.state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def backbone(checkpoint):
    return load_backbone({"model": "vit_tiny_patch16_224", "image_size": 32, "checkpoint": checkpoint})


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (200, 36, 40, 3), dtype=np.uint8)


def in_memory(pixels, read=None) -> ImageSource:
    n = len(pixels)
    ids = np.array([f"{i:04d}.png" for i in range(n)])
    return ImageSource(
        "memory", np.arange(n) % 5, ids, (), read or (lambda row: Image.fromarray(pixels[row])), np.arange(n), "seed 0"
    )


def write_folder(folder, pixels, bad=()):
    for i, each in enumerate(pixels):
        path = folder / "ab"[i % 2] / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(each).save(path)
        if i in bad:
            path.write_bytes(path.read_bytes()[:60])
    return {"kind": "folder", "path": str(folder)}


# --- the numbers ----------------------------------------------------------------------------------


def test_features_are_what_timm_computes(backbone, pixels, tmp_path):
    from timm.data import create_transform, resolve_model_data_config

    config = resolve_model_data_config(backbone.net) | {"input_size": (3, 32, 32)}
    transform = create_transform(**config, is_training=False)
    source = in_memory(pixels[:20, :35, :39])  # cropped, not resized: see test_preparation_is_torchvisions
    found = extract(source, backbone, tmp_path, batch_size=8, shard_size=12, progress=False)
    with torch.inference_mode():
        x = torch.stack([transform(source.image(i)) for i in range(20)])
        tokens = backbone.net.forward_features(x)
        np.testing.assert_allclose(found.cls, tokens[:, 0].numpy(), atol=2e-5)
        np.testing.assert_allclose(found.logits, backbone.net(x).numpy(), atol=2e-4)
        # what the head reads is what we keep
        np.testing.assert_allclose(backbone.net.head(torch.from_numpy(found.cls)).numpy(), found.logits, atol=1e-3)
    assert found.labels.tolist() == source.labels.tolist()
    assert found.ids.tolist() == source.ids.tolist()
    assert found.meta["dtype"] == "float32" and found.meta["bad_images"] == []
    np.testing.assert_array_equal(found.pixels, [source.measured(i)[1] for i in range(20)])
    assert found.meta["backbone_digest"] == backbone.digest


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (224, 224), (100, 90), (1000, 231), (257, 256)])
@pytest.mark.parametrize("name", ["bicubic", "bilinear"])
def test_preparation_is_torchvisions(size, name):
    from torchvision.transforms import v2

    spec = BackboneSpec(model="resnet10t.c3_in1k", pooling="avg", crop=0.875, interpolation=name)
    backbone = Backbone.__new__(Backbone)
    backbone.spec, backbone.size, backbone.crop, backbone.interpolation = spec, 224, 0.875, name
    backbone.crop_mode, backbone.mean = "center", (0.5, 0.5, 0.5)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    theirs = v2.Compose([v2.Resize(256, interpolation=v2.InterpolationMode(name)), v2.CenterCrop(224)])(image)
    difference = np.abs(backbone.prepare(image).astype(int) - np.asarray(theirs))
    assert difference.max() <= 1 and (difference > 0).mean() < 5e-3


def test_pooled_backbones(pixels):
    from timm.models.swin_transformer import SwinTransformer

    torch.manual_seed(0)
    net = SwinTransformer(
        img_size=32, patch_size=2, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(2, 2), num_classes=3
    )
    swin = Backbone(net, BackboneSpec(model="a swin", pooling="avg", image_size=32))
    batch = torch.from_numpy(pixels[:2, :32, :32].copy())
    with torch.inference_mode():
        cls, logits = swin.forward(batch)
        torch.testing.assert_close(net.head.fc(cls), logits)
    assert cls.shape == (2, 32)
    with pytest.raises(ValueError, match="'a swin' has no CLS token.*use 'avg'"):
        Backbone(net, BackboneSpec(model="a swin", image_size=32))


def test_token_and_mean_of_a_vit(checkpoint, pixels):
    settings = {"model": "vit_tiny_patch16_224", "image_size": 32, "checkpoint": checkpoint}
    batch = torch.from_numpy(pixels[:2, :32, :32].copy())
    with torch.inference_mode():
        cls, token, mean = (
            load_backbone(settings | {"pooling": pooling}).forward(batch)[0] for pooling in ("cls", "token", "avg")
        )
        torch.testing.assert_close(cls, token)
        assert (cls - mean).abs().max() > 0.1
    pooled = load_backbone({"model": "vit_tiny_patch16_224", "image_size": 32, "checkpoint": checkpoint})
    pooled.net.global_pool = "avg"
    with pytest.raises(ValueError, match="reads the 'avg' pool, not the CLS token"), torch.inference_mode():
        pooled.forward(batch)


def test_bfloat16_is_close_and_changes_the_key(backbone, pixels, tmp_path):
    source = in_memory(pixels[:8])
    exact = extract(source, backbone, tmp_path, progress=False)
    rough = extract(source, backbone, tmp_path, dtype="bfloat16", progress=False)
    assert 0 < np.abs(exact.cls - rough.cls).max() < 0.2
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        extract(source, backbone, tmp_path, dtype="int8")


# --- shards ---------------------------------------------------------------------------------------

KILLED = """
    import sys, time
    import numpy as np
    from PIL import Image
    from capsae.data.open import open_source
    from capsae.features.extract import extract

    folder, checkpoint, out = sys.argv[1:]
    source = open_source({"kind": "folder", "path": folder})
    read = source.read
    object.__setattr__(source, "read", lambda row: time.sleep(600) if row >= 40 else read(row))
    extract(source, {"model": "vit_tiny_patch16_224", "image_size": 32, "checkpoint": checkpoint}, out, batch_size=8,
    shard_size=16, workers=1)
"""


def test_killed_run_goes_on_where_it_stopped(checkpoint, pixels, tmp_path):
    spec = write_folder(tmp_path / "images", pixels[:64])
    out = tmp_path / "out"
    command = [sys.executable, "-c", textwrap.dedent(KILLED), spec["path"], checkpoint, str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        while not (out / "shard-00000.safetensors").exists():
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline, "no shard after a minute"
            time.sleep(0.01)
    finally:
        process.kill()  # SIGKILL
        process.wait()
        process.stderr.close()
    (out / "shard-00003.safetensors.1.tmp").write_bytes(b"half a shard")
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.glob("shard-*.safetensors")}
    assert 1 <= len(before) < 4

    settings = {"model": "vit_tiny_patch16_224", "image_size": 32, "checkpoint": checkpoint}
    resumed = extract(spec, settings, out, batch_size=8, shard_size=16, progress=False)
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in before} == before
    assert not list(out.glob("*.tmp"))
    assert resumed.meta["resumed_shards"] == len(before)
    whole = extract(spec, settings, tmp_path / "whole", batch_size=8, shard_size=16, progress=False)
    assert len(whole) == 64
    assert resumed.digest() == whole.digest()


RANKS = """
    import json, sys, time
    import torch
    from capsae import distributed
    from capsae.data.open import open_source
    from capsae.features.extract import extract

    folder, checkpoint, out, last = sys.argv[1:]
    torch.set_num_threads(1)
    distributed.start()
    source = open_source({"kind": "folder", "path": folder})
    read = source.read
    object.__setattr__(source, "read", lambda row: time.sleep(600) if row >= int(last) else read(row))
    backbone = {"model": "vit_tiny_patch16_224", "image_size": 32, "checkpoint": checkpoint}
    found = extract(source, backbone, out, batch_size=8, shard_size=16, workers=1, progress=False, max_bad=0.05)
    print(json.dumps([found.digest(), found.meta["resumed_shards"], found.meta["bad_images"], found.meta["ranks"]]))
"""


@pytest.mark.slow
def test_two_ranks_share_the_shards_and_a_killed_run_goes_on(checkpoint, pixels, tmp_path):
    spec = write_folder(tmp_path / "images", pixels[:90], bad={3, 70})
    code, out = textwrap.dedent(RANKS), tmp_path / "out"
    settings = {"model": "vit_tiny_patch16_224", "image_size": 32, "checkpoint": checkpoint}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks have: another number may round another way
    try:
        one = extract(spec, settings, tmp_path / "one", batch_size=8, shard_size=16, max_bad=0.05, progress=False)
    finally:
        torch.set_num_threads(threads)
    assert (one.meta["resumed_shards"], len(one.meta["bad_images"]), one.meta["ranks"]) == (0, 2, 1)

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", code, spec["path"], checkpoint, str(out), "32"]  # shards 2 to 5 wait for ever
    started = [
        subprocess.Popen(command, env=os.environ | ranks.environment(rank, 2, port), stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    try:
        deadline = time.monotonic() + 120
        while len(list(out.glob("shard-*.safetensors"))) < 2:  # shard 0 of rank 0, shard 1 of rank 1, of six
            assert all(process.poll() is None for process in started), "a rank ended"
            assert time.monotonic() < deadline, "no two shards after two minutes"
            time.sleep(0.01)
    finally:
        for process in started:
            process.kill()  # SIGKILL
            process.wait()
            process.stderr.close()
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.glob("shard-*.safetensors")}
    assert sorted(path.name[6:11] for path in before) == ["00000", "00001"]

    outputs = [json.loads(line) for line in ranks.run(code, spec["path"], checkpoint, out, 90)]
    assert outputs == [[one.digest(), 2, one.meta["bad_images"], 2]] * 2, "each rank has what one process makes"
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in before} == before
    assert len(list(out.glob("shard-*"))) == 6


@pytest.mark.slow
def test_capsae_extract_under_torchrun(checkpoint, pixels, tmp_path):
    parts = {"train": pixels[:80], "test": pixels[80:120], "noise": pixels[120:160]}
    tables = []
    for name, each in parts.items():
        write_folder(tmp_path / "images" / name, each)
        table = 'ood."far/noise"' if name == "noise" else name
        tables.append(f'[{table}]\nkind = "folder"\npath = "{tmp_path}/images/{name}"\n')
    backbone = f'[backbone]\nmodel = "vit_tiny_patch16_224"\nimage_size = 32\ncheckpoint = "{checkpoint}"\n'
    text = 'title = "Two classes"\nn_classes = 2\n' + backbone + "".join(tables) + "[sae]\nlatents = 8\nk = 2\n"
    (tmp_path / "own.toml").write_text(text)
    code = """if True:
        import sys
        import torch
        import capsae.features.extract
        from capsae.__main__ import main
        torch.set_num_threads(1)
        capsae.features.extract.extract.__kwdefaults__["shard_size"] = 16
        sys.exit(main(["extract", sys.argv[1], "--quiet"]))
    """
    text, digests = {}, {}
    for count in (1, 2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CAPSAE_HOME", str(tmp_path / f"home{count}"))
            text[count] = ranks.run(code, tmp_path / "own.toml", ranks=count, timeout=140)
        files = sorted((tmp_path / f"home{count}" / "features").glob("*/features.safetensors"))
        found = {file.parent.name: FeatureSet.load(file) for file in files}
        assert all(each.meta["ranks"] == count for each in found.values())
        digests[count] = {name: each.digest() for name, each in found.items()}
        assert not any((tmp_path / f"home{count}" / "scratch").iterdir())
    assert "train: 72 x 192\n" in text[1][0] and "far/noise: 40 x 192\n" in text[1][0]
    assert text[2] == [text[1][0].replace("home1", "home2"), ""], "the first rank alone speaks"
    assert len(digests[1]) == 3 and digests[1] == digests[2]


def test_ranks_without_a_shared_folder_are_told_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"shard-00003.*a folder that all ranks share would do"):
        features_module._needed(tmp_path, 3, "key")


def test_other_source_backbone_or_setting_is_not_resumed(backbone, checkpoint, pixels, tmp_path):
    def stamps():
        return [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("shard-*"))]

    extract(in_memory(pixels[:20]), backbone, tmp_path, shard_size=8, progress=False)
    first = stamps()
    assert len(first) == 3
    same = extract(in_memory(pixels[:20]), backbone, tmp_path, shard_size=8, progress=False)
    assert stamps() == first and same.meta["resumed_shards"] == 3
    other = load_backbone({"model": "vit_tiny_patch16_224", "image_size": 32, "checkpoint": checkpoint, "crop": 1.0})
    changed = extract(in_memory(pixels[:20]), other, tmp_path, shard_size=8, progress=False)
    assert changed.meta["resumed_shards"] == 0 and not set(stamps()) & set(first)
    shorter = extract(in_memory(pixels[:9]), other, tmp_path, shard_size=8, progress=False)
    assert shorter.meta["resumed_shards"] == 0 and len(stamps()) == 2, "shards of a longer source must not stay behind"
    (tmp_path / "shard-00001.safetensors").write_bytes(b"rubbish")
    assert extract(in_memory(pixels[:9]), other, tmp_path, shard_size=8, progress=False).digest() == shorter.digest()


def test_memory_is_flat_images_are_read_only_a_little_ahead(backbone, pixels, tmp_path, monkeypatch):
    started, forwarded, ahead = [], [0], []

    def read(row):
        started.append(row)
        return Image.fromarray(pixels[row])

    forward = backbone.forward

    def counting(batch, logits=True):
        time.sleep(0.02)  # a slow network: decoding must wait for it
        ahead.append(len(started) - forwarded[0])
        forwarded[0] += len(batch)
        return forward(batch, logits)

    monkeypatch.setattr(backbone, "forward", counting)
    extract(in_memory(pixels, read), backbone, tmp_path, batch_size=8, shard_size=64, progress=False)
    assert sorted(started) == list(range(200)), "each image is read once"
    assert max(ahead) <= 8 * (features_module._AHEAD + 1)


def test_bar_shows_the_rate(backbone, pixels, tmp_path, capfd):
    extract(in_memory(pixels[:8]), backbone, tmp_path)
    assert "images/s" in capfd.readouterr().err


# --- bad images -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parquet", "folder", "imglist"])
def test_bad_images_are_skipped_named_counted(kind, backbone, pixels, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    def specs(bad):
        root = tmp_path / f"images{len(bad)}"
        spec = write_folder(root, pixels, bad)
        names = open_source(spec).ids
        if kind == "imglist":
            (tmp_path / "list.txt").write_text("".join(f"{name} {'ab'.index(name[0])}\n" for name in names))
            return {"kind": kind, "list": str(tmp_path / "list.txt"), "root": str(root)}
        if kind == "parquet":
            blobs = [{"bytes": (root / name).read_bytes(), "path": None} for name in names]
            table = {"image": blobs, "label": [int(name[0] == "b") for name in names], "source": names.tolist()}
            pq.write_table(pa.table(table), tmp_path / "x.parquet", row_group_size=30)
            return {"kind": kind, "path": str(tmp_path / "x.parquet")}
        return spec

    found = extract(specs({3, 110}), backbone, tmp_path / "out", batch_size=16, shard_size=48, progress=False)
    assert len(found) == 198
    assert [each["id"] for each in found.meta["bad_images"]] == ["a/0110.png", "b/0003.png"]
    assert "truncated" in found.meta["bad_images"][0]["why"]
    assert "b/0003.png" not in found.ids
    whole = extract(specs(set()), backbone, tmp_path / "whole", batch_size=16, shard_size=48, progress=False)
    np.testing.assert_allclose(found.cls, whole.take(np.isin(whole.ids, found.ids)).cls, atol=1e-5)
    np.testing.assert_array_equal(found.labels, whole.take(np.isin(whole.ids, found.ids)).labels)

    too_many = specs({3, 110, 5})
    with pytest.raises(
        BadImagesError, match=r"at least 3 of 200 images are bad, more than the 1.00%.*a/0110.png"
    ) as caught:
        extract(too_many, backbone, tmp_path / "out", batch_size=16, shard_size=48, progress=False)
    assert len(caught.value.bad) == 3
    with pytest.raises(BadImagesError):  # finished shards remember their bad images
        extract(too_many, backbone, tmp_path / "out", batch_size=16, shard_size=48, progress=False)
    assert (
        len(extract(too_many, backbone, tmp_path / "out", batch_size=16, shard_size=48, max_bad=0.02, progress=False))
        == 197
    )


def test_every_image_bad_or_none_at_all(backbone, tmp_path):
    source = in_memory(np.zeros((3, 8, 8, 3), np.uint8), read=lambda row: b"")
    with pytest.raises(BadImagesError, match="empty file"):
        extract(source, backbone, tmp_path, progress=False)
    with pytest.raises(ValueError, match="holds no images"):
        extract(source.take([]), backbone, tmp_path, progress=False)


def test_error_in_a_decoding_thread_is_not_swallowed(backbone, pixels, tmp_path):
    def read(row):
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        extract(in_memory(pixels, read), backbone, tmp_path, progress=False)


# --- backbones that cannot be ---------------------------------------------------------------------


def test_backbone_errors(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="vit_huge_of_dreams"):
        load_backbone("vit_huge_of_dreams")
    with pytest.raises(FileNotFoundError, match="no checkpoint file 'nowhere.safetensors'"):
        load_backbone({"model": "vit_tiny_patch16_224", "checkpoint": "nowhere.safetensors"})
    with pytest.raises(ValueError, match="unknown backbone key 'modl'"):
        load_backbone({"modl": "vit_tiny_patch16_224"})
    with pytest.raises(ValueError, match="pooling is 'max': Input should be 'cls', 'token' or 'avg'"):
        load_backbone({"model": "vit_tiny_patch16_224", "pooling": "max"})
    with pytest.raises(ValueError, match="vit_small_patch16_224.*size mismatch|vit_small_patch16_224"):
        load_backbone({"model": "vit_small_patch16_224", "checkpoint": checkpoint, "image_size": 32})


def test_settings_are_those_of_an_experiment(checkpoint):
    from pathlib import Path

    given = {"model": "vit_tiny_patch16_224", "image_size": 32, "checkpoint": Path(checkpoint), "mean": [0.1, 0.2, 0.3]}
    spec = BackboneSpec(**given | {"checkpoint": checkpoint, "mean": (0.1, 0.2, 0.3), "dtype": "float32"})
    one, other = load_backbone(given | {"std": None}), load_backbone(spec)
    assert one.digest == other.digest and one.mean == (0.1, 0.2, 0.3), "the precision of products is no part of it"


# --- files ----------------------------------------------------------------------------------------


def a_set(n=6, logits=True):
    rng = np.random.default_rng(1)
    return FeatureSet(
        cls=rng.normal(size=(n, 4)),
        labels=np.arange(n) - 1,
        ids=np.array([f"n0{i}_ü {'x' * i}\n.png" for i in range(n)]),
        logits=rng.normal(size=(n, 3)) if logits else None,
        name="near/some",
        class_names=("a", "b"),
        meta={"bad_images": [], "seconds": 1.5},
    )


@pytest.mark.parametrize("logits", [True, False])
def test_feature_set_round_trip(tmp_path, logits):
    before = a_set(logits=logits)
    after = FeatureSet.load(before.save(tmp_path / "x.safetensors"))
    assert after.digest() == before.digest()
    assert (after.name, after.class_names, after.meta) == (before.name, before.class_names, before.meta)
    np.testing.assert_array_equal(after.cls, before.cls)
    np.testing.assert_array_equal(after.ids, before.ids)
    half = FeatureSet.load(before.save(tmp_path / "h.safetensors", dtype="float16"))
    np.testing.assert_array_equal(half.cls, before.cls.astype(np.float16).astype(np.float32))
    assert half.cls.dtype == np.float32 and half.digest() != before.digest()
    quarter = FeatureSet.load(before.save(tmp_path / "q.safetensors", dtype="int8"))
    assert (np.abs(quarter.cls - before.cls) <= np.abs(before.cls).max(axis=0) / 254 * 1.001).all()
    before.cls[0, 0] = 70_000
    with pytest.raises(ValueError, match="values reach 7e.04, float16 ends at 65504"):
        before.save(tmp_path / "x", dtype="float16")
    with pytest.raises(ValueError, match="dtype is 'int4'"):
        before.save(tmp_path / "x", dtype="int4")


def test_take_and_digest():
    features = a_set()
    mask = features.labels >= 2
    assert features.take(mask).digest() == features.take(np.flatnonzero(mask)).digest()
    assert features.take([2, 0]).ids.tolist() == [features.ids[2], features.ids[0]]
    assert len(features.take([])) == 0
    with pytest.raises(ValueError, match="mask has shape"):
        features.take(np.array([True, False]))
    changed = a_set()
    changed.cls[3, 1] += 1e-3
    assert changed.digest() != features.digest()
    with pytest.raises(ValueError, match="labels has 2 rows, cls 3"):
        FeatureSet(np.zeros((3, 2)), [0, 1], ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"cls has shape \(3,\)"):
        FeatureSet(np.zeros(3), [0, 1, 2], ["a", "b", "c"])


def test_foreign_files_are_refused(tmp_path):
    (tmp_path / "p.safetensors").write_bytes(pickle.dumps({"cls": 1}))
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        FeatureSet.load(tmp_path / "p.safetensors")
    write_tensors(tmp_path / "w.safetensors", {"weight": np.zeros(3)}, {})
    with pytest.raises(ValueError, match="holds no FeatureSet"):
        FeatureSet.load(tmp_path / "w.safetensors")
    with pytest.raises(FileNotFoundError):
        FeatureSet.load(tmp_path / "none.safetensors")


def test_equal_content_is_equal_bytes(tmp_path):
    assert a_set().save(tmp_path / "a").read_bytes() == a_set().save(tmp_path / "b").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a", "b"], "no temporary file stays"


# --- the probe ------------------------------------------------------------------------------------


def blobs(n_classes, n=60, d=5, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(n_classes), n)
    x = rng.normal(size=(len(labels), d)) + 4 * rng.normal(size=(n_classes, d))[labels]
    return (x * np.array([1, 100, 0.01, 1, 1]) + 7).astype(np.float32), labels


@pytest.mark.parametrize("n_classes", [2, 6])
def test_probe_is_the_regression_on_standardised_features(n_classes):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, labels = blobs(n_classes)
    head = fit_linear_probe(x, labels, n_classes, strengths=(0.1,))
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300)).fit(x, labels)
    logits = head.logits(x).astype(np.float64)
    proba = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(proba / proba.sum(axis=1, keepdims=True), theirs.predict_proba(x), atol=2e-3)
    assert (head.weight.shape, head.bias.shape, head.weight.dtype) == ((n_classes, 5), (n_classes,), np.float32)
    again = fit_linear_probe(x, labels, n_classes, strengths=(0.1,))
    np.testing.assert_array_equal(again.weight, head.weight)


def test_probe_chooses_its_strength_and_is_kept(tmp_path):
    x, labels = blobs(6)
    x = np.concatenate([x, np.ones((len(x), 1), np.float32)], axis=1)  # a constant feature
    head = fit_linear_probe(x, labels, 6)
    assert np.isfinite(head.weight).all()
    assert (head.logits(x).argmax(axis=1) == labels).mean() > 0.95
    back = LinearHead.load(head.save(tmp_path / "head.safetensors"))
    np.testing.assert_array_equal(back.logits(x), head.logits(x))
    with pytest.raises(ValueError, match=r"this head expects \(N, 6\)"):
        head.logits(x[:, :5])


def test_probe_refuses_what_it_cannot_fit():
    x, labels = blobs(3)
    with pytest.raises(ValueError, match=r"classes without rows: \[3\]"):
        fit_linear_probe(x, labels, 4)
    with pytest.raises(ValueError, match=r"expected \[0, 1\]"):
        fit_linear_probe(x, labels, 2)
    with pytest.raises(ValueError, match=r"labels lie in \[-1, 2\]"):
        fit_linear_probe(x, np.where(labels == 0, -1, labels), 3)
    with pytest.raises(ValueError, match=r"expected \(N, d\) and \(N,\)"):
        fit_linear_probe(x, labels[:-1], 3)


def test_import_stays_light():
    heavy = ("timm", "torchvision", "datasets", "matplotlib")
    code = f"import sys, capsae.features.extract; print([name for name in {heavy} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
