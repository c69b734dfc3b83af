"""Variants of the SAE: gradients against finite differences, what is saved, what each claims on planted data."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from capsae import sae as zoo
from capsae.features.featureset import LinearHead
from capsae.sae import SAEConfig, TopKSAE, measures, train_sae
from capsae.sae.dictionaries.pursuit import matching_pursuit
from capsae.sae.model import model
from capsae.sae.steps import auxk_loss
from capsae.sae.variants import thresholds as variants
from capsae.sae.variants.samples import head_gradient
from capsae.sae.variants.step import VariantStep

D, M, K = 24, 32, 3
NAMES = [name for name in variants.REGISTRY if name != "topk"]
SMALL = {"archetypal": {"centroids": 128}}  # options that small data need


def planted(n: int, seed: int, active: int = K, signed: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Rows (n, D), sums of `active` unit atoms with little noise; the atoms (M, D), the same for all seeds."""
    w = np.random.default_rng(99).normal(size=(M, D))
    w /= np.linalg.norm(w, axis=1, keepdims=True)
    rng = np.random.default_rng(seed)
    a = np.zeros((n, M))
    for row in a:
        row[rng.permutation(M)[:active]] = rng.uniform(1, 2, active) * (rng.choice([-1, 1], active) if signed else 1)
    return (a @ w + 0.01 * rng.normal(size=(n, D))).astype(np.float32), w


def head(seed: int = 0) -> LinearHead:
    rng = np.random.default_rng(seed)
    return LinearHead(rng.normal(size=(5, D)).astype(np.float32), rng.normal(size=5).astype(np.float32))


def config(name: str, options: dict | None = None, **settings) -> SAEConfig:
    settings = {"latents": 48, "k": K, "epochs": 60, "batch_size": 250, "lr": 5e-3, "normalize": "none"} | settings
    return SAEConfig(variant=name, options=SMALL.get(name, {}) | (options or {}), **settings)


def train(x, settings: SAEConfig, **arguments):
    own_head = head() if settings.variant == "gsae" else None
    return train_sae(x, settings, progress=False, device="cpu", head=own_head, **arguments)


@functools.cache
def trained(name: str, signed: bool = False):
    return train(planted(2000, 0, signed=signed)[0], config(name))


@functools.cache
def short(name: str, **options):
    return train(planted(300, 0)[0], config(name, options, epochs=3, batch_size=100, dead_after_epochs=0.3))[0]


def test_metadata_is_complete():
    assert len(NAMES) == 16
    for name in variants.REGISTRY:
        info = variants.info(name)
        assert info["title"] and info["formula"] and info["description"] and "[" in info["source"]
        assert all(isinstance(value, bool | int | float) for value in info["defaults"].values())


# --- the same interface for all


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_gives_the_same_codes(name, tmp_path):
    model, unseen = short(name), planted(600, 1)[0]
    codes = model.encode(unseen)
    assert type(model) is variants.REGISTRY[name]
    assert (codes.values >= 0).all() and (np.diff(codes.values, axis=1) <= 0).all()
    assert codes.n_latents == model.n_latents and codes.indices.max() < codes.n_latents
    used = [indices[values > 0] for values, indices in zip(codes.values, codes.indices, strict=True)]
    assert all(len(set(row)) == len(row) for row in used)
    np.testing.assert_allclose(model.decoder.detach().norm(dim=1), 1, atol=1e-5)
    folder = model.save(tmp_path)
    assert json.loads((folder / "cfg.json").read_text())["kind"] == name
    for load in (zoo.load, TopKSAE.load):
        again = load(folder)
        assert type(again) is type(model) and again.config == model.config
        found = again.encode(unseen)
        np.testing.assert_array_equal(found.values, codes.values)
        np.testing.assert_array_equal(found.indices, codes.indices)
        np.testing.assert_array_equal(again.reconstruct(unseen), model.reconstruct(unseen))


@pytest.mark.parametrize("name", NAMES)
def test_inference_code_is_what_activate_says(name):
    model, x = short(name), torch.from_numpy(planted(50, 1)[0])
    codes = model.encode(x)
    with torch.no_grad():
        a = model.activate(x)
    if name == "abs_topk":
        a = torch.cat([a.relu(), (-a).relu()], 1)
    if name == "archetypal":
        a = a * model.lengths
    torch.testing.assert_close(codes.dense(), a, atol=1e-5, rtol=1e-4)
    dense = a[:, :48] - a[:, 48:] if name == "abs_topk" else a
    torch.testing.assert_close(model.decode(codes), dense @ model.decoder.detach() + model.pre_bias.detach())


@pytest.mark.parametrize("name", NAMES)
def test_training_is_deterministic_and_goes_on_from_a_checkpoint(name, tmp_path, monkeypatch):
    x = planted(300, 0)[0]
    settings = config(name, epochs=3, batch_size=100, dead_after_epochs=0.3, ema=0.9)
    whole = train(x, settings)[0]
    step = variants.REGISTRY[name].after_step
    calls = []

    def killed(self, *arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        step(self, *arguments)

    monkeypatch.setattr(variants.REGISTRY[name], "after_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(x, settings, checkpoint=tmp_path, checkpoint_seconds=0)
    monkeypatch.setattr(variants.REGISTRY[name], "after_step", step)
    resumed = train(x, settings, checkpoint=tmp_path, checkpoint_seconds=0)[0]
    for key, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[key]), key


def test_topk_is_untouched_by_the_others():
    x = planted(300, 0)[0]
    alone = train_sae(x, config("topk", epochs=3), progress=False, device="cpu")
    both = zoo.train_saes(x, [config("relu", epochs=3), config("topk", epochs=3)], "cpu", progress=False)
    for key, tensor in alone[0].state_dict().items():
        assert torch.equal(tensor, both[1][0].state_dict()[key]), key
    assert type(alone[0]) is TopKSAE and alone[1].attrs["step"] != "VariantStep" == both[0][1].attrs["step"]


@pytest.mark.parametrize("name", ["relu", "mutual_choice"])  # the dead, and what fires too seldom
def test_auxk_looks_at_its_share_of_the_batch(name):
    settings = config(name, aux_rows=0.25)
    step = VariantStep(variants.model(settings)(D, settings), 2.0, 1)
    step.dead = torch.arange(5)
    step.idle += 1
    rng = torch.Generator().manual_seed(0)
    centred, residual, encoder, decoder = (torch.randn(n, D, generator=rng) for n in (40, 40, 5, 5))
    first = auxk_loss(centred[:10], residual[:10], encoder, torch.zeros(5), decoder, D // 2)
    found = step.auxk(centred, residual, encoder, torch.zeros(5), decoder)
    assert found.item() == pytest.approx(settings.aux_alpha * 4 * first.item(), rel=1e-6)


OTHER = {  # for each option a value under which something else must come out
    "relu": {"l1": 0.5, "l1_start": 0.5, "l1_rate": 0.2, "l1_warmup": 0.9},
    "gated": {"l1": 0.5, "l1_start": 0.5, "l1_rate": 0.2, "l1_warmup": 0.9},
    "jumprelu": {"bandwidth": 0.2, "weight": 0.1},
    "gba": {"rate": 0.2, "density_ema": 0.1, "groups": 2},
    "top_afa": {"coefficient": 1.0},
    "batch_topk": {"threshold_ema": 0.01},
    "matryoshka": {"threshold_ema": 0.01},
    "mutual_choice": {"threshold_ema": 0.01, "tau": 2.0, "shift": 10.0, "density_ema": 0.01},
    "feature_choice": {"threshold_ema": 0.01, "tau": 2.0, "shift": 10.0, "density_ema": 0.01},
    "gsae": {"beta": 5.0},
    "vsae": {"beta": 0.5, "sigma": 2.0, "sample": False},
    "mp": {"tolerance": 0.5},
    "archetypal": {"centroids": 64, "delta": 0.01, "start": 0.1},
}


@pytest.mark.parametrize("name", NAMES)
def test_each_option_changes_something(name):
    assert set(OTHER.get(name, {})) >= set(variants.REGISTRY[name].defaults)
    x = planted(200, 1)[0]
    base = {"tau": 0.9} if "tau" in variants.REGISTRY[name].defaults else {}  # so that AuxK has something to do
    reference = short(name, **base).reconstruct(x)
    for key, value in OTHER.get(name, {}).items():
        assert not np.array_equal(short(name, **(base | {key: value})).reconstruct(x), reference), key


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="variant is 'top_q'; one of topk, relu"):
        model(SAEConfig(8, 2, variant="top_q"))
    with pytest.raises(ValueError, match="'jumprelu' has no option 'l1'; it has bandwidth, weight"):
        model(SAEConfig(8, 2, variant="jumprelu", options={"l1": 1}))
    with pytest.raises(ValueError, match="'topk' has no option 'l1'; it has none"):
        model(SAEConfig(8, 2, options={"l1": 1}))
    with pytest.raises(TypeError, match="option 'weight' of 'jumprelu' is 'big'"):
        model(SAEConfig(8, 2, variant="jumprelu", options={"weight": "big"}))
    with pytest.raises(ValueError, match="variant is 'top_q'"):
        train_sae(planted(100, 0)[0], SAEConfig(8, 2, variant="top_q"), progress=False)
    x = planted(100, 0)[0]
    with pytest.raises(ValueError, match="'gsae' needs head"):
        train_sae(x, config("gsae"), progress=False)
    with pytest.raises(ValueError, match="'relu' takes no head"):
        train_sae(x, config("relu"), progress=False, head=head())
    with pytest.raises(ValueError, match="variant='topk', found 'relu'"):
        train_sae(x, config("relu"), progress=False, compiled=True)
    with pytest.raises(ValueError, match="'relu' trains in float32"):
        train_sae(x, config("relu", products="bf16"), progress=False)
    with pytest.raises(ValueError, match="'centroids' is 128, but there are 100 rows"):
        train_sae(x, config("archetypal"), progress=False)
    from capsae.sae.exchange.folders import save_saelens

    with pytest.raises(TypeError, match="a ReLU was given"):
        save_saelens(short("relu"), tmp_path)


# --- gradients


def ready(name: str, **options) -> tuple[variants.Variant, torch.Tensor]:
    """A model of float64 after a few steps, and a batch."""
    model = variants.model(config(name, options))(D, config(name, options))
    model.load_state_dict(short(name, **options).state_dict())
    model.double()
    model.variance, model.n_steps = 3.0, 9
    if name == "gsae":
        model.head = tuple(torch.from_numpy(t).double() for t in (head().weight, head().bias))
    return model, torch.from_numpy(planted(7, 3)[0]).double()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_finite_differences(name):
    """In float64, along random directions of each parameter; thresholds of JumpReLU have a rule of their own."""
    model, x = ready(name)
    model.forward_loss(x, 5).loss.backward()
    rng = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        if key == "log_threshold":
            continue
        direction = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
        step, values = 1e-7, []
        for side in (1, -1):
            with torch.no_grad():
                parameter.add_(side * step * direction)
                if name == "gated":  # its auxiliary term freezes the decoder: x_hat there is a constant to b and W_dec
                    values.append(gated_loss(model, x, key, side * step * direction))
                else:
                    values.append(model.forward_loss(x, 5).loss.item())
                parameter.sub_(side * step * direction)
        numeric = (values[0] - values[1]) / (2 * step)
        analytic = 0.0 if parameter.grad is None else (parameter.grad * direction).sum().item()
        assert analytic == pytest.approx(numeric, rel=2e-4, abs=2e-4), key


def gated_loss(model, x, key, moved) -> float:
    """The gated loss by hand, with the frozen copies where they were before `moved` was added."""
    b, w = model.pre_bias, model.decoder
    frozen_b, frozen_w = (b - moved if key == "pre_bias" else b), (w - moved if key == "decoder" else w)
    product = (x - b) @ model.encoder.T
    gate = product + model.gate_bias
    a = (product * model.log_gain.exp() + model.encoder_bias).clamp_min(0) * (gate > 0)
    error = (x - b - a @ w).square().sum() + (x - frozen_b - gate.clamp_min(0) @ frozen_w).square().sum()
    return (error + model.weight(5) * gate.clamp_min(0).sum()).item()


def test_thresholds_of_jumprelu_follow_the_published_rule():
    model, x = ready("jumprelu", bandwidth=0.5, weight=0.7)
    model.forward_loss(x, 0).loss.backward()
    z, theta = model.preactivations(x).detach(), model.log_threshold.detach().exp()
    width = 0.5 * 3.0**0.5
    a = z * (z > theta)
    residual = x - model.pre_bias - a @ model.decoder
    gradient_a = (-2 * residual @ model.decoder.T).detach()
    l0 = (z > theta).sum() / len(x)
    expected = torch.zeros(48, dtype=torch.float64)
    for row, g in zip(z, gradient_a, strict=True):
        for i in range(48):
            inside = 1.0 if abs((row[i] - theta[i]) / width) < 0.5 else 0.0
            expected[i] += -theta[i] / width * inside * g[i]
            expected[i] += 0.7 * 3.0 * len(x) * 2 * (l0 / K - 1) / K * (-1 / width * inside) / len(x)
    torch.testing.assert_close(model.log_threshold.grad, expected * theta)
    assert (expected != 0).any()


def test_head_gradient_is_autograds():
    x = torch.from_numpy(planted(9, 0)[0]).double().requires_grad_()
    weight, bias = (torch.from_numpy(t).double() for t in (head().weight, head().bias))
    logits = x @ weight.T + bias
    F.cross_entropy(logits, logits.argmax(1), reduction="sum").backward()
    torch.testing.assert_close(head_gradient(x.detach(), weight, bias), x.grad)


def test_gsae_chooses_by_influence():
    model, x = ready("gsae", beta=2.0)
    with torch.no_grad():
        z = model.preactivations(x).relu()
        influence = (head_gradient(x, *model.head) @ model.decoder.T).abs()
        influence /= influence.square().mean(1, keepdim=True).sqrt()
        chosen = (z + 2.0 * z * influence).topk(K, dim=1).indices
        a = model.train_activate(x, 0)
    assert (a.gather(1, chosen) == z.gather(1, chosen)).all() and ((a > 0).sum(1) <= K).all()
    assert not torch.equal(a, model.activate(x))  # TopK would have chosen others


# --- selection rules, by hand


def test_batch_topk_keeps_k_times_the_batch():
    model, x = ready("batch_topk")
    with torch.no_grad():
        a, z = model.train_activate(x, 0), model.preactivations(x).relu()
    assert (a > 0).sum() == K * len(x) and a[a > 0].min() >= z[a == 0].max() - 1e-12


def test_thresholds_are_running_means():
    model, x = ready("batch_topk", threshold_ema=0.25)
    model.threshold.fill_(7.0)
    with torch.no_grad():
        forward = model.forward_loss(x, 1000)
        smallest = model.train_activate(x, 0)
        model.after_step(x, forward, 1000)
    assert model.threshold.item() == pytest.approx(0.25 * 7 + 0.75 * smallest[smallest > 0].min().item())


def test_feature_choice_gives_each_latent_its_share():
    model, x = ready("feature_choice")
    x = torch.from_numpy(planted(400, 3)[0]).double()
    with torch.no_grad():
        a, z = model.train_activate(x, 5), model.preactivations(x)
    rank = model.drive.argsort(descending=True, stable=True).argsort()
    m = (model.zipf()[rank] * 400).round().clamp(min=1)
    positive = (z > 0).sum(0)
    assert torch.equal((a > 0).sum(0).double(), torch.minimum(m, positive.double()))
    assert model.zipf().sum() == pytest.approx(K) and (model.zipf().diff() < 0).all()
    for i in range(48):
        kept = a[:, i] > 0
        if kept.any() and not kept.all():
            assert z[kept, i].min() >= z[~kept, i].max()


def test_top_afa_is_nearest_in_length():
    model, x = ready("top_afa")
    with torch.no_grad():
        a, z = model.activate(x), model.preactivations(x).relu()
    for own, row, target in zip(a, z, (x - model.pre_bias).norm(dim=1), strict=True):
        lengths = [row.sort(descending=True).values[:j].norm().item() for j in range(1, 49)]
        best = min(abs(length - target.item()) for length in lengths)
        assert abs(own.norm() - target).item() == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("numba", [True, False])
def test_matching_pursuit_by_its_gram_matrix_equals_the_residual_form(numba, monkeypatch):
    from capsae.sae.dictionaries import pursuit

    if not numba:
        monkeypatch.setattr(pursuit, "_kernels", lambda x: None)
    x, w = (torch.from_numpy(t).float() for t in planted(40, 0))
    values, indices = matching_pursuit(x, w, 5, 1e-6)
    for row, strengths, chosen in zip(x, values, indices, strict=True):
        residual = row.clone()
        for value, i in zip(strengths.tolist(), chosen.tolist(), strict=True):
            product = w @ residual
            assert product[i] >= product.max() - 1e-5 and product[i] == pytest.approx(value, abs=1e-5)
            residual -= product[i] * w[i]
        left = row.square().sum() - strengths.square().sum()
        assert residual.square().sum().item() == pytest.approx(left.item(), abs=1e-4)
    values, _ = matching_pursuit(torch.stack([w[3], -w.sum(0) * 0]), w, 5, 1e-3)
    assert (values > 0).tolist() == [[True] + [False] * 4, [False] * 5]


@pytest.mark.parametrize("width, latents", [(24, 32), (30, 45)])  # of these kernels pad the second
def test_compiled_pursuit_equals_the_plain_one(width, latents, monkeypatch):
    from capsae.sae.dictionaries import pursuit

    rng = torch.Generator().manual_seed(0)
    w = F.normalize(torch.randn(latents, width, generator=rng), dim=1)
    x = torch.randn(600, width, generator=rng)  # more than one block

    def everything():
        chosen, indices = matching_pursuit(x, w, 6, 0.3)
        values, left = pursuit.unroll(x, w, indices, chosen > 0)
        gradient = pursuit.unroll_gradient(left, w, indices, chosen > 0, values)
        return chosen, indices * (chosen > 0), values, left, *gradient

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        fast = everything()
        torch.set_num_threads(2)
        assert all(torch.equal(one, two) for one, two in zip(fast, everything(), strict=True))
    finally:
        torch.set_num_threads(threads)
    assert 0 < (fast[0] > 0).float().mean() < 1
    torch.testing.assert_close(fast[0], fast[2], atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(pursuit, "_kernels", lambda x: None)
    for one, two in zip(fast, everything(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


def test_a_pursuits_gradient_is_autograds():
    from capsae.sae.dictionaries.pursuit import Left

    x, w = (torch.from_numpy(t).double().requires_grad_() for t in planted(20, 0))
    found, indices = matching_pursuit(x.detach(), w.detach(), 5, 0.2)
    active = found > 0
    left = x
    for j in range(5):
        own = w[indices[:, j]]
        left = left - ((left * own).sum(1) * active[:, j])[:, None] * own
    by_hand = torch.autograd.grad(left.square().sum(), (x, w))
    loss, values, rest = Left.apply(x, w, indices, active)
    assert not active.all()
    torch.testing.assert_close(rest, left.detach())
    torch.testing.assert_close(values, found)
    for mine, theirs in zip(torch.autograd.grad(loss, (x, w)), by_hand, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_hierarchical_topk_scores_every_prefix():
    model, x = ready("hierarchical_topk")
    with torch.no_grad():
        values, indices = model.code(x)
        by_hand = sum(
            (x - model.pre_bias - model.weighted_rows(values[:, :j].contiguous(), indices[:, :j].contiguous()))
            .square()
            .sum()
            for j in range(1, K + 1)
        )
        assert model.forward_loss(x, 0).loss.item() == pytest.approx(by_hand.item() / K)


def test_matryoshka_scores_every_group():
    model, x = ready("matryoshka")
    with torch.no_grad():
        a = model.train_activate(x, 0)
        by_hand = sum((x - model.pre_bias - a[:, :m] @ model.decoder[:m]).square().sum() for m in (3, 9, 21, 48))
        assert model.forward_loss(x, 0).loss.item() == pytest.approx(by_hand.item())


def test_archetypal_rows_lie_near_the_hull():
    model = short("archetypal")
    assert (model.mixture >= 0).all() and model.mixture.sum(1).detach().numpy() == pytest.approx(1, abs=1e-5)
    assert model.relaxation.norm(dim=1).max() <= 1 + 1e-5
    rows = (model.mixture @ model.points + model.relaxation) * model.log_scale.exp()
    torch.testing.assert_close(rows.detach(), (model.decoder * model.lengths[:, None]).detach())


# --- what they claim, on planted dictionaries (unseen rows)

FOUND = {  # mean cosine of a planted atom with the nearest learned one, at least
    "relu": 0.9, "gated": 0.9, "jumprelu": 0.9, "batch_topk": 0.9, "mutual_choice": 0.9, "feature_choice": 0.9,
    "hierarchical_topk": 0.9, "gsae": 0.9, "vsae": 0.9, "mp": 0.9, "vl_sae": 0.9, "archetypal": 0.9,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUND)
def test_planted_dictionary_is_recovered(name):
    model, atoms = trained(name)[0], planted(1, 0)[1]
    assert measures.max_cosines(atoms, model.decoder).mean() > FOUND[name]


@pytest.mark.slow
def test_groups_with_unequal_targets_miss_features_that_are_equally_frequent():
    atoms = planted(1, 0)[1]
    ten, one = (train(planted(2000, 0)[0], config("gba", {"groups": n}))[0] for n in (10, 1))
    assert measures.max_cosines(atoms, one.decoder).mean() > 0.95
    assert measures.max_cosines(atoms, ten.decoder).mean() < 0.92


@pytest.mark.slow
def test_matryoshka_recovers_features_without_an_order_less_well_than_batch_topk():
    model, atoms = trained("matryoshka")[0], planted(1, 0)[1]
    assert measures.max_cosines(atoms, model.decoder).mean() < 0.92
    assert measures.max_cosines(atoms, trained("batch_topk")[0].decoder).mean() > 0.92


@pytest.mark.slow
def test_top_afa_finds_a_dense_code_where_a_sparse_one_was_planted():
    model, atoms = trained("top_afa")[0], planted(1, 0)[1]
    assert measures.l0(model.encode(planted(1000, 5)[0])) > 5 * K
    assert measures.fvu(model, planted(1000, 5)[0]) < 0.05
    assert measures.max_cosines(atoms, model.decoder).mean() < 0.7


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if n != "top_afa"])  # which has no target
def test_l0_is_at_its_target_on_unseen_rows(name):
    found = measures.l0(trained(name)[0].encode(planted(2000, 5)[0]))
    assert found == pytest.approx(K, rel=0.05)


LEVELLED = [name for name in NAMES if issubclass(variants.REGISTRY[name], variants.Levelled)]


@pytest.mark.parametrize("name", LEVELLED)
def test_held_out_rows_decide_on_the_level(name):
    """After too short a training on too few rows, L0 is k where thresholds were calibrated; training is as without."""
    x, held_out, unseen = planted(150, 0)[0], planted(4000, 1)[0], planted(4000, 2)[0]
    settings = config(name, epochs=4, batch_size=50, ema=0.9)
    without = train(x, settings)[0]
    model = train(x, settings, held_out=held_out)[0]
    assert measures.l0(model.encode(held_out)) == pytest.approx(K, abs=0.01)
    assert measures.l0(model.encode(unseen)) == pytest.approx(K, rel=0.05)
    assert abs(measures.l0(without.encode(held_out)) - K) > 0.01
    for key, tensor in without.state_dict().items():
        assert (key == "shift") != torch.equal(tensor, model.state_dict()[key]), key


@pytest.mark.slow
def test_only_signed_codes_join_a_direction_and_its_opposite():
    """Features with both signs: TopK needs a latent for each end; AbsTopK has one atom for both."""
    atoms, unseen = planted(1, 0)[1], planted(1000, 5, signed=True)[0]
    both = trained("abs_topk", signed=True)[0]
    assert measures.max_cosines(atoms, both.decoder, signed=False).mean() > 0.9
    one = trained("topk", signed=True)[0]
    assert measures.fvu(both, unseen) < measures.fvu(one, unseen) / 2
    ends = [measures.max_cosines(sign * atoms, one.decoder) > 0.8 for sign in (1, -1)]
    assert (ends[0] & ends[1]).mean() < 0.75  # 48 latents cannot hold 2 x 32 ends


# --- a hierarchy, after the synthetic benchmark of arXiv 2506.03093

PARENTS, CHILDREN = 10, 3


def siblings(rng, n: int, d: int, cosine: float) -> tuple[np.ndarray, np.ndarray]:
    """n unit atoms around a centre (d,), with a mean cosine of about `cosine`; and the centre."""
    centre = rng.normal(size=d)
    centre /= np.linalg.norm(centre)
    own = rng.normal(size=(n, d))
    own -= np.outer(own @ centre, centre)
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    return np.sqrt(1 - cosine) * own + np.sqrt(cosine) * centre, centre


def family(n: int, seed: int, cosine: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows (n, D) of one of 10 parents, in 6 dimensions, and one of its 3 children, in the 18 orthogonal to them.

    With the atoms (40, D), which are active (n, 40), and the centres of the siblings (10, D).
    """
    rng = np.random.default_rng(99)
    atoms, centres = np.zeros((PARENTS * (1 + CHILDREN), D)), np.zeros((PARENTS, D))
    atoms[:PARENTS, :6] = siblings(rng, PARENTS, 6, cosine)[0]
    for i in range(PARENTS):
        own = slice(PARENTS + CHILDREN * i, PARENTS + CHILDREN * (i + 1))
        atoms[own, 6:], centres[i, 6:] = siblings(rng, CHILDREN, D - 6, cosine)
    rng = np.random.default_rng(seed)
    parent, row = rng.integers(PARENTS, size=n), np.arange(n)
    child = PARENTS + CHILDREN * parent + rng.integers(CHILDREN, size=n)
    a = np.zeros((n, len(atoms)))
    a[row, parent] = 1.5 * np.maximum(0.1, rng.normal(1, 0.25, n))
    a[row, child] = np.maximum(0.1, rng.normal(1, 0.25, n))
    return (a @ atoms + 0.01 * rng.normal(size=(n, D))).astype(np.float32), atoms, a > 0, centres


def support_f1(model, x: np.ndarray, atoms: np.ndarray, active: np.ndarray) -> float:
    """F1 of the active set (a code over 5 % of the row's length), after a one-to-one matching of atoms by cosine."""
    planted_ones, learned = linear_sum_assignment(-atoms @ model.decoder.detach().numpy().T)
    found = model.encode(x).dense() > 0.05 * np.linalg.norm(x, axis=1, keepdims=True)
    both = (active[:, planted_ones] & found[:, learned]).sum()
    return 2 * both / (active.sum() + found.sum())


@functools.cache
def trained_on_family(name: str, cosine: float, seed: int):
    options = {"tolerance": 0.05} if name == "mp" else {}
    settings = config(name, options, latents=40, k=2, epochs=45, batch_size=200, lr=1e-2, seed=seed, pre_bias="zero")
    return train(family(4000, seed, cosine)[0], settings)[0]


@pytest.mark.slow
def test_matching_pursuit_finds_the_active_path_of_a_hierarchy_less_well_than_topk():
    """Means over three seeds (0.73 and 0.85 when written); not what its source reports: a negative result."""
    found = {"mp": [], "topk": []}
    for seed in range(3):
        x, atoms, active, _ = family(2000, 1000 + seed, 0.5)
        for name, scores in found.items():
            scores.append(support_f1(trained_on_family(name, 0.5, seed), x, atoms, active))
    ours, other = (np.mean(scores) for scores in found.values())
    assert 0.6 < ours < 0.8
    assert other > ours + 0.05


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_high_cosine_with_correlated_children_is_not_recovery(seed):
    """Siblings with cosine .9: MP's cosines are over .9 and TopK's are not, but the centre alone has .95 with each."""
    x, atoms, active, centres = family(2000, 1000 + seed, 0.9)
    ours, other = (trained_on_family(name, 0.9, seed) for name in ("mp", "topk"))
    cosine = [measures.max_cosines(atoms[PARENTS:], rows).mean() for rows in (ours.decoder, other.decoder, centres)]
    assert cosine[1] + 0.05 < cosine[0] < cosine[2] and cosine[0] > 0.88
    assert support_f1(ours, x, atoms, active) < 0.65


@pytest.mark.parametrize("cosine", [0.5, 0.9])
def test_with_the_planted_dictionary_a_pursuit_has_the_path_and_thresholds_of_the_same_atoms_have_not(cosine):
    """So it is the dictionary that is not learned; the selection itself does what its source says of it."""
    x, atoms, active, _ = family(2000, 1000, cosine)
    w, rows = torch.from_numpy(atoms).float(), torch.from_numpy(x)
    pursued = matching_pursuit(rows, w, 2, 0.05)[1]
    thresholded = (rows @ w.T).topk(2, dim=1).indices
    pursuit, threshold = (np.take_along_axis(active, i.numpy(), 1).mean() for i in (pursued, thresholded))
    assert pursuit > 0.95 > 0.8 > threshold
