from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from capsae.files import default_root, replacing
from capsae.pipeline.store import Store, UnreadableArtefact, artefact_digest, check_files

CODE = "digest of the code"


def save(value, folder):
    save_file({"x": value}, folder / "x.safetensors")


def load(folder):
    return load_file(folder / "x.safetensors")["x"]


def get(store, config=None, inputs=None, make=lambda: np.arange(1000.0), code=CODE, save=save, load=load):
    return store.get_or_make(
        "stage", config or {"a": 1}, inputs or {"b": "c"}, code, make, save, load, {"experiment": "p"}
    )


def never():
    raise AssertionError("made again")


def folder(store):
    return store.path("stage", artefact_digest("stage", {"a": 1}, {"b": "c"}, CODE))


def test_made_once_then_read(tmp_path):
    assert get(Store(tmp_path)).tolist() == get(Store(tmp_path), make=never).tolist()


def test_config_input_and_stage_each_make_it_anew(tmp_path):
    get(Store(tmp_path))
    for change in ({"config": {"a": 2}}, {"inputs": {"b": "d"}}, {"code": "another"}):
        with pytest.raises(AssertionError, match="made again"):
            get(Store(tmp_path), make=never, **change)


def test_provenance_says_what_was_done(tmp_path):
    store = Store(tmp_path)
    get(store)
    digest = artefact_digest("stage", {"a": 1}, {"b": "c"}, CODE)
    record = store.provenance("stage", digest)
    assert record["experiment"] == "p" and record["config"] == {"a": 1} and record["inputs"] == {"b": "c"}
    assert record["wall_s"] >= 0 and record["peak_rss_mb"] > 10 and "torch" in record["versions"]
    assert record["files"]["x.safetensors"]["bytes"] == (folder(store) / "x.safetensors").stat().st_size
    assert store.provenance("stage", "0" * 64) is None


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "provenance", "no provenance"])
def test_a_damaged_artefact_is_named_and_made_again(tmp_path, caplog, damage):
    store = Store(tmp_path)
    get(store)
    path = folder(store) / ("provenance.json" if "provenance" in damage else "x.safetensors")
    content = path.read_bytes()
    if damage in ("truncate", "provenance"):
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        path.unlink()
    with pytest.raises(ValueError, match=path.name):
        check_files(folder(store))
    assert get(store, make=lambda: np.ones(3)).tolist() == [1, 1, 1]
    assert path.name in caplog.text and str(folder(store)) in caplog.text
    assert get(store, make=never).tolist() == [1, 1, 1]
    assert not [p for p in folder(store).parent.iterdir() if p.name.startswith(".")], "nothing is left behind"


@pytest.mark.parametrize("where", ["make", "save"])
def test_an_error_leaves_no_artefact(tmp_path, where):
    store = Store(tmp_path)

    def fail(*_):
        raise RuntimeError("no luck")

    def half(value, folder):
        save(value, folder)
        fail()

    with pytest.raises(RuntimeError, match="no luck"):
        get(store, **({"make": fail} if where == "make" else {"save": half}))
    assert not folder(store).exists()
    assert len(get(store)) == 1000


KILLED = """
import sys, time, numpy as np
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_store import Store, get, save
def slow_save(value, folder):
    save(value, folder)
    Path({ready!r}).touch()
    time.sleep(60)
def slow_make():
    Path({ready!r}).touch()
    time.sleep(60)
get(Store({root!r}), **({{"make": slow_make}} if {where!r} == "make" else {{"save": slow_save}}))
"""


@pytest.mark.parametrize("where", ["make", "save"])
def test_kill_9_leaves_the_old_state(tmp_path, where):
    ready, root = tmp_path / "ready", tmp_path / "store"
    code = KILLED.format(tests=os.path.dirname(__file__), ready=str(ready), root=str(root), where=where)
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    deadline = time.time() + 60
    while not ready.exists() and time.time() < deadline and process.poll() is None:
        time.sleep(0.05)
    assert ready.exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    store = Store(root)
    assert not folder(store).exists()
    assert len(get(store)) == 1000  # neither the lock nor the half-written folder stands in the way
    assert sorted(p.name for p in folder(store).parent.iterdir()) == [folder(store).name, folder(store).name + ".lock"]


def _make_slowly(root, log):
    def make():
        with open(log, "a") as file:
            file.write("made\n")
        time.sleep(0.5)
        return np.arange(3.0)

    get(Store(root), make=make)


def test_two_processes_share_one_making(tmp_path):
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    log = tmp_path / "log"
    both = [context.Process(target=_make_slowly, args=(tmp_path / "store", log)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert log.read_text() == "made\n"


def test_scratch_goes_with_success_and_stays_without(tmp_path):
    store, digest = Store(tmp_path), artefact_digest("stage", {"a": 1}, {"b": "c"}, CODE)

    def make():
        (store.scratch("stage", digest) / "shard").write_text("1")
        return np.arange(3.0)

    with pytest.raises(RuntimeError):
        get(store, make=lambda: (make(), (_ for _ in ()).throw(RuntimeError("killed"))))
    assert (store.scratch("stage", digest) / "shard").is_file()
    get(store, make=make)
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "Too many open files"),
        PermissionError(errno.EACCES, "Permission denied"),
        MemoryError("cannot allocate"),
        RuntimeError("Found no NVIDIA driver on your system"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_is_wrong_here_and_now_deletes_nothing(tmp_path, error):
    store = Store(tmp_path)
    get(store)

    def fail(_):
        raise error

    with pytest.raises(UnreadableArtefact, match=f"{folder(store)} is whole and kept.*{error.args[-1]}"):
        get(store, make=never, load=fail)
    assert get(store, make=never).tolist() == list(range(1000))


def test_files_that_may_not_be_read_are_no_damage(tmp_path, monkeypatch):
    store = Store(tmp_path)
    get(store)
    for code in (errno.EACCES, errno.EMFILE):

        def fail(path, _code=code):
            raise OSError(_code, os.strerror(_code), str(path))

        with monkeypatch.context() as patched:
            patched.setattr("capsae.pipeline.store.file_record", fail)
            with pytest.raises(UnreadableArtefact, match="x.safetensors"):
                get(store, make=never)
    assert len(get(store, make=never)) == 1000


@pytest.mark.parametrize("where", ["make", "save"])
def test_a_damaged_artefact_stays_until_the_new_one_is_whole(tmp_path, where):
    store = Store(tmp_path)
    get(store)
    path = folder(store) / "x.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    damaged = path.read_bytes()

    def fail(*_):
        raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="no luck"):
        get(store, **{where: fail})
    assert path.read_bytes() == damaged
    assert len(get(store)) == 1000 and len(get(store, make=never)) == 1000


def test_a_file_system_without_locks_or_fsync_is_used_all_the_same(tmp_path, monkeypatch):
    def no_locks(*_, **__):
        raise OSError(errno.ENOLCK, "No locks available")

    def no_fsync(_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr("capsae.pipeline.store.FileLock.acquire", no_locks)
    monkeypatch.setattr(os, "fsync", no_fsync)
    store = Store(tmp_path)
    assert len(get(store)) == 1000 and len(get(store, make=never)) == 1000


def test_a_file_system_without_modes_is_used_all_the_same(tmp_path, monkeypatch):
    def no_modes(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", no_modes)
    with replacing(tmp_path / "a.txt") as path:
        path.write_text("new")
    assert (tmp_path / "a.txt").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_a_lock_that_cannot_be_had_for_another_reason_is_an_error(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("capsae.pipeline.store.FileLock.acquire", fail)
    with pytest.raises(OSError, match="Too many open files"):
        get(Store(tmp_path))


def test_entries_are_what_is_kept_and_can_be_removed(tmp_path):
    store = Store(tmp_path)
    assert list(store.entries()) == []
    get(store)
    store.scratch("sae", "f" * 64)
    one, scratch = sorted(store.entries(), key=lambda entry: entry.stage == "scratch")
    assert (one.stage, one.key, one.path) == ("stage", folder(store).name, folder(store))
    assert one.size == (folder(store) / "x.safetensors").stat().st_size and 0 <= one.age < 600
    assert one.provenance["experiment"] == "p" and scratch.provenance == {} and scratch.key.startswith("sae-")
    store.remove(one)
    assert not list((tmp_path / "stage").iterdir())
    assert len(get(store)) == 1000


def test_default_root(tmp_path, monkeypatch):
    monkeypatch.setenv("CAPSAE_HOME", str(tmp_path / "home"))
    assert default_root() == tmp_path / "home"
    monkeypatch.delenv("CAPSAE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert default_root() == tmp_path / "cache" / "capsae"
    (tmp_path / ".capsae").mkdir()
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    assert default_root() == tmp_path / ".capsae"
