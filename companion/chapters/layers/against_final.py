"""The tidy table of all sites, and every site tested against the network's end."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from capsae import metrics
from capsae.metrics import HIGHER_IS_BETTER, Thresholds
from capsae.stats import (
    FPR95,
    bootstrap,
    bootstrap_p,
    delong_difference,
    exact_interval,
    interval,
    placements,
    verdicts,
)

from .sites import FINAL

N_BOOT = 2000
METRICS = ("auroc", *FPR95)


def table_of(measured: Mapping[str, tuple[pd.DataFrame, dict]], n_boot: int = N_BOOT, seed: int = 0):
    """The tidy table of all sites, and every site tested against the network's end; draws are the same for all.

    Returns
    -------
    table : DataFrame
        site, seed, method ("site" for what is measured of SAE, profiles and probe), set, group, metric, value, lo, hi.
        Intervals: bootstrap over ID and OOD samples, DeLong's for AUROC, exact for accuracies; none where only the
        seeds speak.
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
    ood = [where for where in next(iter(scores.values())) if where != "test"]
    placed = {key: {where: placements(of["test"], of[where]) for where in ood} for key, of in scores.items()}
    value, draws = _fpr95(scores, ood, n_boot, seed)
    over = {group: [where for where in ood if where.startswith(f"{group}/")] for group in ("near", "far")}
    cells = [(w, w.split("/")[0], [w]) for w in ood] + [("mean", g, s) for g, s in {**over, "all": ood}.items() if s]
    against = []
    for key in scores:
        site, method, of_seed = key
        end = (FINAL, method, of_seed)
        for where, group, sets in cells:
            about = {"site": site, "seed": of_seed, "method": method, "group": group}
            tested = where == "mean" and site != FINAL
            nothing = [(np.zeros_like(a), np.zeros_like(b)) for a, b in (placed[key][w] for w in sets)]
            own = delong_difference([placed[key][w] for w in sets], nothing)
            own = [float(np.clip(own[name], 0, 1)) for name in ("value", "lo", "hi")]
            rows.append((site, of_seed, method, where, group, "auroc", *own))
            if tested:
                cell = delong_difference([placed[key][w] for w in sets], [placed[end][w] for w in sets])
                against.append(about | {"metric": "auroc"} | cell)
            for metric in FPR95:
                lo, hi = interval(np.mean([draws[metric][w][key] for w in sets], axis=0))
                if lo == hi:  # as evaluate does: no replicate saw what few samples cannot show
                    n = {w: len(scores[key]["test" if metric == "fpr95_ood_pos" else w]) for w in sets}
                    lo, hi = np.mean([exact_interval(value[metric][w][key], n[w]) for w in sets], axis=0)
                mean = np.mean([value[metric][w][key] for w in sets])
                rows.append((site, of_seed, method, where, group, metric, mean, lo, hi))
                if tested:
                    of = np.mean([draws[metric][w][key] - draws[metric][w][end] for w in sets], axis=0)
                    mean = np.mean([value[metric][w][key] - value[metric][w][end] for w in sets])
                    cell = dict(zip(("value", "lo", "hi", "p"), (mean, *interval(of), bootstrap_p(of)), strict=True))
                    against.append(about | {"metric": metric} | cell)
    table = pd.DataFrame(rows, columns=["site", "seed", "method", "set", "group", "metric", "value", "lo", "hi"])
    return table, _judged(pd.DataFrame(against), n_boot)


def _fpr95(scores: Mapping, ood: list[str], n_boot: int, seed: int):
    """Values and replicates of both FPR95: metric -> set -> (site, method, seed) -> float, (n_boot,)."""
    value, draws = ({metric: {} for metric in FPR95} for _ in range(2))
    for stream, where in enumerate(ood):
        thresholds = {key: Thresholds.of(of["test"], of[where]) for key, of in scores.items()}
        found = bootstrap(thresholds, n_boot, seed, stream, FPR95)
        for metric in FPR95:
            exact = getattr(metrics, metric)
            draws[metric][where] = {key: of[metric].astype(np.float32) for key, of in found.items()}
            value[metric][where] = {key: exact(of["test"], of[where]) for key, of in scores.items()}
    return value, draws


def _judged(against: pd.DataFrame, n_boot: int) -> pd.DataFrame:
    """Holm over the sites, and the verdict on each."""
    gain = against["value"] * np.where(against["metric"].map(HIGHER_IS_BETTER), 1, -1)
    found = verdicts(gain, against["p"], [against[key] for key in ("seed", "method", "group", "metric")])
    at_most = (against["metric"] != "auroc") & (against["p"] <= 2 / (1 + n_boot))
    return against.assign(p_holm=found["p_holm"], p_at_most=at_most, verdict=found["verdict"])
