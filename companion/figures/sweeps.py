"""Tidy data of the ablations: one setting, and sweeps over settings, for :func:`companion.figures.figures.ablation`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from capsae.detectors import info

from .tidy import METRIC_PANELS, fvu_of_seeds, records


def means(table: pd.DataFrame) -> pd.DataFrame:
    """The means over sets of an evaluation in the three metrics shown, with titles."""
    rows = table[(table["set"] == "mean") & table["metric"].isin(METRIC_PANELS)]
    rows = rows[rows["group"].isin(["near", "far", "all"])]
    return rows.assign(title=[info(name)["title"] for name in rows["method"]])


def dictionary(run) -> pd.DataFrame:
    """What stands behind one setting. Columns: item, value. FVU is the mean over seeds, all else of the first seed."""
    caps, fraction, epd = run.caps, run.experiment.caps.core_fraction, run.detectors(["epd"])["epd"]
    values = {"latents D": run.experiment.sae.latents, "active latents k": run.experiment.sae.k}
    values |= {f"FVU, {row['set']}": row["value"] for row in fvu_of_seeds(run).to_dict("records")}
    values |= {"epoch kept": int(run.history.attrs["best_epoch"]), "epochs": run.experiment.sae.epochs}
    overlap = (caps.jaccard(0.05).sum() - caps.n_classes) / max(caps.n_classes * (caps.n_classes - 1), 1)
    values |= {"latents of a core": caps.core_size(fraction), "Jaccard index of two cores, top 5 %": overlap}
    undefined = {name: epd.degenerate(run.observations(name)).mean() for name in ("test", *run.experiment.ood_sets)}
    values["EPD undefined, ID test"] = undefined.pop("test")
    values["EPD undefined, mean of the OOD sets"] = sum(undefined.values()) / len(undefined)
    return pd.DataFrame({"item": list(values), "value": [float(value) for value in values.values()]})


def recorded(method: str, divergence: str | None, changed: Mapping, means: pd.DataFrame, dictionary: pd.DataFrame):
    """What one setting records for the sweeps (JSON)."""
    about: dict[str, Any] = dictionary.set_index("item")["value"].to_dict()
    rows = records(means[["method", "title", "group", "metric", "value", "lo", "hi"]])
    found = {
        "fvu": about["FVU, val"],
        "undefined_id": about["EPD undefined, ID test"],
        "best_epoch": about["epoch kept"],
    }
    return {"method": method, "divergence": divergence or "kl", "changed": dict(changed), "metrics": rows} | found


def ranges(data: pd.DataFrame, metric: str = "fpr95_ood_pos") -> pd.DataFrame:
    """From which setting to which the mean of EPD runs in each sweep, in %, beside the experiment's own setting."""
    rows = data[(data["group"] == "all") & (data["metric"] == metric) & data["series"].str.startswith("EPD")]
    found = []
    for name, part in rows.groupby("sweep", sort=False):
        places = {"own": part[part["chosen"]].iloc[0]}
        places |= {"least": part.loc[part["value"].idxmin()], "largest": part.loc[part["value"].idxmax()]}
        cells = {word: at["setting"] for word, at in places.items()}
        found.append({"sweep": name} | cells | {f"{word}, %": 100 * at["value"] for word, at in places.items()})
    return pd.DataFrame(found)


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
