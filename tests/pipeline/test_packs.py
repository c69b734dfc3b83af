"""The embedded packs: whole, small, and what our own extractor makes of the images."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from capsae import Observations, detectors, metrics
from capsae.data.images import PIXEL_STATISTICS
from capsae.data.open import open_source
from capsae.features.backbone import load_backbone
from capsae.features.extract import extract
from capsae.features.featureset import FeatureSet
from capsae.features.probe import fit_linear_probe
from capsae.pipeline import packs
from capsae.pipeline.experiments import load_experiment
from capsae.pipeline.packs import add_pixels, load_pack, make_pack, pack_sets

SHARED = Path(os.environ.get("CAPSAE_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data"
WEIGHTS = SHARED / "deit_tiny_patch16_224.fb_in1k.fp16.safetensors"
AUGREG = SHARED / "vit_tiny_patch16_224.augreg_in21k_ft_in1k.fp16.safetensors"
needs_images = pytest.mark.skipif(
    not WEIGHTS.is_file(),
    reason=f"no images and weights under {SHARED}: set CAPSAE_SHARED to the folder that holds data/",
)

SIZES = {
    "imagenet20": {
        "train": 9000,
        "test": 1000,
        "near/imagenet980": 1278,
        "near/caltech_objects": 950,
        "near/nips980": 600,
        "near/pacs_photo": 327,
        "far/textures": 600,
        "far/flowers": 450,
        "far/scenes": 450,
        "far/emoji": 300,
        "far/blood_cells": 250,
        "far/brain_mri": 253,
        "far/cue_conflict": 400,
        "far/pacs_art_painting": 326,
        "far/pacs_sketch": 388,
    },
    "mini80": {"train": 12000, "test": 2400, "near/mini20": 2000},
}
FILES = {"imagenet20/test": "imagenet20/validation", "mini80/test": "mini80/test", "mini80/train": "mini80/train"}
FILES |= {f"imagenet20/{name}": f"{name.replace('/', '_')}/test" for name in SIZES["imagenet20"] if "/" in name}
FILES |= {"imagenet20/train": "imagenet20/train", "mini80/near/mini20": "near_mini20/test"}
for same in list(SIZES):  # the same images, seen by another backbone
    SIZES[f"{same}-augreg"] = SIZES[same]
    FILES |= {f"{same}-augreg/{name}": FILES[f"{same}/{name}"] for name in SIZES[same]}


def test_packs_are_all_there():
    assert packs.packs() == sorted([*SIZES, "digits", "imagenet20_shift"])  # those: test_tinyvit.py, test_shift.py
    assert sum(path.stat().st_size for path in packs.PACKS.rglob("*") if path.is_file()) <= 25e6


@pytest.mark.parametrize("name", SIZES)
def test_pack_is_whole_and_small(name):
    folder = packs.PACKS / name
    info = packs.pack_info(name)
    assert {key: each["n"] for key, each in info["sets"].items()} == SIZES[name]
    assert pack_sets(name) == list(SIZES[name])
    assert sum(path.stat().st_size for path in folder.iterdir()) <= packs.MAX_BYTES
    assert {path.name for path in folder.iterdir()} == {"pack.json", *(each["file"] for each in info["sets"].values())}
    for each in info["sets"].values():
        assert hashlib.sha256((folder / each["file"]).read_bytes()).hexdigest() == each["sha256"]
    assert "non-commercial" in info["licence"] and "No image is included" in info["licence"]
    assert info["backbone"]["weights_sha256"] and all(each["source"] for each in info["sets"].values())
    assert "/work" not in json.dumps(info) and "/home" not in json.dumps(info)


@pytest.mark.parametrize("name", SIZES)
def test_sets_of_a_pack(name):
    for set_name, n in SIZES[name].items():
        features = load_pack(name, set_name)
        assert (features.cls.shape, features.cls.dtype) == ((n, 192), np.float32)
        assert features.name == set_name and features.logits is None
        assert features.pixels.shape == (n, len(PIXEL_STATISTICS)) and np.isfinite(features.pixels).all()
        assert np.isfinite(features.cls).all() and features.cls.std() > 0.5
        assert len(set(features.ids)) == n, "ids name the images one by one"
        assert features.labels.min() >= 0 and features.labels.max() < len(features.class_names)
    train, test = load_pack(name, "train"), load_pack(name, "test")
    assert train.class_names == test.class_names
    assert len(set(np.bincount(train.labels))) == 1 and len(set(np.bincount(test.labels))) == 1
    assert not set(train.ids) & set(test.ids)


def test_probe_on_imagenet20_is_as_good_as_measured_elsewhere():
    train, test = load_pack("imagenet20", "train"), load_pack("imagenet20", "test")
    head = fit_linear_probe(train.cls, train.labels, 20, strengths=(0.01,))
    assert (head.logits(test.cls).argmax(axis=1) == test.labels).mean() >= 0.89


@pytest.mark.parametrize(
    ("pack", "name", "control"),
    [
        ("imagenet20", "far/blood_cells", "sharpness"),
        ("imagenet20", "far/emoji", "pixel_statistics"),
        ("imagenet20", "far/textures", "pixel_statistics"),
        ("imagenet20", "near/imagenet980", "pixel_statistics"),
        ("mini80", "near/mini20", "pixel_statistics"),
    ],
)
def test_what_the_limits_say_of_pixel_statistics(pack, name, control):
    sets = [load_pack(pack, which) for which in ("train", "test", name)]
    train, test, ood = (Observations(one.cls, pixels=one.pixels) for one in sets)
    detector = detectors.create(control).fit(train)
    text = (Path(__file__).resolve().parents[2] / "book" / "limits.md").read_text()
    assert f"{metrics.auroc(detector.score(test), detector.score(ood)):.3f}" in text


def test_unknown_pack_or_set():
    with pytest.raises(ValueError, match="no pack 'imagenet21'; embedded are digits, imagenet20"):
        load_pack("imagenet21", "train")
    with pytest.raises(
        ValueError, match="pack 'imagenet20' has no set 'val'; its sets are train, test, near/imagenet980"
    ):
        load_pack("imagenet20", "val")


@needs_images
@pytest.mark.parametrize("name", SIZES)
def test_pack_is_what_our_extractor_makes(name, tmp_path):
    info, experiment = packs.pack_info(name), load_experiment(name)
    weights = AUGREG if name.endswith("augreg") else WEIGHTS
    backbone = load_backbone({"model": info["backbone"]["model"], "checkpoint": str(weights), "crop": 1.0})
    assert backbone.digest == info["backbone_digest"]
    largest = np.abs(load_pack(name, "train").cls).max(axis=0)
    step = largest / 127 if info["dtype"]["stored"] == "int8" else 0
    some = ("train", "test", "near/imagenet980", "near/pacs_photo", "far/emoji", "near/mini20")
    for i, set_name in enumerate(set_name for set_name in some if set_name in SIZES[name]):
        spec = experiment.source(set_name).model_dump(exclude_none=True)
        source = open_source(spec | {"path": str(SHARED / spec["path"])})
        packed = load_pack(name, set_name)
        assert packed.ids.tolist() == source.ids.tolist()
        assert packed.labels.tolist() == source.labels.tolist()
        assert packed.class_names == source.class_names
        rows = np.linspace(0, len(source) - 1, 8).round().astype(int)
        fresh = extract(source.take(rows), backbone, tmp_path / str(i), dtype="float32", progress=False)
        # float16 rounds to 2**-11 of a value; another processor or version of torch moves the last bits of float32
        apart = np.abs(packed.take(rows).cls - fresh.cls)
        assert (apart <= 2**-10 * np.abs(fresh.cls) + 2e-3 + step).all()
        np.testing.assert_allclose(packed.take(rows).pixels, fresh.pixels, rtol=1e-4)  # decoders may differ by a bit


@needs_images
@pytest.mark.parametrize("name", SIZES)
def test_sources_of_the_pack_are_the_files_it_names(name):
    for set_name, each in packs.pack_info(name)["sets"].items():
        path = SHARED / f"{FILES[f'{name}/{set_name}']}.parquet"
        assert each["source"] == {f"{path.parent.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()}


def test_making_a_pack(tmp_path):
    from capsae.features.tinyvit import train_digits_vit

    vit = train_digits_vit({"kind": "builtin", "name": "digits/train", "limit": 50}, epochs=1, progress=False)
    path = vit.save(tmp_path / "vit.safetensors")
    (tmp_path / "images").mkdir()
    for i in range(5):
        Image.new("RGB", (40, 30), (i, 50 * i, 7)).save(tmp_path / "images" / f"{i}.png")
    sources = {
        "train": {"kind": "builtin", "name": "digits/train", "limit": 40},
        "far/flat": {"kind": "folder", "path": str(tmp_path / "images")},
    }
    backbone = {"model": "capsae/digits_vit", "checkpoint": str(path)}
    out = make_pack("own", sources, backbone, tmp_path / "own", notes="a test", progress=False)
    assert sorted(path.name for path in out.iterdir()) == ["far__flat.safetensors", "pack.json", "train.safetensors"]
    assert pack_sets(out) == ["train", "far/flat"]
    fresh = extract(sources["far/flat"], backbone, tmp_path / "fresh", progress=False)
    found = load_pack(out, "far/flat")
    np.testing.assert_array_equal(found.cls, fresh.cls.astype(np.float16).astype(np.float32))
    assert found.ids.tolist() == fresh.ids.tolist() and found.labels.tolist() == [-1] * 5

    first = {path.name: path.read_bytes() for path in out.glob("*.safetensors")}
    info = packs.pack_info(out)
    shutil.rmtree(out)
    make_pack("own", sources, backbone, out, progress=False)
    assert {path.name: path.read_bytes() for path in out.glob("*.safetensors")} == first, "the same pack, byte for byte"
    with pytest.raises(ValueError, match=r"pack 'own' has \d+ bytes, more than 100"):
        make_pack("own", sources, backbone, tmp_path / "small", max_bytes=100, progress=False)

    # images measured anew: features as they were, whatever else the file held
    bare = load_pack(out, "train")
    FeatureSet(bare.cls, bare.labels, bare.ids, None, "train", bare.class_names, bare.meta).save(
        out / "train.safetensors", dtype="float16"
    )
    assert load_pack(out, "train").pixels is None, "files from before there were statistics still load"
    again = add_pixels(out, sources, tmp_path / "again")
    assert {path.name: path.read_bytes() for path in again.glob("*.safetensors")} == first
    assert json.loads((again / "pack.json").read_text())["sets"] == info["sets"]
    other = sources | {"train": sources["train"] | {"limit": 39}}
    with pytest.raises(ValueError, match="own', train: 39 images are given, the pack holds 40"):
        add_pixels(out, other, tmp_path / "other")
    other = sources | {"train": {"kind": "builtin", "name": "digits/test", "limit": 40}}
    with pytest.raises(ValueError, match="train: row 0 has ids .* in the pack"):
        add_pixels(out, other, tmp_path / "other")
    with pytest.raises(ValueError, match="no images are given for its set 'far/flat'"):
        add_pixels(out, {"train": sources["train"]}, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_pack_of_the_same_images_holds_features_alone(tmp_path):
    rng = np.random.default_rng(0)
    first, again = load_pack("mini80", "test"), load_pack("mini80-augreg", "test")
    for key in ("ids", "labels", "pixels"):
        np.testing.assert_array_equal(getattr(first, key), getattr(again, key))
    assert not np.allclose(first.cls, again.cls)
    with pytest.raises(ValueError, match="pixel statistics are those of pack 'mini80'"):
        add_pixels("mini80-augreg", {}, tmp_path)
    cls = rng.normal(size=(50, 7)).astype(np.float32)
    path = FeatureSet(cls, np.zeros(50), np.arange(50)).save(tmp_path / "f.safetensors", dtype="int8")
    assert (np.abs(FeatureSet.load(path).cls - cls) <= np.abs(cls).max(axis=0) / 127 / 1.999).all()
