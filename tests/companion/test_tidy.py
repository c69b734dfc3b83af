from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import auc, roc_auc_score

from capsae.caps import ClassActivationProfiles, energy_profile_divergence
from capsae.latents.explain import explain_epd
from capsae.sae import SparseCodes
from companion.chapters.claims import profile_data
from companion.figures import sweeps, tidy

CLASSES, LATENTS, FIRING = 3, 40, 6


def _codes(rows, seed):
    rng = np.random.default_rng(seed)
    indices = np.stack([rng.permutation(LATENTS)[:FIRING] for _ in range(rows)]).astype(np.int32)
    values = -np.sort(-rng.gamma(1.0, size=(rows, FIRING)).astype(np.float32), axis=1)
    return SparseCodes(values, indices, LATENTS)


@pytest.fixture
def run():
    """A run of random codes with three classes, two OOD sets."""
    sizes = {"train": 90, "test": 30, "near/a": 20, "far/b": 10}
    codes = {name: _codes(n, i) for i, (name, n) in enumerate(sizes.items())}
    labels = {name: np.arange(n) % CLASSES for name, n in sizes.items()}
    names = ("n00000001_great_dog", "n00000002_cat", "n00000003_cow")
    features = {n: SimpleNamespace(labels=labels[n], class_names=names) for n in sizes}
    seen = {n: SimpleNamespace(codes=codes[n], predicted=(labels[n] + 1) % CLASSES, labels=labels[n]) for n in sizes}
    caps = SimpleNamespace(core_fraction=0.25)
    return SimpleNamespace(
        experiment=SimpleNamespace(n_classes=CLASSES, ood_sets=["near/a", "far/b"], caps=caps),
        caps=ClassActivationProfiles.fit(codes["train"], labels["train"], CLASSES),
        features=features.__getitem__, codes=codes.__getitem__, observations=seen.__getitem__,
    )  # fmt: skip


def test_class_names_lose_their_numbers(run):
    assert tidy.class_names(run) == ["great dog", "cat", "cow"]


def test_core_activity_is_the_mean_over_samples_and_core_latents(run):
    data = profile_data.core_activity(run)
    core = run.caps.core(0.25)
    dense, labels = run.codes("test").dense(), run.features("test").labels
    expected = [dense[labels == c][:, core[c]].mean() for c in range(CLASSES)]
    np.testing.assert_allclose(data[data["kind"] == "ID"]["activation"], expected, rtol=1e-6)
    seen = [run.observations(name) for name in ("near/a", "far/b")]
    dense = np.concatenate([obs.codes.dense() for obs in seen])
    predicted = np.concatenate([obs.predicted for obs in seen])
    other = data[data["kind"].str.contains("another")]["activation"]
    np.testing.assert_allclose(other, [dense[predicted != c][:, core[c]].mean() for c in range(CLASSES)], rtol=1e-6)


def test_peakedness_and_sorted_shares_against_dense_arithmetic(run):
    peaks = profile_data.peakedness(run).set_index("set")
    obs, core = run.observations("near/a"), run.caps.core(0.25)
    dense = obs.codes.dense().astype(np.float64)
    inside = np.stack([np.sort(dense[i, core[c]])[::-1] for i, c in enumerate(obs.predicted)])
    total = inside.sum(1, keepdims=True)
    np.testing.assert_allclose(peaks.loc["near/a", "inside"], (total[:, 0] / dense.sum(1)).mean(), rtol=1e-6)
    share = np.divide(inside, total, out=np.zeros_like(inside), where=total > 0)
    np.testing.assert_allclose(peaks.loc["near/a", "largest"], share[:, 0].mean(), rtol=1e-6)
    fires = (share > 0).sum(1)
    entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(1)
    np.testing.assert_allclose(peaks.loc["near/a", "entropy"], entropy.mean(), rtol=1e-6)
    even = entropy[fires > 1] / np.log(fires[fires > 1])
    np.testing.assert_allclose(peaks.loc["near/a", "evenness"], even.mean(), rtol=1e-6)
    lines = profile_data.sorted_shares(run)
    found = lines[lines["set"] == "near/a"].set_index("rank")["share"]
    np.testing.assert_allclose(found, share.mean(0)[: len(found)], rtol=1e-6)


def test_one_sample_under_each_class_is_scored_as_the_score_does(run):
    codes = run.codes("near/a")
    by_class = profile_data.class_divergences(codes, 4, run.caps, 0.25)
    for c in range(CLASSES):
        assert by_class[c] == energy_profile_divergence(codes[4:5], np.array([c]), run.caps, 0.25)[0]
    shown = profile_data.profile_under(codes, 4, 1, run.caps, 0.25, "panel")
    assert shown["expected"].is_monotonic_decreasing and shown["expected"].sum() == pytest.approx(1)
    fires = shown[shown["profile"] > 0]
    assert (fires["profile"] * np.log(fires["profile"] / fires["expected"])).sum() == pytest.approx(by_class[1])


def test_an_explanation_cut_short_still_sums_to_the_score(run):
    codes, predicted = run.codes("far/b"), run.observations("far/b").predicted
    why = explain_epd(codes[2:3], int(predicted[2]), run.caps, 0.5, ("n00000001_great_dog", "b", "c"))
    score = energy_profile_divergence(codes[2:3], predicted[2:3], run.caps, 0.5)[0]
    short = tidy.explained(why, top=2)
    assert len(short) <= 3 and short["share"].sum() == pytest.approx(score)
    assert not short["label"].str.contains(r"n\d{8}").any()


@pytest.fixture
def scores():
    rng, rows = np.random.default_rng(0), []
    for name, n, shift in (("val", 50, 0), ("test", 80, 0), ("near/a", 60, 1), ("far/b", 40, 2)):
        group = name.split("/")[0] if "/" in name else "id"
        for i, score in enumerate(np.round(rng.normal(shift, 1, n), 1)):  # rounded: there are ties
            rows.append(("epd", name, group, i, score))
    return pd.DataFrame(rows, columns=["method", "set", "group", "row", "score"])


def test_roc_curves_have_the_area_that_scikit_learn_finds(scores):
    data = tidy.roc(scores, {"epd": "EPD"}, points=10_000)
    for name, rows in data.groupby("set"):
        known, ood = scores[scores["set"] == "test"]["score"], scores[scores["set"] == name]["score"]
        truth = np.r_[np.zeros(len(known)), np.ones(len(ood))]
        assert auc(rows["fpr"], rows["tpr"]) == pytest.approx(roc_auc_score(truth, np.r_[known, ood]))
    assert list(dict.fromkeys(data["set"])) == ["near/a", "far/b"]


def test_histograms_are_densities_and_leave_validation_rows_out(scores):
    data = tidy.histograms(scores, {"epd": "EPD"}, bins=20)
    area = (data["density"] * (data["right"] - data["left"])).groupby(data["group"]).sum()
    np.testing.assert_allclose(area, 1)
    without = tidy.histograms(scores[scores["set"] != "val"], {"epd": "EPD"}, bins=20)
    pd.testing.assert_frame_equal(data, without)


def test_pick_and_percent():
    rows = [("epd", "mean", "all", "auroc", 0.971, 0.966, 0.976), ("epd", "mean", "near", "auroc", 0.9, np.nan, np.nan)]
    table = pd.DataFrame(rows, columns=["method", "set", "group", "metric", "value", "lo", "hi"])
    assert tidy.percent(tidy.pick(table, "epd", "auroc")) == "97.1 % (96.6 to 97.6)"
    assert tidy.percent(tidy.pick(table, "epd", "auroc", "near")) == "90.0 %"
    with pytest.raises(ValueError, match="0 rows of rmds"):
        tidy.pick(table, "rmds", "auroc")


def test_sweeps_are_laid_out_by_panel_and_by_run():
    metrics = ("auroc", "fpr95_ood_pos", "fpr95_id_pos")
    rows = [
        {"sweep": "k", "setting": k, "chosen": k == "32", "method": m, "series": s, "metric": metric, "group": group,
         "value": 0.1, "lo": 0.05, "hi": 0.2, "fvu": 0.2, "undefined": 0.1, "page": f"k-{k}.html"}
        for k in ("8", "32") for m, s in (("epd", "EPD"), ("code_l1", "L1")) for metric in metrics
        for group in ("near", "all")
    ]  # fmt: skip
    data = pd.DataFrame(rows)
    assert list(dict.fromkeys(sweeps.sweep_panels(data)["panel"])) == list(tidy.METRIC_PANELS.values())
    glance = sweeps.sweep_panels(data, "auroc")
    assert set(glance["panel"]) == {"k"} and set(glance["series"]) == {"EPD"} and len(glance) == 2
    wide = sweeps.sweep_wide(data)
    assert wide["undefined, %"].tolist() == [10.0, 10.0]
    assert list(wide["setting"]) == ["8", "32"] and wide["EPD, AUROC, %"].tolist() == [10.0, 10.0]


def test_sample_rows_keeps_order_and_small_sets():
    class Rows(list):
        def take(self, rows):
            return Rows(self[i] for i in rows)

    assert tidy.sample_rows(Rows(range(5)), 10) == list(range(5))
    some = tidy.sample_rows(Rows(range(100)), 10)
    assert len(some) == 10 and some == sorted(some) and some != list(range(10))


def test_unexplained_variance_is_the_mean_over_seeds_with_both_sources(tmp_path):
    import small_experiment

    from capsae.pipeline.run import Run

    run = Run(small_experiment.write(tmp_path), {"sae_seeds": 3}, tmp_path, "cpu", progress=False)
    found = tidy.fvu_of_seeds(run).set_index("set")
    values = [one.sae.fvu(run.features("test").cls) for one in run.seeds()]
    assert found.loc["test", "value"] == pytest.approx(np.mean(values), rel=1e-4) and found.loc["test", "seeds"] == 3
    # The images' part of one seed: the delta method against redrawn images.
    one = tidy.fvu_of_seeds(run.with_seed(1)).loc[0]
    sae, cls, rng = run.with_seed(1).sae, run.features("train").cls, np.random.default_rng(0)
    drawn = [sae.fvu(cls[rng.integers(0, len(cls), len(cls))]) for _ in range(300)]
    assert (one["hi"] - one["lo"]) / 2 / 1.96 == pytest.approx(np.std(drawn), rel=0.15)


def test_what_the_training_page_records(tmp_path):
    history = pd.DataFrame({"epoch": [1, 2], "dead_fraction": [0.5, 0.25], "l0": [3.0, 4.0]})
    history.attrs["best_epoch"] = 1
    errors = pd.DataFrame({"set": ["test", "near/a", "far/b"], "q50": [0.1, 0.2, 0.4]})
    found = tidy.of_training(history, errors).set_index("key")["value"]
    assert found["best epoch"] == 1 and found["epochs"] == 2 and found["dead"] == 0.5 and found["ood sets"] == 2
    assert (found["median test"], found["median of ood, least"], found["median of ood, largest"]) == (0.1, 0.2, 0.4)
