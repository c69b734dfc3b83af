"""One training, the same bits on every CPU: under caps of instruction set and library, with one and two threads."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from capsae.sae import select

pytestmark = pytest.mark.skipif(select.compiled() is None, reason="no numba, or a CPU without fused multiply-add")

# Of weights, codes and reconstructions. It changes with the recipe, never with the machine.
EXPECTED = "fe5826ff4a47bf0e65b6b1b48ddcea0f"
SCRIPT = """if True:
    import hashlib, sys
    import numpy as np, torch
    from capsae.sae import SAEConfig, train_saes

    torch.set_num_threads(int(sys.argv[1]))
    raw = np.random.PCG64(7).random_raw((640, 48)).view(np.uint16).reshape(640, 48, 4).sum(2, dtype=np.int64)
    x = ((raw - 2 * 0xFFFF) / 32768).astype(np.float32)
    x[:, :24] += 2 * x[:, 24:]
    settings = {"latents": 256, "k": 6, "epochs": 8, "batch_size": 64, "lr": 2e-2, "dead_after_epochs": 0.7}
    configs = [  # 64 steps; without dead latents AuxK would not be at work: held by an assertion
        SAEConfig(**settings),
        SAEConfig(aux_k=5, normalize="l2", init="fitted", aux_scale="residual", ema=0.9, seed=1, **settings),
        SAEConfig(aux_rows=0.5, normalize="dataset", pre_bias="mean", init="random", seed=2, **settings),
    ]
    trained = train_saes(x[:512], configs, "cpu", x[512:], "best", False)
    seeds = [SAEConfig(seed=seed, **settings) for seed in (3, 0)]
    trained.append(train_saes(x[:512], seeds, "cpu", x[512:], "best", False)[1])
    sha = hashlib.sha256()
    for number, (sae, history) in enumerate(trained):
        assert history.attrs["portable"] and history.dead_fraction[:-1].max() > 0.02, history.to_string()
        codes = sae.encode(x)
        arrays = [*(p.detach().numpy() for p in sae.parameters()), codes.values, codes.indices, sae.decode(codes)]
        own = hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()
        if number == 0:
            alone = own
        sha.update(own.encode())
    assert own == alone, "a seed trained with others differs from the same alone"
    print(sha.hexdigest()[:32])
"""
X86 = platform.machine().lower() in ("x86_64", "amd64")
CAPS = {
    "none, two threads": (2, {}),
    "haswell, one thread": (
        1, {"NUMBA_CPU_NAME": "haswell", "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"},
    ),
    "znver4, two threads": (
        2, {"NUMBA_CPU_NAME": "znver4", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("cap", CAPS)
def test_the_bits_of_a_training_are_those_of_the_repository(cap):
    threads, environment = CAPS[cap]
    if environment and not X86:
        pytest.skip("these caps are of x86 CPUs")
    if environment.get("NUMBA_CPU_NAME") == "znver4" and "avx512bw" not in flags():
        pytest.skip("this CPU has no AVX-512")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(threads)], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == EXPECTED


def flags() -> set[str]:
    """What this CPU can do, as LLVM names it."""
    import llvmlite.binding

    return {name for name, there in llvmlite.binding.get_host_cpu_features().items() if there}


def test_the_history_says_whether_it_is_portable():
    import numpy as np

    from capsae.sae import SAEConfig, train_sae

    x = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    config = SAEConfig(latents=16, k=2, epochs=1, batch_size=20)
    assert train_sae(x, config, "cpu", progress=False)[1].attrs["portable"]
    assert not train_sae(x, config, "cpu", progress=False, compiled=False)[1].attrs["portable"]
