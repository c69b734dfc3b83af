"""Sentences and tables of the results chapter are held against the numbers they are made from."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from capsae import comparison_figures, comparisons, display, plan, publish
from capsae.metrics import METRICS

SETS = [f"far/{i}" for i in range(7)]


def _row(verdict, value, metric="fpr95_ood_pos", other="msp", where="mean", p=0.004, method="epd"):
    reach = 0.01
    cells = {"value": value, "lo": value - reach, "hi": value + reach, "p": p, "p_holm": p, "verdict": verdict}
    return {"method": method, "other": other, "metric": metric, "set": where} | cells


def test_a_verdict_says_what_its_row_says():
    better = comparisons.verdict(_row("better", -0.02), "digits")
    assert better == (
        "EPD is better than MSP on digits: difference in mean FPR95 (OOD positive) -2.0 points "
        "(-3.0 to -1.0 uncorrected), p = 0.004 (Holm)."
    )
    assert comparisons.verdict(_row("worse", 0.02), "x").startswith("EPD is not better than MSP on x, it is worse:")
    undecided = comparisons.verdict(_row("undecided", 0.001, "auroc", where="near/a", p=1e-5), "x")
    assert undecided.startswith("EPD is not better than MSP on x, nor clearly worse: difference in AUROC +0.1")
    assert "p < 0.001" in undecided
    assert "p ≤ 0.004 (Holm)" in comparisons.verdict(_row("better", -0.02) | {"p_at_most": True}, "x")
    tuned = comparisons.tuned_text(_row("worse", 0.02, method="epd tuned", other="epd"), "x")
    assert tuned.startswith("Tuning hurts EPD on x: mean FPR95 (OOD positive) +2.0 points")


@pytest.fixture
def compared():
    rows = [_row("better", -0.3, other="msp"), _row("undecided", 0.0, other="knn"), _row("worse", 0.2, other="vim")]
    rows += [_row("better", -0.3, other="knn", where=where) for where in SETS[:5]]
    rows += [_row("worse", 0.3, other="knn", where=where) for where in SETS[5:]]
    rows += [_row("worse", -0.1, "auroc", other="msp"), _row("better", -0.1, method="rpd", other="epd")]
    return pd.DataFrame(rows)


def test_tally_forest_and_wins(compared):
    told = comparisons.tally(compared, "epd", "digits")
    assert "EPD is better than 1 of the 3 baselines, worse than 1, and 1 comparisons are undecided" in told
    assert comparisons.forest(compared, "epd")["label"].tolist() == ["MSP", "KNN", "ViM"]
    assert comparisons.of_means(compared, "epd", "auroc")["other"].tolist() == ["msp"]
    counted = comparisons.wins(compared, "epd", ["knn"])
    assert counted.to_numpy().tolist() == [["KNN", 5, 0, 2]]
    with pytest.raises(ValueError, match="no means of 'knn'"):
        comparisons.of_means(compared, "knn")


def _table(methods, sets, seed=0):
    """An evaluation in which the methods are good in the order given."""
    rng, rows = np.random.default_rng(seed), []
    for i, method in enumerate(methods):
        values = {where: 0.1 * (i + 1) + 0.01 * rng.random() for where in sets}
        for metric in (*METRICS, "oscr", "auroc_correct"):
            good_is_high = not metric.startswith("fpr") and metric != "autc"
            cells = {where: 1 - v if good_is_high else v for where, v in values.items()}
            rows += [(method, where, where.split("/")[0], metric, v, v, v) for where, v in cells.items()]
            for group in {where.split("/")[0] for where in sets} | {"all"}:
                mean = np.mean([v for where, v in cells.items() if group in ("all", where.split("/")[0])])
                rows.append((method, "mean", group, metric, mean, mean - 0.01, mean + 0.01))
        rows += [(method, "test", "id", metric, 0.1, 0.1, 0.1) for metric in ("aurc", "errors_flagged")]
    rows.append(("head", "test", "id", "accuracy", 0.9, 0.9, 0.9))
    return pd.DataFrame(rows, columns=["method", "set", "group", "metric", "value", "lo", "hi"])


def test_ranks_in_words():
    found = comparisons.ranks(_table(comparisons.RANKED, SETS))
    assert found["ranks"].tolist() == list(range(1, 9)) and found["sets"] == 7
    told = comparisons.ranks_text(found)
    assert "The best mean rank: EPD (1.0), the worst: MSP (8.0)" in told and "only 7 OOD sets" in told
    assert "leaves KNN, ViM, Energy, MSP behind" in told or "leaves ViM, Energy, MSP behind" in told
    one = comparisons.ranks_text(comparisons.ranks(_table(comparisons.RANKED, ["near/a"])))
    assert one.startswith("No ranking over sets is given: 1 OOD set for 8 methods")


def test_pixel_verdict_in_both_directions_and_without_pixels():
    fine = comparisons.pixel_verdict(_table(["epd", "knn", "sharpness"], SETS), "x")
    assert fine.startswith("No pixel control wins on x") and "Sharpness" in fine and "EPD" in fine
    broken = comparisons.pixel_verdict(_table(["brightness", "epd"], SETS), "x")
    assert broken.startswith("This benchmark is broken on x where a pixel control wins: far/0 (Brightness)")
    assert "the mean of all sets (Brightness)" in broken
    assert "could be tried" in comparisons.pixel_verdict(_table(["epd", "knn"], SETS), "x")


def test_seeds_ties_and_reliability():
    table = _table(["epd", "rpd"], SETS)
    rows = [(seed, m, metric, 0.1 * seed + shift) for seed in range(3) for m, shift in (("epd", 0.2), ("rpd", 0.1))
            for metric in comparisons.METRIC_PANELS]  # fmt: skip
    found = comparisons.seed_table(pd.DataFrame(rows, columns=["seed", "method", "metric", "value"]), table)
    first = found.iloc[0]
    assert first["method"] == "rpd" and first["seeds"] == 3
    assert first[["mean", "std", "least", "largest"]].tolist() == pytest.approx([20, 10, 10, 30])
    assert comparisons.seed_shown(found).iloc[0, 1] == "20.0 ± 10.0 (10.0–30.0)"
    rows = []
    for where in ("val", "test", *SETS):
        for i in range(1, 11):
            group, sign = ("far", 1) if "/" in where else ("id", -1)
            rows += [("epd", where, group, i, float(i // 2)), ("rpd", where, group, i, float(i * sign))]
    scores = pd.DataFrame(rows, columns=["method", "set", "group", "row", "score"])
    rates = comparisons.tie_rates(scores)
    assert rates["epd"] == 1 and rates["rpd"] == 0
    shown = comparisons.reliability(table, scores)
    assert shown["method"].tolist() == ["EPD", "RPD (ours)"] and shown["tie rate"].tolist() == [100, 0]
    assert shown["AURC of ID errors, ‰"].iloc[0] == pytest.approx(100)


def test_figures_are_drawn_in_both_themes(compared):
    grid = pd.DataFrame(
        {"label": ["EPD", "EPD", "KNN"], "setting": ["p=1", "p=2", "k=1"], "criterion": [10.0, 12.0, np.nan],
         "default": [True, False, True], "chosen": [False, True, True]}
    )  # fmt: skip
    curves = pd.DataFrame({"method": ["EPD", "EPD"], "coverage": [0.5, 1.0], "risk": [0.0, 0.1]})
    ranked = pd.DataFrame({"method": ["a", "b"], "rank": [1.0, 2.0]})
    for function, data, options in [
        (comparison_figures.forest, comparisons.forest(compared, "epd"), {}),
        (comparison_figures.mean_ranks, ranked, {"cd": 0.5}),
        (comparison_figures.risk_coverage, curves, {}),
        (comparison_figures.tuning_grid, grid, {}),
    ]:
        for theme in ("light", "dark"):
            with display.style(theme):
                figure = function(data, **options)
                assert figure.get_size_inches()[0] <= display.WIDE and len(display.render_png(figure)) > 1000
                assert all(ax.get_xlabel() for ax in figure.axes)


@pytest.mark.parametrize("profile", plan.BOOK_PROFILES)
def test_the_verdicts_of_a_published_page_hold_against_its_numbers(profile):
    page = f"{profile}/04_score_ood"
    found = publish.results(page)
    if "compared" not in found:
        pytest.skip("this page was executed before verdicts were recorded")
    rows = {(row["method"], row["other"]): row for row in found["compared"]}
    for row in rows.values():
        clear = row["p_holm"] < 0.05
        assert row["verdict"] == (("better" if row["value"] < 0 else "worse") if clear else "undecided")
    sentences = {comparisons.verdict(row, profile) for row in rows.values()}
    assert found["verdicts"] and set(found["verdicts"]) <= sentences
    text = publish.path_of(page).read_text(encoding="utf-8")
    assert all(sentence in text for sentence in [*found["verdicts"], *found["tallies"], found["pixels"]])
    table = pd.DataFrame(found["compared"])
    assert found["tallies"] == [comparisons.tally(table, method, profile) for method in ("epd", found["ours"])]


@pytest.mark.parametrize("profile", plan.BOOK_PROFILES)
def test_the_pixel_verdict_of_a_published_page_holds_against_its_table(profile):
    """The CSV of the heat map of all detectors holds every cell: where a pixel control leads, the page must say so."""
    from capsae.detectors.pixels import PIXEL_CONTROLS

    found, path = publish.results(f"{profile}/04_score_ood"), publish.path_of(f"{profile}/04_score_ood")
    data = path.parent / "data" / path.stem / "all_detectors_by_set.csv"
    if "pixels" not in found or not data.is_file():
        pytest.skip("this page was executed before pixel controls were judged")
    table = pd.read_csv(data)
    wins = False
    for metric, sign in (("auroc", 1), ("fpr95_ood_pos", -1), ("fpr95_id_pos", -1)):
        for _, rows in table[table["metric"] == metric].groupby(["set", "group"]):
            control = rows["name"].isin(PIXEL_CONTROLS)
            if control.any():
                wins |= (sign * rows["value"][control]).max() > (sign * rows["value"][~control]).max()
    told = found["pixels"]
    assert told.startswith("This benchmark is broken") == wins
    assert wins or told.startswith(("No pixel control wins", "The features of"))


@pytest.mark.parametrize("profile", plan.TUNED)
def test_what_a_published_page_says_of_tuning_holds_against_its_numbers(profile):
    page = f"{profile}/07_tuning"
    if not publish.path_of(page).is_file():
        pytest.skip("this page is not executed yet")
    found = publish.results(page)
    assert found["verdicts"] == [comparisons.tuned_text(row, profile) for row in found["gap"]]
    assert {row["other"] for row in found["gap"]} | {"epd"} <= set(found["frozen"])
    for row in found["gap"]:
        clear = row["p_holm"] < 0.05
        assert row["verdict"] == (("better" if row["value"] < 0 else "worse") if clear else "undecided")
    assert all(row["peeking"] <= min(row["value"], row["default"]) + 1e-12 for row in found["left_out"])
