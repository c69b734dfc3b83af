"""Recorded numbers and tables of the results chapter are held against the data they are made from."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from capsae.metrics import HIGHER_IS_BETTER, METRICS
from companion.figures import comparison_figures, comparisons, display
from companion.findings import of_page
from companion.publish import plan, publish

SETS = [f"far/{i}" for i in range(7)]


def _row(verdict, value, metric="fpr95_ood_pos", other="msp", where="mean", p=0.004, method="epd"):
    reach = 0.01
    cells = {"value": value, "lo": value - reach, "hi": value + reach, "p": p, "p_holm": p, "verdict": verdict}
    return {"method": method, "other": other, "metric": metric, "set": where} | cells


@pytest.fixture
def compared():
    rows = [_row("better", -0.3, other="msp"), _row("undecided", 0.0, other="knn"), _row("worse", 0.2, other="vim")]
    rows += [_row("better", -0.3, other="knn", where=where) for where in SETS[:5]]
    rows += [_row("worse", 0.3, other="knn", where=where) for where in SETS[5:]]
    rows += [_row("worse", -0.1, "auroc", other="msp"), _row("better", -0.1, method="rpd", other="epd")]
    return pd.DataFrame(rows)


def test_forest_and_wins(compared):
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


def test_ranks_say_what_they_are_worth():
    found = comparisons.ranks(_table(comparisons.RANKED, SETS))
    assert found["ranks"].tolist() == list(range(1, 10)) and found["sets"] == 7
    shown = comparisons.rank_table(found)
    assert shown["method"].tolist()[:1] == ["EPD"] and shown["mean rank"].tolist() == list(range(1, 10))
    assert shown["differs from the best"].tolist()[0] == "" and shown["differs from the best"].tolist()[-1] == "yes"
    assert shown["note"].str.contains("only 7 OOD sets").all()
    one = comparisons.rank_table(comparisons.ranks(_table(comparisons.RANKED, ["near/a"])))
    assert one["note"].str.contains("ranks over sets mean nothing").all() and (one["differs from the best"] == "").all()


def test_pixel_wins_in_both_directions_and_without_pixels():
    fine = comparisons.pixel_wins(_table(["epd", "knn", "sharpness"], SETS))
    assert not fine["broken"].any() and set(fine["metric"]) == set(comparisons.METRIC_PANELS)
    table = _table(["brightness", "epd"], SETS)
    broken = comparisons.pixel_wins(table)
    assert broken["broken"].all() and (broken["control"] == "brightness").all()
    shown = comparisons.pixels_shown(table)
    assert {"mean of all", "mean of far", "far/0"} <= set(shown["set"]) and set(shown["best score"]) == {"EPD"}
    assert (shown["broken"] == "yes").all() and len(shown) == len(SETS) + 2
    assert comparisons.pixel_wins(_table(["epd", "knn"], SETS)).empty
    assert comparisons.pixels_shown(_table(["epd", "knn"], SETS)).empty


def _compared(table, pairs):
    """The comparison that the means of a table give, all p 0.01."""
    means = table[(table["set"] == "mean") & (table["group"] == "all")].set_index(["method", "metric"])["value"]
    rows = []
    for a, b in pairs:
        for metric in comparisons.METRIC_PANELS:
            value = means[a, metric] - means[b, metric]
            verdict = "better" if (value > 0) == HIGHER_IS_BETTER[metric] else "worse"
            rows.append(_row(verdict, value, metric, b, method=a))
    return pd.DataFrame(rows)


def test_what_the_page_records_is_its_table():
    names = ["mds++", "epd", "mds", "rpd", "cosine", "msp", "brightness"]
    table = _table(names, SETS)
    pairs = comparisons.pairs(table)
    assert ("epd", "mds++") in pairs and ("rpd", "epd") in pairs and not any("brightness" in pair for pair in pairs)
    assert not any(a == b for a, b in pairs)
    numbers = comparisons.recorded(table, _compared(table, pairs))
    cell = table[(table["method"] == "epd") & (table["set"] == "mean") & (table["group"] == "all")]
    cell = cell.set_index("metric").loc["auroc"]
    assert numbers["epd_auroc"].value == pytest.approx(100 * cell["value"], abs=0.06)
    assert numbers["epd_less_mdspp_auroc"].value < 0 < numbers["epd_less_mds_auroc"].value
    assert numbers["epd_less_msp_auroc"].p == 0.004 and numbers["accuracy"].value == 90
    assert (numbers["epd_rank"].value, numbers["rpd_rank"].value, numbers["detectors"].value) == (2, 4, 6)
    assert numbers["epd_better_than_baselines"].value == 2 and numbers["epd_worse_than_baselines"].value == 1
    assert numbers["pixel_wins"].value == 0
    shown = comparisons.shown(_compared(table, pairs))
    assert shown["method"].tolist() == ["EPD"] * 3 + ["RPD (ours)"] * 4, "the named ones alone"
    assert shown.iloc[0]["less"] == "MDS++" and "p = 0.004" in shown.iloc[0]["AUROC"]


def test_dots_ties_and_reliability():
    table = _table(["epd", "rpd", "msp"], SETS).assign(seeds=lambda t: np.where(t["method"] == "msp", 1, 3))
    rows = [(m, metric, seed, 0.1 * seed + shift) for seed in range(3) for m, shift in (("epd", 0.2), ("rpd", 0.1))
            for metric in comparisons.METRIC_PANELS]  # fmt: skip
    rows += [("msp", metric, 0, 0.3) for metric in comparisons.METRIC_PANELS]
    dots = comparisons.seed_dots(pd.DataFrame(rows, columns=["method", "metric", "seed", "value"]), table)
    assert dots["title"].tolist() == ["EPD"] * 3 + ["RPD (ours)"] * 3, "best mean of the table first, one seed left out"
    assert dots["value"].tolist()[:3] == pytest.approx([20, 30, 40])
    mean = table[(table["method"] == "epd") & (table["set"] == "mean") & (table["group"] == "all")]
    assert dots["mean"][0] == pytest.approx(100 * mean.set_index("metric").loc[comparisons.HEADLINE, "value"])
    rows = []
    for where in ("val", "test", *SETS):
        for i in range(1, 11):
            group, sign = ("far", 1) if "/" in where else ("id", -1)
            rows += [("epd", where, group, i, float(i // 2)), ("rpd", where, group, i, float(i * sign))]
    scores = pd.DataFrame(rows, columns=["method", "set", "group", "row", "score"])
    rates = comparisons.tie_rates(scores)
    assert rates["epd"] == 1 and rates["rpd"] == 0
    shown = comparisons.reliability(table, scores)
    assert shown["method"].tolist()[:2] == ["EPD", "RPD (ours)"] and shown["tie rate"].tolist()[:2] == [100, 0]
    assert shown["AURC of ID errors, ‰"].iloc[0] == pytest.approx(100)


def test_figures_are_drawn_in_both_themes(compared):
    grid = pd.DataFrame(
        {"label": ["EPD", "EPD", "KNN"], "setting": ["p=1", "p=2", "k=1"], "criterion": [10.0, 12.0, np.nan],
         "default": [True, False, True], "chosen": [False, True, True]}
    )  # fmt: skip
    curves = pd.DataFrame({"method": ["EPD", "EPD"], "coverage": [0.5, 1.0], "risk": [0.0, 0.1]})
    seeds = {"seed": [0, 1], "value": [1.0, 2.0], "mean": 1.5, "lo": 1.0, "hi": 2.0, "title": "EPD"}
    for function, data, options in [
        (comparison_figures.forest, comparisons.forest(compared, "epd"), {}),
        (comparison_figures.seeds, pd.DataFrame(seeds), {}),
        (comparison_figures.seeds, pd.concat([pd.DataFrame(seeds).assign(panel=p) for p in "abc"]), {}),
        (comparison_figures.risk_coverage, curves, {}),
        (comparison_figures.tuning_grid, grid, {}),
    ]:
        with display.style():
            figure = function(data, **options)
            assert len(display.render_svg(figure, "figure")) > 1000
            assert all(ax.get_xlabel() for ax in figure.axes if ax.get_visible())


@pytest.mark.parametrize("experiment", plan.BOOK_EXPERIMENTS)
def test_a_published_page_records_the_numbers_of_its_tables(experiment):
    """The CSV of the differences holds every comparison: what is recorded for findings and claims is its rounding."""
    page = f"{experiment}/04_score_ood"
    recorded, data = of_page(page), publish.path_of(page).parent / "data" / "04_score_ood"
    if not recorded:
        pytest.skip("this page was executed before it recorded numbers")
    compared = pd.read_csv(data / "differences.csv")
    rows = compared[(compared["set"] == "mean") & (compared["metric"] == comparisons.HEADLINE)]
    for row in rows.to_dict("records"):
        key = "_".join(map(comparisons.number_name, (row["method"], "less", row["other"], row["metric"])))
        assert recorded[key].value == pytest.approx(100 * row["value"], abs=0.06), key
        clear = row["p_holm"] < 0.05
        assert row["verdict"] == (("better" if row["value"] < 0 else "worse") if clear else "undecided")
    rows = pd.read_csv(data / "pixels.csv")
    assert ("pixel_wins" in recorded) == bool(len(rows))
    if len(rows):
        assert recorded["pixel_wins"].value == rows["broken"].sum()


def test_what_the_page_on_tuning_records():
    from types import SimpleNamespace

    rows = [
        _row("better", -0.02, method="knn tuned", other="knn"),
        _row("worse", 0.03, method="vim tuned", other="vim"),
    ]
    rows += [_row("undecided", 0.1, method="vim tuned", other="vim", where="far/0")]
    rows += [_row("worse", 0.1, method="epd", other="knn tuned"), _row("better", -0.2, method="epd", other="rpd tuned")]
    compared = pd.DataFrame(rows)
    grids = {
        name: SimpleNamespace(table=pd.DataFrame({"method": name, "setting": ["a", "b"], "criterion": [0.2, 0.1],
                              "default": [True, False], "chosen": [False, True], "refused": ""}))
        for name in ("knn", "vim", "dice")
    }  # fmt: skip
    left_out = pd.DataFrame(
        {"method": ["knn", "vim"], "default": [0.5, 0.5], "value": [0.4, 0.45], "peeking": [0.3, 0.4]}
    )
    numbers = comparisons.recorded_of_tuning(compared, grids, left_out)
    counts = {name: numbers[name].value for name in ("helped", "hurt", "undecided", "detectors", "default_kept")}
    assert counts == {"helped": 1, "hurt": 1, "undecided": 0, "detectors": 3, "default_kept": 1}
    assert numbers["knn_tuned_fpr95_ood_pos"].value == -2
    assert (numbers["gain_of_peeking"].value, numbers["gain_of_other_sets"].value) == (15, 7.5)
    assert "gain_of_peeking" not in comparisons.recorded_of_tuning(compared, grids, pd.DataFrame())
    grid = comparisons.tuning_grid(grids)
    shown = comparisons.tuned_shown(compared, grid)
    assert shown["method"].tolist() == ["KNN", "ViM"] and shown["chosen"].tolist() == ["b", "b"]
    assert comparisons.grid_shown(grid)["chosen"].tolist() == ["", "yes"] * 3
    against = comparisons.against_tuned(compared)
    assert against[["method", "less", "points"]].to_numpy().tolist() == [["EPD", "KNN tuned", 10]]
    assert comparisons.left_out_shown(left_out)["peeking at each set"].tolist() == [30, 40]


@pytest.mark.parametrize("experiment", plan.TUNED)
def test_a_published_page_on_tuning_records_its_table(experiment):
    page = f"{experiment}/07_tuning"
    recorded = of_page(page)
    if not recorded:
        pytest.skip("this page was executed before it recorded numbers")
    data = publish.path_of(page).parent / "data" / "07_tuning"
    gap = pd.read_csv(data / "gap.csv")
    gap = gap[
        (gap["method"] == gap["other"] + " tuned") & (gap["set"] == "mean") & (gap["metric"] == comparisons.HEADLINE)
    ]
    verdict = np.where(gap["p_holm"] < 0.05, np.where(gap["value"] < 0, "better", "worse"), "undecided")
    assert (recorded["helped"].value, recorded["hurt"].value) == (
        (verdict == "better").sum(),
        (verdict == "worse").sum(),
    )
    if "gain_of_peeking" in recorded:
        rows = pd.read_csv(data / "left_out.csv")
        assert (rows["peeking"] <= rows[["value", "default"]].min(axis=1) + 1e-6).all()
