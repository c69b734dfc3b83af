"""The tidy table of all sites, and every site tested against the network's end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from capsae.metrics import HIGHER_IS_BETTER, Thresholds
from capsae.stats import FPR95, bootstrap, bootstrap_p, delong_difference, exact_interval, holm, interval, placements

from .sites import FINAL

N_BOOT = 2000
METRICS = ("auroc", *FPR95)


def table_of(measured: Mapping[str, tuple[pd.DataFrame, dict]], n_boot: int = N_BOOT, seed: int = 0):
    """The tidy table of all sites, and every site tested against the network's end.

    Parameters
    ----------
    measured : {site: what :func:`measure_site` gives}; ``final/cls`` must be among them
    n_boot : replicates, the same draws for all sites, methods and seeds
    seed : of the bootstrap

    Returns
    -------
    table : DataFrame
        site, seed, method ("site" for what is measured of SAE, profiles and probe), set, group, metric, value, lo, hi.
        Intervals: bootstrap over ID and OOD rows, DeLong's for AUROC, exact for accuracies; none where only the seeds
        speak.
    against : DataFrame
        site, seed, method, group, metric, value (of the site less that of ``final/cls``, means over the group's sets),
        lo, hi, p, p_holm (over all sites, within a seed, method, group and metric), p_at_most, verdict on the site.
    """
    if FINAL not in measured:
        raise ValueError(f"measured holds {', '.join(measured)}: {FINAL} is needed, all sites are tested against it")
    rows = []
    for site, (found, _) in measured.items():
        for row in found.itertuples():
            lo, hi = exact_interval(row.value, row.n) if row.n else (np.nan,) * 2
            rows.append((site, row.seed, "site", "", "id", row.metric, row.value, lo, hi))
    scores = {(site, *key): of for site, (_, found) in measured.items() for key, of in found.items()}
    ood = [where for where in next(iter(scores.values())) if "/" in where]
    placed = {key: {where: placements(of["test"], of[where]) for where in ood} for key, of in scores.items()}
    value, draws = _fpr95(scores, ood, n_boot, seed)
    over = {"near": [w for w in ood if w.startswith("near/")], "far": [w for w in ood if w.startswith("far/")]}
    cells = [(w, w.split("/")[0], [w]) for w in ood] + [("mean", g, s) for g, s in {**over, "all": ood}.items() if s]
    against = []
    for key in scores:
        site, method, of_seed = key
        for where, group, sets in cells:
            nothing = [(np.zeros_like(a), np.zeros_like(b)) for a, b in (placed[key][w] for w in sets)]
            auroc = delong_difference([placed[key][w] for w in sets], nothing)
            rows.append((site, of_seed, method, where, group, "auroc",
                         *(float(np.clip(auroc[name], 0, 1)) for name in ("value", "lo", "hi"))))  # fmt: skip
            for metric in FPR95:
                of = np.mean([draws[metric][w][key] for w in sets], axis=0)
                mean = np.mean([value[metric][w][key] for w in sets])
                lo, hi = interval(of)
                if lo == hi:  # as evaluate does: no replicate saw what few samples cannot show
                    n = {w: len(scores[key]["test" if metric == "fpr95_ood_pos" else w]) for w in sets}
                    lo, hi = np.mean([exact_interval(value[metric][w][key], n[w]) for w in sets], axis=0)
                rows.append((site, of_seed, method, where, group, metric, mean, lo, hi))
            if where == "mean" and site != FINAL:
                against += _differences(key, group, sets, placed, value, draws)
    table = pd.DataFrame(rows, columns=["site", "seed", "method", "set", "group", "metric", "value", "lo", "hi"])
    return table, _judged(pd.DataFrame(against), n_boot)


def _fpr95(scores: Mapping, ood: Sequence[str], n_boot: int, seed: int):
    """Values and replicates of both FPR95: metric -> set -> (site, method, seed) -> float, (n_boot,)."""
    value, draws = ({metric: {} for metric in FPR95} for _ in range(2))
    for stream, where in enumerate(ood):
        thresholds = {key: Thresholds.of(of["test"], of[where]) for key, of in scores.items()}
        found = bootstrap(thresholds, n_boot, seed, stream, FPR95)
        for metric in FPR95:
            draws[metric][where] = {key: of[metric].astype(np.float32) for key, of in found.items()}
            value[metric][where] = {key: _exact(metric, of, where) for key, of in scores.items()}
    return value, draws


def _exact(metric: str, of: Mapping, where: str) -> float:
    from capsae import metrics

    return getattr(metrics, metric)(of["test"], of[where])


def _differences(key, group, sets, placed, value, draws) -> list[dict]:
    site, method, seed = key
    end = (FINAL, method, seed)
    rows = []
    for metric in METRICS:
        if metric == "auroc":
            cell = delong_difference([placed[key][w] for w in sets], [placed[end][w] for w in sets])
        else:
            of = np.mean([draws[metric][w][key] - draws[metric][w][end] for w in sets], axis=0)
            mean = np.mean([value[metric][w][key] - value[metric][w][end] for w in sets])
            lo, hi = interval(of)
            cell = {"value": mean, "lo": lo, "hi": hi, "p": bootstrap_p(of)}
        rows.append({"site": site, "seed": seed, "method": method, "group": group, "metric": metric} | cell)
    return rows


def _judged(against: pd.DataFrame, n_boot: int) -> pd.DataFrame:
    """Holm over the sites, and the verdict on each, as :func:`capsae.evaluation.evaluate.compare` gives them."""
    family = against.groupby(["seed", "method", "group", "metric"], sort=False)["p"]
    against = against.assign(p_holm=family.transform(holm))
    against["p_at_most"] = (against["metric"] != "auroc") & (against["p"] <= 2 / (1 + n_boot))
    good = against["value"] * np.where(against["metric"].map(HIGHER_IS_BETTER), 1, -1) > 0
    against["verdict"] = np.where(against["p_holm"] < 0.05, np.where(good, "better", "worse"), "undecided")
    return against
