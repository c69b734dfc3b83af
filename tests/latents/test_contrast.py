"""Two sets compared latent by latent: the test, its correction, its intervals, and what small sets cannot tell."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import fisher_exact, hypergeom

from capsae.latents import contrast
from capsae.sae import SparseCodes


def _codes(rng, n, shares, strength=1.0):
    dense = (rng.random((n, len(shares))) < shares) * rng.gamma(3.0, strength, (n, len(shares)))
    indices = np.tile(np.arange(len(shares), dtype=np.int32), (n, 1))
    return SparseCodes(dense.astype(np.float32), indices, len(shares))


def test_p_is_fishers_also_where_the_g_test_stands_in():
    rng = np.random.default_rng(0)
    for n_a, n_b in ((5, 9), (30, 30), (400, 90)):
        a, b = rng.integers(0, n_a + 1, 30), rng.integers(0, n_b + 1, 30)
        exact = [fisher_exact([[x, n_a - x], [y, n_b - y]]).pvalue for x, y in zip(a, b, strict=True)]
        assert contrast.fisher(a, n_a, b, n_b) == pytest.approx(exact, rel=0.1, abs=1e-9)
        small = np.minimum(a, b) < 5
        assert contrast.fisher(a, n_a, b, n_b)[small] == pytest.approx(np.array(exact)[small], rel=1e-6, abs=1e-12)
    large = contrast.fisher([1000, 1000], 4000, [1060, 1120], 4000)
    exact = [fisher_exact([[1000, 3000], [y, 4000 - y]]).pvalue for y in (1060, 1120)]
    assert large == pytest.approx(exact, rel=0.1)


def test_a_small_p_is_at_most_as_frequent_as_it_says():
    n_a, n_b, fired = 40, 25, 12
    k = np.arange(max(0, fired - n_b), min(n_a, fired) + 1)
    p = contrast.fisher(k, n_a, fired - k, n_b)
    weight = hypergeom.pmf(k, n_a + n_b, fired, n_a)
    for level in (0.01, 0.05, 0.2, 0.5):
        assert weight[p <= level].sum() <= level + 1e-9


def test_newcombes_interval_is_that_of_his_paper():
    lo, hi = contrast.newcombe(48, 80, 56, 70)  # 56/70 - 48/80, method 10: 0.0524 to 0.3339
    assert (lo, hi) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    lo, hi = contrast.newcombe(0, 10, 0, 10)
    assert lo == pytest.approx(-hi) and 0.2 < hi < 0.4


def test_planted_differences_are_found_with_their_direction():
    rng = np.random.default_rng(1)
    base = np.full(60, 0.2)
    moved = base.copy()
    moved[:5], moved[5:8], moved[59] = 0.5, 0.02, 0.2
    a, b = _codes(rng, 300, base), _codes(rng, 200, moved)
    table = contrast.compare(a, b).set_index("latent")
    assert (table.loc[range(5), "more"] == "B").all() and (table.loc[range(5, 8), "more"] == "A").all()
    assert table.loc[range(8, 60), "differs"].sum() <= 2
    first = table.loc[0]
    assert first["difference"] == pytest.approx(first["fired_b"] / 200 - first["fired_a"] / 300)
    assert first["lo"] < 0.3 < first["hi"] and first["q"] >= first["p"] and table["q"].notna().all()
    assert table["p"].is_monotonic_increasing
    assert first["mean_a"] == pytest.approx(a.values[:, 0][a.values[:, 0] > 0].mean(), rel=1e-5)
    swapped = contrast.compare(b, a).set_index("latent").loc[table.index]
    assert swapped["p"].to_numpy() == pytest.approx(table["p"].to_numpy())
    assert swapped["difference"].to_numpy() == pytest.approx(-table["difference"].to_numpy())


def test_strength_is_told_apart_from_frequency():
    rng, shares = np.random.default_rng(2), np.full(20, 0.4)
    a, b = _codes(rng, 200, shares), _codes(rng, 200, shares, strength=np.where(np.arange(20) < 3, 2.5, 1.0))
    table = contrast.compare(a, b).set_index("latent")
    assert (table.loc[range(3), "q_strength"] <= 0.05).all() and not table.loc[range(3), "differs"].any()
    assert (table.loc[range(3, 20), "q_strength"] > 0.05).sum() >= 16


def test_latents_that_fire_nowhere_or_hardly_are_left_out_of_the_tests_that_they_cannot_enter():
    rng = np.random.default_rng(3)
    table = contrast.compare(_codes(rng, 50, np.array([0.5, 0.0, 0.02])), _codes(rng, 50, np.array([0.5, 0.0, 0.02])))
    assert 1 not in table["latent"].tolist()
    assert table.set_index("latent")["p_strength"].isna().tolist().count(True) == len(table) - 1


def test_equal_sets_give_no_more_than_the_rate_says():
    rng = np.random.default_rng(4)
    shares = rng.beta(1, 6, 80)
    hits = [contrast.compare(_codes(rng, 150, shares), _codes(rng, 100, shares))["differs"].any() for _ in range(120)]
    assert np.mean(hits) <= 0.1  # 0.05 promised; a binomial of 120 exceeds 0.1 once in a hundred
    splits = contrast.halves(_codes(rng, 300, shares), times=40)
    assert (splits["found"] > 0).mean() <= 0.15 and splits["below"].mean() <= 0.06
    # The same check does fail without the correction.
    assert (splits["below"] > 0).mean() > 0.5


def test_among_many_true_differences_few_found_are_false():
    rng, false, found = np.random.default_rng(5), 0, 0
    base = np.full(100, 0.2)
    moved = np.where(np.arange(100) < 40, 0.45, base)
    for _ in range(20):
        table = contrast.compare(_codes(rng, 150, base), _codes(rng, 150, moved), fdr=0.1)
        found, false = found + table["differs"].sum(), false + (table["differs"] & (table["latent"] >= 40)).sum()
    assert found > 600 and false / found <= 0.1


def test_small_sets_say_what_they_cannot_tell():
    assert contrast.doubts(100, 100, 50) == []
    five = contrast.doubts(1000, 5, 50)
    assert len(five) == 1 and five[0].startswith("B has 5 images") and "points only" in five[0]
    assert contrast.doubts(1, 500, 10)[0].startswith("A has 1 image:")
    assert contrast.doubts(3, 3, 0)[2].startswith("no latent fires often enough for 3 and 3 images")


def test_a_latent_that_could_never_get_a_small_p_is_not_tested():
    fired = np.array([1] * 500 + [3] * 300 + [12] * 4 + [24] * 2)
    able = contrast.testable(fired, 24, 24)
    assert not able[:800].any() and able[800:].all()  # 2 / C(48, 3) C(24, 3) = 0.23, but 1e-5 for 12
    assert not contrast.testable(np.array([1, 2, 6]), 3, 3).any()  # the smallest p of sets of three is 0.1
    assert contrast.testable(np.full(900, 200), 1000, 1000).all()
    rng = np.random.default_rng(8)
    rare = np.r_[np.full(1500, 0.02), 0.9]
    a, b = _codes(rng, 24, np.r_[np.full(1500, 0.02), 0.2]), _codes(rng, 24, rare)
    table = contrast.compare(a, b)
    assert table.loc[0, "latent"] == 1500 and table.loc[0, "differs"] and table["q"].isna().sum() > 500
    hits = [contrast.compare(_codes(rng, 24, rare), _codes(rng, 24, rare))["differs"].any() for _ in range(100)]
    assert np.mean(hits) <= 0.1


def test_wrong_input_is_named():
    rng = np.random.default_rng(6)
    a, empty = _codes(rng, 10, np.full(4, 0.5)), _codes(rng, 0, np.full(4, 0.5))
    with pytest.raises(ValueError, match="B has no rows"):
        contrast.compare(a, empty)
    with pytest.raises(ValueError, match="A has codes of 4 latents, B of 5"):
        contrast.compare(a, _codes(rng, 10, np.full(5, 0.5)))
    with pytest.raises(ValueError, match="fdr is 5"):
        contrast.compare(a, a, fdr=5)
    with pytest.raises(ValueError, match="3 rows"):
        contrast.halves(a[:3])


def test_sets_are_counted_one_by_one():
    rng, base = np.random.default_rng(7), np.full(30, 0.3)
    a = _codes(rng, 200, base)
    found = contrast.by_set(a, {"same": _codes(rng, 200, base), "far": _codes(rng, 200, np.full(30, 0.7))})
    found = found.set_index("set")
    assert found.loc["same", "differs"] <= 1 and found.loc["far", "more_b"] == 30 and found.loc["far", "more_a"] == 0
