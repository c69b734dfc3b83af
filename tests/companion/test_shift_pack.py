"""The embedded pack of corrupted test images is whole, and what our corruptions and our extractor make."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from capsae.data.open import open_source
from capsae.features.backbone import load_backbone
from capsae.features.extract import extract
from capsae.pipeline import packs
from capsae.pipeline.packs import load_pack
from companion.chapters.shift import corruptions
from companion.chapters.shift import make_pack as shift_pack

SHARED = Path(os.environ.get("CAPSAE_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data"
WEIGHTS = SHARED / "deit_tiny_patch16_224.fb_in1k.fp16.safetensors"
needs_images = pytest.mark.skipif(
    not WEIGHTS.is_file(),
    reason=f"no images and weights under {SHARED}: set CAPSAE_SHARED to the folder that holds data/",
)
PACK = "imagenet20_shift"
SETS = [f"{name}/{strength}" for name in corruptions.CORRUPTIONS for strength in corruptions.STRENGTHS]


def test_the_pack_is_whole_and_small():
    folder, info = packs.PACKS / PACK, packs.pack_info(PACK)
    assert packs.pack_sets(PACK) == SETS
    assert sum(path.stat().st_size for path in folder.iterdir()) <= packs.MAX_BYTES
    assert {path.name for path in folder.iterdir()} == {"pack.json", *(each["file"] for each in info["sets"].values())}
    for each in info["sets"].values():
        assert hashlib.sha256((folder / each["file"]).read_bytes()).hexdigest() == each["sha256"]
    assert "non-commercial" in info["licence"] and "No image is included" in info["licence"]
    assert f"version {corruptions.VERSION}, seed 0" in info["notes"]
    of_images = packs.pack_info("imagenet20")["sets"]["test"]["source"]
    assert all(each["source"] == of_images for each in info["sets"].values())
    for key in ("weights_sha256", "pooling", "image_size", "crop", "interpolation", "mean", "std"):
        assert info["backbone"][key] == packs.pack_info("imagenet20")["backbone"][key]


def test_its_rows_are_the_same_test_images_in_every_set():
    test, first = load_pack("imagenet20", "test"), load_pack(PACK, SETS[0])
    place = {id: row for row, id in enumerate(test.ids.tolist())}
    rows = np.array([place[id] for id in first.ids.tolist()])
    assert len(set(np.bincount(first.labels))) == 1 and len(np.unique(rows)) == len(rows)
    moved = {}
    for name in SETS:
        features = load_pack(PACK, name)
        assert features.ids.tolist() == first.ids.tolist()
        assert features.labels.tolist() == test.labels[rows].tolist()
        assert features.class_names == test.class_names and np.isfinite(features.cls).all()
        moved[name] = np.linalg.norm(features.cls - test.cls[rows], axis=1).mean()
    for corruption in corruptions.CORRUPTIONS:
        distance = [moved[f"{corruption}/{s}"] for s in corruptions.STRENGTHS]
        # the backbone takes contrasts of .4 to .2 alike, so that only the strongest is sure to be the furthest
        assert distance[-1] == max(distance) and distance[-1] > 1.3 * distance[0], corruption
        assert corruption == "contrast" or np.all(np.diff(distance) > 0), f"further the stronger {corruption} is"


def test_its_pixel_statistics_tell_the_corruptions():
    sharp, contrast = (packs.pack_info(PACK)["pixel_statistics"].index(name) for name in ("sharpness", "contrast"))
    test = load_pack("imagenet20", "test").pixels.mean(0)
    mean = {name: load_pack(PACK, name).pixels.mean(0) for name in SETS}
    assert all(mean[f"blur/{s}"][sharp] < 0.2 * test[sharp] for s in corruptions.STRENGTHS)
    assert all(mean[f"noise/{s}"][sharp] > 1.5 * test[sharp] for s in corruptions.STRENGTHS)
    shares = [mean[f"contrast/{s}"][contrast] / test[contrast] for s in corruptions.STRENGTHS]
    np.testing.assert_allclose(shares, corruptions.CONTRAST, rtol=0.1)


@needs_images
def test_the_pack_is_what_our_extractor_makes(tmp_path):
    """Strength 0 gives the rows of the experiment's own pack, some of the others those of this one."""
    backbone = load_backbone({"model": "deit_tiny_patch16_224", "checkpoint": str(WEIGHTS), "crop": 1.0})
    source = open_source({"kind": "parquet", "path": str(SHARED / "imagenet20" / "validation.parquet")})
    kept = shift_pack.balanced_rows(source.labels, shift_pack.PER_CLASS)
    assert load_pack(PACK, SETS[0]).ids.tolist() == source.ids[kept].tolist()
    some = np.array([0, 77, 310, 499])
    for name, strength in (("blur", 0), ("noise", 5), ("blur", 2), ("jpeg", 3), ("contrast", 1)):
        made = corruptions.corrupted(source.take(kept), name, strength).take(some)
        fresh = extract(made, backbone, tmp_path / f"{name}{strength}", dtype="float32", progress=False)
        packed = (
            load_pack(PACK, f"{name}/{strength}").take(some)
            if strength
            else load_pack("imagenet20", "test").take(kept[some])
        )
        # int8 has 127 steps up to a column's largest value, float16 2**-11 of a value; other processors, decoders and
        # versions of torch move the last bits
        step = np.abs(load_pack("imagenet20", "train").cls).max(axis=0) / 127
        assert (np.abs(packed.cls - fresh.cls) <= step + 2**-9 * np.abs(fresh.cls) + 4e-3).all()
