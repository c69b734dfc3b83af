"""What a command writes: checked before the work, never over a stranger's file, whole or not at all."""

from __future__ import annotations

import errno
import io
import json
import os
import stat
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import small_experiment
from PIL import Image

import capsae.cli.images
import capsae.features.extract
import capsae.pipeline.own_images
from capsae.__main__ import main
from capsae.data.images import BadImage
from capsae.features.featureset import FeatureSet
from capsae.files import LFS, Output, beside, check_folder, csv_text, refuse_stub, replacing
from capsae.pipeline.arrays import Evaluation
from capsae.pipeline.own_images import Scorer

HEAD = "path,predicted,"


# --- files


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p: p.mkdir(), "is a folder"),
        (lambda p: p.write_text("a,b\n1,2\n"), "is no output of this command"),
        (lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200)), "is no output of this command"),
        (lambda p: p.with_name("t.csv.part").write_text("my notes"), "t.csv.part"),
        (lambda p: p.parent.chmod(0o555), "cannot be written to"),
    ],
)
def test_an_output_is_refused_before_any_work(make, expected, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    folder.mkdir()
    make(folder / "t.csv")
    monkeypatch.setattr(os, "access", lambda path, mode: bool(os.stat(path).st_mode & stat.S_IWUSR))  # as root, too
    with pytest.raises(OSError, match=expected) as error:
        Output(folder / "t.csv", HEAD)
    assert "--out" in str(error.value) and error.value.errno is None
    folder.chmod(0o755)


@pytest.mark.parametrize("text", ["", "\n", "path,predicted,epd\na,b,1\n", "\ufeffpath,predicted,x\n", "path,pre"])
def test_ones_own_table_is_replaced(text, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(text, encoding="utf-8")
    Output(path, HEAD).table(pd.DataFrame({"path": ["a"], "predicted": ["b"], "epd": [1.5]}))
    assert path.read_text() == "path,predicted,epd\na,b,1.5\n" and os.listdir(tmp_path) == ["t.csv"]


def test_a_link_stays_a_link_and_a_device_a_device(tmp_path):
    (tmp_path / "link.csv").symlink_to(tmp_path / "there.csv")
    Output(tmp_path / "link.csv", HEAD).write("path,predicted,\n")
    assert (tmp_path / "link.csv").is_symlink() and (tmp_path / "there.csv").is_file()
    Output("/dev/null", HEAD).write("x")
    assert not Path("/dev/null").is_file()


@pytest.mark.parametrize("rows", [False, True])
def test_a_full_disk_leaves_the_old_table_and_names_it(rows, tmp_path, monkeypatch):
    path = tmp_path / "t.csv"
    path.write_text(f"{HEAD}old\n")
    out = Output(path, HEAD)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space") as error:
        if rows:
            with out.rows() as add:
                add(pd.DataFrame({"path": ["a"]}))
                full()
        else:
            out.write("new")
    assert path.read_text() == f"{HEAD}old\n"
    assert rows or error.value.filename == str(path)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EPERM, errno.ENOTSUP])
def test_a_disk_that_knows_no_fsync_or_chmod_is_written_to(code, tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refused)
    monkeypatch.setattr(os, "chmod", refused)
    with replacing(tmp_path / "a") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "a").read_text() == "new" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("table.csv", "table.json"),
        ("lr0.05", "lr0.05.json"),
        ("lr0.10", "lr0.10.json"),
        ("table.json", "table.json.json"),
        ("a.tsv", "a.tsv.json"),
    ],
)
def test_settings_go_beside_and_never_over_the_table(name, settings, tmp_path):
    assert beside(name, ".json").name == settings
    table = pd.DataFrame({"method": ["epd"], "set": ["test"], "value": [0.5]})
    for _ in range(2):  # again over its own
        written = Evaluation(table, pd.DataFrame(), {}, [], {"seed": 0}).save(tmp_path / name)
    assert [path.name for path in written][::2] == [name, settings]
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / name), table)
    assert json.loads((tmp_path / settings).read_text())["settings"] == {"seed": 0}


def test_two_tables_do_not_share_their_settings(tmp_path):
    table = pd.DataFrame({"method": ["epd"], "set": ["test"], "value": [0.5]})
    Evaluation(table, pd.DataFrame(), {}, [], {"seed": 0}).save(tmp_path / "t.csv")
    with pytest.raises(FileExistsError, match=r"t\.json"):
        Evaluation(table, pd.DataFrame(), {}, [], {"seed": 1}).save(tmp_path / "t")


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    names = ("cfg.json", "a.safetensors")
    assert check_folder(tmp_path / "new" / "deep", names, "mark.json", "digests").name == "deep"
    (tmp_path / "notes.txt").touch()
    check_folder(tmp_path, names, "mark.json", "digests")  # holds nothing that would be replaced
    (tmp_path / "cfg.json").write_text("{}")
    for mark in ("", "[]", "{}", '{"other": 1}'):
        (tmp_path / "mark.json").write_text(mark)
        with pytest.raises(FileExistsError, match=r"cfg\.json, which this command did not write"):
            check_folder(tmp_path, names, "mark.json", "digests")
    (tmp_path / "mark.json").write_text('{"digests": {}}')
    check_folder(tmp_path, names, "mark.json", "digests")
    with pytest.raises(NotADirectoryError, match="is a file"):
        check_folder(tmp_path / "notes.txt", names, "mark.json", "digests")


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t"])
def test_no_cell_is_a_formula(start):
    frame = pd.DataFrame({f"{start}name": [f"{start}cmd|' /C calc'!A0", "plain"], "value": [-1.5, 2.0]})
    text = csv_text(frame)
    again = pd.read_csv(io.StringIO(text))
    assert again.columns[0] == f"'{start}name" and again.iloc[0, 0].startswith(f"'{start}")
    assert again["value"].tolist() == [-1.5, 2.0], "a number is none"


@pytest.mark.parametrize(
    ("content", "expected"), [(b"", "is empty"), (LFS + b"/spec/v1\noid sha256:00\n", "git lfs pull")]
)
def test_stubs_in_place_of_files_are_named(content, expected, tmp_path):
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(ValueError, match=expected):
        refuse_stub(tmp_path / "weights.pth")


# --- score: rows are written as they are made, and the same command goes on


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAPSAE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return str(small_experiment.write(tmp_path_factory.mktemp("experiment")))


@pytest.fixture
def extracted(home, monkeypatch):
    """An extractor that knows the features from a file's number; the names of the images it was asked for."""
    asked, known = [], small_experiment.features("test", 5, seed=1).cls

    def extract(source, backbone, work, *, device, progress, logits, max_bad):
        rows, bad = [], []
        for row in range(len(source)):
            try:
                source.image(row)
                rows.append(row)
            except BadImage as error:
                bad.append({"id": error.id, "why": error.why})
        asked.extend(source.ids[rows].tolist())
        numbers = [int("".join(filter(str.isdigit, Path(source.ids[row]).stem))) for row in rows]
        cls = known[numbers].reshape(len(rows), small_experiment.DIM)
        return FeatureSet(cls, np.full(len(rows), -1), source.ids[rows], meta={"bad_images": bad})

    monkeypatch.setattr(capsae.features.extract, "extract", extract)
    monkeypatch.setattr(capsae.pipeline.own_images, "weights_of", lambda settings, checkpoint=None: None)
    monkeypatch.setattr(capsae.pipeline.own_images, "BLOCK", {"cpu": 2})
    return asked


def drawn(folder: Path, *names: str | bytes) -> Path:
    folder.mkdir()
    for name in names:
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, "PNG")
        with open(os.path.join(os.fsencode(folder), os.fsencode(name)), "wb") as out:
            out.write(file.getvalue())
    return folder


@pytest.mark.parametrize("kill", [KeyboardInterrupt, MemoryError, OSError(errno.ENOSPC, "No space left on device")])
def test_a_stopped_score_keeps_its_rows_and_goes_on(kill, extracted, experiment, tmp_path, monkeypatch, capsys):
    images = drawn(tmp_path / "images", *(f"{i}.png" for i in range(6)))
    (images / "7-zero.png").touch()
    out, command = (
        tmp_path / "s.csv",
        ["score", "-p", experiment, str(images), "-q", "--set", f"seed={hash(str(kill)) % 97}"],
    )
    assert main([*command, "--out", str(tmp_path / "whole.csv")]) == 0
    whole, stub = pd.read_csv(tmp_path / "whole.csv"), capsae.features.extract.extract
    for left in (Path(os.environ["CAPSAE_HOME"]) / "scratch").glob("score-*/rows.jsonl"):
        left.unlink()
    extracted.clear()

    def stops(source, *given, **options):
        if len(extracted) >= 4:
            raise kill
        return stub(source, *given, **options)

    monkeypatch.setattr(capsae.features.extract, "extract", stops)
    assert main([*command, "--out", str(out)]) == (130 if kill is KeyboardInterrupt else 2)
    assert len(pd.read_csv(f"{out}.part")) == 4 and not out.exists()
    monkeypatch.setattr(capsae.features.extract, "extract", stub)
    with open(next(Path(os.environ["CAPSAE_HOME"]).glob("scratch/score-*/rows.jsonl")), "a") as file:
        file.write('["torn')
    extracted.clear()
    assert main([*command, "--out", str(out)]) == 0
    assert [Path(name).name for name in extracted] == ["4.png", "5.png"]
    pd.testing.assert_frame_equal(pd.read_csv(out), whole)
    assert not Path(f"{out}.part").exists() and "Traceback" not in capsys.readouterr().err
    Image.new("RGB", (8, 8), "red").save(images / "0.png")  # another image of the same name
    extracted.clear()
    assert main([*command, "--out", str(out)]) == 0
    assert [Path(name).name for name in extracted] == ["0.png"]


def test_features_of_the_images_are_kept_if_asked(extracted, experiment, tmp_path):
    images = drawn(tmp_path / "images", *(f"{i}.png" for i in range(5)))
    (images / "9-zero.png").touch()
    command = ["score", "-p", experiment, str(images), "-q", "--out", str(tmp_path / "s.csv")]
    assert main([*command, "--features", str(tmp_path / "f.safetensors")]) == 0
    kept = FeatureSet.load(tmp_path / "f.safetensors")
    np.testing.assert_array_equal(kept.cls, small_experiment.features("test", 5, seed=1).cls[:5])
    assert [Path(name).name for name in kept.ids] == [f"{i}.png" for i in range(5)]
    assert [Path(each["id"]).name for each in kept.meta["bad_images"]] == ["9-zero.png"]
    assert main([*command[:-1], "same", "--features", "same"]) == 2


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS knows no file names that are not UTF-8")
def test_names_that_are_no_utf8_lose_nothing(extracted, experiment, tmp_path, monkeypatch):
    images = drawn(tmp_path / "images", "1.png", b"caf\xe9 2.png", "ﬁ\r\n3.png")
    out = tmp_path / "s.csv"
    features = ["--features", str(tmp_path / "f.safetensors")]
    assert main(["score", "-p", experiment, str(images), "-q", "--out", str(out), *features]) == 0
    table = pd.read_csv(out)
    assert (
        len(table) == 3 and table["epd"].notna().all() and table["path"].str.contains(r"caf\udce9", regex=False).any()
    )
    assert any("caf\udce9" in name for name in FeatureSet.load(tmp_path / "f.safetensors").ids)
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["score", "-p", experiment, str(images), "-q"]) == 0
    text = stream.buffer.getvalue().decode("ascii")
    assert len(pd.read_csv(io.StringIO(text))) == 3 and r"caf\udce9" in text


# --- a trained folder is enough to deploy


def test_train_leaves_a_strangers_folder_alone(home, experiment, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("capsae.sae.train_sae", lambda *_, **__: pytest.fail("work had started"))
    (tmp_path / "cfg.json").write_text('{"architecture": "topk"}')
    assert main(["train", "-p", experiment, "--out", str(tmp_path), "--set", "seed=5", "-q"]) == 2
    assert "cfg.json, which this command did not write" in capsys.readouterr().err
    assert (tmp_path / "cfg.json").read_text() == '{"architecture": "topk"}'


def test_a_trained_folder_scores_without_experiment_images_and_store(
    extracted, experiment, tmp_path, monkeypatch, capsys
):
    images = drawn(tmp_path / "images", *(f"{i}.png" for i in range(4)))
    (images / "5-zero.png").touch()
    folder = str(tmp_path / "sae")
    for _ in range(2):  # again over its own
        assert main(["train", "-p", experiment, "--out", folder, "-q"]) == 0
    assert sorted(os.listdir(folder)) == sorted(capsae.cli.images.TRAINED)
    assert main(["score", "-p", experiment, str(images), "-q", "--out", str(tmp_path / "a.csv")]) == 0
    monkeypatch.setenv("CAPSAE_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(
        "capsae.pipeline.experiments.load_experiment", lambda *_: pytest.fail("no experiment is needed")
    )
    assert main(["score", "--sae", folder, str(images), "-q", "--out", str(tmp_path / "b.csv")]) == 0
    one, two = pd.read_csv(tmp_path / "a.csv"), pd.read_csv(tmp_path / "b.csv")
    pd.testing.assert_frame_equal(one, two, rtol=1e-9)

    found = capsae.Scorer.load(folder)([images / f"{i}.png" for i in range(4)] + [images / "5-zero.png"])
    np.testing.assert_allclose(found.scores, one["epd"], rtol=1e-6)
    assert found.flags.tolist() == [*one["flag"][:4].astype(bool), True] and found.predicted.tolist()[4] == ""
    assert found.predicted[:4].tolist() == one["predicted"][:4].tolist()
    capsys.readouterr()
    for arguments, expected in {
        ("--sae", folder, "--method", "knn"): "no threshold of 'knn'; it holds those of epd, rpd",
        ("--sae", str(images)): "holds no scorer.json",
        ("--sae", folder, "-p", experiment): "leave --experiment and --set out",
    }.items():
        assert main(["score", str(images), "-q", *arguments]) == 2
        assert expected in capsys.readouterr().err


def test_a_scorer_takes_what_a_service_has_at_hand(home, tmp_path, monkeypatch):
    seen = []

    def extract(source, *_, **__):
        seen.extend(source.image(row).size for row in range(len(source)))
        cls = small_experiment.features("test", 1).cls[: len(source)]
        return FeatureSet(cls, np.full(len(source), -1), source.ids, meta={"bad_images": []})

    monkeypatch.setattr(capsae.features.extract, "extract", extract)
    monkeypatch.setattr(capsae.pipeline.own_images, "weights_of", lambda settings, checkpoint=None: None)
    assert main(["train", "-p", str(small_experiment.write(tmp_path)), "--out", str(tmp_path / "sae"), "-q"]) == 0
    image, file = Image.new("RGB", (8, 4)), io.BytesIO()
    image.save(file, "PNG")
    image.save(tmp_path / "a.png")
    scores, flags, predicted = Scorer.load(tmp_path / "sae")(
        [image, file.getvalue(), np.asarray(image), str(tmp_path / "a.png")]
    )
    assert seen == [(8, 4)] * 4 and np.isfinite(scores).all() and flags.dtype == bool and len(predicted) == 4
