"""What goes wrong outside of this program ends with a message: the thing, what was found, what would do."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import small_experiment
from PIL import Image

from capsae.__main__ import main
from capsae.cli import commands
from capsae.data.open import open_source
from capsae.files import LFS
from capsae.latents.explain import plain_name
from capsae.pipeline.arrays_io import arrays_from, load_arrays
from capsae.pipeline.experiment_errors import ExperimentError
from capsae.pipeline.experiments import load_experiment

POINTER = LFS + b"/spec/v1\noid sha256:4665a5ea423c2713d436b5ee50593a9640e0018c1550b5a0002f74190d6caea8\nsize 12\n"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("CAPSAE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


# --- files that are none


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty (0 bytes)"),
        (POINTER, "git lfs pull"),
        (b"PK\x03\x04" + bytes(40), "weights"),
        (b"<html>", "weights"),
    ],
)
def test_weights_that_are_none(suffix, content, message, tmp_path, capsys):
    weights, image = tmp_path / f"w{suffix}", tmp_path / "a.png"
    weights.write_bytes(content)
    Image.new("RGB", (8, 8)).save(image)
    experiment = str(small_experiment.write(tmp_path))
    assert main(["score", "-p", experiment, str(image), "--checkpoint", str(weights), "-q"]) == 2
    out, err = capsys.readouterr()
    assert message in err and str(weights) in err and err.startswith("capsae: ") and not out


@pytest.mark.parametrize(
    "name", ["f.npz", "f.safetensors", "f.csv", "f.parquet", "d/train/features.npy", "d/train.csv"]
)
@pytest.mark.parametrize("content", [b"", POINTER, b"\x93NUMPY", b"PAR1\x00", b"\xff\xfe\x00bad"])
def test_arrays_that_are_none(name, content, tmp_path, capsys):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    assert main(["evaluate", str(tmp_path / "d" if name[0] == "d" else path), "-q"]) == 2
    out, err = capsys.readouterr()
    assert path.name in err and err.startswith("capsae: ") and "Traceback" not in err and not out
    assert content != POINTER or "git lfs pull" in err


# --- tables of features


def frames(rng=None) -> dict[str, pd.DataFrame]:
    rng = rng or np.random.default_rng(0)
    found = {}
    for name, n in {"train": 60, "test": 20, "far/x": 20}.items():
        labels = np.arange(n) % 3
        features = rng.normal(size=(n, 4)) + 3 * np.eye(4)[labels] * (name != "far/x")
        found[name] = pd.DataFrame(features, columns=["b", "a", "c", "d"]).assign(label=labels)
    found["far/x"] = found["far/x"].drop(columns="label")
    return found


def table_of(kind: str, parts: dict[str, pd.DataFrame], folder: Path) -> Path:
    suffix, whole = f".{kind.split()[0]}", "folder" not in kind
    write = {".csv": lambda f, p: f.to_csv(p, index=False), ".parquet": lambda f, p: f.to_parquet(p)}[suffix]
    if whole:
        write(pd.concat([part.assign(set=name) for name, part in parts.items()]), folder / f"t{suffix}")
        return folder / f"t{suffix}"
    for name, part in parts.items():
        (folder / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        write(part, folder / "d" / f"{name}{suffix}")
    return folder / "d"


@pytest.mark.parametrize("kind", ["csv", "parquet", "csv folder", "parquet folder"])
def test_a_table_is_read_a_column_a_feature(kind, tmp_path):
    parts = frames()
    parts["test"] = parts["test"][["label", "d", "c", "b", "a"]]  # another order: columns go by name
    found = load_arrays(table_of(kind, parts, tmp_path))
    for name, part in frames().items():
        np.testing.assert_allclose(found.sets[name].cls, part[["b", "a", "c", "d"]], rtol=1e-6)
    assert found.sets["train"].labels.tolist() == parts["train"]["label"].tolist() and found.n_classes == 3
    assert (found.sets["far/x"].labels == -1).all()


@pytest.mark.parametrize("kind", ["csv", "parquet folder"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f["train"].insert(0, "path", "a.jpg"), "column 'path' of .* holds 'a.jpg'"),
        (lambda f: f["train"].__setitem__("label", 1.5), "label of train holds 1.5"),
        (lambda f: f["train"].__setitem__("label", "cat"), "label of train holds 'cat'"),
        (lambda f: f.pop("test"), "test/features"),
        (lambda f: f["test"].__setitem__("a", np.nan), "NaN"),
    ],
)
def test_a_table_that_does_not_fit_is_an_error(kind, change, message, tmp_path):
    parts = frames()
    change(parts)
    if "path" in parts["train"]:
        parts = {name: part.assign(path="a.jpg") for name, part in parts.items()}
    with pytest.raises(ValueError, match=message):
        load_arrays(table_of(kind, parts, tmp_path))


def test_a_table_without_sets_says_what_would_do(tmp_path):
    frames()["train"].to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(ValueError, match=r"no column 'set'.*folder with\s+train\.csv"):
        load_arrays(tmp_path / "t.csv")


def test_logits_and_scores_of_a_table(tmp_path):
    parts = frames()
    for part in parts.values():
        part[["logits/0", "logits/1", "logits/2"]] = part[["b", "a", "c"]].to_numpy()
        part["scores/mine"] = 1.0
    found = load_arrays(table_of("csv", parts, tmp_path))
    np.testing.assert_allclose(found.sets["test"].logits, parts["test"][["b", "a", "c"]], rtol=1e-6)
    assert found.sets["test"].cls.shape == (20, 4) and set(found.scores) == {"mine"}
    assert isinstance(
        arrays_from(
            {f"{n}/features": s.cls for n, s in found.sets.items()} | {"train/labels": found.sets["train"].labels}
        ).n_classes,
        int,
    )


# --- bare errors of the system


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EMFILE, errno.EDQUOT, errno.EIO])
def test_an_error_of_the_system_gets_its_path_and_a_remedy(code, monkeypatch, capsys):
    def fails(options):
        raise OSError(code, os.strerror(code), "/somewhere/file")

    monkeypatch.setattr(commands, "detectors", fails)
    assert main(["detectors"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("capsae: /somewhere/file: ") and f"errno {code}" in err and "[Errno" not in err
    assert code == errno.EIO or ":" in err.split("file: ")[1], "a remedy"


@pytest.mark.parametrize("error", [RuntimeError("one\ntwo"), KeyError("key"), AssertionError()])
def test_a_fault_of_ours_is_called_one(error, monkeypatch, capsys):
    def fails(options):
        raise error

    monkeypatch.setattr(commands, "detectors", fails)
    assert main(["detectors"]) == 1
    err = capsys.readouterr().err
    assert type(error).__name__ in err and "--debug shows where" in err and "Traceback" not in err
    with pytest.raises(type(error)):
        main(["detectors", "--debug"])


# --- names and paths


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "a\\b", "<script>x", "a\nb", ""])
def test_a_experiments_name_names_one_folder(name):
    with pytest.raises(ExperimentError, match="name"):
        load_experiment("digits", {"name": name})


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "a <img src=x onerror=y>", "</div>", "<!-- x"])
def test_no_title_is_a_tag(text):
    for key in ("title", "description"):
        with pytest.raises(ExperimentError, match=key):
            load_experiment("digits", {key: text})
    assert load_experiment("digits", {"title": "a < b & c > d <3"}).title
    assert "<" not in plain_name(text) and plain_name("\x1b[31mred\x07") == "?[31mred?"


@pytest.mark.parametrize("line", ["../secret.png 0", "a/../../secret.png 0", "{root}/../secret.png 0"])
def test_a_list_stays_below_its_root(line, tmp_path):
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (tmp_path / "list.txt").write_text(line.format(root=root) + "\n")
    with pytest.raises(ValueError, match="leaves its root"):
        open_source({"kind": "imglist", "list": str(tmp_path / "list.txt"), "root": str(root)})


def test_a_list_may_begin_with_a_byte_order_mark(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfa.png 0\r\n")
    source = open_source({"kind": "imglist", "list": str(tmp_path / "list.txt"), "root": str(tmp_path)})
    assert source.ids.tolist() == ["a.png"] and source.labels.tolist() == [0]


@pytest.mark.parametrize("folder", ["run[1]", "a*b", "what?"])
def test_brackets_in_a_path_are_letters(folder, tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    file, root = io.BytesIO(), tmp_path / folder
    Image.new("RGB", (8, 8)).save(file, "PNG")
    root.mkdir()
    pq.write_table(pa.table({"image": [file.getvalue()], "label": [0]}), root / "x[0].parquet")
    assert len(open_source({"kind": "parquet", "path": str(root / "x[0].parquet")})) == 1
    experiment = load_experiment("digits", {"data_root": str(root), "pack": "none"})
    for path in ("x[0].parquet", "x*.parquet"):
        test = experiment.model_copy(
            update={"test": experiment.test.__class__.model_construct(kind="parquet", path=path)}
        )
        assert len(open_source({"kind": "parquet", "path": str(test.resolve(path))})) == 1


# --- streams, signals, no home: in a process of its own


def ran(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "capsae", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        **options,
    )


@pytest.mark.parametrize(
    ("redirected", "status"),
    [(">&-", 0), ("2>&-", 0), (">&- 2>&-", 0), ("<&-", 0), (">/dev/full", 2), ("| head -c 1", 0)],
)
def test_streams_may_be_closed_or_full(redirected, status):
    if "/dev/full" in redirected and not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    line = f"set -o pipefail; {sys.executable} -m capsae detectors {redirected}"
    found = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert found.returncode == status, found.stderr
    assert "Traceback" not in found.stderr and "Exception ignored" not in found.stderr
    assert status == 0 or "the disk is full" in found.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_unwinds_and_removes_temporary_folders(number, tmp_path):
    code = (
        "import sys, tempfile, time\nfrom capsae.cli import commands\nfrom capsae.__main__ import main\n"
        "def waits(options):\n"
        "    with tempfile.TemporaryDirectory(dir=sys.argv[1]):\n        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
        "commands.detectors = waits\nsys.exit(main(['detectors']))"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # whoever runs the tests may ignore it (nohup)
    )  # fmt: skip
    assert run.stdout.readline() == "ready\n" and len(os.listdir(tmp_path)) == 1
    run.send_signal(number)
    _, err = run.communicate(timeout=60)
    assert run.returncode == (130 if number == signal.SIGINT else 143)
    assert "stopped; what is finished is kept" in err and "Traceback" not in err and os.listdir(tmp_path) == []


def test_no_home_is_no_fault(tmp_path):
    bare = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[1])}
    found = ran("experiments", "mini80", env=bare, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    locked = {**bare, "HOME": "/proc/nowhere", "XDG_CACHE_HOME": "/proc/nowhere"}
    found = ran("train", "mini80", "--out", str(tmp_path / "sae"), env=locked, cwd=tmp_path)
    assert found.returncode == 2 and "CAPSAE_HOME" in found.stderr and "Traceback" not in found.stderr
