"""OpenOOD's near, far and full-spectrum protocol from its own layout of folders, and annotated contamination."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import capsae
from capsae.data.open import open_source
from capsae.pipeline.experiment_errors import ExperimentError
from capsae.pipeline.experiments import load_experiment
from capsae.pipeline.run import Run
from companion.figures import tidy

LISTS = {  # list: (folder, images a class, labelled, pixels a side)
    "train_imagenet": ("imagenet_1k/train", 12, True, 40),
    "val_imagenet": ("imagenet_1k/val", 4, True, 40),
    "test_imagenet": ("imagenet_1k/val", 6, True, 40),
    "test_imagenet_v2": ("imagenet_v2", 3, True, 40),
    "test_imagenet_c": ("imagenet_c", 3, True, 32),
    "test_imagenet_r": ("imagenet_r", 2, True, 40),
    "test_ssb_hard": ("ssb_hard", 4, False, 40),
    "test_ninco": ("ninco", 4, False, 40),
    "test_inaturalist": ("inaturalist", 4, False, 40),
    "test_textures": ("texture", 4, False, 40),
    "test_openimage_o": ("openimage_o", 4, False, 40),
}
PROFILE = """
extends = "imagenet1k"
n_classes = 3
head = "probe"
n_boot = 10
data_root = "."

[backbone]
model = "vit_tiny_patch16_224"
checkpoint = "vit.safetensors"
pretrained = false
image_size = 32
crop = 0.8

[sae]
latents = 32
k = 4
epochs = 3
batch_size = 32
"""


@pytest.fixture(scope="module")
def openood(tmp_path_factory):
    """OpenOOD's folders with three classes of coloured noise; returns the experiment's file."""
    import timm
    import torch
    from safetensors.torch import save_file

    root, rng = tmp_path_factory.mktemp("openood"), np.random.default_rng(0)
    torch.manual_seed(0)
    save_file(timm.create_model("vit_tiny_patch16_224", img_size=32).state_dict(), root / "vit.safetensors")
    (root / "benchmark_imglist" / "imagenet").mkdir(parents=True)
    for name, (folder, per_class, labelled, side) in LISTS.items():
        images = "images_classic" if folder == "texture" else "images_largescale"
        lines = []
        for label in range(3):
            for i in range(per_class):
                file = root / images / folder / str(label) / f"{name}_{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(0, 120, (side, side, 3))
                pixels[..., label if labelled else (label + 1) % 3] += 110 if labelled else 60
                Image.fromarray(pixels.astype(np.uint8)).save(file)
                lines.append(f"{folder}/{label}/{file.name} {label if labelled else -1}\n")
        (root / "benchmark_imglist" / "imagenet" / f"{name}.txt").write_text("".join(lines))
    (root / "small.toml").write_text(PROFILE)
    return root / "small.toml"


@pytest.fixture(scope="module")
def run(openood, tmp_path_factory):
    return Run(openood, store=tmp_path_factory.mktemp("store"), device="cpu", progress=False)


def test_shifted_sets_have_labels_and_count_as_id_in_the_full_spectrum(run):
    assert run.experiment.sets[-3:] == ["shifted/imagenet_v2", "shifted/imagenet_c", "shifted/imagenet_r"]
    sizes = {name: len(run.features(name)) for name in run.experiment.sets}
    assert sizes["shifted/imagenet_v2"] == 9 and sizes["shifted/imagenet_r"] == 6 and sizes["near/ninco"] == 12
    assert run.observations("near/ninco").labels is None
    assert run.observations("shifted/imagenet_c").labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    table = run.table(["msp", "sharpness"]).set_index(["method", "set", "group", "metric"])["value"]
    score = {name: run.detectors(["msp"])["msp"].score(run.observations(name)) for name in run.experiment.sets}
    everything = np.concatenate([score["test"], *(score[name] for name in run.experiment.shifted)])
    for group, id_scores in {"near": score["test"], "full-spectrum near": everything}.items():
        expected = capsae.metrics.auroc(id_scores, score["near/ninco"])
        assert table["msp", "near/ninco", group, "auroc"] == pytest.approx(expected, abs=1e-12)
    assert ("head", "shifted/imagenet_r", "id", "accuracy") in table


def test_an_own_crop_reaches_the_images(run):
    """ImageNet-C comes cut to size: what a crop of 1 gives of 32 px images is those images."""
    assert run.inputs._recipe("shifted/imagenet_c")[0]["backbone"]["crop"] == 1.0
    assert run.inputs._recipe("shifted/imagenet_v2")[0]["backbone"]["crop"] == 0.8
    assert run.features("shifted/imagenet_c").meta["backbone"]["crop"] == 1.0


def test_shifted_sets_can_be_left_out(openood):
    profile = load_experiment(openood, {"shifted": {}})
    assert profile.shifted == {} and not any(name.startswith("shifted") for name in profile.sets)


def test_sets_lie_in_the_table_of_their_kind(openood):
    folder = {"kind": "folder", "path": "images_largescale/ninco"}
    with pytest.raises(ExperimentError, match=r"shifted\.near/x = 'near/x': String should match"):
        load_experiment(openood, {"shifted": {"near/x": folder}})
    with pytest.raises(ExperimentError, match=r"ood\.shifted/x = 'shifted/x': String should match"):
        load_experiment(openood, {"ood": {"shifted/x": folder}})
    with pytest.raises(ExperimentError, match=r"shifted\.shifted/x\.path = 'gone'"):
        load_experiment(openood, {"shifted": {"shifted/x": {"kind": "folder", "path": "gone"}}})
    with pytest.raises(ExperimentError, match=r"ood\.near/ninco\.crop"):
        load_experiment(openood, {"ood.near/ninco.crop": 1.5})


# --- contamination


@pytest.mark.parametrize("kind", ["txt", "csv"])
def test_annotated_images_are_left_out_counted_and_told(openood, tmp_path, kind):
    names = ["ninco/0/test_ninco_1.png", "ninco/2/test_ninco_3.png"]
    path = tmp_path / f"contaminated.{kind}"
    path.write_text("# shown to contain an ID object\n" * (kind == "txt") + "id,why\n" * (kind == "csv"))
    with open(path, "a") as file:
        file.writelines(f"{name},a dog\n" if kind == "csv" else f"{name}\n" for name in names)
    run = Run(
        openood, {"ood.near/ninco.exclude": str(path), "shifted": {}}, store=tmp_path, device="cpu", progress=False
    )
    features = run.features("near/ninco")
    assert len(features) == 10 and not set(names) & set(features.ids) and features.meta["excluded"] == 2
    role = tidy.sets(run).set_index("set")["role"]
    assert role["near/ninco"] == f"near OOD, 2 images left out by contaminated.{kind}"
    assert role["near/ssb_hard"] == "near OOD"
    plain = Run(openood, store=tmp_path, device="cpu", progress=False)
    assert plain.inputs.digest("near/ninco") != run.inputs.digest("near/ninco")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a/0.png\nb/9.png\n", r"1 of 2 names are of no image of .*, e\.g\. 'b/9\.png'; its ids look like 'a/0\.png'"),
        ("# nothing\n", "names no image to exclude"),
        ("a/0.png\n1.png\n2.png\n", "excludes every image of"),
        (None, "no file .* of images to exclude"),
    ],
)
def test_lists_that_do_not_fit_are_refused(tmp_path, text, message):
    (tmp_path / "images" / "a").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / "a" / f"{i}.png")
    if text is not None:
        (tmp_path / "list.txt").write_text(text)
    spec = {"kind": "folder", "path": str(tmp_path / "images"), "exclude": str(tmp_path / "list.txt")}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_source(spec)


def test_exclusion_comes_before_the_limit_and_by_file_name_too(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(10):
        Image.new("RGB", (4, 4)).save(tmp_path / "a" / f"{i}.png")
    (tmp_path / "list.csv").write_text("id\n0.png\na/9.png\n")
    source = open_source({"kind": "folder", "path": str(tmp_path), "exclude": str(tmp_path / "list.csv"), "limit": 8})
    assert source.ids.tolist() == [f"a/{i}.png" for i in range(1, 9)] and source.excluded == 2
    (tmp_path / "list.csv").write_text("name\n0.png\n")
    with pytest.raises(ValueError, match="has no column 'id'; its columns are name"):
        open_source({"kind": "folder", "path": str(tmp_path), "exclude": str(tmp_path / "list.csv")})
