"""TopKSAE, SparseCodes, SAEConfig: against dense float64 computations, and what they refuse."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest
import torch

from capsae.sae import SAEConfig, SparseCodes, TopKSAE

D, M, K = 12, 40, 5


def random_sae(seed: int = 0, **options) -> TopKSAE:
    """Untrained, but with biases and an encoder of its own, so that nothing cancels by chance."""
    sae = TopKSAE.untrained(D, SAEConfig(latents=M, k=K, init="random", seed=seed, **options))
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sae.encoder_bias.copy_(0.1 * torch.randn(M, generator=rng))
        sae.pre_bias.copy_(0.1 * torch.randn(D, generator=rng))
    return sae


def features(n: int = 30, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (3 + 2 * rng.normal(size=(n, D)) * rng.uniform(0.5, 2, size=(n, 1))).astype(np.float32)


def dense_code(sae: TopKSAE, normalized: np.ndarray) -> np.ndarray:
    """(N, M) float64: sort, keep k, all by hand."""
    w, c, b = (p.detach().double().numpy() for p in (sae.encoder, sae.encoder_bias, sae.pre_bias))
    z = np.maximum((normalized.astype(np.float64) - b) @ w.T + c, 0)
    for row in z:
        row[np.argsort(-row)[sae.config.k :]] = 0
    return z


@pytest.mark.parametrize("normalize", ["sample", "l2", "dataset", "none"])
def test_normalize_encode_decode_reconstruct_equal_dense_computation(normalize):
    sae, x = random_sae(normalize=normalize), features()
    if normalize == "dataset":
        sae.mean.copy_(torch.from_numpy(x.mean(0)))
        sae.std.copy_(torch.from_numpy(x.std(0)))
    x64 = x.astype(np.float64)
    shift, scale = {
        "sample": (x64.mean(1, keepdims=True), x64.std(1, keepdims=True)),
        "l2": (0.0, np.linalg.norm(x64, axis=1, keepdims=True)),
        "dataset": (x64.mean(0), x64.std(0)),
        "none": (0.0, 1.0),
    }[normalize]
    expected = (x64 - shift) / scale
    np.testing.assert_allclose(sae.normalize(x), expected, atol=2e-6)

    codes = sae.encode(x)
    code = dense_code(sae, expected)
    np.testing.assert_allclose(codes.dense(), code, atol=1e-5)
    x_hat = code @ sae.decoder.detach().double().numpy() + sae.pre_bias.detach().double().numpy()
    np.testing.assert_allclose(sae.decode(codes), x_hat, atol=1e-5)
    np.testing.assert_allclose(sae.reconstruct(x), x_hat * scale + shift, atol=1e-4)
    fvu = ((expected - x_hat) ** 2).sum() / ((expected - expected.mean(0)) ** 2).sum()
    assert sae.fvu(x) == pytest.approx(fvu, rel=1e-5)


def test_codes_are_sorted_k_sparse_and_typed():
    codes = random_sae().encode(features())
    assert codes.values.shape == codes.indices.shape == (30, K) and len(codes) == 30 and codes.n_latents == M
    assert codes.values.dtype == np.float32 and codes.indices.dtype == np.int32
    assert (codes.values >= 0).all() and (np.diff(codes.values, axis=1) <= 0).all()
    assert all(len(set(row)) == K for row in codes.indices)
    assert len(codes[3:7]) == 4 and len(codes[codes.values[:, 0] > 0]) == 30 and len(codes[5]) == len(codes[-1]) == 1
    np.testing.assert_array_equal(codes[[4, 2]].dense(), codes.dense()[[4, 2]])


def test_kind_in_is_kind_out():
    sae, x = random_sae(), features()
    codes, same = sae.encode(x), sae.encode(torch.from_numpy(x))
    assert isinstance(codes.values, np.ndarray) and isinstance(same.values, torch.Tensor)
    assert isinstance(sae.decode(codes), np.ndarray) and isinstance(sae.decode(same), torch.Tensor)
    assert isinstance(sae.normalize(x), np.ndarray) and isinstance(sae.reconstruct(torch.from_numpy(x)), torch.Tensor)
    np.testing.assert_array_equal(same.numpy().indices, codes.indices)
    np.testing.assert_array_equal(codes.to("cpu").dense().numpy(), codes.dense())
    assert not same.values.requires_grad


def test_batch_size_does_not_matter():
    sae, x = random_sae(), features(50)
    np.testing.assert_allclose(sae.encode(x, batch_size=7).dense(), sae.encode(x).dense(), atol=1e-6)


def test_fewer_than_k_positive_gives_zeros_at_the_end():
    sae = random_sae()
    with torch.no_grad():
        sae.encoder_bias.fill_(-1e3)
        sae.encoder_bias[:2] = 1e3
    codes = sae.encode(features())
    assert (codes.values[:, :2] > 0).all() and (codes.values[:, 2:] == 0).all()
    assert (np.sort(codes.indices[:, :2]) == [0, 1]).all()
    assert all(len(set(row)) == K for row in codes.indices)


@pytest.mark.parametrize("normalize", ["sample", "l2", "dataset", "none"])
def test_rows_without_variance_stay_finite(normalize):
    x = np.vstack([features(), np.full((1, D), 0.1), np.zeros((1, D))]).astype(np.float32)
    sae = random_sae(normalize=normalize)
    assert np.isfinite(sae.encode(x).values).all() and np.isfinite(sae.reconstruct(x)).all()
    if normalize == "sample":
        np.testing.assert_array_equal(sae.normalize(x)[-2:], 0)  # not rounding noise blown up to unit std


@pytest.mark.parametrize("relu", ["before", "after"])
def test_relu_before_or_after_topk_is_one_code(relu):
    sae, x = random_sae(relu=relu), features()
    with torch.no_grad():
        sae.encoder_bias -= 2  # some rows have fewer than k positive
    np.testing.assert_allclose(sae.encode(x).dense(), dense_code(sae, sae.normalize(x)), atol=1e-5)


def test_untrained_has_unit_rows_and_repeats():
    config = SAEConfig(latents=M, k=K, seed=3)
    sae = TopKSAE.untrained(D, config)
    torch.testing.assert_close(sae.decoder.norm(dim=1), torch.ones(M))
    assert torch.equal(sae.encoder, sae.decoder)
    assert torch.equal(sae.decoder, TopKSAE.untrained(D, config).decoder)
    assert not torch.equal(sae.decoder, TopKSAE.untrained(D, dataclasses.replace(config, seed=4)).decoder)


def test_read_only_float16_and_float64_input_is_welcome():
    sae, x = random_sae(), features()
    x.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        codes = sae.encode(x)
    np.testing.assert_array_equal(sae.encode(x.astype(np.float64)).indices, codes.indices)
    assert sae.encode(x.astype(np.float16)).values.dtype == np.float32


@pytest.mark.parametrize(
    ("x", "kind", "says"),
    [
        (np.ones((3, D), np.int64), TypeError, "int64"),
        (np.array([["a"] * D]), TypeError, "floating point"),
        ([[1.0] * D], TypeError, "list"),
        (np.ones(D, np.float32), ValueError, r"\(12,\)"),
        (np.ones((3, D + 1), np.float32), ValueError, "13 columns, the SAE 12"),
        (np.ones((0, D), np.float32), ValueError, "0 rows"),
        (np.where(np.arange(4)[:, None] == 2, np.nan, np.ones((4, D))), ValueError, "row 2"),
        (np.where(np.arange(4)[:, None] >= 1, np.inf, np.ones((4, D))), ValueError, "3 of 4 rows, first in row 1"),
        (np.full((2, D), 1e300), ValueError, "infinity"),
    ],
)
def test_bad_input_is_named(x, kind, says):
    with pytest.raises(kind, match=says):
        random_sae().encode(x)


def test_foreign_codes_are_refused():
    with pytest.raises(ValueError, match="39 latents"):
        random_sae().decode(SparseCodes(np.zeros((1, K), np.float32), np.zeros((1, K), np.int32), M - 1))
    with pytest.raises(ValueError, match=r"both must be \(N, k\)"):
        SparseCodes(np.zeros((1, K)), np.zeros((2, K)), M)


def test_fvu_without_variance_is_refused():
    with pytest.raises(ValueError, match="variance"):
        random_sae().fvu(np.ones((4, D), np.float32))


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"k": 9}, ValueError, "k is 9, latents 8"),
        ({"k": 0}, ValueError, "k is 0"),
        ({"latents": 0}, ValueError, "latents is 0"),
        ({"k": 2.5}, TypeError, "k is 2.5"),
        ({"epochs": True}, TypeError, "epochs"),
        ({"normalize": "batch"}, ValueError, "'sample', 'l2', 'dataset', 'none'"),
        ({"pre_bias": "median"}, ValueError, "geometric_median"),
        ({"products": "fp8"}, ValueError, "bf16"),
        ({"lr": 0.0}, ValueError, "lr is 0.0"),
        ({"lr": float("nan")}, ValueError, "lr"),
        ({"lr": "high"}, TypeError, "lr"),
        ({"warmup": 0.7, "decay": 0.5}, ValueError, "over 1 together"),
        ({"ema": 1.0}, ValueError, "ema"),
        ({"aux_alpha": -1}, ValueError, "aux_alpha"),
        ({"aux_rows": 0}, ValueError, "aux_rows"),
        ({"aux_rows": 1.5}, ValueError, "aux_rows"),
        ({"dead_after_epochs": 0}, ValueError, "dead_after_epochs"),
        ({"seed": -1}, ValueError, "seed"),
    ],
)
def test_impossible_settings_are_refused(options, kind, says):
    with pytest.raises(kind, match=says):
        SAEConfig(**({"latents": 8, "k": 2} | options))


def test_default_lr_is_the_formula_of_large_runs():
    assert SAEConfig(latents=2**14, k=2).peak_lr == pytest.approx(2e-4)
    assert SAEConfig(latents=2**12, k=2).peak_lr == pytest.approx(4e-4)
    assert SAEConfig(latents=2**12, k=2, lr=0.1).peak_lr == 0.1
