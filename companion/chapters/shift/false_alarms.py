"""False alarms under covariate shift: how often detectors flag known classes, at a threshold set on clean rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from capsae.detectors import OURS, Observations
from capsae.features.featureset import FeatureSet
from capsae.stats import bootstrap_p, exact_interval, holm, interval

from .maths import CLEAN, N_BOOT, clean, draw, parts

ALARMS = ("epd", OURS, "msp", "energy", "knn", "mds++")


def alarms(
    run, shifted: Mapping[str, FeatureSet], methods: Sequence[str] = ALARMS, n_boot: int = N_BOOT
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Share of ID images that a detector flags at the threshold that keeps 95 % of the clean ID validation rows.

    Returns
    -------
    shares : DataFrame
        method, title, set, corruption, strength, group, n, value, lo, hi; ``group`` is "all", "correct": images that
        the head still classifies correctly, where a flag helps nobody, or "ood": the experiment's OOD sets, where it
        should flag. Intervals are Clopper and Pearson's, of one set.
    rises : DataFrame
        method, title, group ("all", "correct"), clean, mean (of the shifted sets), value (mean less clean), lo, hi, p,
        p_holm (over all rows), p_at_most: a paired bootstrap over images, at the threshold as it is.
    """
    from capsae.detectors import info

    rows, rises = [], []
    detectors = run.detectors(methods)
    given = {CLEAN: clean(run, shifted), **shifted}
    weights = draw({name: features.ids for name, features in given.items()}, n_boot, run.experiment.seed)
    seen = {
        name: Observations(f.cls, labels=f.labels, head=run.head, sae=run.sae, pixels=f.pixels)
        for name, f in given.items()
    }
    unknown = {name: run.observations(name) for name in run.experiment.ood_sets}
    for method in methods:
        threshold, title = run.threshold(method), info(method)["title"]
        found: dict[str, dict] = {"all": {}, "correct": {}}
        for name, obs in (seen | unknown).items():
            flagged = detectors[method].score(obs) > threshold
            every = np.ones(len(obs), bool)
            groups = {"ood": every} if name in unknown else {"all": every, "correct": obs.predicted == obs.labels}
            corruption, strength = (CLEAN, 0) if name == CLEAN else parts(name)
            for group, chosen in groups.items():
                share = float(flagged[chosen].mean()) if chosen.any() else np.nan
                cell = (share, *exact_interval(share, int(chosen.sum())))
                rows.append((method, title, name, corruption, strength, group, int(chosen.sum()), *cell))
                if group in found:
                    w = weights[name] @ np.stack([flagged & chosen, chosen], axis=1).astype(np.float32)
                    found[group][name] = (share, w[:, 0] / np.maximum(w[:, 1], 1))
        for group, of in found.items():
            before, drawn = of.pop(CLEAN)
            # A set in which no image is of the group (none classified correctly) has no share, and takes no part.
            defined = [(share, d) for share, d in of.values() if not np.isnan(share)]
            mean = float(np.mean([share for share, _ in defined])) if defined else np.nan
            draws = np.mean([d for _, d in defined], axis=0) - drawn if defined else np.full(n_boot, np.nan)
            p = bootstrap_p(draws)
            cell = (mean - before, *interval(draws), p, p <= 2 / (1 + n_boot))
            rises.append((method, title, group, before, mean, *cell))
    columns = ["method", "title", "set", "corruption", "strength", "group", "n", "value", "lo", "hi"]
    rises = pd.DataFrame(
        rises, columns=["method", "title", "group", "clean", "mean", "value", "lo", "hi", "p", "p_at_most"]
    )
    return pd.DataFrame(rows, columns=columns), rises.assign(p_holm=holm(rises["p"]))
