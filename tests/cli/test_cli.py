from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import small_experiment
from PIL import Image

import capsae.features.extract
import capsae.pipeline.own_images
from capsae.__main__ import main
from capsae.data.images import BadImage
from capsae.features.featureset import FeatureSet
from capsae.pipeline.experiments import Experiment, available, load_experiment
from capsae.pipeline.own_images import find_images

SHARED = Path(os.environ.get("CAPSAE_SHARED", Path(__file__).resolve().parents[3] / "shared"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAPSAE_HOME", str(folder))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield folder


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return str(small_experiment.write(tmp_path_factory.mktemp("experiment")))


@pytest.fixture
def capsae_(home, capsys):
    """Run one command: (status, stdout, stderr)."""

    def call(*arguments):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            status = stop.code
        return (status, *capsys.readouterr())

    return call


# --- help and listings


def test_help_leads_through_every_command(capsae_):
    status, out, _ = capsae_("--help")
    assert status == 0
    order = [
        out.index(f"  capsae {word}")
        for word in ("experiments", "extract", "train", "score", "explain", "evaluate", "reproduce")
    ]
    assert order == sorted(order)
    for word in ("experiments", "extract", "train", "score", "explain", "evaluate", "detectors", "reproduce"):
        status, out, _ = capsae_(word, "--help")
        assert status == 0 and "usage" in out


def test_it_runs_as_a_module_and_tells_status():
    run = subprocess.run(
        [sys.executable, "-m", "capsae", "experiments", "nowhere"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("capsae: no experiment 'nowhere'") and "Traceback" not in run.stderr


def test_experiments_lists_all_with_what_they_need(capsae_):
    status, out, _ = capsae_("experiments")
    assert status == 0
    assert [line for line in out.splitlines() if line in available()] == available()
    assert out.count("  needs ") == len(available()) and "16572 images, 7.0 MB" in out and "150 GB" in out


def test_experiments_prints_one_with_overrides(capsae_):
    status, out, _ = capsae_("experiments", "imagenet20", "--set", "sae.k=64")
    assert status == 0 and "sae.k = 64\n" in out and "sae.latents = 1920\n" in out


@pytest.mark.parametrize("name", available())
def test_a_printed_experiment_is_a_experiment_file(capsae_, name, tmp_path):
    status, out, _ = capsae_("experiments", name, "--set", "n_boot=7")
    assert status == 0
    experiment = load_experiment(name, {"n_boot": 7})
    assert Experiment.model_validate_json(json.dumps(tomllib.loads(out))) == experiment
    line = next(line for line in out.splitlines() if line.startswith("ood."))  # as printed, with TOML's quotes
    status, again, _ = capsae_("experiments", name, "--set", "pack=none", "--set", line.replace(" = ", "=", 1))
    assert status == 0 and f"{line}\n" in again
    if experiment.pack or name == "digits":  # the others need their images
        (tmp_path / "own.toml").write_text(out, encoding="utf-8")
        own = load_experiment(tmp_path / "own.toml")
        assert own.model_copy(update={"data_root": None}) == experiment


def test_detectors_are_listed_with_formula_and_options(capsae_):
    _, out, _ = capsae_("detectors")
    assert "epd  (EPD, paper" in out and "core_fraction=0.15" in out


# --- wrong input: a message, status 2, no traceback


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "--out", "x", "--set", "sae.kk=3"], "did you mean sae.k?"),
        (["train", "--out", "x", "--set", "sae.k=1e3"], "write 1000"),
        (["train", "--out", "x", "--set", "sae.k"], "write KEY=VALUE"),
        (["train", "mini80", "--experiment", "digits", "--out", "x"], "two experiments"),
        (["score", "no/such.jpg"], "no image or folder 'no/such.jpg'"),
        (["score", __file__, "--out", "no/such/folder/scores.csv"], "no folder"),
        (["score", __file__, "--checkpoint", "no.safetensors"], "--checkpoint 'no.safetensors': no such file"),
        (["explain"], "give one image file, or --from-set"),
        (["explain", "--from-set", "far/texture"], "far/textures"),
        (["extract", "imagenet1k"], "data_root"),
        (["reproduce", "cifar10"], "no pages in the book"),
    ],
)
def test_wrong_input_is_refused(capsae_, monkeypatch, arguments, expected):
    monkeypatch.delenv("CAPSAE_DATA", raising=False)
    monkeypatch.setattr("capsae.sae.train_sae", lambda *_, **__: pytest.fail("work had started"))
    status, out, err = capsae_(*arguments)
    assert status == 2 and expected in err and out == ""
    assert err.startswith("capsae: ") and "Traceback" not in err


def test_missing_weights_are_explained_before_any_training(capsae_, monkeypatch, tmp_path):
    def offline(settings):
        raise FileNotFoundError("no connection. And more.")

    monkeypatch.setattr("capsae.features.backbone.load_backbone", offline)
    monkeypatch.setattr("capsae.sae.train_sae", lambda *_, **__: pytest.fail("trained"))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    status, _, err = capsae_("score", tmp_path)
    assert status == 2 and "give --checkpoint FILE" in err and "(no connection)" in err


def test_debug_shows_the_traceback(home):
    with pytest.raises(ValueError, match="nowhere"):
        main(["train", "nowhere", "--out", "x", "--debug"])


# --- train


def test_train_writes_a_folder_that_can_be_read_back(capsae_, experiment, tmp_path):
    from capsae import ClassActivationProfiles, TopKSAE

    status, out, _ = capsae_(
        "train", "--experiment", experiment, "--out", tmp_path / "sae", "--set", "sae.k=4", "--quiet"
    )
    assert status == 0 and "FVU" in out
    assert TopKSAE.load(tmp_path / "sae").config.k == 4
    assert ClassActivationProfiles.load(tmp_path / "sae" / "caps.safetensors").n_classes == 4
    assert {"provenance.json", "history.csv", "head.safetensors"} <= {p.name for p in (tmp_path / "sae").iterdir()}


def test_extract_makes_a_pack_again_from_the_experiments_images(capsae_, monkeypatch, tmp_path):
    """The real extraction is compared in test_packs; here: the right sources, backbone and folder."""
    import capsae.pipeline.packs

    made = {}
    sets = {name: small_experiment.features(name, 2) for name in ("train", "test", "near/shifted", "far/noise")}
    experiment = small_experiment.write(tmp_path, sets)
    for name in ("train", "test", "shifted", "noise"):
        for c in range(4):
            draw(tmp_path / name / f"class{c}", "0.png", "1.png")
    monkeypatch.setattr(capsae.pipeline.own_images, "load_weights", lambda run: "backbone")
    monkeypatch.setattr(
        capsae.pipeline.packs,
        "make_pack",
        lambda name, sources, backbone, out, **_: made.update(out=out, sources=sources),
    )
    status, out, _ = capsae_("extract", experiment, "--out", tmp_path / "new")
    assert status == 0 and made["out"] == tmp_path / "new" and "--set pack=" in out
    assert {name: len(source) for name, source in made["sources"].items()} == dict.fromkeys(sets, 8)
    monkeypatch.setattr(capsae.pipeline.own_images, "load_weights", lambda run: pytest.fail("pixels need no backbone"))
    monkeypatch.setattr(
        capsae.pipeline.packs, "add_pixels", lambda name, sources, out: made.update(pixels=sorted(sources))
    )
    status, out, _ = capsae_("extract", experiment, "--pixels", "--out", tmp_path / "new")
    assert status == 0 and made["pixels"] == sorted(sets) and "pixel statistics new" in out
    (tmp_path / "noise").rename(tmp_path / "gone")
    status, _, err = capsae_("extract", experiment, "--out", tmp_path / "new")
    assert status == 2 and "ood.far/noise.path" in err


# --- score and explain, with an extractor that knows the answer from the file's name


@pytest.fixture
def stubbed(monkeypatch):
    def extract(source, backbone, work, *, device, progress, logits, max_bad):
        rows, bad = [], []
        for row in range(len(source)):
            try:
                source.image(row)
                rows.append(row)
            except BadImage as error:
                bad.append({"id": error.id, "why": error.why})
        stems = [Path(source.ids[row]).stem.split("-") for row in rows]
        sets = {name: small_experiment.features(name, 5, seed=1) for name in ("test", "far/noise")}
        known = {"id": sets["test"], "ood": sets["far/noise"]}
        cls = np.array([known[kind].cls[int(at)] for kind, at in stems]).reshape(len(rows), small_experiment.DIM)
        return FeatureSet(cls, np.full(len(rows), -1), source.ids[rows], meta={"bad_images": bad})

    monkeypatch.setattr(capsae.features.extract, "extract", extract)
    monkeypatch.setattr(capsae.pipeline.own_images, "load_weights", lambda run, checkpoint: None)


def draw(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (8, 8)).save(folder / name)
    return folder


def test_score_writes_a_row_an_image_with_flags_and_reasons(capsae_, experiment, stubbed, tmp_path):
    images = draw(tmp_path / "images", "id-0.png", "id-12.png", "ood-3.png", "deep-0.png")
    (images / "inside").mkdir()
    (images / "deep-0.png").rename(images / "inside" / "ood-7.png")
    (images / "zero.jpg").touch()
    (images / "notes.txt").write_text("not an image")
    out = tmp_path / "scores.csv"
    options = ["--experiment", experiment, "--set", "val.fraction=0.4", "--out", out, "-q"]
    status, _, err = capsae_("score", images, images / "id-0.png", *options)
    table = pd.read_csv(out)
    assert status == 0
    assert list(table.columns) == "path predicted confidence epd epd_threshold rpd rpd_threshold flag reason".split()
    names = [Path(path).name for path in table["path"]]
    assert names == ["id-0.png", "id-12.png", "ood-7.png", "ood-3.png", "zero.jpg"]
    assert table["predicted"][:2].tolist() == ["n00000000_kind_0", "n00000002_kind_2"]
    assert table["flag"].astype("string").tolist()[:4] == ["False", "False", "True", "True"]
    good = table[table["reason"].isna()]
    assert ((good["epd"] > good["epd_threshold"]) == good["flag"].astype(bool)).all()
    assert table.loc[4, ["predicted", "confidence", "epd", "flag"]].isna().all() and table["reason"][4] == "empty file"
    assert "zero.jpg: empty file" in err and "2 of 4 images flagged" in err


def test_score_of_nothing_readable_is_an_error_with_its_rows(capsae_, experiment, stubbed, tmp_path):
    (tmp_path / "zero.jpg").touch()
    status, out, err = capsae_("score", "-p", experiment, tmp_path / "zero.jpg", "-q")
    assert status == 2 and "empty file" in out and "empty file" in err


def test_score_can_flag_by_our_own(capsae_, experiment, stubbed, tmp_path):
    status, out, _ = capsae_("score", "-p", experiment, draw(tmp_path, "ood-1.png"), "--method", "ours", "-q")
    table = pd.read_csv(io.StringIO(out))
    assert status == 0 and "epd" not in table and table["flag"][0] == (table["rpd"] > table["rpd_threshold"])[0]


def test_explain_an_image(capsae_, experiment, stubbed, tmp_path):
    image = draw(tmp_path, "id-12.png") / "id-12.png"
    status, out, _ = capsae_("explain", "-p", experiment, image, "-q", "--out", tmp_path / "why.csv")
    assert status == 0 and "predicted kind 2" in out and "in distribution" in out
    score = float(out.split("epd ")[1].split(",")[0])
    assert pd.read_csv(tmp_path / "why.csv")["share"].sum() == pytest.approx(score, abs=1e-4)


def test_explain_a_row_of_a_set(capsae_, experiment):
    status, out, _ = capsae_(
        "explain", "-p", experiment, "--from-set", "far/noise", "--row", 3, "--method", "ours", "-q"
    )
    assert status == 0 and out.startswith("far/noise, row 3: predicted kind") and "rpd" in out
    status, _, err = capsae_("explain", "-p", experiment, "--from-set", "far/noise", "--row", 80, "-q")
    assert status == 2 and "use 0..79" in err


@pytest.mark.parametrize("settings", [["abs_topk"], ["gsae", "sae.options.beta=2.0"], ["mp"]])
def test_another_variant_is_trained_scores_and_explains(capsae_, experiment, stubbed, tmp_path, settings):
    from capsae.sae import load

    chosen = [word for text in (f"sae.variant={settings[0]}", *settings[1:]) for word in ("--set", text)]
    status, _, _ = capsae_("train", "-p", experiment, "--out", tmp_path / "sae", "-q", *chosen)
    sae = load(tmp_path / "sae")
    assert status == 0 and sae.config.variant == settings[0] and len(sae.config.options) == len(settings) - 1
    status, out, _ = capsae_("score", "-p", experiment, draw(tmp_path, "id-1.png", "ood-1.png"), "-q", *chosen)
    assert status == 0 and np.isfinite(pd.read_csv(io.StringIO(out))["epd"]).tolist() == [True, True]
    status, out, _ = capsae_("explain", "-p", experiment, "--from-set", "far/noise", "--row", 3, "-q", *chosen)
    assert status == 0 and out.startswith("far/noise, row 3: predicted kind")


def test_folders_without_images_are_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match="holds no images"):
        find_images([tmp_path])


def test_reproduce_asks_for_the_experiments_pages(capsae_, monkeypatch):
    from companion import build

    asked = {}
    monkeypatch.setattr(build, "reproduce", lambda **given: asked.update(given) or 0)
    assert capsae_("reproduce", "mini80", "-n")[0] == 0
    assert asked["dry_run"] and asked["targets"] and all("mini80" in target for target in asked["targets"])
    assert capsae_("reproduce")[0] == 0 and asked["targets"] == []


def test_a_dry_run_names_each_page_and_why(monkeypatch, capsys):
    from companion import build

    asked = {"a/01": None, "a/02": "changed: drawing"}
    monkeypatch.setattr(build, "pages", lambda: {name: name for name in asked})
    monkeypatch.setattr(build, "why_stale", asked.get)
    monkeypatch.setattr(build.subprocess, "run", lambda *a, **k: pytest.fail("nothing is to be executed"))
    assert build.reproduce(dry_run=True) == 0
    assert capsys.readouterr().out == "a/02: changed: drawing\n1 of 2 pages would be executed\n"
    assert build.reproduce(dry_run=True, everything=True) == 0
    assert "a/01: fresh; everything was asked for" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "printed"),
    [
        ("zoo --jobs 0", "--jobs 0: 1 or more"),
        ("zoo --seeds -1", "--seeds -1: 0 or more"),
        ("reproduce --jobs -1", "--jobs -1: 1 or more"),
        ("train --out x --seed -3", "--seed -3: 0 or more"),
        ("train --out x --set seed=-3", "seed = -3"),
        ("train --out x --set sae.seed=-3", "seed is -3"),
        ("train --out x --set val.seed=-3", "val.seed = -3"),
        ("explain --from-set test --row -1", "--row -1: 0 or more"),
        ("explain --from-set test --top -3", "--top -3: 1 or more"),
        ("compare a b --top 0", "--top 0: 1 or more"),
        ("evaluate f.npz --n-boot -1", "--n-boot -1: 0 or more"),
        ("evaluate f.npz --seed x", "invalid"),
        ("score f.png --device cuda:99", "--device cuda:99 cannot be used here"),
        ("score f.png --device gpu", "--device gpu cannot be used here"),
        ("score f.png --device meta", "auto or cpu would do"),
    ],
)
def test_nonsense_is_refused_before_work(capsae_, command, printed):
    status, out, err = capsae_(*command.split())
    assert status == 2 and printed in err and out == "" and "Traceback" not in err


def test_the_store_is_listed_and_cleaned_of_what_no_settings_use(capsae_, tmp_path, monkeypatch):
    from capsae import Run
    from capsae.pipeline.store import Store

    monkeypatch.setenv("CAPSAE_HOME", str(tmp_path))
    store, run = Store(tmp_path), Run("imagenet20", store=tmp_path, progress=False)

    def keep(stage, experiment, config=None, inputs=None, made_by="other"):
        given = {"save": lambda value, folder: (folder / "x").write_text("x"), "load": lambda folder: "x"}
        config, inputs = config or {"a": 1}, inputs or {}
        store.get_or_make(stage, config, inputs, made_by, lambda: "x", **given, provenance={"experiment": experiment})

    keep("caps", "imagenet20", *run._recipe("caps"))
    keep("caps", "imagenet20")
    keep("table", "imagenet20", {"detectors": {"gone": {}}})
    keep("caps", "my-own.toml", {"b": 2})
    keep("zoo-fit", "imagenet20")
    status, out, _ = capsae_("store", "list")
    assert status == 0 and "5 artefacts, 0.0 MB" in out
    assert sorted(line.split()[-1] for line in out.splitlines()[1:-1]) == ["?", "?", "no", "no", "yes"]
    assert "2 artefacts, 0.0 MB would be removed" in capsae_("store", "clean", "--dry-run")[1]
    assert len(list(store.entries())) == 5
    assert "2 artefacts, 0.0 MB removed" in capsae_("store", "clean")[1]
    assert sorted((e.stage, e.provenance["experiment"]) for e in store.entries()) == [
        ("caps", "imagenet20"), ("caps", "my-own.toml"), ("zoo-fit", "imagenet20"),
    ]  # fmt: skip


# --- for real


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "data" / "imagenet20").is_dir(), reason=f"no images at {SHARED} (set CAPSAE_SHARED)")
def test_real_photographs_and_textures_are_told_apart(capsae_, tmp_path):
    import pyarrow.parquet as pq

    for name, path in {"photo": "imagenet20/validation.parquet", "texture": "far_textures/test.parquet"}.items():
        column = pq.read_table(SHARED / "data" / path, columns=["image"])["image"]
        for row in range(0, len(column), len(column) // 25):
            (tmp_path / f"{name}-{row:04d}.webp").write_bytes(column[row].as_py()["bytes"])
    weights = SHARED / "data" / "deit_tiny_patch16_224.fb_in1k.fp16.safetensors"
    out = tmp_path / "scores.csv"
    options = ["--checkpoint", weights, "--out", out, "-q", "--set", "sae.epochs=8", "--device", "cpu"]
    status, _, _ = capsae_("score", tmp_path, *options)
    table = pd.read_csv(out)
    flagged = table["flag"].astype(bool).groupby(table["path"].str.contains("texture")).mean()
    assert status == 0 and table["confidence"].between(0, 1).all()
    assert flagged[False] <= 0.2 and flagged[True] >= 0.8


def test_a_flag_that_means_little_is_called_so():
    import pandas as pd

    from capsae.pipeline.own_images import doubts

    tied = pd.DataFrame({"epd": [2.0, 2.0, 1.0], "epd_threshold": 2.0})
    assert [text.split()[0] for text in doubts(tied, ("epd",), 2)] == ["the", "most"]
    assert doubts(tied.assign(epd=[0.1, 0.2, 3.0]), ("epd",), 500) == []


def test_help_waits_for_no_library():
    code = "import sys; from capsae.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'pandas', 'pydantic')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_a_public_name_is_what_it_was_however_its_module_was_imported():
    code = (
        "import capsae.evaluation.evaluate, capsae.pipeline.run\nassert capsae.evaluate.__name__ == 'evaluate'\n"
        "from capsae import evaluate, detectors, TopKSAE\nassert callable(evaluate) and detectors.create('msp')\n"
        "assert set(capsae.__all__) <= set(dir(capsae))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
