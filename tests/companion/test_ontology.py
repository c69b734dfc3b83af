"""Synsets against latents: what is planted is found, what is not there is not, and each number is its definition."""

from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from capsae.latents import wordnet
from capsae.pipeline.packs import load_pack
from capsae.sae import SparseCodes
from companion import findings
from companion.chapters.ontology import figures as drawn
from companion.chapters.ontology import mantel, search, study
from companion.chapters.ontology import maths as ontology
from companion.figures.display import style
from companion.publish.plan import ANALYSES
from companion.publish.publish import path_of

PER_CLASS = 12


@pytest.fixture(scope="module")
def tree():
    return wordnet.load([wordnet.wnid(name) for name in load_pack("imagenet20", "train").class_names])


def _members(tree):
    return np.stack([tree.members(synset) for synset in tree.synsets], axis=1)


def _codes(active, n_latents, seed, k=6):
    """Codes in which latent i fires in the classes active[:, i], the rest of the slots by noise latents, weakly."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(active)), PER_CLASS)
    values = np.zeros((len(labels), n_latents))
    planted = active.shape[1]
    values[:, :planted] = active[labels] * rng.uniform(1, 2, (len(labels), planted))
    for row in values:
        row[planted + rng.choice(n_latents - planted, k, replace=False)] = rng.uniform(0.1, 0.4, k)
    order = np.argsort(-values, axis=1)[:, : planted + k]
    found = np.take_along_axis(values, order, axis=1).astype(np.float32)
    return SparseCodes(found, order.astype(np.int32), n_latents), labels


def _judge(active, tree, n_latents=60, permutations=39):
    (train, labels), (test, test_labels) = (_codes(active, n_latents, seed) for seed in (0, 1))
    weights = ontology.image_draws(test_labels, 40)
    given = (labels, test_labels, _members(tree), ontology.tree_order(tree), weights)
    return ontology.judge(ontology.Units.of_codes(train, test), *given, permutations, permutations // 2)


@pytest.fixture(scope="module")
def planted(tree):
    return _judge(_members(tree), tree)


@pytest.fixture(scope="module")
def nothing(tree):
    return _judge(np.zeros((20, 0), bool), tree)


def test_one_latent_a_synset_is_found(tree, planted):
    assert planted.choice.unit.tolist() == list(range(len(tree.synsets)))
    assert (planted.by_class == 1).all() and (planted.by_image == 1).all() and planted.choice.f1 == pytest.approx(1)
    large = _members(tree).sum(0) >= search.LEAST
    # "canine" and "dog" differ by the dingo alone: where it is held out, either latent may be chosen for both
    assert (planted.unseen[large] > 0.9).all() and np.isnan(planted.unseen[~large]).all() and large.sum() == 6
    assert (planted.replicates["by_image"] == 1).all()
    assert planted.null["by_class"].mean() < 0.8 and planted.null["unseen"].shape[0] == 19
    assert (ontology.p_values(planted.by_class, planted.null["by_class"]) <= 0.4).all()


def test_where_nothing_is_planted_the_best_of_many_is_what_permutations_give(tree, nothing):
    p = ontology.p_values(nothing.by_class.mean(), nothing.null["by_class"].mean(axis=1))
    assert p > 0.05 and abs(nothing.by_class.mean() - nothing.null["by_class"].mean()) < 0.15
    assert nothing.choice.f1.mean() > nothing.by_class.mean() + 0.1  # the search flatters itself on its own rows
    summary, _ = ontology.measured({study.SAE: [nothing]})
    assert summary.query("by == 'classes' and measure == 'mean F1'")["p"].iloc[0] > 0.05
    assert not (ontology.by_synset({study.SAE: [nothing]}, tree)["q"] < 0.05).any()


def test_every_class_is_a_control_that_knows_nothing_and_large_synsets_are_not_asked_for(tree, planted, nothing):
    members = _members(tree)
    assert (
        members.sum(0)[ontology.asked(members)].max() == 10
        and ontology.asked(members).sum() == 9 == members.shape[1] - 2
    )
    labels = np.repeat(np.arange(20), 5)
    labels = np.append(labels, [0] * 50)  # one class has more images than others
    every = ontology.every_class(labels, members, 7)
    assert every.by_class == pytest.approx(2 * members.sum(0) / (20 + members.sum(0)))
    truth = members[labels]
    assert every.by_image == pytest.approx(search.f1(np.ones_like(truth), truth))
    assert np.isnan(every.unseen).sum() == 5 and every.replicates["by_image"].shape == (7, 11)
    weights = len(planted.replicates["by_class"])
    every = ontology.every_class(np.repeat(np.arange(20), PER_CLASS), members, weights)
    judged = {study.SAE: [planted], study.RANDOM: [nothing], study.EVERY: [every]}
    summary, kept = ontology.measured(judged)
    pairs = [(study.SAE, study.RANDOM), (study.SAE, study.EVERY), (study.RANDOM, study.EVERY)]
    gaps = ontology.differences(kept, summary, pairs)
    row = summary[(summary["method"] == study.EVERY) & (summary["by"] == "classes")].set_index("measure")["value"]
    assert row["mean F1"] == pytest.approx(every.by_class[every.asked].mean()) and row[ontology.ABOVE] == 0
    assert summary[summary["method"] == study.EVERY]["p"].isna().all()
    above = gaps[(gaps["measure"] == ontology.ABOVE) & (gaps["by"] == "classes")].set_index(["dictionary", "other"])
    raw = (planted.by_class - planted.null["by_class"].mean(axis=0))[planted.asked].mean()
    assert above.loc[(study.SAE, study.EVERY), "value"] == pytest.approx(raw)
    assert (gaps[gaps["by"] == "unseen classes"]["verdict"] == "too few synsets").all()


def test_p_is_even_where_nothing_is_there():
    rng, found = np.random.default_rng(0), []
    members = np.zeros((12, 2), bool)
    members[:3, 0] = members[2:7, 1] = True
    for seed in range(120):
        train = rng.random((12, 30))
        test = train + 0.05 * rng.random((12, 30))
        null = search.permuted_f1(train, test, members, 19, seed)
        observed = search.f1(search.Search(train)(members).classes(test), members)
        found.append(ontology.p_values(observed.mean(), null.mean(axis=1)))
    assert np.mean(np.array(found) <= 0.1) < 0.2 and 0.35 < np.mean(np.array(found) <= 0.5) < 0.75


def test_the_search_is_its_definition():
    rng = np.random.default_rng(3)
    profiles = np.round(rng.random((7, 9)), 1) * (rng.random((7, 9)) < 0.7)  # ties and silence
    members = rng.random((7, 4)) < 0.4
    members[0], members[1] = True, False
    choice = search.Search(profiles)(members)
    for s in range(4):
        best = 0
        for u in range(9):
            levels = np.unique(profiles[:, u])
            for low, high in zip(levels, levels[1:], strict=False):
                called = profiles[:, u] > (low + high) / 2
                both = (called & members[:, s]).sum()
                best = max(best, 2 * both / (called.sum() + members[:, s].sum()))
        assert choice.f1[s] == pytest.approx(best)
        assert search.f1(choice.classes(profiles), members)[s] == pytest.approx(best)
    with pytest.raises(ValueError, match="none of the 9 units"):
        search.Search(np.ones((7, 9)))


def test_of_equal_units_the_one_with_the_widest_gap_is_taken():
    profiles = np.array([[0.01, 1.0, 0.5], [0.01, 1.1, 0.5], [0.0, 0.2, 0.4], [0.0, 0.1, 0.0]])
    choice = search.Search(profiles)(np.array([[True], [True], [False], [False]]))
    assert choice.unit[0] == 1 and choice.threshold[0] == pytest.approx(0.6) and choice.f1[0] == 1


def test_images_are_judged_by_counting(tree):
    rng = np.random.default_rng(5)
    codes, labels = _codes(rng.random((20, 3)) < 0.4, 30, 0)
    units, members = ontology.Units.of_codes(codes, codes), _members(tree)
    choice = search.image_choice(units.train, labels, members)
    dense, truth = codes.dense(), members[labels]
    called = dense[:, choice.unit] > choice.threshold
    assert search.f1(called, truth) == pytest.approx(choice.f1, abs=1e-6)
    every = np.array(
        [
            max(search.f1(dense > t, truth[:, [s]]).max() for t in np.linspace(0, 2, 300))
            for s in range(members.shape[1])
        ]
    )
    assert (choice.f1 <= every + 0.02).all() and (choice.f1 >= every - 0.05).all()  # BINS thresholds, not all


def test_unseen_classes_take_no_part_in_the_choice():
    """A latent a class fits every synset it has seen, and says nothing of a class that it has not."""
    members = np.zeros((20, 1), bool)
    members[::2] = True
    rng = np.random.default_rng(0)
    coded = np.stack([np.isin(np.arange(20), pick) for pick in combinations(range(20), 3)], axis=1) * 1.0
    general = rng.random((20, 1)) * 0.2 + members
    place = np.arange(20)
    for profiles, least, most in ((coded, 0, 0.7), (np.hstack([coded, general]), 1, 1)):
        found, null = search.unseen_f1(profiles, profiles, members, place, permutations=4)
        assert least <= found[0] <= most and null.shape == (4, 1)
    altered = np.hstack([coded, general])
    altered[place % search.FOLDS == 0] = 0  # what the first fold shows in training changes nothing of its judgement
    seen = search.unseen_f1(altered, np.hstack([coded, general]), members, place)[0]
    held = place % search.FOLDS == 0
    choice = search.Search(np.hstack([coded, general])[~held])(members[~held])
    assert (choice.classes(np.hstack([coded, general])[held]) == members[held]).all() and seen[0] <= 1


def test_coordinates_have_both_signs_and_any_threshold():
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(40, 3)), rng.normal(size=(30, 3)) - 5
    units = ontology.Units.of_features(train, test)
    assert units.train.shape == (40, 6) and units.test.shape == (30, 6) and (units.train.toarray() > 0).all()
    labels = np.arange(40) % 4
    means = ontology.profiles(units.train, labels, 4)
    raw = np.stack([train[labels == c].mean(0) for c in range(4)])
    assert np.diff(means[:, :3], axis=0) == pytest.approx(np.diff(raw, axis=0))
    assert np.diff(means[:, 3:], axis=0) == pytest.approx(-np.diff(raw, axis=0))
    assert units.drawn(4, 0).train.shape == (40, 4)
    with pytest.raises(ValueError, match="each of the 5 classes"):
        ontology.profiles(units.train, labels, 5)


def test_draws_keep_the_rows_of_each_class_and_intervals_hold_the_estimate(tree):
    weights = ontology.image_draws(np.array([0, 0, 0, 1, 1]), 50)
    assert (weights[:, :3].sum(1) == 3).all() and (weights[:, 3:].sum(1) == 2).all() and weights.std(0).min() > 0
    active = _members(tree) ^ (np.random.default_rng(0).random((20, 11)) < 0.1)
    noisy = _judge(active, tree, permutations=0)
    table = ontology.by_synset({study.SAE: [noisy, noisy]}, tree)
    assert (table["lo"] <= table["f1"] + 1e-9).all() and (table["f1"] <= table["hi"] + 1e-9).all()
    assert table["p"].isna().all() and table["f1"].mean() > 0.5
    summary, kept = ontology.measured({study.SAE: [noisy], "other": [noisy]})
    assert (summary["lo"] <= summary["value"] + 1e-9).all() and (summary["value"] <= summary["hi"] + 1e-9).all()
    gaps = ontology.differences(kept, summary, [(study.SAE, "other")])
    assert (gaps[["value", "lo", "hi"]] == 0).all(axis=None) and set(gaps["verdict"]) == {
        "undecided",
        "too few synsets",
    }


def test_the_tree_in_a_list(tree):
    place = ontology.tree_order(tree)
    assert sorted(place) == list(range(20))
    spread = [s for s in tree.synsets if np.ptp(place[tree.members(s)]) != tree.members(s).sum() - 1]
    assert [tree.name(s) for s in spread] == ["device"]  # a chain saw is a device, but also a tool
    depth = dict(zip((tree.name(s) for s in tree.synsets), ontology.indents(tree, tree.synsets), strict=True))
    assert (depth["vertebrate"], depth["canine"], depth["dog"], depth["artifact"]) == (0, 1, 2, 0)
    assert ontology.trivial_f1(np.array([[True], [True], [False], [False]]))[0] == pytest.approx(2 * 2 / 6)


# --- numbers of the findings, and figures


PART = "SAE, 8 latents"


def test_numbers_of_the_findings_are_those_of_the_tables(tree, planted, nothing):
    labels = np.repeat(np.arange(20), PER_CLASS)
    every = ontology.every_class(labels, _members(tree), len(planted.replicates["by_class"]))
    judged = {
        study.SAE: [planted],
        study.CLS: [nothing],
        study.RANDOM: [nothing],
        PART: [nothing],
        study.EVERY: [every],
    }
    summary, kept = ontology.measured(judged)
    pairs = [(study.SAE, study.RANDOM), (study.SAE, study.EVERY), (PART, study.CLS)]
    path, split = tree.path_distance(), mantel.split_distance(tree.members(study.ANIMAL))
    rng = np.random.default_rng(0)
    distances = {(study.SAE, "cosine"): path / 30.0}
    for name, kind in ((study.RANDOM, "cosine"), (study.MEANS, "Euclidean")):
        noise = rng.random(path.shape)
        distances[name, kind] = (noise + noise.T) * (1 - np.eye(len(path)))
    data = SimpleNamespace(
        tree=tree, synsets=ontology.by_synset(judged, tree), summary=summary, distances=distances,
        differences=ontology.differences(kept, summary, pairs),
        agreement=mantel.agreement(path, distances, study.MEANS, split, n=99),
        inside=mantel.inside(path, distances, study.families(tree), "spearman", n=99),
        gains=mantel.gains(path, distances, study.SAE, study.RANDOM),
    )  # fmt: skip
    numbers = study.numbers(data)
    assert {name for one in findings.of_notebook("10_ontology") for name in one.names} <= set(numbers)
    assert (numbers["won_images"].value, numbers["synsets_images"].value) == (9, 9)
    assert numbers["f1_sae_images"].value == 1 and numbers["r"].value == 1
    row = data.differences.query("dictionary == @PART and by == 'images' and measure == 'mean F1'").iloc[0]
    assert numbers["equal_number_less_cls_coordinates_images"].value == pytest.approx(row["value"], abs=0.001)
    marks = {row["key"]: row["mark"] for row in findings.judge(findings.of_notebook("10_ontology"), numbers)}
    assert marks["sae-random"] == marks["sae-every"] == marks["within-split"] == findings.HOLDS
    assert marks["one-split"] == findings.FAILS and marks["unseen"] == findings.UNDECIDED
    assert study.paths(data)["panel"].nunique() == 3


def test_families_are_of_eight_classes_or_more(tree):
    found = {name: int(members.sum()) for name, members in study.families(tree).items()}
    assert found == {"animal": 12, "canine": 11, "dog": 10, "artifact": 8}
    few = wordnet.load(list(tree.leaves[:9]))
    assert all(members.sum() >= study.LEAST_CLASSES for members in study.families(few).values())


def test_classes_of_another_kind_are_refused():
    class Digits:
        experiment = type("P", (), {"name": "digits"})

        def features(self, _):
            return type("F", (), {"class_names": ("0", "1")})

    with pytest.raises(ValueError, match="digits.*class '0'"):
        study.taxonomy(Digits())


def test_figures_are_drawn_in_both_themes(tree, planted, nothing):
    judged = {study.SAE: [planted], study.CLS: [nothing], study.RANDOM: [nothing], PART: [nothing]}
    labels = np.repeat(np.arange(20), PER_CLASS)
    judged[study.EVERY] = [ontology.every_class(labels, _members(tree), len(planted.replicates["by_class"]))]
    synsets = ontology.by_synset(judged, tree)
    summary, _ = ontology.measured(judged)
    path = tree.path_distance()
    found = {(study.SAE, "cosine"): path / 30.0}
    names = load_pack("imagenet20", "train").class_names
    pairs = study.ordered_pairs(tree, path / 30.0, names)
    assert pairs["distance"].to_numpy() == pytest.approx(pairs["path"] / 30)
    along = study.along_paths(path, found, list(found))
    assert along["pairs"].sum() == 190 and (along["q50"] == along["path"] / 30).all()
    with style():
        figure = drawn.synset_dots(synsets)
        labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
        assert labels[:3] == ["vertebrate (12)", "· canine (11)", "· · dog (10)"]
        for ax in figure.axes:  # the tick in both panels, at its own F1
            ticks = next(one for one in ax.collections if one.get_label() == study.EVERY).get_offsets()
            assert list(ticks[0]) == pytest.approx([2 * 12 / 32, 0], abs=0.02)
        curves = drawn.coverage_curves(study.covered(synsets, summary))
        assert len(curves.axes) == 3
        assert all(study.EVERY in [line.get_label() for line in ax.lines] for ax in curves.axes)
        assert len(drawn.distance_by_path(along).axes) == 1
        assert len(drawn.ordered_heatmap(pairs).axes) == 2


# --- the published pages


@pytest.mark.parametrize("profile", ANALYSES["10_ontology"])
def test_the_tables_of_a_published_page_agree_with_each_other(profile):
    folder = path_of(f"{profile}/10_ontology").parent / "data" / "10_ontology"
    summary, gaps, synsets = (pd.read_csv(folder / f"{name}.csv") for name in ("summary", "differences", "synsets"))
    large, synsets = synsets[~synsets["asked"]], synsets[synsets["asked"]]
    assert large["q"].isna().all() and large["images"].notna().all()
    assert {study.EVERY, study.RANDOM, study.CLS} < set(synsets["method"])
    for by, column in (("classes", "f1"), ("images", "images"), ("unseen classes", "unseen")):
        for method in (study.SAE, study.EVERY):
            mean = synsets[synsets["method"] == method][column].mean()
            row = summary[(summary["method"] == method) & (summary["by"] == by) & (summary["measure"] == "mean F1")]
            assert row["value"].iloc[0] == pytest.approx(mean, abs=1e-4)
    assert (gaps[gaps["synsets"] < ontology.FEWEST]["verdict"] == "too few synsets").all()
