"""Data-parallel training: two Gloo processes give the SAE of one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import ranks
import small_experiment
import torch

from capsae.features.featureset import read_tensors
from capsae.sae import SAEConfig, TopKSAE, train_sae

SCRIPT = """if True:
    import json, sys
    import numpy as np
    from capsae import distributed
    from capsae.features.featureset import write_tensors
    from capsae.sae import SAEConfig, train_sae

    distributed.start()
    out, options, cut = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    x, held = np.load(f"{out}/x.npy"), np.load(f"{out}/held.npy")
    x, held = (np.split(rows, at)[distributed.rank()] for rows, at in zip((x, held), cut))
    sae, history = train_sae(x, SAEConfig(**options), "cpu", held, "best", progress=False, sharded=True)
    tensors = {name: t.numpy() for name, t in sae.state_dict().items()}
    info = {"history": history.drop(columns="seconds").to_dict("list")} | history.attrs
    write_tensors(f"{out}/{distributed.rank()}.safetensors", tensors, info)
"""


def planted(n: int, d: int = 16, m: int = 40, k: int = 3) -> np.ndarray:
    rng = np.random.default_rng(0)
    atoms = rng.normal(size=(m, d))
    code = np.zeros((n, m))
    for row in code:
        row[rng.choice(m, k, replace=False)] = rng.uniform(1, 2, k)
    return (code @ atoms + 3 + 0.01 * rng.normal(size=(n, d))).astype(np.float32)


@pytest.mark.parametrize(
    ("options", "cut"),
    [
        ({"normalize": "sample"}, ([700], [60])),  # shards of other sizes; a batch may have no row on a rank
        ({"normalize": "dataset", "latents": 200, "lr": 3e-2, "ema": 0.9}, ([300], [100])),  # AuxK at work
        ({"normalize": "none", "pre_bias": "mean", "products": "bf16", "batch_size": 4}, ([790], [10])),
    ],
)
def test_two_ranks_train_the_sae_of_one(tmp_path, options, cut):
    x = planted(920)
    options = {"latents": 40, "k": 3, "epochs": 4, "batch_size": 100, "lr": 1e-2, "products": "float32"} | options
    x, held = x[:800], x[800:]
    if options["batch_size"] == 4:
        options["epochs"] = 1
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "held.npy", held)
    ranks.run(SCRIPT, tmp_path, json.dumps(options), json.dumps(cut))
    (a, first), (b, second) = (read_tensors(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert first | {"rate": 0} == second | {"rate": 0} and first["step"] == "PlainStep"

    sae, history = train_sae(x, SAEConfig(**options), "cpu", held, "best", progress=False, compiled=False)
    assert first["best_epoch"] == history.attrs["best_epoch"]
    rough = options["products"] == "bf16"
    shared = pd.DataFrame(first["history"])
    np.testing.assert_allclose(shared, history[shared.columns], rtol=2e-3 if rough else 2e-4, atol=1e-6)
    for name, weights in sae.state_dict().items():
        difference = (torch.from_numpy(a[name]) - weights).abs()
        assert difference.median() < (1e-3 if rough else 1e-5), name
        assert difference.mean() < (1e-2 if rough else 1e-3), name  # a near tie may fall otherwise
    if options["latents"] == 200:
        assert history.dead_fraction.max() > 0.02


def test_an_error_of_one_rank_is_raised_on_all():
    code = """if True:
        import numpy as np
        from capsae import distributed
        from capsae.sae import SAEConfig, train_sae
        distributed.start()
        x = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
        if distributed.rank() == 1:
            x[7, 3] = np.nan
        try:
            train_sae(x, SAEConfig(latents=16, k=2), "cpu", progress=False, sharded=True)
        except ValueError as error:
            print(error)
    """
    for line in ranks.run(code):
        assert line.startswith("rank 1: x has NaN or infinity in 1 of 50 rows, first in row 7")


def test_ranks_go_on_from_a_checkpoint(tmp_path):
    code = """if True:
        import sys
        import numpy as np, torch
        from capsae import distributed
        from capsae.sae import SAEConfig, train_sae
        from capsae.sae.steps import Step
        distributed.start()
        x = np.random.default_rng(distributed.rank()).normal(size=(120, 8)).astype(np.float32)
        config = SAEConfig(latents=60, k=2, lr=3e-2, epochs=4, batch_size=24)
        train = lambda path: train_sae(x, config, "cpu", None, "last", False, None, path, 0, True)
        whole, history = train(None)
        together, steps = Step.together, []
        def stop(batches, lrs, take):
            steps.append(1)
            if len(steps) == 17:
                raise KeyboardInterrupt
            take(batches, lrs)
        Step.together = lambda all_steps: lambda *what, take=together(all_steps): stop(*what, take)
        try:
            train(sys.argv[1])
        except KeyboardInterrupt:
            distributed.barrier()
        again, resumed = train(sys.argv[1])
        assert len(steps) == 17 + 40 - 16, len(steps)
        assert all(torch.equal(v, again.state_dict()[n]) for n, v in whole.state_dict().items())
        assert history.drop(columns="seconds").equals(resumed.drop(columns="seconds"))
    """
    ranks.run(code, tmp_path)
    assert not os.listdir(tmp_path)


def test_sharded_alone_is_plain_training():
    x, config = planted(300), SAEConfig(latents=40, k=3, epochs=2, batch_size=50, lr=1e-2)
    (a, _), (b, _) = (train_sae(x, config, "cpu", progress=False, compiled=False, sharded=s) for s in (False, True))
    assert all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())
    with pytest.raises(ValueError, match="aux_rows is 0.5: sharded"):
        train_sae(x, SAEConfig(latents=40, k=3, aux_rows=0.5), "cpu", progress=False, sharded=True)


@pytest.mark.slow
def test_capsae_train_under_torchrun(tmp_path):
    experiment = small_experiment.write(tmp_path / "experiment")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["-m", "capsae", "train", "--experiment", experiment, "--device", "cpu", "--quiet"]
    arguments += ["--set", "sae.products=float32", "--out"]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", port]
    outputs = {}
    for name, command in {"one": arguments, "two": [*launch, *arguments]}.items():
        environment = os.environ | {
            "CAPSAE_HOME": str(tmp_path / f"home-{name}"),
            "OMP_NUM_THREADS": "1",
            "CAPSAE_NUMBA": "0",
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = [sys.executable, *map(str, [*command, tmp_path / name])]
        for _ in range(2 if name == "two" else 1):  # the second time, everything is read
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
            assert done.returncode == 0, done.stderr
        outputs[name] = done.stdout
    assert outputs["two"].count("epoch") == 1  # the first rank alone speaks
    assert all(TopKSAE.load(tmp_path / name).config.products == "float32" for name in ("one", "two"))
    one, two = (pd.read_csv(tmp_path / name / "history.csv").fvu for name in ("one", "two"))
    assert one[0] == pytest.approx(two[0], rel=1e-4)
    np.testing.assert_allclose(one, two, rtol=0.02)  # rounding may tip a near tie, and one step follows from another
    assert len(list((tmp_path / "home-two" / "sae").glob("*/sae.safetensors"))) == 1
    assert not any((tmp_path / "home-two" / "scratch").iterdir())
