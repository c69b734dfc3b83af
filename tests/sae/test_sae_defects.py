"""Defects that other trainers had, one test each."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from capsae.sae import SAEConfig, TopKSAE, select, train_sae
from capsae.sae.kernels.cpu_step import CompiledStep
from capsae.sae.steps import PlainStep, auxk_loss

needs_numba = pytest.mark.skipif(select.compiled() is None, reason="numba is not installed")
STEPS = [PlainStep, pytest.param(CompiledStep, marks=needs_numba)]


def rows(n: int = 400, d: int = 10, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def with_dead(kind, dead: list[int], **options):
    """A step whose `dead` latents have not fired for long, do not fire now, and would like to."""
    config = SAEConfig(**({"latents": 30, "k": 3, "lr": 1e-2, "products": "float32"} | options))
    sae = TopKSAE.untrained(10, config)
    with torch.no_grad():
        sae.encoder[dead] *= 0.1
    step = kind(sae, variance=1.0, window=5)
    step.idle[dead] = 99
    step.find_dead()
    return sae, step


@pytest.mark.parametrize("kind", STEPS)
def test_auxk_gradient_reaches_the_encoder(kind):
    """sparsify: the auxiliary loss gave the encoder a zero gradient."""
    dead = [4, 9, 17]
    sae, step = with_dead(kind, dead)
    before = sae.encoder.detach().clone(), sae.encoder_bias.detach().clone()
    step(torch.from_numpy(rows()), 1e-2)
    step.close()
    assert (sae.encoder[dead] != before[0][dead]).all() and (sae.encoder_bias[dead] != before[1][dead]).all()


def test_auxk_decodes_without_the_bias():
    """saev: the pre-bias was added to the residual's reconstruction."""
    x, residual = torch.from_numpy(rows(20)), torch.from_numpy(rows(20, seed=1))
    w = torch.from_numpy(rows(6, seed=2))
    silent = auxk_loss(x, residual, w, torch.full((6,), -1e3), w, k=3)
    torch.testing.assert_close(silent, residual.square().sum())  # nothing fires: e_hat is 0, not b


@pytest.mark.parametrize("kind", STEPS)
def test_auxk_is_for_dead_latents_alone(kind):
    """overcomplete: its auxiliary loss took latents that live."""
    alive, dead = [i for i in range(30) if i not in (4, 9, 17)], [4, 9, 17]
    moved = []
    for alpha in (0.0, 10.0):
        sae, step = with_dead(kind, dead, aux_alpha=alpha)
        step(torch.from_numpy(rows()), 1e-2)
        step.close()
        moved.append({name: p.detach().clone() for name, p in sae.named_parameters()})
    for name in ("encoder", "encoder_bias", "decoder"):
        torch.testing.assert_close(moved[0][name][alive], moved[1][name][alive], msg=name)
        assert not torch.equal(moved[0][name][dead], moved[1][name][dead]), name
    torch.testing.assert_close(moved[0]["pre_bias"], moved[1]["pre_bias"])


@pytest.mark.parametrize("kind", STEPS)
def test_a_revived_latent_leaves_auxk_at_once(kind):
    """The dead are looked for once an epoch; who fires in between must not go on being helped."""
    sae, step = with_dead(kind, [4, 9])
    step.idle[4] = 0  # it fired since
    x = torch.from_numpy(rows())
    leaves = [p.detach()[step.dead].requires_grad_() for p in (sae.encoder, sae.encoder_bias, sae.decoder)]
    step.auxk(x, x, *leaves).backward()
    step.close()
    assert (leaves[0].grad[0] == 0).all() and (leaves[0].grad[1] != 0).any()


def test_nothing_dead_costs_nothing(monkeypatch):
    """AuxK must not be computed while all latents live."""
    monkeypatch.setattr("capsae.sae.steps.auxk_loss", lambda *_: pytest.fail("AuxK without dead latents"))
    for compiled in (False, None):
        _, history = train_sae(rows(), SAEConfig(latents=12, k=6, epochs=3, lr=1e-4), compiled=compiled, progress=False)
        assert (history.dead_fraction == 0).all()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_numba)])
@pytest.mark.parametrize("keep", ["last", "best"])
def test_decoder_is_unit_after_the_last_step(compiled, keep):
    """openai: rows were normalised before the step, so the last step left them longer."""
    config = SAEConfig(latents=30, k=3, epochs=3, batch_size=100, lr=0.3, decay=0.0)
    sae, _ = train_sae(rows(), config, held_out=rows(50, seed=1), keep=keep, compiled=compiled, progress=False)
    torch.testing.assert_close(sae.decoder.norm(dim=1), torch.ones(30), atol=1e-6, rtol=0)


def test_fvu_is_about_the_mean():
    """SAELens: variance about zero makes any reconstruction of data with a mean look good."""
    x = rows() + 50
    config = SAEConfig(latents=30, k=3, epochs=1, lr=1e-12, normalize="none", pre_bias="mean")
    sae, history = train_sae(x, config, progress=False)
    with torch.no_grad():
        sae.encoder_bias.fill_(-1e9)  # nothing fires: x_hat is the mean
    assert sae.fvu(x) == pytest.approx(1.0, abs=1e-5)
    assert history.fvu[0] > 0.3


@pytest.mark.parametrize("kind", STEPS)
def test_loss_does_not_scale_with_the_batch(kind):
    """SAELens: an MSE summed over the batch changes the learning rate's meaning with the batch size."""
    x = torch.from_numpy(rows(100))
    weights, losses = [], []
    for batch in (x, torch.cat([x, x, x])):
        sae, step = with_dead(kind, [])
        with torch.no_grad():
            sae.encoder_bias += 1
        step(batch, 1e-2)
        losses.append(step.read()["loss"])
        step.close()
        weights.append(sae.decoder.detach())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(weights[0], weights[1], atol=1e-5, rtol=1e-4)


def test_loss_does_not_scale_with_the_features():
    config = SAEConfig(latents=30, k=3, epochs=2, lr=1e-12, normalize="none", init="transpose")
    losses = [train_sae(rows() * c, config, progress=False)[1].loss[0] for c in (1, 1024)]  # exact in bf16
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_k_is_per_sample():
    """overcomplete's and others' k of a batch: a loud sample must not take the places of a quiet one."""
    x = rows(64)
    x[0] *= 1e3
    sae = TopKSAE.untrained(10, SAEConfig(latents=30, k=3, normalize="none"))
    np.testing.assert_array_equal((sae.encode(x).values > 0).sum(1), 3)
    np.testing.assert_allclose(sae.encode(x[5:6]).dense(), sae.encode(x).dense()[5:6], rtol=1e-5)


def test_no_step_waits_for_the_device(monkeypatch):
    """All of them: one host sync a step. Here the host reads once an epoch, whatever the number of steps."""
    reads = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "nonzero", "cpu", "numpy"):
        true = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda t, *a, true=true, name=name: reads.append(name) or true(t, *a))
    counts = []
    for batch_size in (400, 10):
        reads.clear()
        config = SAEConfig(latents=30, k=3, epochs=3, batch_size=batch_size, lr=1e-2)
        train_sae(rows(), config, compiled=False, progress=False)
        counts.append(len(reads))
    assert counts[0] == counts[1], "a plain step reads from the device"


def test_dead_counts_a_whole_pass():
    """A latent that fires on one row in the data set lives, however small the batches."""
    x = np.abs(rows(40)) * 0.01
    x[0] = 10 * np.eye(10)[0]
    config = SAEConfig(latents=10, k=1, epochs=4, batch_size=4, lr=1e-12, normalize="none", pre_bias="zero")
    start = TopKSAE.untrained(10, config)
    fired = np.unique(start.encode(x).indices)
    _, history = train_sae(x, config, progress=False)
    assert history.dead_fraction.iloc[-1] == pytest.approx(1 - len(fired) / 10)
