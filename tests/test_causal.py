"""The causal check on planted dictionaries with known effects, and its published page against its own numbers."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch

from capsae import ClassActivationProfiles, SAEConfig, display, plan, publish
from capsae.analyses import causal, causal_curves, causal_effects, causal_figures, causal_text
from capsae.featureset import LinearHead
from capsae.sae.model import SparseCodes, TopKSAE

C, D, K = 4, 12, 3  # classes, width, active latents


def _sae(normalize="none", latents=D, seed=0):
    """Latent i is unit vector i; further latents are random unit vectors."""
    sae = TopKSAE(D, SAEConfig(latents=latents, k=K, normalize=normalize, seed=seed))
    rows = torch.eye(D)
    if latents > D:
        extra = torch.randn(latents - D, D, generator=torch.Generator().manual_seed(seed))
        rows = torch.cat([rows, torch.nn.functional.normalize(extra, dim=1)])
    with torch.no_grad():
        sae.decoder.copy_(rows)
        sae.encoder.copy_(rows)
        sae.mean.copy_(torch.linspace(-1, 1, D))
        sae.std.copy_(torch.linspace(0.5, 2, D))
    return sae


def _planted(rows=30, seed=0, shared=0.0):
    """Class c fires latent c strongly (value about 5) and two of the latents from 4 on; the head reads latent c."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(C), rows)
    x = np.zeros((len(labels), D), np.float32)
    x[np.arange(len(x)), labels] = 5 + 0.2 * rng.random(len(x))
    for row in x:
        row[rng.choice(np.arange(C, D), 2, replace=False)] = 1 + rng.random(2)
    weight = np.zeros((C, D), np.float32)
    weight[:, :C] = np.eye(C) * 2 + shared
    sae = _sae()
    caps = ClassActivationProfiles.fit(sae.encode(x), labels, C)
    return causal.Bench(sae, LinearHead(weight, np.zeros(C, np.float32)), caps, x, labels, 1 / D)


def _random_bench(normalize="sample", rows=25, latents=40, seed=1):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(C), rows)
    centres = rng.normal(size=(C, D)) * 2
    x = centres[labels] + rng.normal(size=(len(labels), D)) + 0.7
    sae = _sae(normalize, latents, seed)
    x = x.astype(np.float32)
    head = LinearHead(centres.astype(np.float32), rng.normal(size=C).astype(np.float32))
    caps = ClassActivationProfiles.fit(sae.encode(x), labels, C)
    return causal.Bench(sae, head, caps, x, labels, 0.2), head


# --- interventions


def test_one_latent_that_is_one_class_direction_lowers_that_logit_by_value_times_weight_and_no_other():
    bench = _planted()
    found = dict(causal.deletions(bench, np.zeros(D)))
    for c in range(C):
        own = bench.labels == c
        value = bench.x[own, c]
        move = found[c]["core"][0][own] @ bench.weight.T
        np.testing.assert_allclose(move[:, c], -2 * value, rtol=1e-6)
        assert np.abs(np.delete(move, c, 1)).max() == 0
        assert np.abs(found[c]["core"][0][~own]).max() == 0, "other classes do not fire the latent"
        assert np.abs(found[c]["outside"][0][own] @ bench.weight[c]).max() == 0


@pytest.mark.parametrize("normalize", ["sample", "l2", "dataset", "none"])
def test_effects_are_those_of_decoding_and_of_the_head(normalize):
    bench, head = _random_bench(normalize)
    sae, x = bench.sae, bench.x.astype(np.float32)
    np.testing.assert_allclose(bench.x_hat, sae.reconstruct(x), atol=1e-4)
    codes = causal.scaled(bench.codes, bench.core[2], 2.5)
    change = bench.change(codes)
    rows, shift, scale = sae._normalized(torch.as_tensor(x))
    by_hand = (sae.decode(codes) - sae.decode(bench.codes)) * scale.numpy()
    assert np.abs(by_hand).max() > 0.1
    np.testing.assert_allclose(bench.delta(change), by_hand, atol=2e-4)
    exact = head.logits(x + by_hand.astype(np.float32)) - head.logits(x)
    np.testing.assert_allclose(bench.logit_delta(change), exact, atol=2e-3)
    np.testing.assert_allclose(bench.logits, head.logits(x), atol=1e-4)


def test_scaling_and_transplanting_codes():
    codes = SparseCodes(np.array([[3.0, 2.0, 1.0]]), np.array([[4, 0, 2]], np.int32), 6)
    mask = np.array([False, False, True, False, True, False])
    assert causal.scaled(codes, mask, 0).values.tolist() == [[0, 2, 0]]
    assert causal.scaled(codes, np.array([[True, False, False]]), 2).values.tolist() == [[6, 2, 1]]
    with pytest.raises(ValueError, match="chosen has shape"):
        causal.scaled(codes, np.zeros((2, 2), bool), 0)
    profile = np.array([0.5, 9, 9, 0.25, 9, 9])
    put = causal.transplanted(codes, mask, np.array([0, 3]), profile)
    assert put.dense().tolist() == [[0.5, 0, 0, 0.25, 0, 0]], "own core out, and what stood on the other's core"
    kept = causal.transplanted(codes, np.array([False] * 4 + [True, False]), np.array([3]), profile)
    assert kept.dense().tolist() == [[2, 0, 1, 0.25, 0, 0]]


def test_transplants_are_those_of_the_codes():
    bench, head = _random_bench()
    pairs = causal_curves.transplants(bench)
    core = bench.caps.core(bench.core_fraction)
    for a, b in ((0, 1), (3, 2)):
        own = bench.labels == a
        codes = causal.transplanted(bench.codes[own], bench.core[a], core[b], bench.caps.mean[b])
        x_hat = bench.sae.decode(SparseCodes(codes.values.astype(np.float32), codes.indices, codes.n_latents))
        new = bench.x[own] + (x_hat - bench.sae.decode(bench.codes[own])) * bench.row_scale[own]
        share = (head.logits(new.astype(np.float32)).argmax(1) == b).mean()
        row = pairs[(pairs["of"] == a) & (pairs["into"] == b)].iloc[0]
        assert row["predicted"] == pytest.approx(share)
    planted = causal_curves.transplants(_planted())
    assert (planted["predicted"] == 1).all() and (planted["top2"] == 1).all() and (planted["shuffled"] < 1).all()
    assert (planted["reordered"] == 1).all(), "a core of one latent has one order"


def test_controls_have_exactly_the_cores_energy_and_the_random_one_its_number():
    bench, _ = _random_bench()
    for c, found in causal.deletions(bench, bench.x.mean(0)):
        core, count, *_ = found["core"]
        energy = (core**2).sum(1)
        for name in (*causal_effects.MATCHED, "head_direction"):
            delta = found[name][0]
            fine = ~np.isnan(delta[:, 0])
            np.testing.assert_allclose((delta[fine] ** 2).sum(1), energy[fine], rtol=1e-10)
            assert fine.mean() > 0.3, name
        assert (found["random_active"][1] == count).all()
        assert (found["outside"][2] == 0).all() and (found["core"][2] == count).all()
        along = found["head_direction"][0] @ causal.head_direction(bench, c)
        np.testing.assert_allclose(along, -np.sqrt(energy), rtol=1e-10)
        left = (bench.x + found["head_projection"][0] - bench.x.mean(0)) @ causal.head_direction(bench, c)
        assert np.abs(left).max() < 1e-9


def test_what_cannot_be_matched_is_nan_and_left_out():
    delta = np.array([[3.0, 4.0], [0, 0], [0, 0]])
    found = causal.matched(delta, np.array([100.0, 1.0, 0.0]))
    assert found[0].tolist() == [6, 8] and np.isnan(found[1]).all() and found[2].tolist() == [0, 0]
    bench = _planted()
    table, _, _ = causal_effects.effects(bench, np.zeros(D))
    other = table[table["intervention"] == "other_core"]
    assert (other["unmatched"] == 1).all() and (other["rows"] == 0).all(), "another class's latent never fires here"


def test_a_decoder_that_is_not_linear_and_shapes_that_do_not_fit_are_refused():
    bench, head = _random_bench()

    class Squared(TopKSAE):
        def decode(self, codes):
            return super().decode(codes) ** 2

    sae = Squared(D, bench.sae.config)
    sae.load_state_dict(bench.sae.state_dict())
    with pytest.raises(ValueError, match="not linear"):
        causal.Bench(sae, head, bench.caps, bench.x, bench.labels, 0.2)
    few = LinearHead(head.weight[:2], head.bias[:2])
    with pytest.raises(ValueError, match="the head has 2 classes"):
        causal.Bench(bench.sae, few, bench.caps, bench.x, bench.labels, 0.2)
    with pytest.raises(ValueError, match="indices were changed"):
        bench.change(SparseCodes(bench.codes.values, bench.codes.indices[:, ::-1], bench.codes.n_latents))


def test_partial_deletion_takes_exactly_the_energy_in_order_and_never_stretches():
    bench, _ = _random_bench()
    slots = bench.codes.values != 0
    first = np.argmax(bench.codes.values, 1)
    order = -bench.codes.values
    whole = bench.delta(-bench.codes.values)
    most = (whole**2).sum(1)
    one = np.where(np.arange(K) == first[:, None], -bench.codes.values, 0.0)
    alone = (bench.delta(one) ** 2).sum(1)
    part = causal.partial(bench, slots, order, alone / 4)
    np.testing.assert_allclose(part, bench.delta(one) / 2, atol=1e-9)  # half of the first, none of the others
    np.testing.assert_allclose(causal.partial(bench, slots, order, 1e9 + most), whole, atol=1e-9)
    some = causal.partial(bench, slots, bench.codes.indices, most * 0.3)
    np.testing.assert_allclose((some**2).sum(1), most * 0.3, rtol=1e-9)
    assert not causal.partial(bench, slots & False, order, most).any()
    for c, found in causal.deletions(bench, bench.x.mean(0)):
        energy = {name: (found[name][0] ** 2).sum(1) for name in ("core", "outside_plain", *causal_effects.FAIR)}
        for name in causal_effects.FAIR:
            reached = energy["core"] >= energy["outside_plain"]
            np.testing.assert_allclose(energy[name][reached], energy["outside_plain"][reached], rtol=1e-9)
        values = np.where(bench.core[c][bench.codes.indices], 0.0, -bench.codes.values)
        np.testing.assert_allclose(found["outside_plain"][0], bench.delta(values))
        assert (found["outside_plain"][2] == 0).all()


def test_draws_hold_all_other_classes_and_the_gap_of_each():
    bench, _ = _random_bench()
    data = causal_effects.draws(bench, directions=5)
    assert data.groupby("control").size().to_dict() == {
        "other_core": C * (C - 1), "random_order": 5 * C, "random_active": 5 * C,
    }  # fmt: skip
    row = data[(data["control"] == "other_core") & (data["class"] == 1) & (data["draw"] == 3)].iloc[0]
    own = bench.labels == 1

    def gone(mask):
        return bench.delta(np.where(mask[bench.codes.indices], -bench.codes.values, 0.0))[own]

    mine, other = gone(bench.core[1]), gone(bench.core[3])
    factor = causal.stretch(other, (mine**2).sum(1))
    gap = (mine - factor[:, None] * other) @ bench.weight[1]
    assert row["gap"] == pytest.approx(np.nanmean(gap)) and row["unmatched"] == np.isnan(gap).mean()
    assert row["stretch"] == pytest.approx(np.nanmedian(factor))
    table, _, _ = causal_effects.effects(bench, bench.x.mean(0))
    told = causal_effects.stretching(data, table).set_index("control")
    assert told.loc[causal.TITLES["outside"], "shared"] == 0 and (told["least"] <= told["most"]).all()


def test_over_draws_counts_classes_over_draws_and_pairs():
    gaps = np.array([[-3.0, -3.1, -2.9, -3.0], [3.0, 3.1, 2.9, np.nan], [-1.0, 1.0, -1.1, 1.1]])
    rows = [("other_core", c, d, gaps[c, d], 0.1 * c) for c in range(3) for d in range(4)]
    data = pd.DataFrame(rows, columns=["control", "class", "draw", "gap", "unmatched"])
    found = causal_effects.over_draws(data).iloc[0]
    assert (found["larger"], found["smaller"], found["classes"], found["pairs"]) == (1, 1, 3, 11)
    assert found["wins"] == pytest.approx(5 / 11) and found["unmatched_most"] == pytest.approx(0.2)
    assert found["lo"] < found["value"] < found["hi"]


def test_core_shares_and_the_empty_code():
    bench = _planted()
    shares = causal_effects.core_shares(bench).groupby("rows")[["latents", "squares"]].mean()
    assert shares.loc["of other classes"].max() == 0
    assert shares.loc["of the class", "latents"] == pytest.approx(1 / 3)
    square = (bench.codes.values[:, 0] ** 2 / (bench.codes.values**2).sum(1)).mean()
    assert shares.loc["of the class", "squares"] == pytest.approx(square)
    assert (causal_effects.emptied(bench) == 0).all(), "all logits zero: the first class wins the tie"


# --- effects


def test_effects_of_a_planted_class():
    bench = _planted()
    table, matrix, moved = causal_effects.effects(bench, np.zeros(D))
    core = table[table["intervention"] == "core"].iloc[1]
    own = bench.labels == 1
    assert core["logit"] == pytest.approx(-2 * bench.x[own, 1].mean()) and core["p"] < 1e-6
    assert core["logit_lo"] < core["logit"] < core["logit_hi"]
    assert core["others"] == core["largest_other"] == 0 and core["others_kept"] == 1 and core["kept"] == 0
    assert core["changed"] == 1 and core["latents"] == 1 and core["to"] == 0
    bound = table[table["intervention"] == "head_direction"]
    np.testing.assert_allclose(bound["efficiency"], 1, rtol=1e-9)
    assert (table["efficiency"].dropna() <= 1 + 1e-9).all()
    np.testing.assert_allclose(moved["core"][own, 1], -bench.x[own, 1], rtol=1e-6)
    cells = matrix.pivot(index="deleted", columns="logit", values="change").to_numpy()
    assert (np.diag(cells) < -9).all() and np.abs(cells[~np.eye(C, dtype=bool)]).max() == 0
    assert (matrix.loc[matrix["deleted"] != matrix["logit"], "p_holm"] == 1).all()


def test_t_test_is_scipys():
    from scipy.stats import ttest_1samp

    values = np.random.default_rng(0).normal(0.3, 1, (20, 3))
    mean, reach, p = causal_effects.t_test(values)
    expected = ttest_1samp(values, 0)
    np.testing.assert_allclose(p, expected.pvalue)
    interval = expected.confidence_interval(0.95)
    np.testing.assert_allclose([mean - reach, mean + reach], [interval.low, interval.high])
    assert causal_effects.t_test(np.zeros(5))[2] == 1 and causal_effects.t_test(np.ones(5))[2] == 0
    values[0] = np.nan
    np.testing.assert_allclose(causal_effects.t_test(values)[2], ttest_1samp(values[1:], 0).pvalue)


def test_class_intervals_hold_the_mean_of_noise_as_often_as_they_say():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        cell = causal_effects.class_interval(rng.normal(size=30), n_boot=400)
        hits += cell["lo"] <= 0 <= cell["hi"]
    assert 0.88 <= hits / 200 <= 0.99
    assert np.isnan(causal_effects.class_interval(np.array([np.nan]))["value"])


def test_epd_notices_a_missing_core_and_not_a_change_of_nothing():
    bench, _ = _random_bench("none")
    _, _, moved = causal_effects.effects(bench, bench.x.mean(0))
    moved["nothing"] = np.zeros_like(bench.x)
    whole = causal_effects.epd_after(bench, moved, ("core", "nothing"), n_boot=50).set_index("intervention")
    found = whole["auroc"]
    assert found["nothing"] == pytest.approx(0.5) and found["core"] > 0.6
    assert whole.loc["nothing", "gap"] == pytest.approx(found["core"] - 0.5) and whole.loc["core", "gap"] == 0
    assert whole.loc["nothing", "gap_lo"] < whole.loc["nothing", "gap"] < whole.loc["nothing", "gap_hi"]
    assert whole.loc["nothing", "changed"] == 0 and np.isnan(whole.loc["nothing", "auroc_changed"])
    assert whole.loc["nothing", "auroc_same"] == pytest.approx(0.5)


# --- curves, steering, APP


def test_curves_are_those_of_keeping_and_deleting_codes():
    bench, head = _random_bench()
    place = causal_curves.places(bench)["cap"]
    data, _ = causal_curves.curves(bench, {"cap": place}, [2, 40])
    keep = place[bench.predicted[:, None], bench.codes.indices] < 2
    right = bench.predicted == bench.labels

    def accuracy(slots):
        change = bench.change(causal.scaled(bench.codes, slots, 0.0))
        now = (bench.logits + bench.logit_delta(change)).argmax(1) == bench.labels
        return np.mean([now[bench.labels == c].mean() / right[bench.labels == c].mean() for c in range(C)])

    def told(test, n):
        rows = data[(data["test"] == test) & (data["n"] == n) & (data["measure"] == "accuracy")]
        return rows["value"].item()

    assert told("sufficiency", 2) == pytest.approx(accuracy(~keep))
    assert told("necessity", 2) == pytest.approx(accuracy(keep))
    assert told("necessity", 0) == told("sufficiency", 40) == pytest.approx(1)
    kept = causal.scaled(bench.codes, ~keep, 0.0)
    x_hat = bench.sae.decode(kept) * bench.row_scale + bench.shift
    now = head.logits(x_hat.astype(np.float32)).argmax(1) == bench.labels
    share = np.mean([now[bench.labels == c].mean() / right[bench.labels == c].mean() for c in range(C)])
    assert told("sufficiency, no error", 2) == pytest.approx(share)


def test_one_latent_suffices_and_is_needed_where_it_is_the_class():
    bench = _planted()
    data, areas = causal_curves.curves(bench, causal_curves.places(bench), [1, 2, 12])
    assert causal_curves.enough(data, "cap") == {"n": 1, "latents": 1.0, "value": 1.0, "lo": 1.0, "hi": 1.0}
    wide = data.assign(lo=np.where(data["n"] == 1, 0.8, data["lo"]))
    assert causal_curves.enough(wide, "cap")["n"] == 2 and causal_curves.enough(wide, "cap", sure=False)["n"] == 1
    assert causal_curves.enough(data, "union")["latents"] == C
    needed = causal_curves.enough(data, "attribution", "necessity", share=0.7, sure=False)
    assert needed["n"] == 1, "without it the first class wins every tie: a quarter of the rows"
    claimed = data[(data["measure"] == "claimed") & (data["n"] == 1)]["value"].item()
    assert claimed <= 0.25, "keeping another class's latent does not make that class"
    assert causal_curves.enough(data[data["n"] == 0], "cap") is None
    areas = areas.set_index(["order", "test"])["value"]
    assert areas["cap", "sufficiency"] == pytest.approx(1) and areas["other", "sufficiency"] < 0.9
    assert causal_curves.area(np.array([1, 10, 100]), np.array([1.0, 0.5, 0.0])) == pytest.approx(0.5)


def test_orders_are_permutations_and_sizes_have_no_repeats():
    bench, _ = _random_bench()
    found = causal_curves.places(bench)
    for name in ("cap", "attribution", "random", "other"):
        assert (np.sort(found[name], axis=1) == np.arange(40)).all()
    first = np.take_along_axis(bench.caps.mean, found["cap"].argmin(1)[:, None], 1)[:, 0]
    assert (first == bench.caps.mean.max(1)).all()
    assert (found["other"] != found["cap"]).any(1).all()
    at = causal_curves.sizes(288)
    assert at[0] == 1 and at[-1] == 288 and (np.diff(at) > 0).all() and causal_curves.sizes(4).tolist() == [1, 2, 3, 4]


def test_steering_is_scaling_the_core():
    bench, _ = _random_bench()
    data = causal_curves.steering(bench, (0.0, 1.0, 3.0))
    rows = data[(data["series"] == "core") & (data["measure"] == "margin") & (data["rows"] == "of the class")]
    for alpha in (0.0, 1.0, 3.0):
        margins = []
        for c in range(C):
            change = bench.change(causal.scaled(bench.codes, bench.core[c], alpha))
            logits = (bench.logits + bench.logit_delta(change))[bench.labels == c]
            margins.append((logits[:, c] - np.delete(logits, c, 1).max(1)).mean())
        assert rows[rows["alpha"] == alpha]["value"].item() == pytest.approx(np.mean(margins))
    at = data[(data["rows"] == "of the class") & (data["measure"] == "margin") & (data["alpha"] == 3.0)]
    at = at.set_index("series")["value"]
    assert at["difference"] == pytest.approx(at["core"] - at["random"])


def test_posterior_of_planted_activations_and_attenuation():
    """Latent 0 fires in class 0 alone, latent 1 in both, weakly in class 0 and strongly in class 1."""
    values = np.array([[2.0, 1.0]] * 10 + [[4.0, 0.0]] * 10, np.float32)
    indices = np.array([[0, 1]] * 10 + [[1, 0]] * 10, np.int32)
    codes, labels = SparseCodes(values, indices, 3), np.repeat([0, 1], 10)
    posterior = causal_curves.Posterior.fit(codes, labels, 2, bins=4)
    assert posterior(codes, 0)[0].tolist() == [1, 1] and posterior(codes, 1)[10, 0] == 1
    half = SparseCodes(np.array([[3.0]]), np.array([[2]], np.int32), 3)
    assert posterior(half, 0).item() == 0.5, "no training row: nothing is known"
    with pytest.raises(ValueError, match="class 2 has no row"):
        causal_curves.Posterior.fit(codes, labels, 3)
    bench = _planted()
    posterior = causal_curves.Posterior.fit(bench.codes, bench.labels, C)
    change = causal_curves.attenuation(bench, posterior, core_only=True)(2)
    own = bench.labels == 2
    assert (change[~own] == 0).all()
    np.testing.assert_allclose(-change[own].min(1), bench.x[own, 2], rtol=1e-6)  # as good as deleted: it speaks for it
    wide = causal_curves.attenuation(bench, posterior, core_only=False)(2)
    share = -wide[own] / bench.codes.values[own]
    assert 0.2 < share[:, 1:].mean() < 0.6, "latents that all classes share are scaled by less"


def test_equal_suppression_compares_at_the_same_fall():
    rows = [("deletion", c, n, 2.0 * n, 1, 1 - 0.1 * n) for c in range(3) for n in range(4)]
    rows += [("app_core", c, -1, 3.0, 1, 0.95) for c in range(3)]
    data = pd.DataFrame(rows, columns=["method", "class", "n", "fall", "own_kept", "others_kept"])
    found = causal_curves.at_equal_suppression(data, "app_core")
    assert found["value"] == pytest.approx(0.95 - 0.85) and found["reached"] == 3
    data.loc[data["method"] == "app_core", "fall"] = 9.0
    assert causal_curves.at_equal_suppression(data, "app_core")["reached"] == 0


# --- sentences


def _tables(bench):
    table, matrix, moved = causal_effects.effects(bench, bench.x.mean(0))
    return table, matrix, causal_effects.over_classes(table), moved


def test_sentences_say_yes_where_it_is_so():
    bench = _planted()
    table, matrix, means, _ = _tables(bench)
    assert "Yes, clearly so in all 4 classes" in causal_text.falls(table, means)
    told = causal_text.only_that_one(table, matrix, means, list("abcd"))
    assert told.startswith("And only that one? Yes: it is the logit that falls most in 4 of 4 classes")


def test_sentences_say_no_where_it_is_not():
    table, matrix, means, _ = _tables(_planted(shared=0.5))
    told = causal_text.only_that_one(table, matrix, means, list("abcd"))
    assert told.startswith("And only that one? No: it is the logit that falls most in 4 of 4 classes")
    assert "of the 3 other logits, 3.0 fall clearly, too" in told
    quiet = table.assign(p=1.0)
    assert "No, clearly so in no class" in causal_text.falls(quiet, means)
    core = table["intervention"] == "core"
    one = table.assign(p=np.where(core & (table["class"] == 0), 0, 1))
    assert "Clearly so in 1 of 4 classes" in causal_text.falls(one, means)
    kept = means.assign(lo=np.where(means["measure"] == "others_kept", 0.5, means["lo"]))
    bench = _planted()
    table, matrix, _, _ = _tables(bench)
    assert "only that one? No" in causal_text.only_that_one(table, matrix, kept, list("abcd"))


def _means(*names, **cells):
    """All measures of the interventions at 0.5 (0.4 to 0.6), but for the ``name__measure`` given."""
    rows = [{"intervention": i, "measure": m, "value": 0.5, "lo": 0.4, "hi": 0.6}
            for i in names for m in causal_effects.MEASURES]  # fmt: skip
    table = pd.DataFrame(rows).set_index(["intervention", "measure"])
    for key, cell in cells.items():
        table.loc[tuple(key.split("__"))] = cell
    return table.reset_index()


_MORE, _LESS, _SAME = (dict(zip(("value", "lo", "hi"), cell, strict=True))
                       for cell in ((-2.0, -3.0, -1.0), (2.0, 1.0, 3.0), (0.1, -1.0, 1.0)))  # fmt: skip


def _drawn(cell, wins=0.25):
    row = {"control": "other_core", "larger": 3, "smaller": 1, "classes": 4, "wins": wins, "pairs": 12}
    return pd.DataFrame([row | cell])


def _plain(cell):
    return pd.DataFrame([{"of": of, "larger": 3, "smaller": 1, "classes": 4} | cell for of in causal_effects.FAIR])


def test_sentences_on_controls_go_both_ways():
    means = _means("other_core", "core", "outside", "outside_plain", *causal_effects.FAIR, outside__stretch=(4, 3, 5))
    words = {"lowers the class's logit by 2.0 (1.0 to 3.0) more than": _MORE,
             "lowers the class's logit by 2.0 (1.0 to 3.0) less than": _LESS,
             "shows no significant difference (0.1 (-1.0 to 1.0)) from": _SAME}  # fmt: skip
    for told, cell in words.items():
        found = causal_text.controls(_drawn(cell), means)[0]
        assert told in found and "in 25.0 % of the 12 pairs" in found and "core is not the specific one" in found
        assert causal_text.fair(_plain(cell), means).count(told) == 2
        assert told in causal_text.stretched(pd.DataFrame([{"control": "outside"} | cell]), means)
    assert "specific" not in causal_text.controls(_drawn(_MORE, wins=0.0), means)[0]
    row = pd.DataFrame([{"control": "outside"} | _MORE])
    assert "this is no deletion: in the median row values are turned to -3.0" in causal_text.stretched(row, means)
    damped = _means("outside", outside__stretch=(0.5, 0.4, 0.6))
    assert "values are only damped" in causal_text.stretched(row, damped)


def test_the_sentence_on_the_default_names_the_classes_that_keep_their_accuracy_or_says_there_are_none():
    core = pd.DataFrame({"intervention": "core", "class": range(4), "kept": [0.0, 0.7, 0.1, 0.02]})
    told = causal_text.default(core, [1, 1, 1, 2], list("abcd"))
    assert "median class keeps 6.0 %, but *b* 70.0 %. They are the head's default" in told
    assert "75.0 % of all images are taken for *b*" in told
    assert "default does not single out" in causal_text.default(core, [2, 2, 2, 1], list("abcd"))
    none = causal_text.default(core.assign(kept=0.1), [1, 1, 1, 2], list("abcd"))
    assert "and none more than 20 %. The default does not" in none


def test_the_answer_goes_both_ways():
    bench = _planted()
    curves, _ = causal_curves.curves(bench, causal_curves.places(bench), [1, 2])
    low = {"core__logit": (-2, -3, -1), "core__others_kept": (1, 0.995, 1)}
    yes = causal_text.answer(_means("core", **low), _plain(_MORE), _drawn(_MORE, 0.0), curves)
    assert yes.startswith("Yes, the core matters") and "And it is theirs alone" in yes and "the first 1 of" in yes
    no = causal_text.answer(_means("core", **low), _plain(_SAME), _drawn(_MORE, 0.3), curves[curves["n"] == 0])
    assert no.startswith("That the core matters is not shown") and "not for it alone" in no and "No number" in no
    shared = causal_text.answer(_means("core"), _plain(_MORE), _drawn(_MORE, 0.0), curves)
    assert shared.startswith("That the core matters is not shown") and "not for it alone" in shared


def test_sentences_on_transplants_steering_app_and_epd_go_both_ways():
    pairs = pd.DataFrame([(a, b, 0.9, 0.1, 0.0, 0.8, 0.5, 0.1) for a in range(3) for b in range(3) if a != b],
                         columns=["of", "into", "predicted", "deleted", "before", "top2", "reordered", "shuffled"])  # fmt: skip  # noqa: E501
    told = causal_text.transplant(pairs)
    assert "other class is predicted" in told and "The latents count, not" in told and "do more than shuffled" in told
    none = causal_text.transplant(pairs.assign(predicted=0.1))
    assert "other class is not predicted" in none and "do no more than the length" in none
    assert "do not significantly more than shuffled" in none
    bench = _random_bench()[0]
    steer, shares = causal_curves.steering(bench, (1.0, 4.0)), causal_effects.core_shares(bench)
    elsewhere = (steer["rows"] == "of other classes") & (steer["measure"] == "margin") & (steer["alpha"] == 4)
    for value, words in ((-99.0, "there steers away from"), (99.0, "there does not steer away from")):
        moved = {key: np.where(elsewhere, value, steer[key]) for key in ("value", "lo", "hi")}
        assert words in causal_text.steering(steer.assign(**moved), shares)
    gap = steer["series"] == "difference"
    for cell, words in ((_MORE, "paired by class, less:"), (_LESS, "class, more:"), (_SAME, "no significant diff")):
        paired = {key: np.where(gap, cell[key], steer[key]) for key in cell}
        assert words in causal_text.steering(steer.assign(**paired), shares)
    rows = [("deletion", c, n, 2.0 * n, 1, 1 - 0.1 * n) for c in range(3) for n in range(4)]
    whole = pd.DataFrame(rows, columns=["method", "class", "n", "fall", "own_kept", "others_kept"])
    harm = causal_text.harm(whole)
    assert "first 2 of a core's 3 latents lowers the logit by 4.0 (4.0 to 4.0), deleting all of them by 6.0" in harm
    assert "keep 80.0 % (80.0 to 80.0) of their accuracy, and 70.0 %" in harm
    means = _means("core", "app_core", "app_all")
    for kept, words in ((0.95, "spares the other classes more"), (0.5, "classes less"), (0.85, "no significant")):
        apps = [(name, c, -1, 3.0, 1, kept) for c in range(3) for name in ("app_core", "app_all")]
        data = pd.DataFrame(rows + apps, columns=["method", "class", "n", "fall", "own_kept", "others_kept"])
        assert all(words in told for told in causal_text.app(data, means))
    after = pd.DataFrame({"intervention": ["core", "outside", "head_direction"], "auroc": [0.95, 0.6, 0.92],
                          "lo": 0.5, "hi": 1.0, "gap": [0, 0.35, 0.03], "gap_lo": [0, 0.3, 0.01],
                          "gap_hi": [0, 0.4, 0.05], "changed": [0.9, 0.1, 0.9], "rows_same": 30,
                          "auroc_same": [0.9, 0.6, 0.7], "auroc_changed": [0.99, 0.6, 0.97]})  # fmt: skip
    told = causal_text.noticed(after)
    assert "more than the strongest control, head's direction" in told and "notices much besides" in told
    assert "1 of 2 controls reach 0.9" in told and "these controls 0.970 to 0.970" in told
    assert "core deleted 0.900 (30 rows), head's direction" in told
    assert "no significant difference from the strongest" in causal_text.noticed(after.assign(gap_lo=-0.1))
    assert "less than the strongest" in causal_text.noticed(after.assign(gap_lo=-0.3, gap_hi=-0.1))
    weak = causal_text.noticed(after.assign(auroc=[0.95, 0.6, 0.7], changed=[0.9, 0.1, 0.2]))
    assert "notices little besides" in weak and "no control changes as many" in weak


def test_sentences_on_numbers_name_what_was_not_reached():
    bench = _planted()
    data, _ = causal_curves.curves(bench, causal_curves.places(bench), [1, 2])
    told = causal_text.sufficiency(data)
    assert "by the predicted class's profile 1 (100.0 %, 100.0 to 100.0)" in told
    assert "1 a class (100.0 %, 100.0 to 100.0), 4 in all" in told and "by another class's profile more than 2" in told
    most = data[(data["measure"] == "claimed") & (data["n"] > 0)]["value"].max()
    assert f"claim that class in at most {100 * most:.1f} %" in told
    assert "more than 2 by profile," in causal_text.necessity(data), "a quarter is left: ties go to class 0"


# --- figures and the page


def test_figures_are_drawn_in_both_themes():
    bench, _ = _random_bench()
    table, matrix, means, _ = _tables(bench)
    posterior = causal_curves.Posterior.fit(bench.codes, bench.labels, C)
    shown = means[means["measure"] == "logit"].assign(panel="logit")
    drawn = [
        (causal_figures.logit_changes, matrix.assign(deleted=list("aaaabbbbccccdddd"), logit=list("abcd") * 4)),
        (causal_figures.interventions, shown),
        (causal_figures.dose_response, causal_curves.steering(bench)),
        (causal_figures.number_curves, causal_curves.curves(bench, causal_curves.places(bench), [1, 4, 8])[0]),
        (causal_figures.suppression, causal_curves.frontier(bench, posterior, [1, 4, 8])),
    ]
    for function, data in drawn:
        for theme in ("light", "dark"):
            with display.style(theme):
                figure = function(data)
                assert figure.get_size_inches()[0] <= display.WIDE and len(display.render_png(figure)) > 1000


@pytest.mark.parametrize("profile", plan.ANALYSES["12_causal"])
def test_the_sentences_of_the_published_page_hold_against_its_numbers(profile):
    page = f"{profile}/12_causal"
    found, path = publish.results(page), publish.path_of(page)
    data = {file.stem: pd.read_csv(file) for file in (path.parent / "data" / path.stem).glob("*.csv")}
    names = found["names"]
    number = {name: i for i, name in enumerate(names)}
    table = data["effects"].assign(**{"class": data["effects"]["class"].map(number)})
    matrix = data["logit_changes"]
    matrix = matrix.assign(deleted=matrix["deleted"].map(number), logit=matrix["logit"].map(number))
    means, against = pd.DataFrame(found["means"]), pd.DataFrame(found["against"])
    again = causal_effects.over_classes(table)[["value", "lo", "hi"]].to_numpy()
    np.testing.assert_allclose(means[["value", "lo", "hi"]].astype(float), again, rtol=1e-3, atol=1e-4)
    curves, frontier = data["curves"], data["suppression"]
    assert found["verdicts"] == [
        causal_text.falls(table, means),
        causal_text.default(table, [number[name] for name in found["emptied"]], names),
        causal_text.only_that_one(table, matrix, means, names),
        causal_text.destination(table, means, names),
    ]
    plain, overall = pd.DataFrame(found["plain"]), pd.DataFrame(found["draws"])
    compared = [causal_text.fair(plain, means), *causal_text.controls(overall, means)]
    compared += [causal_text.stretched(against, means), causal_text.bound(means), causal_text.error_term(means)]
    assert found["controls"] == compared
    assert found["answer"] == causal_text.answer(means, plain, overall, curves)
    drawn = data["draws"]
    assert drawn.groupby("control").size()["other_core"] == len(names) * (len(names) - 1)
    for row in overall.to_dict("records"):
        part = drawn[drawn["control"] == row["control"]]
        assert row["value"] == pytest.approx(part["gap"].mean(), abs=1e-3)
        assert row["wins"] == pytest.approx((part["gap"] > 0).mean(), abs=1e-3)
    assert found["numbers"] == [causal_text.sufficiency(curves), causal_text.necessity(curves)]
    pairs = data["transplants"]
    pairs = pairs.assign(of=pairs["of"].map(number), into=pairs["into"].map(number))
    shares = data["core_shares"]
    assert found["moves"] == [causal_text.steering(data["dose_response"], shares), causal_text.transplant(pairs)]
    assert found["cost"] == [causal_text.harm(frontier), *causal_text.app(frontier, means)]
    assert found["sanity"] == causal_text.noticed(data["epd_after"])
    text = path.read_text(encoding="utf-8")
    told = [found[key] for key in ("verdicts", "controls", "numbers", "moves", "cost")]
    for sentence in [*sum(told, []), found["sanity"], found["answer"]]:
        assert json.dumps(sentence, ensure_ascii=False)[1:-1] in text
    # Without the functions that made the sentences: the counts, and energies of the controls.
    core = table[table["intervention"] == "core"].set_index("class")
    clear = int((core["p"] * len(core) < 0.05).sum())  # Bonferroni: no more than Holm finds
    assert clear == len(core) and (core["logit"] < 0).all() == ("in all" in found["verdicts"][0])
    diagonal = matrix[matrix["deleted"] == matrix["logit"]].set_index("deleted")["change"]
    assert (diagonal - core["logit"]).abs().max() < 1e-4
    for name in causal_effects.MATCHED:
        part = table[table["intervention"] == name].set_index("class")
        whole = part["unmatched"] == 0
        np.testing.assert_allclose(part["energy"][whole], core["energy"][whole], rtol=1e-4)
