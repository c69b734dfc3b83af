"""Covariate shift: sets, probes, tests of their differences, the numbers of its findings, and the published page."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from small_experiment import write

from capsae.features.probe import fit_linear_probe
from capsae.pipeline.run import Run
from capsae.stats import holm
from companion import findings
from companion.chapters.shift import calibration, false_alarms, probes
from companion.chapters.shift import figures as shift_figures
from companion.chapters.shift import maths as shift
from companion.chapters.shift import study as shift_study
from companion.figures import display
from companion.publish import plan, publish

SETS = ["noise/1", "noise/5", "blur/2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shift")
    return Run(write(folder / "small"), store=folder / "store", progress=False)


@pytest.fixture(scope="module")
def pack(run, tmp_path_factory):
    """Half of the test rows with noise that grows; blur/2 is so strong that nothing is left."""
    folder = tmp_path_factory.mktemp("pack")
    test, rng = run.features("test").take(np.arange(0, 80, 2)[::-1]), np.random.default_rng(0)
    for name, scale in zip(SETS, (1, 3, 300), strict=True):
        cls = test.cls + scale * rng.normal(size=test.cls.shape)
        replace(test, cls=cls, name=name).save(folder / f"{name.replace('/', '__')}.safetensors")
    info = {"backbone": {"model": "vit_tiny_patch16_224"}, "sets": {name: {} for name in SETS}}
    (folder / "pack.json").write_text(json.dumps(info))
    return folder


@pytest.fixture(scope="module")
def fitted(run):
    return probes.fit_probes(run)


@pytest.fixture(scope="module")
def evaluated(run, pack, fitted):
    return shift.evaluate(run, shift.sets(run, pack), fitted[0], n_boot=400)


def test_sets_are_the_packs_and_what_cannot_be_is_named(run, pack, tmp_path):
    found = shift.sets(run, pack)
    assert list(found) == SETS
    known = shift.clean(run, found)
    assert known.ids.tolist() == found["noise/1"].ids.tolist() and len(known) == 40
    with pytest.raises(ValueError, match="has no covariate-shifted set: add one to its .shifted., or make corrupted"):
        shift.sets(run)
    info = json.loads((pack / "pack.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    for path in pack.glob("*.safetensors"):
        (other / path.name).write_bytes(path.read_bytes())
    (other / "pack.json").write_text(json.dumps(info | {"backbone": {"model": "resnet"}}))
    with pytest.raises(ValueError, match="was made with backbone model = 'resnet'"):
        shift.sets(run, other)
    without = SimpleNamespace(experiment=run.experiment.model_copy(update={"pack": None}), features=run.features)
    with pytest.raises(ValueError, match="backbone of experiment 'small' with"):
        shift.sets(without, other)
    (other / "pack.json").write_text(json.dumps(info))
    strange = found["noise/5"]
    replace(strange, ids=np.array([f"x{i}" for i in range(40)])).save(other / "noise__5.safetensors")
    with pytest.raises(ValueError, match="noise/5: 'x0' is no ID test image"):
        shift.sets(run, other)


def test_parts_and_places():
    assert shift.parts("blur/3") == ("blur", 3) and shift.parts("shifted/fog") == ("shifted/fog", None)
    found = shift.places(["clean", "blur/1", "noise/1", "blur/2", "shifted/fog"])
    assert found["blur"] == ["blur/1", "blur/2"] and found["shifted/fog"] == ["shifted/fog"]
    assert found["mean"] == ["blur/1", "noise/1", "blur/2", "shifted/fog"] and found["clean"] == ["clean"]


def test_draws_are_shared_by_sets_of_the_same_images():
    ids = np.array(list("abcd"))
    found = shift.draw({"clean": ids, "blur/1": ids.copy(), "shifted/x": np.array(list("efgh"))}, 50)
    assert found["clean"] is found["blur/1"] and (found["clean"].sum(1) == 4).all()
    assert (found["clean"] != found["shifted/x"]).any()


# --- probes


def test_a_probe_on_dense_rows_is_the_book_s_own_at_its_penalty(run):
    train, test = run.features("train"), run.features("test")
    found = dict(probes.fit_rows(train.cls, train.labels, strengths=(0.003, 0.03)))
    own = fit_linear_probe(train.cls, train.labels, 4, strengths=(0.03,))
    expected, got = (calibration.log_softmax(z) for z in (own.logits(test.cls), found[True, 0.03](test.cls)))
    np.testing.assert_allclose(got, expected, atol=0.02)


def test_a_probe_on_sparse_codes_is_that_on_dense_ones(run):
    train, test = (run.sae.encode(run.features(name).cls) for name in ("train", "test"))
    labels = run.features("train").labels
    for standardise in (True, False):
        (_, sparse), (_, dense) = (
            next(probes.fit_rows(rows, labels, standardise, (0.03,))) for rows in (train.csr(), train.dense())
        )
        found, expected = (calibration.log_softmax(z) for z in (sparse(test.csr()), dense(test.dense())))
        np.testing.assert_allclose(found, expected, atol=0.02)
    assert train.csr().nnz == (train.values > 0).sum()


def test_all_probes_know_these_classes_and_the_controls_are_what_they_say(run, fitted):
    fitted, test = fitted[0], run.features("test")
    assert list(fitted) == list(probes.TITLES) == list(probes.READS)
    for name, probe in fitted.items():
        logits = probe.logits(test.cls)
        assert logits.shape == (80, 4) and (logits.argmax(1) == test.labels).mean() > 0.9, name
    scaled = 3 * test.cls + 1  # the SAE takes mean and length off each row
    for name in ("normalised", "codes", "reconstruction", "caps", "random", "pca"):
        np.testing.assert_allclose(fitted[name].logits(scaled), fitted[name].logits(test.cls), atol=1e-2)
    cosine = fitted["caps"].logits(test.cls)
    dense, caps = run.sae.encode(test.cls).dense()[0], run.caps.mean[2]
    assert cosine[0, 2] == pytest.approx(dense @ caps / np.linalg.norm(dense) / np.linalg.norm(caps), abs=1e-5)
    with pytest.raises(ValueError, match="no probe 'svm'; there are cls, normalised, codes"):
        probes.fit_probes(run, ["svm"])


def test_one_rule_chooses_every_probe_on_validation_rows(run, fitted):
    (fitted, tried), val = fitted, run.features("val")
    for name in set(probes.TITLES) - {"caps"}:
        rows = tried[tried["representation"] == name]
        assert set(rows["standardised"]) == {True, False}, name
        best = rows.loc[rows["log loss"].idxmin()]
        assert fitted[name].choice == (best["standardised"], best["strength"])
        loss = -calibration.log_softmax(fitted[name].logits(val.cls))[np.arange(len(val.labels)), val.labels].mean()
        assert loss == pytest.approx(best["log loss"], rel=1e-6)
        for _, grid in rows.groupby("standardised"):  # weakened until the loss rises, and no further
            steps = np.diff(grid["log loss"])
            assert (steps[:-1] <= 0).all() and (steps[-1] > 0 or len(grid) == len(probes.GRID))


def test_rules_choose_by_their_own_column():
    rows = [("x", True, 0.1, 0.3, 0.2, 0.8), ("x", False, 0.1, 0.2, 0.4, 0.7), ("x", False, 0.01, 0.5, 0.5, 0.8)]
    tried = pd.DataFrame(rows, columns=["representation", "standardised", "strength", *probes.RULES])
    assert probes.choose(tried, "x") == (False, 0.1) and probes.choose(tried, "x", standardised=True) == (True, 0.1)
    assert probes.choose(tried, "x", "scaled log loss") == (True, 0.1)
    assert probes.choose(tried, "x", "accuracy") == (False, 0.01), "of equals the stronger penalty"
    with pytest.raises(ValueError, match="nothing to choose for 'y' by 'log loss'"):
        probes.choose(tried, "y")


# --- tables


def _row(compared, representation, metric="accuracy", place=shift.MEAN, other="cls"):
    asked = {"representation": representation, "metric": metric, "place": place, "other": other}
    (row,) = compared[(compared[list(asked)] == list(asked.values())).all(axis=1)].to_dict("records")
    return row


def test_what_is_measured(run, evaluated):
    measured, compared, fitted = evaluated
    rows = measured[(measured["representation"] == "cls") & (measured["metric"] == "accuracy")].set_index("set")
    assert list(rows.index) == ["clean", *SETS] and set(rows["scaled"]) == {"after"}
    assert rows.loc["clean", "value"] > 0.9 and rows.loc["blur/2", "value"] < 0.5
    assert rows["strength"].tolist() == [0, 1, 5, 2] and (rows["lo"] <= rows["value"]).all()
    scaled = measured[(measured["representation"] == "cls") & (measured["set"] == "noise/5")]
    assert set(scaled["metric"]) == set(calibration.METRICS) and len(scaled) == 9
    assert fitted["representation"].tolist() == list(probes.TITLES) and (fitted["temperature"] > 0).all()
    at = measured.set_index(["representation", "set", "metric", "scaled"])["value"]
    row = _row(compared, "codes", "accuracy", "noise")
    own, cls = (np.mean([at[r, s, "accuracy", "after"] for s in SETS[:2]]) for r in ("codes", "cls"))
    assert (row["own"], row["than"], row["value"]) == pytest.approx((own, cls, own - cls))
    lost = _row(compared, "pca", "nll", shift.LOSS)
    mean, clean = (_row(compared, "pca", "nll", place) for place in (shift.MEAN, shift.CLEAN))
    assert lost["value"] == pytest.approx(mean["value"] - clean["value"])
    assert (compared["p_holm"] >= compared["p"]).all() and (compared["lo"] <= compared["hi"]).all()
    assert len(shift.means(measured)) == len(probes.TITLES) * 9
    inside = (measured["lo"] <= measured["value"] + 1e-6) & (measured["value"] <= measured["hi"] + 1e-6)
    assert inside[measured["metric"].isin(calibration.ERRORS)].all()
    first = compared[(compared["family"] == "primary") & (compared["metric"] == "accuracy")]
    pairs = set(zip(first["representation"], first["other"], strict=True))
    assert len(first) == 10 and pairs == set(shift.PAIRS) and set(first["place"]) == set(shift.PRIMARY)
    for _, rows in compared.groupby(["metric", "family"]):
        np.testing.assert_allclose(rows["p_holm"], holm(rows["p"]))
    row = _row(compared, "codes", other="random")
    assert row["value"] == pytest.approx(
        np.mean([at["codes", s, "accuracy", "after"] - at["random", s, "accuracy", "after"] for s in SETS])
    )


def _replicates(shifts, n_boot=2000):
    """Measured and replicates in which representations differ from the CLS by known amounts."""
    rng, rows, draws = np.random.default_rng(0), [], {}
    for metric, scaled in shift.TESTED:
        for name, of in {"cls": 0.0, **shifts}.items():
            for where in ("clean", "blur/1", "noise/1"):
                value = 0.5 + (of if where != "clean" else 0)
                rows.append((name, where, metric, scaled, value))
                draws[name, where, metric, scaled] = value + 0.01 * rng.normal(size=n_boot)
    return pd.DataFrame(rows, columns=["representation", "set", "metric", "scaled", "value"]), draws


def test_comparisons_find_what_was_put_in_and_know_the_direction_of_each_metric():
    table = shift.compare(*_replicates({"up": 0.2, "same": 0.0, "down": -0.2}))
    assert set(table["other"]) == {"cls"}
    word = table.set_index(["representation", "metric", "place"])["verdict"]
    for metric in calibration.METRICS:
        good = "better" if metric == "accuracy" else "worse"
        bad = "worse" if metric == "accuracy" else "better"
        for place in ("blur", "mean", shift.LOSS):
            found = [word[name, metric, place] for name in ("up", "same", "down")]
            assert found == [good, "undecided", bad], (metric, place)
        assert word["up", metric, "clean"] == "undecided"
    assert table.groupby("metric")["p_holm"].apply(lambda p: (p >= 0).all()).all()
    least = table[(table["representation"] == "up") & (table["place"] == "mean")].iloc[0]
    assert least["p_at_most"] and least["p_holm"] > least["p"]


def test_alarms_are_at_the_threshold_that_keeps_clean_rows(run, pack):
    found, rises = false_alarms.alarms(run, shift.sets(run, pack), ("epd", "knn"), n_boot=300)
    rows = found[(found["method"] == "knn") & (found["group"] == "all")].set_index("set")
    assert rows.loc["blur/2", "value"] > rows.loc["clean", "value"] + 0.1 and rows.loc["clean", "value"] < 0.2
    assert rows.loc["noise/1", "value"] <= rows.loc["noise/5", "value"]
    right = found[(found["method"] == "knn") & (found["group"] == "correct")].set_index("set")
    assert right.loc["blur/2", "n"] < rows.loc["blur/2", "n"] == 40
    drawn = shift.with_clean(found[found["group"] != "ood"])
    assert set(drawn["corruption"]) == {"noise", "blur"} and (drawn[drawn["set"] == "clean"]["strength"] == 0).all()
    rise = rises.set_index(["method", "group"]).loc[("knn", "all")]
    assert rise["value"] == pytest.approx(rows.loc[SETS, "value"].mean() - rows.loc["clean", "value"])
    assert rise["lo"] <= rise["value"] <= rise["hi"] and len(rises) == 4
    table = shift_study.alarm_table(found, rises)
    far = found[(found["method"] == "knn") & found["set"].str.startswith("far/")]["value"]
    assert table["far OOD"].iloc[1] == pytest.approx(100 * far.mean()) and len(table) == 2


def test_seeds_and_other_choices(run, pack, evaluated, fitted):
    shifted = shift.sets(run, pack)
    own, random = (_row(evaluated[1], "codes", other=other) for other in ("cls", "random"))
    found = shift.over_seeds(run, shifted, fitted[0], seeds=(0, 1))
    first = found[(found["seed"] == 0) & (found["place"] == "mean")].iloc[0]
    assert first["accuracy"] == pytest.approx(own["own"]) and set(found["seed"]) == {0, 1}
    assert (first["less cls"], first["less random"]) == pytest.approx((own["value"], random["value"]))
    ways = shift.sensitivity(run, shifted, *fitted, n_boot=400)
    rows = ways.set_index(["way", "other"])
    assert len(ways) == 2 * len(shift.WAYS) + 1
    for row in (own, random):
        cell = rows.loc[(next(iter(shift.WAYS)), row["other"])]
        assert tuple(cell[["own", "than", "value"]]) == pytest.approx((row["own"], row["than"], row["value"]), abs=1e-5)
        assert (cell["lo"], cell["hi"]) == pytest.approx((row["lo"], row["hi"]), abs=1e-6)
    assert (
        not ways[ways["way"].str.contains("standardised alone") & ~ways["way"].str.contains("not")]["codes chose"]
        .str.startswith("not")
        .any()
    )


# --- the numbers of the findings


def test_numbers_of_the_findings_are_those_of_the_tables(run, pack, evaluated, fitted):
    measured, compared, chosen = evaluated
    shifted = shift.sets(run, pack)
    alarms, rises = false_alarms.alarms(run, shifted, ("epd", "knn"), n_boot=100)
    found = SimpleNamespace(
        probes=fitted[0], measured=measured, compared=compared, chosen=chosen, alarms=alarms, rises=rises,
        ways=shift.sensitivity(run, shifted, *fitted, n_boot=100),
        seeds=shift.over_seeds(run, shifted, fitted[0], seeds=(0, 1)),
    )  # fmt: skip
    numbers = shift_study.numbers(found)
    row, made = _row(compared, "codes"), numbers["codes_less_cls_accuracy_mean"]
    assert (made.value, made.lo, made.hi) == pytest.approx([100 * row[key] for key in ("value", "lo", "hi")], abs=0.051)
    assert numbers["cls_accuracy_mean"].value == pytest.approx(100 * row["than"], abs=0.051)
    assert numbers["detectors"].value == 2 and numbers["corruptions"].value == 2
    assert numbers["detectors_that_rise"].value <= 2
    least, most = (numbers[f"seeds_less_cls_{end}"].value for end in ("least", "most"))
    assert least <= numbers["codes_less_cls_accuracy_mean"].value <= most
    names = {name for one in findings.of_notebook("11_shift") for name in one.names}
    assert names <= set(numbers)
    assert len(shift_study.chosen(found)) == len(probes.TITLES)
    assert set(shift_study.by_strength(found, "ece")["corruption"]) == {"noise", "blur"}
    assert set(shift_study.compared(found)["metric"]) == {metric for metric, _ in shift.TESTED}


def test_figures_are_drawn_in_both_themes(evaluated):
    measured, compared, _ = evaluated
    lines = shift.with_clean(measured[measured["metric"] == "accuracy"]).assign(series=lambda t: t["representation"])
    rows = compared[(compared["metric"] == "accuracy") & (compared["other"] == "cls")].assign(
        panel=lambda t: t["place"], label=lambda t: t["representation"]
    )
    for function, data in ((shift_figures.by_strength, lines), (shift_figures.differences, rows)):
        with display.style():
            figure = function(data)
            assert len(display.render_svg(figure, "figure")) > 1000


# --- the published page


@pytest.mark.parametrize("experiment", plan.ANALYSES["11_shift"])
def test_the_tables_of_the_published_page_agree_with_each_other(experiment):
    folder = publish.path_of(f"{experiment}/11_shift").parent / "data" / "11_shift"
    measured, compared, rises, alarms = (
        pd.read_csv(folder / f"{name}.csv") for name in ("measured", "compared", "rises", "alarms")
    )
    at = measured.set_index(["representation", "set", "metric", "scaled"])["value"]
    over = shift.places(list(dict.fromkeys(measured["set"])))
    for row in compared[compared["place"] != shift.LOSS].to_dict("records"):
        known = [
            np.mean([at[name, s, row["metric"], row["scaled"]] for s in over[row["place"]]])
            for name in (row["representation"], row["other"])
        ]
        assert known == pytest.approx([row["own"], row["than"]], abs=1e-5)
        good = row["value"] > 0 if row["metric"] == "accuracy" else row["value"] < 0
        assert row["verdict"] == (("better" if good else "worse") if row["p_holm"] < 0.05 else "undecided")
    assert measured["set"].nunique() == 21
    inside = (measured["lo"] <= measured["value"] + 1e-5) & (measured["value"] <= measured["hi"] + 1e-5)
    assert inside.all(), "every interval holds its estimate"
    flagged = alarms[(alarms["group"] == "all") & (alarms["set"] != "clean")].groupby("method")["value"].mean()
    for row in rises[rises["group"] == "all"].itertuples():
        assert row.mean == pytest.approx(flagged[row.method], abs=1e-5)
