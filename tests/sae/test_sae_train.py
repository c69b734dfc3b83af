"""Training: gradients, both steps, determinism, a planted dictionary, the history, what is refused."""

from __future__ import annotations

import dataclasses
import weakref

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from capsae.sae import SAEConfig, TopKSAE, progress, rows, select, train_sae, train_saes
from capsae.sae.kernels.cpu_step import CompiledStep
from capsae.sae.rows import geometric_median, start
from capsae.sae.steps import PlainStep, Step, auxk_loss
from capsae.sae.train import schedule

needs_numba = pytest.mark.skipif(select.compiled() is None, reason="numba is not installed")
STEPS = [PlainStep, pytest.param(CompiledStep, marks=needs_numba)]


def planted(n: int = 3000, d: int = 24, m: int = 60, k: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows that are sums of k of m unit atoms, and the atoms."""
    rng = np.random.default_rng(seed)
    atoms = rng.normal(size=(m, d))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    code = np.zeros((n, m))
    for row in code:
        row[rng.choice(m, k, replace=False)] = rng.uniform(1, 2, k)
    return (code @ atoms + 0.01 * rng.normal(size=(n, d))).astype(np.float32), atoms


def small(**options) -> SAEConfig:
    return SAEConfig(**({"latents": 60, "k": 3, "epochs": 5, "batch_size": 500, "lr": 1e-2} | options))


def biased_sae(config: SAEConfig, d: int) -> TopKSAE:
    sae = TopKSAE.untrained(d, config)
    rng = torch.Generator().manual_seed(9)
    with torch.no_grad():
        sae.pre_bias.copy_(0.1 * torch.randn(d, generator=rng))
        sae.encoder_bias.copy_(0.1 * torch.randn(config.latents, generator=rng))
    return sae


def reference_step(sae: TopKSAE, x: torch.Tensor, variance: float, dead: torch.Tensor, lr: float) -> dict:
    """The first step in float64, by autograd on a dense code and the textbook's Adam."""
    cfg = sae.config
    p = {name: t.detach().double().requires_grad_() for name, t in sae.named_parameters()}
    x = x.double()
    z = (x - p["pre_bias"]) @ p["encoder"].T + p["encoder_bias"]
    code = z.relu() * torch.zeros_like(z).scatter(1, z.topk(cfg.k).indices, 1)
    residual = x - code @ p["decoder"] - p["pre_bias"]
    loss = residual.square().sum()
    if len(dead):
        z_dead = (x - p["pre_bias"]).detach() @ p["encoder"][dead].T + p["encoder_bias"][dead]
        kept = z_dead.relu() * torch.zeros_like(z_dead).scatter(1, z_dead.topk(cfg.aux_k).indices, 1)
        missed = (residual.detach() - kept @ p["decoder"][dead]).square().sum(1)
        seen = round(cfg.aux_rows * len(x))
        loss = loss + cfg.aux_alpha * missed[:seen].sum() * len(x) / seen
    (loss / (len(x) * variance)).backward()
    grad = {name: t.grad.clone() for name, t in p.items()}
    unit = p["decoder"].detach()
    grad["decoder"] -= (grad["decoder"] * unit).sum(1, keepdim=True) * unit
    after = {name: t.detach() - lr * grad[name] / (grad[name].abs() + 6.25e-10) for name, t in p.items()}
    return after | {"decoder": F.normalize(after["decoder"], dim=1)}, grad


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize(("n_dead", "aux_rows"), [(0, 1.0), (12, 1.0), (12, 0.25)])
@pytest.mark.parametrize(("d", "k"), [(24, 3), (19, 4)])
def test_one_step_equals_autograd_in_float64(kind, n_dead, aux_rows, d, k):
    config = small(products="float32", aux_k=5, k=k, aux_rows=aux_rows)
    sae, x = biased_sae(config, d), torch.randn(700, d, generator=torch.Generator().manual_seed(2))
    dead = torch.arange(3, 3 + n_dead)
    with torch.no_grad():  # the dead see much and yet do not fire, so that AuxK alone moves them
        sae.encoder[dead] *= 12.0
        sae.encoder_bias[dead] -= 30.0
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    expected, grad = reference_step(sae, x, 2.5, dead, lr=1e-3)

    step = kind(sae, variance=2.5, window=10)
    step.idle[dead] = 50
    step.find_dead()
    step(x, 1e-3)
    step.close()
    for name, parameter in sae.named_parameters():
        sure = grad[name].abs() > 1e-6  # Adam's first step is the gradient's sign: rounding decides it near 0
        assert sure.double().mean() > 0.5 or name == "encoder"
        moved = (parameter.detach() - before[name])[sure]
        torch.testing.assert_close(moved, (expected[name] - before[name])[sure].float(), atol=2e-6, rtol=5e-3)
    if n_dead and aux_rows == 1:
        assert (sae.encoder[dead] != before["encoder"][dead]).any(1).double().mean() > 0.8  # AuxK reaches the encoder


@needs_numba
def test_gradients_of_the_compiled_path_equal_autograd():
    config = small(products="float32")
    sae, x = biased_sae(config, 24), torch.randn(333, 24, generator=torch.Generator().manual_seed(2))
    step = CompiledStep(sae, variance=1.0, window=10)
    try:
        total, (values, indices, _), gradient, bias_gradient = step.forward(sae, step.store(sae), x, scale=2.0)
    finally:
        step.close()
    v = torch.from_numpy(values).double().requires_grad_()
    rows = sae.decoder.detach().double()
    x_hat = (v[:, :, None] * rows[torch.from_numpy(indices).long()]).sum(1) + sae.pre_bias.detach().double()
    x_hat.retain_grad()
    loss = (x_hat - x).square().sum()
    loss.backward()
    assert total == pytest.approx(loss.item(), rel=1e-6)
    np.testing.assert_allclose(step.kernels.widened(gradient, 24), x_hat.grad, atol=1e-5)
    np.testing.assert_allclose(bias_gradient, x_hat.grad.sum(0), rtol=1e-5)


@needs_numba
@pytest.mark.parametrize(
    "options",
    [
        {"products": "float32"},
        {"products": "float32", "latents": 400, "k": 2, "lr": 5e-2},  # many die: AuxK at work
        {"products": "float32", "ema": 0.9, "normalize": "l2", "init": "random", "pre_bias": "mean"},
        {"products": "bf16"},
    ],
)
def test_plain_and_compiled_agree(options):
    x, _ = planted()
    config = small(epochs=8, **options)
    (a, plain), (b, quick) = (
        train_sae(x[300:], config, held_out=x[:300], compiled=c, progress=False) for c in (False, True)
    )
    assert (plain.attrs["step"], quick.attrs["step"]) == ("PlainStep", "CompiledStep")
    columns = ["loss", "fvu", "l0", "held_out_fvu"]
    np.testing.assert_allclose(quick[columns], plain[columns], rtol=0.02)
    np.testing.assert_allclose(quick.dead_fraction, plain.dead_fraction, atol=0.05)
    assert a.fvu(x) == pytest.approx(b.fvu(x), rel=0.02)
    if options.get("latents") == 400:
        assert plain.dead_fraction.max() > 0.1


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_numba)])
def test_bit_identical_for_a_seed(compiled):
    x, _ = planted(1500)
    config = small(latents=300, lr=3e-2, epochs=6)
    (a, first), (b, second) = (train_sae(x, config, compiled=compiled, progress=False) for _ in range(2))
    assert first.dead_fraction.max() > 0  # AuxK takes part
    for name, weights in a.state_dict().items():
        assert torch.equal(weights, b.state_dict()[name]), name
    pd.testing.assert_frame_equal(first.drop(columns="seconds"), second.drop(columns="seconds"))
    other, _ = train_sae(x, dataclasses.replace(config, seed=1), compiled=compiled, progress=False)
    assert not torch.equal(a.decoder, other.decoder)


@pytest.mark.parametrize("kind", STEPS)
def test_a_step_goes_on_from_its_state(kind):
    x = torch.from_numpy(planted(600)[0])
    config, after = small(latents=200, lr=5e-2, ema=0.9), []
    for interrupted in (False, True):
        step = kind(biased_sae(config, 24), variance=2.5, window=3)
        for position in range(12):
            if position == 5:
                step.find_dead()  # in the middle of what is counted
                assert len(step.dead)
            if position == 8 and interrupted:
                state = {name: tensor.clone() for name, tensor in step.state().items()}
                step.close()
                step = kind(TopKSAE.untrained(24, config), variance=2.5, window=3)
                step.load_state(state)
            step(x[position * 50 : position * 50 + 50], 5e-2)
        after.append((step.state(), step.read()))
        step.close()
    assert after[0][1] == after[1][1]
    assert all(torch.equal(value, after[1][0][name]) for name, value in after[0][0].items())


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_numba)])
def test_several_at_once_equal_each_apart(compiled, monkeypatch):
    x, _ = planted(1200)
    configs = [
        small(),
        small(seed=1, latents=300, lr=3e-2, ema=0.9),  # AuxK at work
        small(k=5, normalize="dataset"),
        small(seed=1, k=2, pre_bias="mean"),
        small(epochs=3, batch_size=170, normalize="l2"),
    ]
    prepared = []
    monkeypatch.setattr("capsae.sae.rows.prepare", lambda *a, f=rows.prepare: prepared.append(1) or f(*a))
    together = train_saes(x[200:], configs, held_out=x[:200], keep="best", compiled=compiled, progress=False)
    assert len(prepared) == 3  # three normalise, or have batches, in the same way: one copy serves them
    assert any(history.dead_fraction.max() > 0 for _, history in together)
    for config, (sae, history) in zip(configs, together, strict=True):
        alone, its = train_sae(x[200:], config, held_out=x[:200], keep="best", compiled=compiled, progress=False)
        assert sae.config == config
        for name, weights in alone.state_dict().items():
            assert torch.equal(weights, sae.state_dict()[name]), name
        pd.testing.assert_frame_equal(history.drop(columns="seconds"), its.drop(columns="seconds"))
        assert history.attrs["best_epoch"] == its.attrs["best_epoch"]
    with pytest.raises(ValueError, match="configs is empty"):
        train_saes(x, [])


def test_several_steps_are_one_call_for_each_batch(monkeypatch):
    calls = []

    def together(steps):
        take = Step.together(steps)
        return lambda batches, lrs: calls.append((len(batches), tuple(lrs))) or take(batches, lrs)

    monkeypatch.setattr(PlainStep, "together", together)
    x, _ = planted(1000)
    train_saes(x, [small(lr=1e-2), small(lr=1e-3)], compiled=False, progress=False)
    assert len(calls) == 5 * 2 and all(n == 2 and lrs[0] == pytest.approx(10 * lrs[1]) for n, lrs in calls)


def test_one_copy_of_the_features_is_made(monkeypatch):
    """What torch holds at the most, beside the rows that came in: one float32 copy, and blocks of it."""
    x = torch.from_numpy(planted(4000)[0])
    monkeypatch.setattr(rows, "CHUNK", 100)
    for normalize in ("sample", "l2", "dataset", "none"):
        config, device = small(normalize=normalize, pre_bias="mean"), torch.device("cpu")
        with Allocations() as held:
            sae, prepared = rows.start(x, config, device)
        copy = 0 if normalize == "none" else x.nbytes
        assert copy <= held.most < copy + 0.2 * x.nbytes, normalize
        del prepared, sae


class Allocations(TorchDispatchMode):
    """Bytes of the storages that operations made and that live: the most at one time."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        known = {t.untyped_storage()._cdata for t in tree_leaves(arguments) if isinstance(t, torch.Tensor)}
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in known | self.alive.keys():
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(tensor, self.alive.pop, storage._cdata, None)
        self.most = max(self.most, sum(self.alive.values()))
        return result


@needs_numba
def test_number_of_threads_changes_no_bit():
    x, _ = planted(1500)
    threads, states = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            states.append(train_sae(x, small(batch_size=750), progress=False)[0].state_dict())
            assert torch.get_num_threads() == n  # given back
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_planted_dictionary_is_recovered():
    x, atoms = planted()
    sae, history = train_sae(x, small(normalize="none", epochs=50, batch_size=250, latents=90), progress=False)
    nearest = (atoms @ sae.decoder.detach().numpy().T).max(1)
    assert (nearest > 0.95).mean() > 0.9, np.sort(nearest)[:10]
    assert history.fvu.iloc[-1] < 0.1


def test_history_and_best_epoch():
    x = np.random.default_rng(0).normal(size=(250, 24)).astype(np.float32)  # noise: all that is learnt is by heart
    config = small(epochs=30, latents=200, k=8, lr=2e-2, batch_size=25)
    best, history = train_sae(x[100:], config, held_out=x[:100], keep="best", progress=False)
    last, _ = train_sae(x[100:], config, held_out=x[:100], keep="last", progress=False)
    columns = ["epoch", "loss", "fvu", "l0", "dead_fraction", "held_out_fvu", "seconds"]
    assert list(history.columns) == columns and list(history.epoch) == list(range(1, 31))
    assert {"best_epoch", "device", "products", "rate"} <= set(history.attrs)
    assert history.attrs["best_epoch"] == history.epoch[history.held_out_fvu.idxmin()] < 30
    assert best.fvu(x[:100]) == pytest.approx(history.held_out_fvu.min(), rel=0.01)
    assert last.fvu(x[:100]) == pytest.approx(history.held_out_fvu.iloc[-1], rel=0.01)
    assert (history.l0 <= 8).all() and history.l0.iloc[-1] > 7
    assert "held_out_fvu" not in train_sae(x, small(), progress=False)[1]


def test_ema_is_an_average_of_the_steps():
    x, _ = planted(1000)
    raw, _ = train_sae(x, small(), progress=False)
    averaged, _ = train_sae(x, small(ema=0.99), progress=False)
    assert not torch.equal(raw.encoder, averaged.encoder)
    torch.testing.assert_close(averaged.decoder.norm(dim=1), torch.ones(60))
    assert averaged.fvu(x) < 1.5 * raw.fvu(x)


@pytest.mark.parametrize("batch_size", [1, 7, 10_000])
def test_any_batch_size(batch_size):
    x, _ = planted(40)
    _, history = train_sae(x, small(batch_size=batch_size, epochs=2), progress=False)
    assert history.fvu.notna().all()


def test_bad_input_is_refused():
    x, _ = planted(100)
    broken = x.copy()
    broken[17, 3] = np.nan
    with pytest.raises(ValueError, match="row 17"):
        train_sae(broken, small())
    with pytest.raises(ValueError, match="held_out has NaN"):
        train_sae(x, small(), held_out=broken)
    with pytest.raises(ValueError, match="held_out has 23 columns"):
        train_sae(x, small(), held_out=x[:, 1:])
    with pytest.raises(ValueError, match="1 rows; at least 2"):
        train_sae(x[:1], small())
    with pytest.raises(ValueError, match="all equal"):
        train_sae(np.repeat(x[:1], 9, axis=0), small())
    with pytest.raises(TypeError, match="int64"):
        train_sae(np.ones((9, 4), np.int64), small())
    with pytest.raises(ValueError, match="give held_out"):
        train_sae(x, small(), keep="best")
    with pytest.raises(ValueError, match="'last' or 'best'"):
        train_sae(x, small(), keep="first")


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_numba)])
def test_a_learning_rate_far_too_high_is_named(compiled):
    x, _ = planted(400)
    with pytest.raises(FloatingPointError, match=r"lr 1e\+30"):
        train_sae(x, small(lr=1e30, normalize="none"), compiled=compiled, progress=False)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_numba)])
@pytest.mark.parametrize("lr", [3.0, 1e3])
def test_a_loss_that_diverges_in_finite_numbers_is_named(compiled, lr):
    x, _ = planted(400)
    with pytest.raises(FloatingPointError, match=rf"diverges: FVU .* lr {lr:g} is too high: try lr {lr / 10:g}"):
        train_sae(x, small(lr=lr, batch_size=40), compiled=compiled, progress=False)


def records(*fvu: float) -> list[dict]:
    return [{"epoch": i, "loss": value, "fvu": value, "dead_fraction": 0.0} for i, value in enumerate(fvu, 1)]


def test_a_bad_epoch_may_be_made_good_and_three_may_not(caplog):
    config = small(epochs=9, warmup=0.2)
    for fine in (records(0.9, 1.9, 1.5), records(500, 0.9), records(0.9, 3, 3, 1.9), records(*[0.9] * 9)):
        progress.check_progress(fine, 1.0, config)
    progress.check_progress(records(3, 3, 3), 2.0, config)  # it began there
    for bad in (records(0.9, 3, 3, 3), records(0.9, 300), records(*[0.9] * 8, 3), records(np.nan), records(np.inf)):
        with pytest.raises(FloatingPointError, match="lr 0.01 is too high: try lr 0.001"):
            progress.check_progress(bad, 1.0, config)
    last = records(*[1.0] * 9)
    last[-1]["dead_fraction"] = 0.9
    progress.check_progress(last, 1.0, config)
    assert "explains nothing (FVU 1.000, 90 % dead): lr 0.01 may be too high" in caplog.text


def test_one_bar_shows_rate_fvu_and_dead_within_an_epoch(capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    shown = []
    monkeypatch.setattr(
        progress.Bar, "_show", lambda self, *what, show=progress.Bar._show: shown.append(what[0]) or show(self, *what)
    )
    x, _ = planted(1000)
    train_saes(x, [small(epochs=2, batch_size=100), small(seed=1, epochs=2, batch_size=100)], progress=True)
    assert shown == [*range(200, 2001, 200), 2000, *range(2200, 4001, 200), 4000]
    line = capsys.readouterr().err.split("\r")[-1]
    assert all(word in line for word in ("100%", "vec/s", "fvu=0.", "dead=0.")), line
    train_sae(x, small(epochs=1), progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("room", "says"),
    [
        (3_600_000, "batch_size=128 would fit"),
        (1_500_000, "2 of these SAEs at a time would fit"),
        (400_000, "latents=36 would fit"),
        (100_000, "520 rows would fit"),
    ],
)
def test_out_of_gpu_memory_says_what_would_fit(monkeypatch, room, says):
    def fail(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(PlainStep, "__call__", fail)
    monkeypatch.setattr("capsae.sae.train.room", lambda _: room)
    x, _ = planted(2000)
    configs = [small(latents=600, seed=seed) for seed in range(4)]
    with pytest.raises(MemoryError, match=r"0\.00 GB for 2000 rows of 24, .* optimiser of 4 SAEs") as caught:
        train_saes(x, configs, compiled=False, progress=False)
    assert says in str(caught.value)


def test_geometric_median_resists_outliers():
    rng = np.random.default_rng(0)
    x = torch.from_numpy(np.vstack([rng.normal(size=(900, 5)), np.full((99, 5), 100.0)])).float()
    assert geometric_median(x).norm() < 1 < x.mean(0).norm()


@pytest.mark.parametrize("d", [24, 48])
def test_fitted_start_reconstructs_best(d):
    x, _ = planted(500, d)
    fvu = {}
    for init in ("transpose", "fitted"):
        sae, _ = start(torch.from_numpy(x), small(init=init, latents=300, k=12), torch.device("cpu"))
        fvu[init] = sae.fvu(x)
        torch.testing.assert_close(F.normalize(sae.encoder, dim=1), sae.decoder)
    assert fvu["fitted"] < fvu["transpose"]
    with torch.no_grad():
        sae.encoder *= 1.1
    assert sae.fvu(x) > fvu["fitted"]


def test_schedule_rises_stays_and_falls():
    lr = [schedule(i, 100, 0.1, 0.2) for i in range(100)]
    assert lr[0] < 0.1 and lr[10:80] == [1.0] * 70 and 0 < lr[-1] < 0.1
    assert np.diff(lr[:10]).min() > 0 > np.diff(lr[81:]).max()
    assert [schedule(i, 3, 0, 0) for i in range(3)] == [1, 1, 1]


def test_auxk_of_all_dead_is_dense():
    rng = torch.Generator().manual_seed(0)
    x, e, w, v = (torch.randn(n, 6, generator=rng) for n in (10, 10, 4, 4))
    dense = (e - F.linear(x, w).relu() @ v).square().sum()
    torch.testing.assert_close(auxk_loss(x, e, w, torch.zeros(4), v, k=4), dense)
