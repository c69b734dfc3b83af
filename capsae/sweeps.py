"""Tidy data of the ablations: one setting, and sweeps over settings, for :func:`capsae.figures.ablation`."""

from __future__ import annotations

import pandas as pd

from .tidy import METRIC_PANELS


def one_setting(means: pd.DataFrame) -> pd.DataFrame:
    """Means of one run for :func:`figures.ablation`: a panel a metric, near, far and all along the axis."""
    means = means.sort_values("metric", key=lambda names: names.map(list(METRIC_PANELS).index), kind="stable")
    data = means.assign(panel=means["metric"].map(METRIC_PANELS), setting=means["group"], series=means["title"])
    return data.assign(chosen=False)[["panel", "setting", "series", "value", "lo", "hi", "chosen"]]


def sweep_panels(data: pd.DataFrame, metric: str | None = None) -> pd.DataFrame:
    """Runs for :func:`figures.ablation`: one sweep with a panel a metric, or one metric with a panel a sweep."""
    data = data[data["group"] == "all"]
    if metric is not None:
        data = data[(data["metric"] == metric) & ~data["method"].isin(["code_l1", "code_entropy"])]
        data = data.assign(panel=data["sweep"])
    else:
        data = data.assign(panel=data["metric"].map(METRIC_PANELS))
        data = data.sort_values("metric", key=lambda names: names.map(list(METRIC_PANELS).index), kind="stable")
    return data[["panel", "setting", "series", "value", "lo", "hi", "chosen"]]


def sweep_wide(data: pd.DataFrame) -> pd.DataFrame:
    """One row a run: setting, held-out FVU, means over all OOD sets in % by detector and metric, and the run's page."""
    names = {"fpr95_ood_pos": "FPR95 OOD-pos., %", "auroc": "AUROC, %"}
    data = data[(data["group"] == "all") & data["metric"].isin(names)]
    wide = data.assign(column=data["series"] + ", " + data["metric"].map(names), value=100 * data["value"])
    wide["undefined, %"] = 100 * data["undefined"]
    keys = ["sweep", "setting", "FVU", "undefined, %", "page"]
    cells = wide.rename(columns={"fvu": "FVU"}).pivot_table(index=keys, columns="column", values="value", sort=False)
    columns = [f"{series}, {name}" for name in names.values() for series in dict.fromkeys(data["series"])]
    found = cells.reset_index()[[*keys, *columns]]
    return found if found["sweep"].nunique() > 1 else found.drop(columns="sweep")
