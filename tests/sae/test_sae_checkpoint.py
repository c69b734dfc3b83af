"""Exact resume: a training killed at any moment goes on where it stood and ends with the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch

from capsae.features.featureset import read_tensors, write_tensors
from capsae.sae import SAEConfig, select, train_sae, train_saes
from capsae.sae.checkpoint import fingerprint
from capsae.sae.kernels.cpu_step import CompiledStep
from capsae.sae.rows import Rows
from capsae.sae.steps import PlainStep

needs_numba = pytest.mark.skipif(select.compiled() is None, reason="numba is not installed")
KINDS = [False, pytest.param(True, marks=needs_numba)]

SCRIPT = """if True:
    import json, sys
    import numpy as np
    from capsae.sae import SAEConfig, train_saes
    from capsae.features.featureset import write_tensors

    compiled, checkpoint, out = sys.argv[1] == "True", sys.argv[2] or None, sys.argv[3]
    x = np.random.default_rng(0).normal(size=(1100, 16)).astype(np.float32)
    settings = {"latents": 150, "epochs": 4, "batch_size": 20, "lr": 2e-2}
    configs = [SAEConfig(k=3, **settings), SAEConfig(k=2, seed=1, ema=0.99, **settings)]
    trained = train_saes(x[100:], configs, "cpu", x[:100], "best", False, compiled, checkpoint, 0.02)
    tensors = {f"{i}.{name}": t.numpy() for i, (sae, _) in enumerate(trained) for name, t in sae.state_dict().items()}
    histories = [(h.drop(columns="seconds").to_dict("list"), h.attrs["best_epoch"]) for _, h in trained]
    write_tensors(out, tensors, {"histories": histories})
"""
BATCHES = 50  # an epoch


def run(compiled: bool, checkpoint, out) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, str(compiled), str(checkpoint or ""), str(out)]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)


def steps_in(path) -> int:
    return read_tensors(path)[1]["progress"]["done"] if path.is_file() else 0


@pytest.mark.slow
@pytest.mark.parametrize("compiled", KINDS)
def test_killed_in_the_middle_of_an_epoch_it_ends_with_the_same_bits(compiled, tmp_path):
    whole = run(compiled, None, tmp_path / "whole.safetensors")
    path, stops = tmp_path / "training.safetensors", []
    for goal in (1, 70):  # kill -9 twice
        killed = run(compiled, tmp_path, tmp_path / "resumed.safetensors")
        while killed.poll() is None and steps_in(path) < goal:
            time.sleep(0.005)
        os.kill(killed.pid, signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL, killed.stderr.read()
        stops.append(steps_in(path))
    assert any(stop % BATCHES for stop in stops) and stops == sorted(set(stops)) and stops[-1] < 4 * BATCHES
    for process in (run(compiled, tmp_path, tmp_path / "resumed.safetensors"), whole):
        assert process.wait() == 0, process.stderr.read()
    (a, histories), (b, other) = (read_tensors(tmp_path / f"{name}.safetensors") for name in ("whole", "resumed"))
    assert histories == other
    assert all(np.array_equal(a[name], b[name]) for name in a) and a.keys() == b.keys()
    assert sorted(os.listdir(tmp_path)) == ["resumed.safetensors", "whole.safetensors"]  # the checkpoint has gone


class Killed(Exception):
    pass


def rows(n: int = 600) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, 12)).astype(np.float32)


def config(**options) -> SAEConfig:
    return SAEConfig(**({"latents": 200, "k": 2, "epochs": 5, "batch_size": 60, "lr": 3e-2} | options))


def stop_after(monkeypatch, n: int, configs, checkpoint, x=None, **options) -> None:
    """Train until step n, and stop there as if killed."""
    count = iter(range(n))

    def together(kind, steps):
        take = originals[kind](steps)

        def counted(batches, lrs):
            if next(count, None) is None:
                raise Killed
            take(batches, lrs)

        return counted

    originals = {kind: kind.together for kind in (PlainStep, CompiledStep)}
    with monkeypatch.context() as patched, pytest.raises(Killed):
        for kind in originals:
            patched.setattr(kind, "together", classmethod(together))
        options = {"progress": False, "checkpoint": checkpoint, "checkpoint_seconds": 0} | options
        train_saes(rows() if x is None else x, configs, "cpu", **options)


def count_steps(monkeypatch, steps: list) -> None:
    for kind in (PlainStep, CompiledStep):
        counted = kind.update_average
        monkeypatch.setattr(kind, "update_average", lambda s, f=counted: steps.append(1) or f(s))


def same(trained, other) -> None:
    for (a, first), (b, second) in zip(trained, other, strict=True):
        assert all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())
        pd.testing.assert_frame_equal(first.drop(columns="seconds"), second.drop(columns="seconds"))


@pytest.mark.parametrize("compiled", KINDS)
@pytest.mark.parametrize("n", [0, 9, 10, 37])
def test_it_goes_on_from_any_step(monkeypatch, tmp_path, n, compiled):
    configs = [config(), config(seed=1, ema=0.9), config(epochs=3)]
    options = {"held_out": rows(90), "keep": "best", "compiled": compiled}
    whole = train_saes(rows(), configs, "cpu", progress=False, **options)
    assert whole[0][1].dead_fraction.max() > 0  # AuxK and its dead set take part
    stop_after(monkeypatch, n, configs, tmp_path, **options)
    steps = []
    count_steps(monkeypatch, steps)
    again = train_saes(rows(), configs, "cpu", progress=False, checkpoint=tmp_path, **options)
    same(whole, again)
    assert len(steps) == 2 * max(0, 50 - n) + 30  # none is made twice
    assert not os.listdir(tmp_path)


def test_finished_parts_are_not_trained_again(monkeypatch, tmp_path):
    configs = [config(), config(epochs=3)]
    stop_after(monkeypatch, 60, configs, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["training-1.safetensors", "training.safetensors"]
    steps = []
    count_steps(monkeypatch, steps)
    again = train_saes(rows(), configs, "cpu", progress=False, checkpoint=tmp_path)
    assert len(steps) == 20
    monkeypatch.undo()
    same(train_saes(rows(), configs, "cpu", progress=False), again)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"config": {"lr": 1e-2}}, r"settings.\[0\].lr was 0.03, is 0.01"),
        ({"config": {"k": 3}}, r"settings.\[0\].k was 2, is 3"),
        ({"x": rows()[::-1].copy()}, "x.content was"),
        ({"x": rows(599)}, "x.rows was 600, is 599"),
        ({"held_out": rows(50)}, "held_out was None"),
        ({"compiled": False}, "step was 'CompiledStep', is 'PlainStep'"),
    ],
)
@needs_numba
def test_that_of_another_training_is_refused(monkeypatch, tmp_path, change, says):
    stop_after(monkeypatch, 12, [config()], tmp_path)
    before = (tmp_path / "training.safetensors").read_bytes()
    options = {"held_out": change.get("held_out"), "compiled": change.get("compiled"), "progress": False}
    with pytest.raises(ValueError, match=says):
        train_sae(change.get("x", rows()), config(**change.get("config", {})), "cpu", checkpoint=tmp_path, **options)
    assert (tmp_path / "training.safetensors").read_bytes() == before


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "foreign", "not ours"])
def test_a_damaged_one_is_named_and_training_starts_anew(monkeypatch, tmp_path, caplog, damage):
    path = tmp_path / "mine.safetensors"
    stop_after(monkeypatch, 12, [config()], path)
    content = bytearray(path.read_bytes())
    content[-1] ^= damage == "flipped"
    path.write_bytes({"cut": content[:-100], "empty": b"", "not ours": b"hello, world"}.get(damage, content))
    if damage == "foreign":
        write_tensors(path, {"a": np.ones(3)}, {})
    (tmp_path / "mine.safetensors.12345678.tmp").write_bytes(b"half")  # of a run that was killed while it wrote
    again = [train_sae(rows(), config(), "cpu", progress=False, checkpoint=path)]
    assert f"checkpoint {path} is damaged" in caplog.text
    same(again, [train_sae(rows(), config(), "cpu", progress=False)])
    assert not os.listdir(tmp_path)


def test_it_is_written_every_so_many_seconds(monkeypatch, tmp_path):
    now, saved = [0.0], []
    monkeypatch.setattr("capsae.sae.checkpoint.time.monotonic", lambda: now.__setitem__(0, now[0] + 1) or now[0])
    write = "capsae.sae.checkpoint.write_tensors"
    monkeypatch.setattr(write, lambda path, arrays, info: saved.append(info["progress"]["done"]))
    train_sae(rows(), config(), "cpu", progress=False, checkpoint=tmp_path, checkpoint_seconds=10)
    assert 2 <= len(saved) <= 6


def test_a_fingerprint_notices_any_change():
    x = torch.from_numpy(rows(500))
    of = lambda x, first=0: fingerprint(Rows(x, first, 500, 1.0))  # noqa: E731
    exchanged, changed = x.clone(), x.clone()
    exchanged[[3, 4]] = x[[4, 3]]
    changed[7, 7] = torch.nextafter(changed[7, 7], torch.tensor(9.0))
    assert len({of(x), of(exchanged), of(changed), of(x[:-1]), of(x, 1)}) == 5
    assert of(x) == of(x.clone())
    assert json.loads(json.dumps(of(x))) == of(x)
