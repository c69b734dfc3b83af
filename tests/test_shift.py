"""Covariate shift: sets, probes, tests of their differences, sentences both ways, and the published page."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from small_profile import write

from capsae import display, plan, publish
from capsae.analyses import calibration, probes, shift, shift_figures, shift_verdicts
from capsae.pipeline import Run
from capsae.probe import fit_linear_probe
from capsae.sae.measures import _matrix

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
    without = SimpleNamespace(profile=run.profile.model_copy(update={"pack": None}), features=run.features)
    with pytest.raises(ValueError, match="backbone of profile 'small' with"):
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
            next(probes.fit_rows(rows, labels, standardise, (0.03,)))
            for rows in (_matrix(train), train.dense())
        )
        found, expected = (calibration.log_softmax(z) for z in (sparse(_matrix(test)), dense(test.dense())))
        np.testing.assert_allclose(found, expected, atol=0.02)
    assert _matrix(train).nnz == (train.values > 0).sum()


def test_all_probes_know_these_classes_and_the_controls_are_what_they_say(run, fitted):
    fitted, test = fitted[0], run.features("test")
    assert list(fitted) == list(probes.TITLES) == list(probes.TOLD)
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
    row = shift_verdicts.row_of(compared, "codes", "accuracy", "noise")
    own, cls = (np.mean([at[r, s, "accuracy", "after"] for s in SETS[:2]]) for r in ("codes", "cls"))
    assert (row["own"], row["than"], row["value"]) == pytest.approx((own, cls, own - cls))
    lost = shift_verdicts.row_of(compared, "pca", "nll", shift.LOSS)
    mean, clean = (shift_verdicts.row_of(compared, "pca", "nll", place) for place in (shift.MEAN, shift.CLEAN))
    assert lost["value"] == pytest.approx(mean["value"] - clean["value"])
    assert (compared["p_holm"] >= compared["p"]).all() and (compared["lo"] <= compared["hi"]).all()
    assert len(shift.means(measured)) == len(probes.TITLES) * 9
    inside = (measured["lo"] <= measured["value"] + 1e-6) & (measured["value"] <= measured["hi"] + 1e-6)
    assert inside[measured["metric"].isin(calibration.ERRORS)].all()
    first = compared[(compared["family"] == "primary") & (compared["metric"] == "accuracy")]
    pairs = set(zip(first["representation"], first["other"], strict=True))
    assert len(first) == 10 and pairs == set(shift.PAIRS) and set(first["place"]) == set(shift.PRIMARY)
    for _, rows in compared.groupby(["metric", "family"]):
        np.testing.assert_allclose(rows["p_holm"], shift.holm(rows["p"]))
    row = shift_verdicts.row_of(compared, "codes", other="random")
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
    found, rises = shift.alarms(run, shift.sets(run, pack), ("epd", "knn"), n_boot=300)
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
    table = shift_verdicts.alarm_table(found, rises)
    far = found[(found["method"] == "knn") & found["set"].str.startswith("far/")]["value"]
    assert table["far OOD"].iloc[1] == pytest.approx(100 * far.mean()) and len(table) == 2


def test_seeds_and_other_choices(run, pack, evaluated, fitted):
    shifted = shift.sets(run, pack)
    own, random = (shift_verdicts.row_of(evaluated[1], "codes", other=other) for other in ("cls", "random"))
    found = shift.over_seeds(run, shifted, fitted[0], seeds=(0, 1))
    first = found[(found["seed"] == 0) & (found["place"] == "mean")].iloc[0]
    assert first["accuracy"] == pytest.approx(own["own"]) and set(found["seed"]) == {0, 1}
    assert (first["less cls"], first["less random"]) == pytest.approx((own["value"], random["value"]))
    ways = shift.sensitivity(run, shifted, *fitted, n_boot=400)
    rows = ways.set_index(["way", "other"])
    assert len(ways) == 2 * len(shift.WAYS) + 1
    for row in (own, random):
        cell = rows.loc[(next(iter(shift.WAYS)), row["other"])]
        assert tuple(cell[["own", "than", "value"]]) == pytest.approx((row["own"], row["than"], row["value"]))
        assert (cell["lo"], cell["hi"]) == pytest.approx((row["lo"], row["hi"]), abs=1e-6)
    assert (
        not ways[ways["way"].str.contains("standardised alone") & ~ways["way"].str.contains("not")]["codes chose"]
        .str.startswith("not")
        .any()
    )


# --- sentences


def _row(verdict, value, metric="accuracy", place="mean", name="codes", other="cls"):
    cells = {
        "other": other,
        "own": 0.7 + value,
        "than": 0.7,
        "value": value,
        "lo": value - 0.01,
        "hi": value + 0.01,
        "p_holm": 0.004,
    }
    return {"representation": name, "metric": metric, "place": place, "verdict": verdict, "p_at_most": False} | cells


def test_a_verdict_says_what_its_row_says():
    better = shift_verdicts.verdict(_row("better", 0.02), "digits")
    assert better == (
        "On digits, SAE codes are better than the CLS in the mean of all shifted sets: accuracy 72.0 % against 70.0 %, "
        "difference +2.0 points (+1.0 to +3.0 uncorrected), p = 0.004 (Holm)."
    )
    assert "are worse than the CLS under blur: " in shift_verdicts.verdict(_row("worse", -0.02, place="blur"), "x")
    undecided = shift_verdicts.verdict(_row("undecided", 0.0, "nll", "clean", "pca"), "x")
    assert (
        "PCA, k components is not clearly better or worse than the CLS on the clean images: log loss 0.700" in undecided
    )
    lost = shift_verdicts.verdict(_row("worse", -0.02, place=shift.LOSS), "x")
    assert "in what the shift changes" in lost and "accuracy +68.0 points against +70.0 points" in lost


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("better", "is seen on x:"),
        ("worse", "is not seen on x; the opposite is:"),
        ("undecided", "is not seen on x: probes on SAE codes and on the CLS are not told apart"),
    ],
)
def test_the_claim_is_told_by_the_row(word, told):
    table = pd.DataFrame([_row(word, 0.02), _row("better", 0.3, "ece"), _row("worse", -0.3, name="pca")])
    assert told in shift_verdicts.claim(table, _ways(), "x")
    with pytest.raises(ValueError, match="the table holds 0 rows of codes, nll, mean, cls"):
        shift_verdicts.row_of(table, "codes", "nll")


def _ways(other="cls", values=(-0.02, 0.0, 0.02, 0.02)):
    rows = [(f"w{i}", other, "a", f"b{v}", v, v - 0.01, v + 0.01) for i, v in enumerate(values)]
    return pd.DataFrame(rows, columns=["way", "other", "codes chose", "other chose", "value", "lo", "hi"])


def test_the_claim_is_told_with_how_it_depends_on_the_choice_of_probes():
    told = shift_verdicts.claim(pd.DataFrame([_row("worse", -0.02)]), _ways(), "x")
    assert told.endswith(
        "over 3 different choices of the two probes on ID rows -2.0 to +2.0 points, of 3 uncorrected intervals 1 "
        "wholly below 0 and 1 above)."
    )


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("better", "Training the dictionary pays:"),
        ("worse", "harms:"),
        ("undecided", "are not told apart (accuracy 72.0"),
    ],
)
def test_what_training_is_worth_is_told_by_the_paired_row(word, told):
    table = pd.DataFrame([_row(word, 0.02, other="random"), _row("worse", -0.5)])
    found = shift_verdicts.trained(table, _ways("random", (0.02,)))
    assert told in found and "over 1 different choices" in found


def test_what_the_shift_changes_is_told_for_codes_and_controls():
    names = {"codes": "undecided", "random": "worse", "pca": "better", "normalised": "undecided"}
    rows = [_row(word, 0.01 * i, place=shift.LOSS, name=name) for i, (name, word) in enumerate(names.items())]
    told = shift_verdicts.change_text(pd.DataFrame(rows))
    assert "less accuracy is lost: PCA, k components (+2.0 points, +1.0 to +3.0 uncorrected, p = 0.004 Holm);" in told
    assert "more is lost: random dictionary's codes (" in told and "undecided: SAE codes (+0.0 points" in told
    none = shift_verdicts.change_text(pd.DataFrame([{**row, "verdict": "undecided"} for row in rows]))
    assert "less accuracy is lost: none; more is lost: none; undecided: SAE codes" in none


def test_places_controls_and_seeds_in_words():
    rows = [_row("better", 0.1, place="blur"), _row("worse", -0.1, place="noise"), _row("worse", -0.1)]
    told = shift_verdicts.by_place(pd.DataFrame(rows), "codes", "accuracy")
    assert told == "By corruption, SAE codes against the CLS in accuracy: better: blur; worse: noise; undecided: none."
    rows = [
        _row("better", 0.1, name="pca"),
        _row("worse", -0.1, name="random"),
        _row("undecided", 0, name="normalised"),
    ]
    told = shift_verdicts.controls(pd.DataFrame(rows))
    assert "PCA, k components better, accuracy 80.0 %" in told and "random dictionary's codes worse" in told
    seeds = pd.DataFrame({"seed": [0, 1], "place": ["mean", "mean"], "less cls": [-0.02, -0.03]})
    assert shift_verdicts.seeds_text(seeds).endswith("-3.0 and -2.0 points: its sign does not depend on the seed.")
    assert "its sign depends on the seed" in shift_verdicts.seeds_text(seeds.assign(**{"less cls": [0.1, -0.1]}))


def test_alarms_in_words():
    cells = {"group": "all", "value": [0.2, 0.01], "lo": [0.1, -0.01], "hi": [0.3, 0.03], "p_at_most": [True, False]}
    rises = pd.DataFrame({"title": ["EPD", "KNN"], "p_holm": [0.004, 0.2], **cells})
    assert shift_verdicts.alarm_text(rises) == (
        "1 of 2 detectors clearly raise more alarms on shifted ID images than on clean ones: the rise in the mean of "
        "the shifted sets lies between +1.0 points (KNN, -1.0 to +3.0, p = 0.200 Holm) and +20.0 points (EPD, +10.0 to "
        "+30.0, p ≤ 0.004 Holm)."
    )
    fewer = rises.assign(value=-rises["value"])
    assert shift_verdicts.alarm_text(fewer).startswith("0 of 2 detectors"), "a fall is no rise, however clear"


def test_figures_are_drawn_in_both_themes(evaluated):
    measured, compared, _ = evaluated
    lines = shift.with_clean(measured[measured["metric"] == "accuracy"]).assign(series=lambda t: t["representation"])
    rows = compared[(compared["metric"] == "accuracy") & (compared["other"] == "cls")].assign(
        panel=lambda t: t["place"], label=lambda t: t["representation"]
    )
    for function, data in ((shift_figures.by_strength, lines), (shift_figures.differences, rows)):
        for theme in ("light", "dark"):
            with display.style(theme):
                figure = function(data)
                assert figure.get_size_inches()[0] <= 8 and len(display.render_png(figure)) > 1000


# --- the published page


@pytest.fixture(scope="module", params=plan.ANALYSES.get("11_shift", ()))
def page(request):
    name = f"{request.param}/11_shift"
    if not publish.path_of(name).is_file():
        pytest.skip("this page is not executed yet")
    return request.param, publish.results(name), publish.path_of(name).read_text(encoding="utf-8")


def test_what_the_published_page_says_holds_against_its_numbers(page):
    profile, found, text = page
    table = pd.DataFrame(found["compared"])
    for row in found["compared"]:
        good = row["value"] > 0 if row["metric"] == "accuracy" else row["value"] < 0
        assert row["verdict"] == (("better" if good else "worse") if row["p_holm"] < 0.05 else "undecided")
        assert row["value"] == pytest.approx(row["own"] - row["than"], abs=1e-6)
    known = {shift_verdicts.verdict(row, profile) for row in found["compared"]}
    known |= {shift_verdicts.by_place(table, "codes", "accuracy"), shift_verdicts.change_text(table)}
    known.add(shift_verdicts.controls(table))
    assert found["verdicts"] and set(found["verdicts"]) <= known
    assert found["calibration"] and set(found["calibration"]) <= known
    ways, seeds = pd.DataFrame(found["ways"]), pd.DataFrame(found["seeds"])
    assert found["claim"] == shift_verdicts.claim(table, ways, profile)
    assert found["trained"] == shift_verdicts.trained(table, ways)
    assert found["stable"] == [shift_verdicts.seeds_text(seeds, other) for other in ("cls", "random")]
    assert found["alarms_told"] == shift_verdicts.alarm_text(pd.DataFrame(found["rises"]))
    for key in ("cls", "random"):
        own, first = shift_verdicts.row_of(table, "codes", other=key), ways[ways["other"] == key].iloc[0]
        assert first["value"] == pytest.approx(own["value"], abs=1e-5)
        seed = seeds[(seeds["seed"] == 0) & (seeds["place"] == "mean")].iloc[0]
        assert seed[f"less {key}"] == pytest.approx(own["value"], abs=1e-5)
    told = [found["claim"], found["trained"], found["alarms_told"], *found["stable"]]
    for sentence in [*told, *found["verdicts"], *found["calibration"]]:
        assert json.dumps(sentence)[1:-1] in text or json.dumps(sentence, ensure_ascii=False)[1:-1] in text


def test_every_probe_of_the_page_is_what_the_rule_chooses(page):
    tried = pd.DataFrame(page[1]["tried"])
    for row in page[1]["fitted"]:
        if row["representation"] != "caps":
            assert (row["standardised"], row["strength"]) == probes.choose(tried, row["representation"])


def test_the_csv_of_the_published_page_holds_the_same_numbers(page):
    profile, found, _ = page
    folder = publish.path_of(f"{profile}/11_shift").parent / "data" / "11_shift"
    measured = pd.read_csv(folder / "measured.csv")
    at = measured.set_index(["representation", "set", "metric", "scaled"])["value"]
    over = shift.places(list(dict.fromkeys(measured["set"])))
    for row in found["compared"]:
        if row["place"] == shift.LOSS:
            continue
        own, cls = (
            np.mean([at[r, s, row["metric"], row["scaled"]] for s in over[row["place"]]])
            for r in (row["representation"], row["other"])
        )
        assert (own, cls) == pytest.approx((row["own"], row["than"]), abs=1e-5)
    assert set(found["sets"]) == set(measured["set"]) - {"clean"} and len(found["sets"]) == 20
    inside = (measured["lo"] <= measured["value"] + 1e-5) & (measured["value"] <= measured["hi"] + 1e-5)
    assert inside.all(), "every interval holds its estimate"
    rises = pd.read_csv(folder / "rises.csv")
    alarms = pd.DataFrame(found["alarms"]).set_index(["method", "set", "group"])["value"]
    for row in rises.itertuples():
        mean = np.mean([alarms[row.method, name, row.group] for name in found["sets"]])
        assert (row.clean, row.value) == pytest.approx(
            (alarms[row.method, "clean", row.group], mean - row.clean), abs=1e-5
        )
