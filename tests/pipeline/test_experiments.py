from __future__ import annotations

import math
from pathlib import Path

import pytest
import small_experiment

import capsae.pipeline.experiments
from capsae.cli.commands import _dotted
from capsae.pipeline.experiment_errors import ExperimentError
from capsae.pipeline.experiments import Experiment, available, load_experiment

FREE = {"pack": "none"}  # lets sources of an embedded experiment change


def refused(name="imagenet20", **overrides) -> str:
    overrides = {key.replace("__", "."): value for key, value in overrides.items()}
    with pytest.raises(ExperimentError) as error:
        load_experiment(name, overrides)
    assert len(str(error.value).splitlines()) <= 14, "more than a screen"
    return str(error.value)


def test_the_module_wins_over_the_folder_of_the_same_name():
    assert Path(capsae.pipeline.experiments.__file__).name == "experiments.py"
    assert not list(capsae.pipeline.experiments.FOLDER.glob("*.py"))


def test_every_embedded_experiment_loads_without_its_data():
    assert available()[0] == "imagenet20"
    assert {"mini80", "digits", "cifar10", "imagenet1k", "imagenet1k-swin-t", "imagenet1k-dinov2"} < set(available())
    for name in available():
        experiment = load_experiment(name)
        assert experiment.name == name and experiment.needs and experiment.ood_sets


def test_embedded_experiments_say_what_the_issue_asks():
    default, paper = load_experiment("imagenet20"), load_experiment("imagenet1k")
    assert (default.sae.latents, default.sae.k, default.caps.core_fraction, default.head) == (1920, 32, 0.15, "probe")
    assert (paper.sae.latents, paper.sae.k, paper.sae.epochs, paper.sae.batch_size) == (7680, 128, 100, 4096)
    assert paper.backbone.model == "torchvision/vit_b_16" and paper.head == "backbone"
    assert [name for name in available() if load_experiment(name).show_images] == ["digits"]
    assert load_experiment("mini80").ood_sets == ["near/mini20"]


def test_variants_inherit_all_they_do_not_change():
    paper, swin = load_experiment("imagenet1k"), load_experiment("imagenet1k-swin-t")
    assert swin.sae == paper.sae and swin.ood == paper.ood and swin.train == paper.train
    assert swin.backbone.pooling == "avg" and swin.title != paper.title


def test_ood_sets_near_first():
    assert load_experiment("imagenet20").ood_sets[:2] == ["near/imagenet980", "near/caltech_objects"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"sae.kk": 64}, ["sae.kk = 64", "unknown key", "did you mean sae.k?"]),
        ({"core_fraction": 0.2}, ["core_fraction = 0.2", "or caps.core_fraction?"]),
        ({"cap.core_fraction": 0.2}, ["did you mean caps?"]),
        ({"caps.fraction": 0.2}, ["did you mean caps.core_fraction or val.fraction?"]),
        ({"val.fractoin": 0.2}, ["did you mean val.fraction?"]),
        ({"sae.k": 1000.0}, ["sae.k = 1000.0", "write 1000"]),
        ({"sae.k": 3.5}, ["sae.k = 3.5", "whole number"]),
        ({"sae.k": "64"}, ["sae.k = '64'", "integer"]),
        ({"sae.k": True}, ["sae.k = True", "integer"]),
        ({"sae.k": 5000}, ["5000", "1920", "at most"]),
        ({"sae.k": 0}, ["k is 0", "at least 1"]),
        ({"sae": 3}, ["sae = 3"]),
        ({"sae.k.x": 3}, ["sae.k.x = 3", "no keys"]),
        ({"sae.lr": "fast"}, ["sae.lr = 'fast'"]),
        ({"caps.core_fraction": 0}, ["caps.core_fraction = 0", "greater than 0"]),
        ({"caps.core_fraction": 1.01}, ["caps.core_fraction = 1.01"]),
        ({"caps.core_fraction": math.nan}, ["caps.core_fraction"]),
        ({"train_fraction": 0}, ["train_fraction = 0"]),
        ({"val.fraction": 1.0}, ["val.fraction = 1.0"]),
        ({"predicted": "label"}, ["predicted = 'label'", "'predicted' or 'true'"]),
        ({"n_classes": 0}, ["n_classes = 0"]),
        ({"head": "backbone"}, ["pack"]),
        ({"backbone.model": "resnet50"}, ["pack 'imagenet20'", 'pack = "none"']),
        ({"train.path": "other.parquet"}, ["train.path", 'pack = "none"']),
        ({"data_root": "/no/such/folder"}, ["data_root", "/no/such/folder"]),
        ({"backbone.checkpoint": "/no/weights.safetensors"}, ["backbone.checkpoint", "/no/weights.safetensors"]),
        ({"ood.far/x.kind": "parqet", **FREE}, ["ood.far/x.kind = 'parqet'", "'parquet'"]),
        ({"ood.far/x.kind": "parquet", **FREE}, ["ood.far/x.path", "required"]),
        ({"ood.far/x.path": "a", **FREE}, ["ood.far/x.kind", "missing"]),
        ({"ood.far/textures.pth": "a", **FREE}, ["did you mean ood.far/textures.path?"]),
        ({"ood.other/x.kind": "builtin", "ood.other/x.name": "noise", **FREE}, ["'other/x'", "(near|far)/"]),
        ({"ood": {}, **FREE}, ["ood"]),
        ({"train.limit": 0, **FREE}, ["train.limit = 0", "greater than or equal to 1"]),
        ({"train.crop": 1.5, **FREE}, ["train.crop = 1.5"]),
        ({"backbone.image_size": 0, **FREE}, ["backbone.image_size = 0"]),
        ({"seed": -3}, ["seed = -3"]),
        ({"val.seed": -3}, ["val.seed = -3"]),
        ({"n_boot": -1}, ["n_boot = -1"]),
    ],
)
def test_refused_with_key_value_and_what_would_do(overrides, expected):
    message = refused(**overrides)
    for part in expected:
        assert part in message
    assert "pydantic" not in message and "type=" not in message


def test_all_wrong_keys_are_named_at_once():
    message = refused(**{"sae.kk": 1, "caps.core_fraction": 0, "predicted": "x"})
    assert all(word in message for word in ("sae.kk", "caps.core_fraction", "predicted"))


def test_unknown_experiment_lists_the_known():
    with pytest.raises(ExperimentError, match="imagenet21.*\n.*imagenet20, "):
        load_experiment("imagenet21")
    with pytest.raises(ExperimentError, match="no experiment file"):
        load_experiment("nowhere/my.toml")


def test_overrides_apply_to_names_files_and_experiments(tmp_path):
    by_name = load_experiment("imagenet20", {"sae.k": 64, "seed": 3})
    assert (by_name.sae.k, by_name.seed, by_name.sae.latents) == (64, 3, 1920)
    again = load_experiment(by_name, {"caps.core_fraction": 1})
    assert (again.sae.k, again.caps.core_fraction) == (64, 1.0)
    own = load_experiment(small_experiment.write(tmp_path), {"sae.k": 5})
    assert own.sae.k == 5 and own.name == "small"


def test_every_printed_key_can_be_set():
    import json

    experiment = load_experiment("digits")
    for line in _dotted(experiment.to_dict()):
        key, _, value = line.partition(" = ")
        # with its pack named again, or what the pack holds could not be set
        assert load_experiment("digits", {"pack": "digits", key: json.loads(value)}) == experiment
    assert Experiment.model_validate_json(json.dumps(experiment.to_dict())) == experiment
    for key in ("ood.near/letters.limit", 'ood."near/letters".limit'):
        assert load_experiment("digits", {"pack": "digits", key: 7}).ood["near/letters"].limit == 7


def own_experiment(folder: Path, **changes: str) -> Path:
    small_experiment.write(folder)
    path = folder / "own.toml"
    text = small_experiment.TOML.format(pack='"none"')
    for old, new in changes.items():
        text = text.replace(old, new)
    path.write_text(text)
    return path


def test_missing_folders_are_named_with_their_place(tmp_path):
    path = own_experiment(tmp_path)
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
    with pytest.raises(ExperimentError) as error:
        load_experiment(path)
    assert "ood.near/shifted.path = 'shifted'" in str(error.value) and str(tmp_path / "noise") in str(error.value)
    assert "train.path" not in str(error.value)


def test_relative_paths_start_from_data_root_or_the_file(tmp_path, monkeypatch):
    data = tmp_path / "data"
    for name in ("train", "test", "shifted", "noise"):
        (data / name).mkdir(parents=True)
    path = own_experiment(tmp_path / "experiments", n_boot='data_root = "../data"\nn_boot')
    experiment = load_experiment(path)
    assert experiment.source_spec("far/noise") == {"kind": "folder", "path": str(data / "noise")}
    monkeypatch.setenv("CAPSAE_DATA", str(data))
    assert load_experiment(own_experiment(tmp_path / "elsewhere")).source_spec("train")["path"] == str(data / "train")


def test_files_without_a_root_are_asked_for_by_name(monkeypatch):
    monkeypatch.delenv("CAPSAE_DATA", raising=False)
    with pytest.raises(ExperimentError, match="data_root"):
        load_experiment("imagenet1k").check_files()


def test_unreadable_toml_names_file_and_line(tmp_path):
    path = tmp_path / "broken.toml"
    path.write_text("title = \n")
    with pytest.raises(ExperimentError, match=r"broken\.toml.*\n.*line 1"):
        load_experiment(path)


def test_extending_an_embedded_experiment(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('extends = "imagenet20"\n[sae]\nk = 16\n')
    experiment = load_experiment(path)
    assert (experiment.name, experiment.sae.k, experiment.pack) == ("mine", 16, "imagenet20")
    path.write_text('extends = "imagenet20"\n[backbone]\nmodel = "vit_small_patch16_224"\n')
    with pytest.raises(ExperimentError, match="would change nothing"):
        load_experiment(path)
    path.write_text('extends = "mine.toml"\n')
    with pytest.raises(ExperimentError, match="extends itself"):
        load_experiment(path)


def test_unknown_set_lists_the_known():
    with pytest.raises(ValueError, match="far/texture'.*far/textures"):
        load_experiment("imagenet20").source("far/texture")
