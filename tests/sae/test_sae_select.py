"""Top-k selection is exact, with ties, with fewer than k positive, in both precisions, with and without numba."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from capsae.sae import select


def cases() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(40, 333, generator=rng)
    return {
        "normal": z,
        "many ties": (z * 2).round(),
        "few positive": z - 2.5,
        "none positive": -z.abs(),
        "all equal": torch.ones(5, 333),
        "all zero": torch.zeros(5, 333),
        "tiny differences": 1 + 1e-6 * z,  # equal in their upper 16 bits
        "huge and tiny": z * torch.logspace(-30, 30, 333),
        "wide": torch.randn(3, 40_000, generator=rng).abs(),  # over the range of a 16-bit counter
    }


@pytest.mark.parametrize("k", [1, 2, 7, 32, 333])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", cases())
def test_topk_is_exact(name, dtype, k):
    z = cases()[name].to(dtype)
    values, indices = select.topk(z, k)
    expected = z.float().relu().sort(dim=1, descending=True).values[:, :k]
    assert torch.equal(values.float(), expected)
    assert torch.equal(z.float().relu().gather(1, indices), expected)
    assert all(len(set(row)) == k for row in indices.tolist())


@pytest.mark.skipif(select.compiled() is None, reason="numba is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_go_to_the_lower_column(dtype):
    z = (torch.randn(50, 200, generator=torch.Generator().manual_seed(1)) * 2).round().to(dtype)
    _, indices = select.topk(z, 20)
    for row, chosen in zip(z.float().numpy(), indices.numpy(), strict=True):
        row = np.maximum(row, 0)
        positive = int((row > 0).sum())
        expected = np.argsort(-row, kind="stable")[: min(20, positive)]
        np.testing.assert_array_equal(chosen[: len(expected)], expected)


def test_plain_topk_takes_relu_before_or_after():
    z = cases()["few positive"]
    a, b = select.topk_plain(z, 9, "before")[0], select.topk_plain(z, 9, "after")[0]
    assert torch.equal(a, b)


def test_gradient_falls_back_to_the_differentiable_path():
    z = cases()["normal"].clone().requires_grad_()
    select.topk(z, 3)[0].sum().backward()
    assert z.grad.sum() == 3 * len(z)


def test_works_without_numba():
    code = "import sys; sys.modules['numba'] = None\nimport numpy as np, capsae.sae as s\n" + (
        "sae, h = s.train_sae(np.random.default_rng(0).normal(size=(64, 8)), "
        "s.SAEConfig(latents=16, k=2, epochs=2, lr=1e-2), progress=False)\nprint(h.attrs['step'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.stdout.strip() == "PlainStep", done.stderr


def test_import_does_not_load_numba():
    code = "import sys, capsae.sae; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
