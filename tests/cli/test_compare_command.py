"""``capsae compare A B`` on sets of an experiment, on folders of images, and on what is too small for it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import small_experiment

from capsae.__main__ import main
from capsae.cli import report_compare as compare_report
from capsae.pipeline.latents import of_run
from capsae.pipeline.run import Run

SHARED = Path(os.environ.get("CAPSAE_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data"
WEIGHTS = SHARED / "deit_tiny_patch16_224.fb_in1k.fp16.safetensors"


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
def compare(home, capsys):
    """Run ``capsae compare``: (status, stdout, stderr)."""

    def call(*arguments):
        status = main(["compare", "-q", *(str(argument) for argument in arguments)])
        return (status, *capsys.readouterr())

    return call


def test_two_sets_of_a_experiment_without_any_image(compare, experiment, tmp_path):
    out = tmp_path / "differences.csv"
    status, printed, _ = compare("test", "near/shifted", "-p", experiment, "--out", out, "--top", 2)
    table = pd.read_csv(out)
    tested, differs = table["q"].notna().sum(), table["differs"].sum()
    assert status == 0 and "A: set test of experiment small, 80 images" in printed and "B: set near/shifted" in printed
    assert f"{tested} of {len(table)} latents" in printed and f") {differs} differ: " in printed
    more = printed.split("More often in B; ")[1].split("\n\n")[0].splitlines()[1:]
    first = table[table["more"] == "B"].nlargest(1, "difference").iloc[0]
    assert more[0].split()[0] == "latent" and len(more) <= 3 and more[1].split()[0] == str(first["latent"])
    assert f"{100 * first['frequency_a']:.1f}  " in more[1] and first["examples_b"].split(" | ")[0] in more[1]
    assert table["differs"].sum() > 3 and (table["differs"] == (table["q"] <= 0.05)).all()
    assert {"name", "kind", "classes", "examples_a", "lo", "hi", "q_strength"} <= set(table)
    first = table[table["fired_b"] > 0].iloc[0]
    assert first["examples_b"].startswith("near/shifted-")
    strict = compare("test", "near/shifted", "-p", experiment, "--fdr", "0.000001", "--out", out)
    assert strict[0] == 0 and pd.read_csv(out)["differs"].sum() < table["differs"].sum()


def test_a_set_and_itself_do_not_differ(home, experiment):
    run = Run(experiment, progress=False)
    one = compare_report.side(run, "test")
    printed = compare_report.report(compare_report.compare_sides(one, one, of_run(run)), one, one)
    assert ") 0 differ: 0 more in B, 0 more in A" in printed and "The most certain difference" in printed
    assert "unadjusted" not in printed
    assert f"Caution: {len(one.ids)} images are in A and in B" in printed


def test_the_help_has_an_example_with_two_folders(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    assert "capsae compare --experiment imagenet20 holiday/ archive/" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["test", "nowhere"], "B, 'nowhere', is no folder of images and no set of experiment 'small', which has train"),
        (["EMPTY", "test"], "holds no images"),
        (["test", "near/shifted", "--fdr", "5"], "--fdr 5.0"),
        (["test", "near/shifted", "--out", "no/such/folder/x.csv"], "no folder"),
    ],
)
def test_wrong_input_is_named(compare, experiment, tmp_path, arguments, expected):
    (tmp_path / "EMPTY").mkdir()
    arguments = [str(tmp_path / a) if a == "EMPTY" else a for a in arguments]
    status, out, err = compare("-p", experiment, *arguments)
    assert status == 2 and expected in err and not out


real = pytest.mark.skipif(not WEIGHTS.is_file(), reason=f"no images and weights at {SHARED} (set CAPSAE_SHARED)")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of photographs, of textures, of five textures, and of one file that is no image."""
    import pyarrow.parquet as pq

    root = tmp_path_factory.mktemp("images")
    for name, (path, n) in {
        "photos": ("imagenet20/validation.parquet", 40),
        "textures": ("far_textures/test.parquet", 40),
        "few": ("far_textures/test.parquet", 5),
    }.items():
        column = pq.read_table(SHARED / path, columns=["image"])["image"]
        (root / name).mkdir()
        for row in np.linspace(0, len(column) - 1, n).astype(int):
            (root / name / f"{row:04d}.webp").write_bytes(column[int(row)].as_py()["bytes"])
    (root / "textures" / "broken.jpg").write_bytes(b"no image")
    (root / "broken").mkdir()
    (root / "broken" / "a.png").write_bytes(b"none either")
    return root


FAST = ["--checkpoint", str(WEIGHTS), "--set", "sae.epochs=2", "--device", "cpu"]


@real
@pytest.mark.slow
def test_folders_of_real_images(compare, folders, tmp_path):
    out = tmp_path / "out.csv"
    status, printed, err = compare(folders / "photos", folders / "textures", *FAST, "--out", out)
    table = pd.read_csv(out)
    assert status == 0 and f"images under {folders / 'textures'}, 40 images" in printed
    assert "skipped" in err and "broken.jpg" in err
    assert table["differs"].any() and "More often in" in printed and ".webp" in printed
    assert (table["n_a"] == 40).all() and printed.count("Caution") == 1


@real
@pytest.mark.slow
def test_few_images_and_none_that_can_be_read(compare, folders):
    status, printed, _ = compare("far/textures", folders / "few", *FAST)
    assert status == 0 and "Caution: B has 5 images" in printed and "8 or more images would do" in printed
    status, _, err = compare("test", folders / "broken", *FAST)
    assert status == 2 and "none of its 1 images can be read" in err


def test_the_same_set_twice_is_refused_at_once(compare, experiment):
    status, _, err = compare("test", "test", "-p", experiment)
    assert status == 2 and "A and B are both 'test'" in err
