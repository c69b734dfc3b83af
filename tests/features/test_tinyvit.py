"""The built-in images and the small ViT that is trained on them."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from capsae.__main__ import main
from capsae.data import builtin
from capsae.data.open import open_source
from capsae.features import tinyvit
from capsae.features.backbone import load_backbone
from capsae.features.extract import extract
from capsae.features.tinyvit import WEIGHTS, DigitsViT, load_digits_vit, train_digits_vit
from capsae.files import file_record
from capsae.pipeline.packs import load_pack, pack_sets
from capsae.pipeline.run import Run


@pytest.mark.parametrize("name", builtin.NAMES)
def test_sets_look_alike_but_for_what_they_show(name):
    images, labels, ids, classes = builtin.load(name)
    assert images.shape[1:] == (32, 32, 3) and images.dtype == np.uint8
    assert len(images) == len(labels) == len(ids) == len(set(ids)) >= 200
    assert set(labels) == set(range(len(classes)))
    assert (images[..., 0] == images[..., 1]).all() and (images[..., 0] == images[..., 2]).all()
    # 8 x 8 values of 17 levels, enlarged: nothing else went in
    cells = images[..., 0].reshape(-1, 8, 4, 8, 4)[:, :, 1:3, :, 1:3].astype(float).mean(axis=(2, 4))
    assert (cells.std(axis=(1, 2)) > 5).all(), "a blank image"
    again = builtin.load(name)
    np.testing.assert_array_equal(again[0], images)
    assert again[2].tolist() == ids.tolist()


def test_digits_are_split_once_and_for_all():
    train, val, test = (builtin.load(f"digits/{part}") for part in ("train", "val", "test"))
    assert [len(part[0]) for part in (train, val, test)] == [1147, 200, 450]
    assert len({*train[2], *val[2], *test[2]}) == 1797
    assert np.bincount(test[1]).min() >= 43, "stratified by class"
    np.testing.assert_array_equal(builtin.load("digits/test", seed=7)[0], test[0])


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    images, labels, ids, _ = builtin.load("digits/test")
    data = load_digits()
    row = int(ids[10].removeprefix("digit-"))
    assert labels[10] == data.target[row]
    np.testing.assert_array_equal(images[10], builtin.enlarge(data.images[row][None])[0])


def test_letters_leave_out_what_reads_as_a_digit():
    _, _, ids, classes = builtin.load("letters")
    assert not set("OoIlSZ") & set(classes)
    assert len({each.split("-", 1)[1].rsplit("-", 1)[0] for each in ids}) >= 5, "several fonts"


def test_counting_cells_is_the_digits_own_procedure():
    grey = np.zeros((1, 32, 32))
    grey[0, :4, :2] = 1  # half of the first block
    grey[0, 4:8, 8:12] = 1
    cells = builtin.count_cells(grey)[0]
    assert cells[0, 0] == 8 and cells[1, 2] == 16 and cells.sum() == 24


def test_seeds_draw_other_letters():
    assert (builtin.load("letters", seed=0)[0] != builtin.load("letters", seed=1)[0]).any()
    source = open_source({"kind": "builtin", "name": "noise", "seed": 1})
    assert source.digest() != open_source({"kind": "builtin", "name": "noise"}).digest()


def test_embedded_weights_are_what_their_provenance_says_and_good():
    made = json.loads(WEIGHTS.with_suffix(".json").read_text())
    assert made["weights"] == file_record(WEIGHTS) and made["versions"]["torch"]
    net = DigitsViT(load_digits_vit(), None)
    for part in ("val", "test"):
        images, labels, _, _ = builtin.load(f"digits/{part}")
        accuracy = (net.predict(images) == labels).mean()
        assert accuracy >= 0.97 and accuracy == pytest.approx(made["accuracy"][part], abs=0.006)


def test_the_digits_take_the_embedded_weights_and_other_seeds_their_own(tmp_path):
    embedded, other = (Run("digits", {"pack": "none", "seed": seed}, store=tmp_path, progress=False) for seed in (0, 1))
    assert embedded.inputs.backbone_settings()["checkpoint"] == str(WEIGHTS)
    assert embedded.digest("features") != other.digest("features")
    assert not tinyvit.is_embedded(1, embedded.inputs.source("train"))
    assert not tinyvit.is_embedded(0, embedded.inputs.source("val"))
    with pytest.raises(ValueError, match="only 'capsae/digits_vit' is trained here"):
        Run("imagenet20", store=tmp_path, progress=False).inputs.train_backbone()
    assert not (tmp_path / "backbone").exists(), "nothing was trained"


@pytest.mark.parametrize("name", pack_sets("digits"))
def test_the_pack_holds_what_the_embedded_weights_make_of_the_images(name, tmp_path):
    packed = load_pack("digits", name)
    source = open_source(
        {
            "kind": "builtin",
            "name": {"near/letters": "letters"}.get(name, name.removeprefix("far/"))
            if "/" in name
            else f"digits/{name}",
        }
    )
    assert packed.ids.tolist() == source.ids.tolist() and packed.labels.tolist() == source.labels.tolist()
    fresh = extract(source, "capsae/digits_vit", tmp_path, dtype="float32", logits=False, progress=False)
    # torch sums in another order on another kind of processor: the last bits of float32 differ, which is why it ships
    np.testing.assert_allclose(packed.cls, fresh.cls, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(packed.pixels, fresh.pixels, rtol=1e-4)


def test_packed_features_separate_digits_and_know_them_from_noise():
    from sklearn.neighbors import NearestNeighbors

    sets = {name: load_pack("digits", name) for name in pack_sets("digits")}
    near = NearestNeighbors(n_neighbors=5).fit(sets["train"].cls)
    distance = {name: np.median(near.kneighbors(each.cls)[0].mean(axis=1)) for name, each in sets.items()}
    assert all(distance[name] > 1.5 * distance["test"] for name in sets if "/" in name)


def test_training_from_pixels_learns():
    vit = train_digits_vit(seed=0, epochs=6, progress=False)
    images, labels, _, _ = builtin.load("digits/test")
    assert (vit.predict(images) == labels).mean() >= 0.2  # chance is 0.1; sixty epochs reach 0.99
    loss = vit.history["loss"].tolist()
    assert loss == sorted(loss, reverse=True) and vit.history["epoch"].tolist() == list(range(6))


def test_the_command_trains_the_backbone_and_makes_the_pack_of_it(tmp_path, monkeypatch):
    monkeypatch.setenv("CAPSAE_HOME", str(tmp_path / "store"))
    monkeypatch.setattr(
        tinyvit.train_digits_vit, "__kwdefaults__", {**tinyvit.train_digits_vit.__kwdefaults__, "epochs": 1}
    )
    assert main(["extract", "digits", "--train-backbone", "--quiet", "--out", str(tmp_path / "pack")]) == 0
    made = json.loads((tmp_path / "pack" / "vit.json").read_text())
    assert made["epochs"] == 1 and made["train"]["images"] == 1147
    found = load_pack(tmp_path / "pack", "test")
    fresh = extract(
        {"kind": "builtin", "name": "digits/test"},
        {"model": "capsae/digits_vit", "checkpoint": str(tmp_path / "pack" / "vit.safetensors")},
        tmp_path / "fresh",
        dtype="float32",
        logits=False,
        progress=False,
    )
    np.testing.assert_array_equal(found.cls, fresh.cls)


def test_training_is_deterministic_for_a_seed(tmp_path):
    source = open_source({"kind": "builtin", "name": "digits/train", "limit": 200})
    one, two, other = (train_digits_vit(source, seed=seed, epochs=2, progress=False) for seed in (3, 3, 4))
    files = [vit.save(tmp_path / str(i)) for i, vit in enumerate((one, two, other))]
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()
    assert one.history["loss"].tolist() == two.history["loss"].tolist()


def test_weights_come_back(tmp_path):
    vit = train_digits_vit({"kind": "builtin", "name": "digits/train", "limit": 100}, epochs=1, progress=False)
    path = vit.save(tmp_path / "vit.safetensors")
    backbone = load_backbone({"model": "capsae/digits_vit", "checkpoint": str(path)})
    assert (backbone.size, backbone.dim, backbone.n_logits) == (32, 64, 10)
    assert os.listdir(tmp_path) == ["vit.safetensors"]
    source = open_source({"kind": "builtin", "name": "digits/test", "limit": 20})
    found = extract(source, backbone, tmp_path / "out", progress=False)
    images = np.stack([np.asarray(source.image(i)) for i in range(20)])
    assert (found.logits.argmax(axis=1) == vit.predict(images)).all()


def test_what_cannot_be_trained_or_loaded_is_said(tmp_path):
    from capsae.features.featureset import write_tensors

    with pytest.raises(ValueError, match=r"labels lie in \[0, 28\], expected \[0, 9\]"):
        train_digits_vit({"kind": "builtin", "name": "letters"})
    write_tensors(tmp_path / "x.safetensors", {"a": np.zeros(1)}, {"kind": "something"})
    with pytest.raises(ValueError, match="holds no digits ViT"):
        load_backbone({"model": "capsae/digits_vit", "checkpoint": str(tmp_path / "x.safetensors")})
    with pytest.raises(ValueError, match="unknown backbone 'capsae/dogs'"):
        load_backbone("capsae/dogs")
