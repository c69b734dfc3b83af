"""The measures of profiles against the readable functions, and that a claim about training rests on a difference."""

import numpy as np
import pytest
import small_experiment

from capsae.caps import ClassActivationProfiles, core_activations
from capsae.pipeline.run import Run
from capsae.sae import SparseCodes
from companion.chapters.claims import profile_claims


@pytest.fixture
def codes():
    rng = np.random.default_rng(0)
    indices = np.array([rng.permutation(40)[:6] for _ in range(90)]).astype(np.int32)
    return SparseCodes(rng.exponential(size=(90, 6)).astype(np.float32), indices, 40), np.arange(90) % 3


def test_one_replicate_is_the_profiles_of_its_images(codes):
    codes, labels = codes
    rng = np.random.default_rng(1)
    halves, weights = np.arange(90) % 2 > 0, rng.integers(0, 3, (2, 90)).astype(np.int32)
    found = profile_claims.of_training(codes, labels, 3, halves, weights)
    for number, weight in enumerate(weights):
        rows = np.repeat(np.arange(90), weight)
        caps = ClassActivationProfiles.fit(codes[rows], labels[rows], 3)
        off = ~np.eye(3, dtype=bool)
        assert found["overlap"][number] == pytest.approx(caps.jaccard(0.05)[off].mean())
        unit = caps.mean / np.linalg.norm(caps.mean, axis=1, keepdims=True)
        assert found["between"][number] == pytest.approx((unit @ unit.T)[off].mean())
        a, b = (
            ClassActivationProfiles.fit(codes[rows[halves[rows] == h]], labels[rows[halves[rows] == h]], 3).mean
            for h in (False, True)
        )
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert found["stability"][number] == pytest.approx(cosine.mean())


def test_measures_of_a_sample(codes):
    codes, labels = codes
    caps = ClassActivationProfiles.fit(codes, labels, 3)
    found = profile_claims.of_samples(codes, labels, caps, 0.25)
    dense, mask = codes.dense(), caps.core_mask(0.25)
    for row in (0, 1, 50):
        core = dense[row, mask[labels[row]]].astype(np.float64)
        share = core[core > 0] / core.sum()
        entropy = -(share * np.log(share)).sum()
        assert found["inside"][row] == pytest.approx(core.sum() / dense[row].sum(), rel=1e-6)
        assert found["entropy"][row] == pytest.approx(entropy)
        assert found["core"][row] == pytest.approx(core.mean())
        others = [dense[row, mask[c]].mean() for c in range(3) if c != labels[row]]
        assert found["other"][row] == pytest.approx(np.mean(others), rel=1e-6)
        if len(share) > 1:
            assert found["evenness"][row] == pytest.approx(entropy / np.log(len(share)))
    assert (found["inside"] <= 1 + 1e-9).all()
    assert core_activations(codes, labels, caps, 0.25).shape == (90, 6)


def test_two_dictionaries_that_are_one_do_not_differ(tmp_path):
    """Trained against itself: the differences and their errors are zero; single numbers keep theirs."""
    run = Run(small_experiment.write(tmp_path), {"sae_seeds": 2}, tmp_path, "cpu", progress=False)
    same = [{"trained": one["trained"], "untrained": one["trained"]} for one in profile_claims._seeds(run, 3)]
    table, dots = profile_claims.combined(same)
    assert tuple(dict.fromkeys(table["measure"])) == profile_claims.MEASURES
    table = table.set_index(["dictionary", "measure"])
    assert (table.loc["difference"][["value", "lo", "hi"]] == 0).all(axis=None)
    assert (table.loc["difference"]["p"] == 1).all()
    spread = (table["hi"] - table["lo"]).loc["trained"].drop("overlap")  # of so few latents, the cores share none
    assert (spread > 0).all()
    assert dots.groupby(["measure", "dictionary"])["value"].count().eq(2).all()
    means = dots.groupby(["dictionary", "measure"])["value"].mean()
    for key, value in table["value"].items():
        if key[0] == "difference":
            continue
        assert means[key] == pytest.approx(value), key
    # What the gaps are made of adds up.
    value = table.loc["trained"]["value"]
    assert value["core_share"] == pytest.approx(value["inside_id"] - value["inside_ood"])
    assert value["evenness"] == pytest.approx(value["evenness_ood"] - value["evenness_id"])


def test_what_the_page_records_and_draws(tmp_path):
    run = Run(small_experiment.write(tmp_path), {"sae_seeds": 2}, tmp_path, "cpu", progress=False)
    table, seeds = profile_claims.claims(run, n_boot=2)
    numbers = profile_claims.recorded(table, run.caps)
    assert numbers["stability_difference"].p is not None and numbers["core_share_trained"].p is not None
    assert numbers["stability_trained"].p is None, "that a stability is not zero is no news"
    assert {
        f"{one}_{side}".replace(" ", "_") for one in profile_claims.MEASURES for side in ("trained", "difference")
    } <= (numbers.keys())
    dots = profile_claims.dots(seeds, table)
    assert len(dots) == len(profile_claims.DRAWN) * 2 * 2 and dots["panel"].nunique() == len(profile_claims.DRAWN)
    assert ((dots["lo"] <= dots["mean"]) & (dots["mean"] <= dots["hi"])).all()
    shown = profile_claims.shown(table)
    assert shown["measure"].tolist() == list(profile_claims.SHOWN.values())
    value = table.set_index(["measure", "dictionary"]).loc[("stability", "trained"), "value"]
    assert shown["trained"][1].startswith(f"{value:.3f} (")
