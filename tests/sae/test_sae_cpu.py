"""The CPU's kernels: stored rows, decoding and sorting against plain numpy; weights changed from outside."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from capsae.sae import SAEConfig, TopKSAE, select
from capsae.sae.kernels.cpu_step import CompiledStep

kernels = select.compiled()
pytestmark = pytest.mark.skipif(kernels is None, reason="numba is not installed")
STORED = {"packed": (np.int32, 2), "float32": (np.float32, 1)}  # dtype, elements per item


def empty(kind: str, n: int, d: int) -> np.ndarray:
    dtype, per_item = STORED[kind]
    return np.full((n, kernels.padded(d) // per_item), 7, dtype)


def batch(n: int = 300, d: int = 24, m: int = 60, k: int = 5, seed: int = 0):
    """Rows, a code whose every third value is 0, and a dictionary."""
    rng = np.random.default_rng(seed)
    x, decoder = rng.normal(size=(n, d)).astype(np.float32), rng.normal(size=(m, d)).astype(np.float32)
    values = rng.uniform(0.5, 1, (n, k)).astype(np.float32)
    values.ravel()[::3] = 0
    indices = np.stack([rng.choice(m, k, replace=False) for _ in range(n)]).astype(np.int32)
    return x, decoder, values, indices


@pytest.mark.parametrize("d", [1, 17, 32, 33, 192])
def test_stored_rows_are_the_rows_rounded_as_torch_rounds(d):
    rows = (
        np.random.default_rng(0).normal(size=(9, d)).astype(np.float32)
        * np.float32(10) ** np.arange(-4, 5, dtype=np.float32)[:, None]
    )
    packed, floats = empty("packed", 9, d), empty("float32", 9, d)
    kernels.pack_rows(rows, packed)
    kernels.pack_rows(rows, floats)
    np.testing.assert_array_equal(kernels.widened(floats, d), rows)
    np.testing.assert_array_equal(kernels.widened(packed, d), torch.from_numpy(rows).bfloat16().float().numpy())
    seen = torch.from_numpy(packed).view(torch.bfloat16).float()  # as torch multiplies it: shuffled, padded with 0
    np.testing.assert_allclose((seen @ seen.T).diagonal(), (rows**2).sum(1), rtol=0.01)
    kernels.centre_rows(rows, rows[0], floats)
    np.testing.assert_allclose(kernels.widened(floats, d), rows - rows[0], rtol=1e-6)


@pytest.mark.parametrize("k", [1, 4, 5, 7])
@pytest.mark.parametrize("kind", STORED)
def test_decoding(kind, k):
    x, decoder, values, indices = batch(k=k)
    bias = np.linspace(-1, 1, x.shape[1], dtype=np.float32)
    stored, gradient = empty(kind, len(decoder), x.shape[1]), empty(kind, *x.shape)
    kernels.pack_rows(decoder, stored)
    bias_gradient, fired = np.zeros(x.shape[1], np.float32), np.full(len(decoder), 9, np.int32)
    code = values, indices, stored
    error = kernels.decode_rows(x, bias, *code, np.float32(0.5), gradient, bias_gradient, fired)
    residual = np.einsum("nk,nkd->nd", values, kernels.widened(stored, x.shape[1])[indices]) + bias - x
    assert error == pytest.approx((residual**2).sum(), rel=1e-5)
    np.testing.assert_allclose(bias_gradient, 0.5 * residual.sum(0), rtol=1e-4, atol=1e-4)
    exact = {"packed": 2.0**-8, "float32": 1e-5}[kind]
    np.testing.assert_allclose(kernels.widened(gradient, x.shape[1]), 0.5 * residual, rtol=exact, atol=1e-5)
    np.testing.assert_array_equal(fired, np.bincount(indices[values > 0], minlength=len(decoder)))


@pytest.mark.parametrize("size", [300, 100, 7])
def test_pairs_are_sorted_by_latent_and_row_whatever_the_blocks(size):
    _, decoder, values, indices = batch()
    parts = [slice(start, start + size) for start in range(0, len(values), size)]
    place = np.stack([np.bincount(indices[p][values[p] > 0], minlength=60) for p in parts]).astype(np.int32)
    first, pairs = np.zeros(61, np.int64), np.zeros((values.size, 2), np.int32)
    kernels.first_pairs(place, first)
    for part, own in zip(parts, place, strict=True):
        kernels.scatter_pairs(part.start, values[part], indices[part], own, pairs)
    rows, slots = np.nonzero(values)
    order = np.lexsort((rows, indices[rows, slots]))
    np.testing.assert_array_equal(pairs[: first[-1], 0], rows[order])
    np.testing.assert_array_equal(pairs[: first[-1], 1].view(np.float32), values[rows, slots][order])
    np.testing.assert_array_equal(np.diff(first), np.bincount(indices[rows, slots], minlength=60))


def step_of(products: str, d: int = 24) -> tuple[TopKSAE, CompiledStep, torch.Tensor]:
    sae = TopKSAE.untrained(d, SAEConfig(latents=60, k=3, products=products))
    return sae, CompiledStep(sae, 1.0, 10), torch.randn(600, d, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("products", ["bf16", "float32"])
def test_a_step_keeps_the_stored_rows_up_to_date(products):
    sae, step, x = step_of(products)
    for _ in range(3):
        step(x, 1e-2)
    kept = [copy.copy() for copy in step.stored]
    for copy, fresh in zip(kept, step.store(sae), strict=True):
        np.testing.assert_array_equal(copy, fresh)
    step.close()


@pytest.mark.parametrize("products", ["bf16", "float32"])
def test_weights_that_are_written_between_steps_are_seen(products):
    """Stored rows of old weights would train another SAE: a checkpoint is loaded into one that has begun."""
    (sae, step, x), (other, fresh, _) = step_of(products), step_of(products)
    with torch.no_grad():
        for s in (sae, other):
            s.encoder.copy_(s.encoder.flip(0))
            s.decoder.copy_(s.decoder.flip(0))
    fresh.stored = fresh.store(other)
    for s in (step, fresh):
        s(x, 1e-2)
        s.close()
    assert torch.equal(sae.encoder, other.encoder) and torch.equal(sae.decoder, other.decoder)
    assert step.read()["fvu"] == fresh.read()["fvu"]
