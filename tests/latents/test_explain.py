from __future__ import annotations

import numpy as np
import pytest
import small_experiment

from capsae import ClassActivationProfiles, SparseCodes, energy_profile_divergence
from capsae.detectors import OURS
from capsae.latents.explain import describe, explain, explain_epd, explain_slots, plain_name
from capsae.pipeline.run import Run

M, K, C = 40, 6, 3


def random_codes(n: int, seed: int) -> SparseCodes:
    rng = np.random.default_rng(seed)
    indices = np.stack([rng.choice(M, K, replace=False) for _ in range(n)]).astype(np.int32)
    values = -np.sort(-rng.exponential(size=(n, K)), axis=1).astype(np.float32)
    return SparseCodes(values, indices, M)


@pytest.fixture
def caps():
    labels = np.random.default_rng(1).integers(0, C, 200)
    return ClassActivationProfiles.fit(random_codes(200, 0), labels, C)


def one_code(caps, entries: dict[int, float]) -> SparseCodes:
    indices = [*entries, *(i for i in range(M) if i not in entries)][:K]
    values = [entries.get(i, 0.0) for i in indices]
    return SparseCodes(np.array([values], np.float32), np.array([indices], np.int32), M)


@pytest.mark.parametrize("fraction", [0.15, 0.5, 1.0])
def test_shares_sum_to_the_score(caps, fraction):
    codes, predicted = random_codes(50, 2), np.random.default_rng(3).integers(0, C, 50)
    scores = energy_profile_divergence(codes, predicted, caps, fraction)
    for row in range(50):
        table = explain_epd(codes[[row]], predicted[row], caps, fraction)
        assert table["share"].sum() == pytest.approx(scores[row], rel=1e-12, abs=1e-12)


def test_every_core_latent_is_there_once_with_its_kind(caps):
    table = explain_epd(random_codes(1, 5), 1, caps, 0.5)
    assert sorted(table["latent"]) == sorted(caps.core(0.5)[1])
    assert table["profile"].sum() == pytest.approx(1) and table["expected"].sum() == pytest.approx(1)
    assert (table.loc[table["kind"] == "too much", "share"] > 0).all()
    assert (table.loc[table["kind"] == "missing", "share"] <= 0).all()
    assert (table.loc[table["profile"] == 0, "share"] == 0).all() and (table["kind"] == "missing").any()
    assert table["share"].abs().is_monotonic_decreasing


def test_hand_made_case():
    sums = np.array([[3.0, 1.0, 0.0, 0.0], [0.0, 2.0, 2.0, 0.0]])
    caps = ClassActivationProfiles(sums, (sums > 0).astype(np.int64), np.array([1, 1]))
    codes = SparseCodes(np.array([[1.0, 1.0]], np.float32), np.array([[0, 1]], np.int32), 4)
    table = explain_epd(codes, 0, caps, 0.5, ["n00000001_big_cat", "dog"]).set_index("latent")
    assert table["share"].to_dict() == pytest.approx({0: 0.5 * np.log(0.5 / 0.75), 1: 0.5 * np.log(0.5 / 0.25)})
    assert table["kind"].to_dict() == {0: "missing", 1: "too much"}
    assert table.loc[0, "classes"] == "big cat 100%" and table.loc[1, "classes"] == "dog 67%, big cat 33%"


def test_a_silent_core_carries_the_largest_score_in_one_row(caps):
    outside = [i for i in range(M) if i not in set(caps.core(0.15)[0])]
    codes = one_code(caps, {outside[0]: 1.0, outside[1]: 2.0})
    table = explain_epd(codes, 0, caps, 0.15)
    assert table.loc[0, "kind"] == "of no latent" and table.loc[0, "latent"] == -1
    assert table["share"].sum() == energy_profile_divergence(codes, np.array([0]), caps, 0.15)[0]


def test_a_latent_the_class_never_uses_carries_it_too():
    sums = np.array([[3.0, 1.0, 0.0, 0.0]])
    caps = ClassActivationProfiles(sums, (sums > 0).astype(np.int64), np.array([1]))
    codes = SparseCodes(np.array([[1.0, 1.0]], np.float32), np.array([[0, 3]], np.int32), 4)
    table = explain_epd(codes, 0, caps, 1.0).set_index("latent")
    assert table.loc[3, "kind"] == "unknown to the class"
    assert (
        table["share"].sum() == energy_profile_divergence(codes, np.array([0]), caps, 1.0)[0] == table.loc[3, "share"]
    )


def test_more_than_one_sample_is_refused(caps):
    with pytest.raises(ValueError, match="2 rows"):
        explain_epd(random_codes(2, 0), 0, caps)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return Run(small_experiment.write(folder), store=folder / "store", device="cpu", progress=False)


def test_explaining_a_run_agrees_with_its_scores(run):
    obs = run.observations("far/noise")
    scores = run.detectors("epd")["epd"].score(obs)
    for row in (0, 7):
        table = explain(run, obs, row)
        assert table["share"].sum() == pytest.approx(scores[row], rel=1e-12)
        assert table["classes"].str.contains("kind ").any()


def test_rows_and_methods_that_cannot_be_explained_are_refused(run):
    obs = run.observations("test")
    with pytest.raises(ValueError, match=r"row is 80, but there are 80: use 0\.\.79"):
        explain(run, obs, 80)
    with pytest.raises(ValueError, match="'msp'.*no sum over latents.*'epd'"):
        explain(run, obs, 0, "msp")


def test_our_own_score_is_explained_by_its_slots(run):
    obs = run.observations("near/shifted")
    scores = run.detectors(OURS)[OURS].score(obs)
    for row in (0, 9):
        table = explain(run, obs, row, OURS)
        assert table["share"].sum() == pytest.approx(scores[row], rel=1e-9)
        assert table.loc[table["share"] != 0, "profile"].gt(0).all()
        assert table["profile"].sum() == pytest.approx(1) and table["expected"].sum() == pytest.approx(1)


def test_what_slots_do_not_explain_has_a_row_of_its_own(caps):
    codes = one_code(caps, {})
    table = explain_slots(codes, np.zeros(K), 3.5, 0, caps)
    assert table.loc[0, "latent"] == -1 and table.loc[0, "share"] == 3.5 == table["share"].sum()


def test_the_text_names_score_latents_and_classes(run):
    obs = run.observations("far/noise")
    table = explain(run, obs, 0)
    text = describe(table, table["share"].sum(), "far/noise, row 0", top=3)
    assert text.startswith("far/noise, row 0\nscore ") and "kind 1" in text
    assert text.count("too much") == min(3, (table["kind"] == "too much").sum())
    assert "expected but silent" in text


def test_wordnet_numbers_are_not_shown():
    assert plain_name("n01440764_tench_fish") == "tench fish" and plain_name("7") == "7"
