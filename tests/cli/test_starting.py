"""Own folders and own weights: ``capsae init``, and a new OOD set beside an embedded pack."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import small_experiment
from PIL import Image

import capsae.features.extract
from capsae.__main__ import main
from capsae.cli.init import LISTS, look
from capsae.features.featureset import FeatureSet
from capsae.pipeline.experiment_errors import ExperimentError
from capsae.pipeline.experiments import load_experiment
from capsae.pipeline.run import Run

MODEL = "test_vit"  # timm's smallest, 64 columns


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("CAPSAE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def folders(root: Path, *parts: str, n: int = 3) -> Path:
    """Images of one hue a folder, so that classes differ."""
    for i, part in enumerate(parts):
        (root / part).mkdir(parents=True)
        for j in range(n):
            grey = np.random.default_rng([i, j]).integers(0, 60, (16, 16, 3))
            image = Image.fromarray((grey + np.eye(3, dtype=int)[i % 3] * 190).astype(np.uint8))
            image.save(root / part / f"{j}.png")
    return root


@pytest.mark.parametrize(
    ("parts", "sets", "n_classes"),
    [
        (["train/a", "train/b", "test/a", "test/b", "far/x"], {"far/x"}, 2),
        (["Train/a", "Train/b", "val/a", "val/b", "ood/x y", "near/z"], {"far/x_y", "near/z"}, 2),
        (["train/a", "train/b", "test/a", "test/b", "val/a", "val/b", "far"], {"far/far"}, 2),
        (["train/a", "train/b", "train/c", "test/a", "shifted/fog/a", "@eaDir", ".cache/a"], {"far/noise"}, 3),
    ],
)
def test_a_folder_becomes_a_experiment(parts, sets, n_classes, tmp_path):
    root = folders(tmp_path / "my photos", *parts)
    text, lists = look(root, MODEL)
    (root / "capsae.toml").write_text(text, encoding="utf-8")
    experiment = load_experiment(root / "capsae.toml")
    assert set(experiment.ood_sets) == sets and experiment.n_classes == n_classes and not lists
    assert experiment.title == "my photos" and experiment.sae.latents == 640 and len(text.splitlines()) <= 12
    assert ("val" in tomllib.loads(text)) == (any(p.startswith("val") for p in parts) and "test/a" in parts)
    assert list(experiment.shifted) == (["shifted/fog"] if "shifted/fog/a" in parts else [])


def test_class_folders_alone_are_split_by_lists(tmp_path):
    root = folders(tmp_path / "all", "a", "b b", "far/x", n=10)
    text, lists = look(root, MODEL)
    train, test = (lists[name].splitlines() for name in LISTS)
    assert (len(train), len(test)) == (16, 4) and not set(train) & set(test) and "b b/4.png 1" in test
    assert tomllib.loads(text)["train"]["class_names"] == ["a", "b b"]


@pytest.mark.parametrize(
    ("parts", "options", "expected"),
    [
        (["train/a"], {}, "two classes at least"),
        (["test/a", "test/b"], {}, "one for each class"),
        (["a", "b"], {}, "too few images"),
        (["train/a", "train/b", "test/a"], {"model": "vit_tinny_patch16_224"}, "vit_tiny_patch16_224"),
        (["train/a", "train/b", "test/a"], {"checkpoint": "no.pth"}, "--checkpoint 'no.pth': no such file"),
    ],
)
def test_what_is_no_experiment_is_named(parts, options, expected, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=expected):
        look(folders(tmp_path / "x", *parts), **options)


@pytest.mark.filterwarnings("ignore")
def test_from_a_folder_and_weights_to_scores(tmp_path, capsys):
    """All of it for real, on a CPU in seconds: own classes, own weights, no store and no images at the end."""
    import timm
    from safetensors.torch import save_file

    root = folders(tmp_path / "mine", "red", "green", "blue", n=15)
    save_file(timm.create_model(MODEL, num_classes=3).state_dict(), root / f"{MODEL}-mine.safetensors")
    assert main(["init", str(root)]) == 0
    assert f'checkpoint = "{MODEL}-mine.safetensors"' in capsys.readouterr().out
    assert main(["init", str(root)]) == 2 and "is there" in capsys.readouterr().err
    settings = ["--set", "sae.epochs=2", "--set", "sae.latents=48", "--set", "sae.k=4", "--device", "cpu", "-q"]
    experiment, sae = str(root / "capsae.toml"), str(tmp_path / "sae")
    assert main(["train", "-p", experiment, "--seed", "3", "--out", sae, *settings]) == 0
    test = [str(path) for path in sorted(root.glob("*/4.png"))]
    assert main(["score", "-p", experiment, "--seed", "3", *settings, *test, "--out", str(tmp_path / "a.csv")]) == 0
    for path in [*root.rglob("*.png"), *root.glob("*.safetensors"), root / "capsae.toml"]:
        path.rename(tmp_path / path.name) if str(path) not in test and "png" not in path.name else None
    assert main(["score", "--sae", sae, *test, "--out", str(tmp_path / "b.csv"), "--device", "cpu", "-q"]) == 0
    one, two = pd.read_csv(tmp_path / "a.csv"), pd.read_csv(tmp_path / "b.csv")
    pd.testing.assert_frame_equal(one, two, rtol=1e-5)
    assert one["epd"].notna().all() and set(one["predicted"]) <= {"red", "green", "blue"}


def test_a_new_ood_set_stands_beside_an_embedded_pack(tmp_path, monkeypatch):
    mine, cls = folders(tmp_path / "mine", "a"), np.ones((3, small_experiment.DIM))
    experiment = str(small_experiment.write(tmp_path))
    monkeypatch.setattr("capsae.features.backbone.load_backbone", lambda settings: settings)

    def extract(source, backbone, shards, *, device, name, progress):
        return FeatureSet(cls, source.labels, source.ids, name=name, meta={"bad_images": []})

    monkeypatch.setattr(capsae.features.extract, "extract", extract)
    monkeypatch.chdir(tmp_path)
    for value in (str(mine), "mine", {"kind": "folder", "path": str(mine)}):
        run = Run(experiment, {"ood.far/mine": value, "backbone.pretrained": True}, progress=False)
        assert run.experiment.ood_sets == ["near/shifted", "far/noise", "far/mine"]
        np.testing.assert_array_equal(run.features("far/mine").cls, cls)
        assert len(run.features("far/noise")) == 80
    assert set(run.table(["msp"])["set"]) >= {"far/mine", "far/noise"}
    with pytest.raises(ExperimentError, match="would change nothing"):
        Run(experiment, {"ood.far/noise": str(mine)})
    for gone, expected in (
        ({"ood.far/gone": "no/such"}, "no/such"),
        ({"ood.far/rel.kind": "folder", "ood.far/rel.path": "x"}, "rel"),
    ):
        with pytest.raises(ExperimentError, match=expected):
            Run(experiment, gone)
