"""Files: bit for bit, atomic, never a pickle, and an error that names what is wrong."""

from __future__ import annotations

import json
import os
import pickle

import numpy as np
import pytest
import torch

from capsae.sae import SAEConfig, TopKSAE, train_sae


@pytest.fixture(scope="module")
def trained() -> tuple[TopKSAE, np.ndarray]:
    x = np.random.default_rng(0).normal(2, 3, size=(200, 10)).astype(np.float32)
    config = SAEConfig(latents=30, k=3, epochs=2, lr=1e-2, normalize="dataset", ema=0.9, aux_k=4)
    return train_sae(x, config, progress=False)[0], x


def test_save_and_load_bit_for_bit(trained, tmp_path):
    sae, x = trained
    folder = sae.save(tmp_path / "a" / "b")
    assert sorted(os.listdir(folder)) == ["cfg.json", "sae.safetensors"]  # no temporary file is left
    again = TopKSAE.load(folder)
    assert again.config == sae.config
    for name, weights in sae.state_dict().items():
        assert torch.equal(weights, again.state_dict()[name]), name
    np.testing.assert_array_equal(again.encode(x).values, sae.encode(x).values)
    np.testing.assert_array_equal(again.normalize(x), sae.normalize(x))  # the input's statistics came along
    assert abs(again.normalize(x).mean(0)).max() < 1e-4
    assert json.loads((folder / "cfg.json").read_text())["schema"] == 1


@pytest.mark.parametrize("name", ["sae.pt", "sae.pth", "pytorch_model.bin", "sae.pkl", "sae.ckpt"])
def test_pickles_are_refused_unread(name, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="pickle runs the code in it"):
        TopKSAE.load(tmp_path / name)
    (tmp_path / "sae.safetensors").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "cfg.json").write_text(json.dumps({"schema": 1, "config": {"latents": 3, "k": 1}}))
    with pytest.raises(ValueError, match="no whole safetensors file"):
        TopKSAE.load(tmp_path)
    assert not (tmp_path / "exploded").exists()


def edit(folder, change) -> None:
    cfg = json.loads((folder / "cfg.json").read_text())
    change(cfg)
    (folder / "cfg.json").write_text(json.dumps(cfg))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda cfg: cfg.update(schema=2), "schema 2; this version reads 1"),
        (lambda cfg: cfg.pop("schema"), "schema None"),
        (lambda cfg: cfg["config"].update(latents=31), "do not fit together"),
        (lambda cfg: cfg["config"].update(colour="red"), "unknown SAE setting 'colour'"),
        (lambda cfg: cfg["config"].update(k=31), "k is 31"),
        (lambda cfg: cfg["config"].pop("k"), "no setting 'k'"),
        (lambda cfg: cfg.pop("config"), "no 'config'"),
    ],
)
def test_foreign_settings_are_refused(trained, tmp_path, change, says):
    folder = trained[0].save(tmp_path)
    edit(folder, change)
    with pytest.raises(ValueError, match=says):
        TopKSAE.load(folder)


def test_damaged_and_missing_files_are_named(trained, tmp_path):
    folder = trained[0].save(tmp_path)
    weights = folder / "sae.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        TopKSAE.load(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no sae\.safetensors"):
        TopKSAE.load(folder)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        TopKSAE.load(tmp_path / "nowhere")
    trained[0].save(tmp_path)
    (tmp_path / "cfg.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        TopKSAE.load(tmp_path)


def test_a_failed_write_leaves_the_old_files(trained, tmp_path, monkeypatch):
    folder = trained[0].save(tmp_path)
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        TopKSAE.untrained(10, SAEConfig(latents=5, k=1)).save(folder)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before


def test_foreign_features_are_refused(trained, tmp_path):
    sae = TopKSAE.load(trained[0].save(tmp_path))
    with pytest.raises(ValueError, match="11 columns, the SAE 10"):
        sae.encode(np.ones((2, 11), np.float32))
