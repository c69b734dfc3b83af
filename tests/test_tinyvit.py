"""The built-in images and the small ViT that is trained on them."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest

from capsae import builtin
from capsae.backbone import load_backbone
from capsae.data import open_source
from capsae.features import extract
from capsae.tinyvit import train_digits_vit


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


@pytest.fixture(scope="module")
def trained():
    started = time.process_time()
    vit = train_digits_vit(seed=0, progress=False)
    return vit, time.process_time() - started


@pytest.mark.slow
def test_97_percent_on_held_out_digits_within_a_minute(trained):
    vit, seconds = trained
    images, labels, _, _ = builtin.load("digits/test")
    assert (vit.predict(images) == labels).mean() >= 0.97
    # processor time of all threads, so that a busy machine does not decide: a minute on two cores is 120 s of it
    assert seconds <= 120
    assert vit.history["loss"].iloc[-1] < 0.7 * vit.history["loss"].iloc[0]
    assert vit.history["epoch"].tolist() == list(range(len(vit.history)))


@pytest.mark.slow
def test_features_of_the_trained_vit_separate_digits_and_know_them_from_noise(trained, tmp_path):
    from sklearn.neighbors import NearestNeighbors

    path = trained[0].save(tmp_path / "vit.safetensors")
    backbone = {"model": "capsae/digits_vit", "checkpoint": str(path)}
    sets = {
        name: extract({"kind": "builtin", "name": name}, backbone, tmp_path / str(i), progress=False)
        for i, name in enumerate(("digits/train", "digits/test", "letters", "patches", "noise"))
    }
    test = sets["digits/test"]
    assert test.cls.shape == (450, 64) and test.logits.shape == (450, 10)
    assert (test.logits.argmax(axis=1) == trained[0].predict(builtin.load("digits/test")[0])).all()

    near = NearestNeighbors(n_neighbors=5).fit(sets["digits/train"].cls)
    distance = {name: near.kneighbors(each.cls)[0].mean(axis=1) for name, each in sets.items()}
    far = np.median(distance["digits/test"])
    assert all(np.median(distance[name]) > 1.5 * far for name in ("letters", "patches", "noise"))


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
    from capsae.featureset import write_tensors

    with pytest.raises(ValueError, match=r"labels lie in \[0, 28\], expected \[0, 9\]"):
        train_digits_vit({"kind": "builtin", "name": "letters"})
    write_tensors(tmp_path / "x.safetensors", {"a": np.zeros(1)}, {"kind": "something"})
    with pytest.raises(ValueError, match="holds no digits ViT"):
        load_backbone({"model": "capsae/digits_vit", "checkpoint": str(tmp_path / "x.safetensors")})
    with pytest.raises(ValueError, match="unknown backbone 'capsae/dogs'"):
        load_backbone("capsae/dogs")
