"""The causal check on planted dictionaries with known effects, and its published page against its own numbers."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from capsae import ClassActivationProfiles, SAEConfig
from capsae.features.featureset import LinearHead
from capsae.sae.model import SparseCodes, TopKSAE
from companion import findings
from companion.chapters.causal import curves as causal_curves
from companion.chapters.causal import effects as causal_effects
from companion.chapters.causal import figures as causal_figures
from companion.chapters.causal import maths as causal
from companion.chapters.causal import study as causal_study
from companion.figures import display

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


def _scaled(bench, slots, factor):
    """Codes with the values of some slots (N, k) multiplied, and the change of the values."""
    values = np.where(slots, bench.codes.values * factor, bench.codes.values)
    changed = SparseCodes(values.astype(np.float32), bench.codes.indices, bench.codes.n_latents)
    return changed, values.astype(np.float64) - bench.codes.values


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
    codes, change = _scaled(bench, bench.core[2][bench.codes.indices], 2.5)
    rows, shift, scale = sae._normalized(torch.as_tensor(x))
    by_hand = (sae.decode(codes) - sae.decode(bench.codes)) * scale.numpy()
    assert np.abs(by_hand).max() > 0.1
    np.testing.assert_allclose(bench.delta(change), by_hand, atol=2e-4)
    exact = head.logits(x + by_hand.astype(np.float32)) - head.logits(x)
    np.testing.assert_allclose(bench.logit_delta(change), exact, atol=2e-3)
    np.testing.assert_allclose(bench.logits, head.logits(x), atol=1e-4)


def test_transplants_are_those_of_the_codes():
    bench, head = _random_bench()
    pairs = causal_curves.transplants(bench)
    every = np.arange(bench.codes.n_latents, dtype=np.int32)
    for a, b in ((0, 1), (3, 2)):
        own = bench.labels == a
        codes = np.where(bench.core[a] | bench.core[b], 0, bench.codes[own].dense())
        codes = np.where(bench.core[b], bench.caps.mean[b], codes).astype(np.float32)
        x_hat = bench.sae.decode(SparseCodes(codes, np.tile(every, (len(codes), 1)), len(every)))
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
    factor = causal.stretch(np.array([[3.0, 4.0], [0, 0], [0, 0]]), np.array([100.0, 1.0, 0.0]))
    assert factor[[0, 2]].tolist() == [2, 0] and np.isnan(factor[1])
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
    stretched = causal_effects.stretching(data, table).set_index("control")
    assert stretched.loc[causal.TITLES["outside"], "shared"] == 0 and (stretched["least"] <= stretched["most"]).all()


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
        change = _scaled(bench, slots, 0.0)[1]
        now = (bench.logits + bench.logit_delta(change)).argmax(1) == bench.labels
        return np.mean([now[bench.labels == c].mean() / right[bench.labels == c].mean() for c in range(C)])

    def measured(test, n):
        rows = data[(data["test"] == test) & (data["n"] == n) & (data["measure"] == "accuracy")]
        return rows["value"].item()

    assert measured("sufficiency", 2) == pytest.approx(accuracy(~keep))
    assert measured("necessity", 2) == pytest.approx(accuracy(keep))
    assert measured("necessity", 0) == measured("sufficiency", 40) == pytest.approx(1)
    kept, _ = _scaled(bench, ~keep, 0.0)
    x_hat = bench.sae.decode(kept) * bench.row_scale + bench.shift
    now = head.logits(x_hat.astype(np.float32)).argmax(1) == bench.labels
    share = np.mean([now[bench.labels == c].mean() / right[bench.labels == c].mean() for c in range(C)])
    assert measured("sufficiency, no error", 2) == pytest.approx(share)


def test_one_latent_suffices_and_is_needed_where_it_is_the_class():
    bench = _planted()
    data, areas = causal_curves.curves(bench, causal_curves.places(bench), [1, 2, 12])
    assert causal_curves.enough(data, "cap") == {"n": 1, "latents": 1.0, "value": 1.0, "lo": 1.0, "hi": 1.0}
    wide = data.assign(lo=np.where(data["n"] == 1, 0.8, data["lo"]))
    assert causal_curves.enough(wide, "cap")["n"] == 2, "the whole interval must reach the share"
    assert causal_curves.enough(data, "union")["latents"] == C
    needed = causal_curves.enough(data.assign(hi=data["value"]), "attribution", "necessity", share=0.7)
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
            change = _scaled(bench, bench.core[c][bench.codes.indices], alpha)[1]
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
    change = causal_curves.attenuation(bench, posterior, True, 2)
    own = bench.labels == 2
    assert (change[~own] == 0).all()
    np.testing.assert_allclose(-change[own].min(1), bench.x[own, 2], rtol=1e-6)  # as good as deleted: it speaks for it
    wide = causal_curves.attenuation(bench, posterior, False, 2)
    share = -wide[own] / bench.codes.values[own]
    assert 0.2 < share[:, 1:].mean() < 0.6, "latents that all classes share are scaled by less"


def test_equal_suppression_compares_at_the_same_fall():
    rows = [("deletion", c, n, 2.0 * n, 1, 1 - 0.1 * n) for c in range(3) for n in range(4)]
    rows += [("app_core", c, -1, 3.0, 1, 0.95) for c in range(3)]
    data = pd.DataFrame(rows, columns=["method", "class", "n", "fall", "own_kept", "others_kept"])
    found = causal_curves.at_equal_suppression(data, "app_core")
    assert found["value"] == pytest.approx(0.95 - 0.85)
    data.loc[data["method"] == "app_core", "fall"] = 9.0
    assert causal_curves.at_equal_suppression(data, "app_core")["value"] == pytest.approx(0.95 - 0.7), "the nearest"


# --- the numbers of the findings


def _tables(bench):
    table, matrix, moved = causal_effects.effects(bench, bench.x.mean(0))
    return table, matrix, causal_effects.over_classes(table), moved


def test_numbers_of_the_findings_are_those_of_the_tables():
    bench, _ = _random_bench()
    table, matrix, means, moved = _tables(bench)
    drawn = causal_effects.draws(bench, 3)
    at = [1, 2, 4]
    posterior = causal_curves.Posterior.fit(bench.codes, bench.labels, C)
    found = SimpleNamespace(
        names=list("abcd"), table=table, matrix=matrix, means=means, plain=causal_effects.plain_gaps(bench, moved),
        against=causal_effects.against_controls(bench, moved), drawn=drawn, overall=causal_effects.over_draws(drawn),
        curves=causal_curves.curves(bench, causal_curves.places(bench), at)[0], steer=causal_curves.steering(bench),
        pairs=causal_curves.transplants(bench, 2), emptied=causal_effects.emptied(bench),
        frontier=causal_curves.frontier(bench, posterior, at),
        after=causal_effects.epd_after(bench, moved, ("core", "outside"), n_boot=20),
    )  # fmt: skip
    numbers = causal_study.numbers(found)
    core = means[(means["intervention"] == "core") & (means["measure"] == "others_kept")].iloc[0]
    assert numbers["core_others_kept"].value == pytest.approx(100 * core["value"], abs=0.06)
    assert numbers["classes"].value == C and 0 <= numbers["falling"].value <= C
    gaps = drawn[drawn["control"] == "other_core"]["gap"].dropna()
    assert numbers["wins_other_core"].value == pytest.approx(100 * (gaps > 0).mean(), abs=0.06)
    deleted = found.frontier[(found.frontier["method"] == "deletion")].groupby("n")["fall"].mean()
    few = int(numbers["half_of_the_fall_latents"].value)
    assert deleted[few] >= deleted[4] / 2 and (deleted[deleted.index < few] < deleted[4] / 2).all()
    assert numbers["epd_less_strongest_control"].value == pytest.approx(found.after["gap"].iloc[1], abs=0.01)
    names = {name for one in findings.of_notebook("12_causal") for name in one.names}
    assert names - set(numbers) <= {"sufficiency_cap", "sufficiency_cap_latents"}, "not reached on random codes"
    assert len(causal_study.by_class(found)) == C and len(causal_study.panels(found)) % 3 == 0


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
        with display.style():
            figure = function(data)
            assert len(display.render_svg(figure, "figure")) > 1000
