"""CAPs and EPD against independent dense float64 computations."""

import numpy as np
import pytest
import ranks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import capsae
from capsae.caps import ClassActivationProfiles, core_reference, energy_profile_divergence, epd_terms, stability
from capsae.sae import SparseCodes


def random_codes(rng, n, n_latents, k, zeros=0.1):
    indices = np.stack([rng.permutation(n_latents)[:k] for _ in range(n)]).astype(np.int32)
    values = rng.exponential(size=(n, k)).astype(np.float32)
    values[rng.random((n, k)) < zeros] = 0
    return SparseCodes(values, indices, n_latents)


def dense(codes):
    out = np.zeros((len(codes.values), codes.n_latents))
    for row in range(len(out)):
        for value, index in zip(codes.values[row], codes.indices[row], strict=True):
            out[row, index] = value
    return out


def epd_by_hand(codes, predicted, h, labels, n_classes, fraction):
    """The paper's formula, sample by sample, on dense arrays."""
    means = np.stack([h[labels == c].mean(axis=0) for c in range(n_classes)])
    size = max(1, round(fraction * h.shape[1]))
    scores, largest = [], 0.0
    for c in range(n_classes):
        core = sorted(range(h.shape[1]), key=lambda i: (-means[c, i], i))[:size]
        q = means[c, core] / means[c, core].sum()
        largest = max(largest, -np.log(q[q > 0].min()))
    for x, c in zip(dense(codes), predicted, strict=True):
        core = sorted(range(h.shape[1]), key=lambda i: (-means[c, i], i))[:size]
        s, reference = x[core], means[c, core] / means[c, core].sum()
        if s.sum() == 0 or ((s > 0) & (reference == 0)).any():
            scores.append(largest)
        else:
            p = s / s.sum()
            scores.append(sum(pi * np.log(pi / qi) for pi, qi in zip(p, reference, strict=True) if pi > 0))
    return np.array(scores)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), fraction=st.sampled_from([0.02, 0.15, 0.5, 1.0]))
def test_epd_equals_the_formula(seed, fraction):
    rng = np.random.default_rng(seed)
    train, test = random_codes(rng, 60, 40, 6), random_codes(rng, 30, 40, 6)
    labels = np.concatenate([np.arange(4), rng.integers(0, 4, 56)])
    predicted = rng.integers(0, 4, 30)
    caps = ClassActivationProfiles.fit(train, labels, 4)
    ours = capsae.energy_profile_divergence(test, predicted, caps, fraction)
    np.testing.assert_allclose(
        ours, epd_by_hand(test, predicted, dense(train), labels, 4, fraction), rtol=1e-9, atol=1e-12
    )


def test_epd_is_zero_on_the_profile_itself_and_torch_gives_the_same():
    codes = SparseCodes(np.array([[3.0, 1.0], [3.0, 1.0]], np.float32), np.array([[0, 1], [0, 1]], np.int32), 4)
    caps = ClassActivationProfiles.fit(codes, np.array([0, 0]), 1)
    assert np.abs(capsae.energy_profile_divergence(codes, np.array([0, 0]), caps, 0.5)).max() < 1e-12
    as_torch = SparseCodes(torch.tensor(codes.values), torch.tensor(codes.indices), 4)
    again = capsae.energy_profile_divergence(as_torch, torch.tensor([0, 0]), caps, 0.5)
    assert isinstance(again, np.ndarray) and np.abs(again).max() < 1e-12


def test_silent_core_gets_the_largest_score_and_is_counted():
    rng = np.random.default_rng(0)
    train = random_codes(rng, 200, 40, 6, zeros=0)
    caps = ClassActivationProfiles.fit(train, rng.integers(0, 2, 200), 2)
    outside = np.setdiff1d(np.arange(40), caps.core(0.15)[0])[:6].astype(np.int32)
    silent = SparseCodes(np.ones((1, 6), np.float32), outside[None], 40)
    score, _, degenerate = epd_terms(silent, np.array([0]), caps, 0.15)
    assert degenerate.tolist() == [True] and np.isfinite(score[0])
    others = capsae.energy_profile_divergence(train, rng.integers(0, 2, 200), caps, 0.15)
    assert score[0] == core_reference(caps, 0.15)[1] >= others.max()


def test_terms_sum_to_the_score():
    rng = np.random.default_rng(1)
    codes, labels = random_codes(rng, 100, 30, 5), rng.integers(0, 3, 100)
    score, terms, degenerate = epd_terms(codes, labels, ClassActivationProfiles.fit(codes, labels, 3), 0.3)
    np.testing.assert_allclose(terms.sum(1)[~degenerate], score[~degenerate], rtol=1e-12)


def test_sum_over_ranks_is_the_merge(tmp_path):
    rng = np.random.default_rng(5)
    codes, labels = random_codes(rng, 90, 40, 6), rng.integers(0, 4, 90)
    parts = [
        ClassActivationProfiles.empty(4, 40).update(codes[rows], labels[rows]) for rows in (slice(60), slice(60, 90))
    ]
    for rank, part in enumerate(parts):
        part.save(tmp_path / f"{rank}.in")
    code = """if True:
        import sys
        from capsae import ClassActivationProfiles, distributed
        distributed.start()
        part = ClassActivationProfiles.load(f"{sys.argv[1]}/{distributed.rank()}.in")
        part.all_reduce().save(f"{sys.argv[1]}/{distributed.rank()}.out")
    """
    ranks.run(code, tmp_path)
    merged = parts[0].merge(parts[1])
    for rank in range(2):
        found = ClassActivationProfiles.load(tmp_path / f"{rank}.out")
        for name in ("sums", "active", "counts"):
            one, two = getattr(found, name), getattr(merged, name)
            assert one.dtype == two.dtype
            np.testing.assert_array_equal(one, two)
    assert merged.all_reduce() is merged, "alone there is nothing to add"


def test_merge_of_parts_is_the_whole_and_mean_is_the_mean():
    rng = np.random.default_rng(2)
    codes, labels = random_codes(rng, 90, 30, 5), rng.integers(0, 3, 90)
    whole = ClassActivationProfiles.fit(codes, labels, 3)
    a = ClassActivationProfiles.empty(3, 30).update(codes[:31], labels[:31])
    b = ClassActivationProfiles.empty(3, 30).update(codes[31:], labels[31:])
    merged = a.merge(b)
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-13)
    assert (merged.active == whole.active).all() and (merged.counts == whole.counts).all()
    expected = np.stack([dense(codes)[labels == c].mean(0) for c in range(3)])
    np.testing.assert_allclose(whole.mean, expected, rtol=1e-12)


def test_core_active_fraction_and_jaccard():
    values = np.array([[4, 2, 1], [4, 2, 1], [5, 3, 0]], np.float32)
    indices = np.array([[0, 1, 2], [0, 1, 2], [3, 1, 5]], np.int32)
    caps = ClassActivationProfiles.fit(SparseCodes(values, indices, 6), np.array([0, 0, 1]), 2)
    assert caps.core(0.5).tolist() == [[0, 1, 2], [3, 1, 0]]  # ties go to the lower index
    assert caps.active_fraction().tolist() == [0.5, 2 / 6]  # a slot of value 0 did not fire
    np.testing.assert_allclose(caps.jaccard(1 / 3), [[1, 1 / 3], [1 / 3, 1]])


def test_stability_is_one_for_equal_samples_and_low_for_noise():
    rng = np.random.default_rng(3)
    same = SparseCodes(np.ones((20, 3), np.float32), np.tile(np.arange(3, dtype=np.int32), (20, 1)), 50)
    np.testing.assert_allclose(stability(same, np.arange(20) % 2, 2), 1)
    noise = random_codes(rng, 8, 5000, 3)
    assert stability(noise, np.zeros(8, int), 1)[0] < 0.2
    assert np.isnan(stability(noise, np.array([0] * 7 + [1]), 2)[1])


def test_save_and_load(tmp_path):
    rng = np.random.default_rng(4)
    caps = ClassActivationProfiles.fit(random_codes(rng, 50, 30, 5), np.arange(50) % 3, 3)
    caps.save(tmp_path / "caps.safetensors")
    again = ClassActivationProfiles.load(tmp_path / "caps.safetensors")
    assert (again.sums == caps.sums).all() and (again.active == caps.active).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, y: (c, y[:-1]), "labels has 49 rows, codes 50"),
        (lambda c, y: (c, np.where(y == 0, 7, y)), "n_classes is 3"),
        (lambda c, y: (c, y.astype(float)), "integers"),
        (lambda c, y: (c, np.where(y == 2, 1, y)), "class 2"),
        (lambda c, y: (SparseCodes(np.full_like(c.values, np.nan), c.indices, 30), y), "row 0"),
    ],
)
def test_wrong_input_is_named(change, message):
    rng = np.random.default_rng(5)
    codes, labels = change(random_codes(rng, 50, 30, 5), np.arange(50) % 3)
    with pytest.raises((ValueError, TypeError), match=message):
        ClassActivationProfiles.fit(codes, labels, 3)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.5])
def test_impossible_core_fraction(fraction):
    rng = np.random.default_rng(6)
    codes = random_codes(rng, 50, 30, 5)
    caps = ClassActivationProfiles.fit(codes, np.arange(50) % 3, 3)
    with pytest.raises(ValueError, match="core_fraction"):
        capsae.energy_profile_divergence(codes, np.arange(50) % 3, caps, fraction)


@pytest.mark.parametrize(
    "values, indices, message",
    [
        (np.nan, 0, "NaN or infinity in row 0"),
        (-np.inf, 0, "NaN or infinity in row 0"),
        (1j, 0, "codes hold complex128"),
        (1.0, -1, "fire latents -1..-1, but n_latents is 6"),
        (1.0, 6, "fire latents 6..6, but n_latents is 6"),
        (1.0, 0.5, "expected real values at whole indices"),
    ],
)
def test_codes_that_are_none_give_no_profile_and_no_score(values, indices, message):
    good = SparseCodes(np.ones((2, 1)), np.zeros((2, 1), np.int32), 6)
    caps = ClassActivationProfiles.fit(good, [0, 1], 2)
    bad = SparseCodes(np.full((2, 1), values), np.full((2, 1), indices), 6)
    for use in (lambda: caps.update(bad, [0, 1]), lambda: energy_profile_divergence(bad, [0, 1], caps)):
        with pytest.raises(ValueError, match=message):
            use()
    assert caps.counts.tolist() == [1, 1], "what is refused leaves no trace"
    assert energy_profile_divergence(good[:0], [], caps).shape == (0,)
