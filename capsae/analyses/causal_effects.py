"""Causal check: what interventions do to logits, probabilities and predictions, and how surely.

See :mod:`capsae.analyses.causal` for the interventions. Intervals of a class run over its rows (Student's t), those of
a mean over classes over the classes (bootstrap).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

from ..caps import energy_profile_divergence
from ..metrics import auroc
from ..stats import holm, interval
from .causal import TITLES, Bench, deletions

LEVEL = 0.05
MATCHED = ("random_active", "outside", "other_core", "random_order")  # each at exactly the core's energy
MEASURES = ("logit", "others", "rms_others", "probability", "changed", "kept", "runner_up", "others_kept", "elsewhere",
            "efficiency", "energy", "latents", "shared", "unmatched")  # fmt: skip


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax (N, C)."""
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def t_test(values: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean of columns (n, ...), reach of its t interval, and two-sided p of "mean zero" by Student's t.

    Columns of equal values: p is 1 where they are zero, else 0. NaN rows are left out (all columns share them).
    """
    from scipy.special import stdtr, stdtrit

    if len(values):
        values = values[~np.isnan(values.reshape(len(values), -1)[:, 0])]
    n = len(values)
    if n < 2:
        mean = values.mean(0) if n else np.full(values.shape[1:], np.nan)
        return mean, np.full(values.shape[1:], np.nan), np.ones(values.shape[1:])
    mean, error = values.mean(0), values.std(0, ddof=1) / np.sqrt(n)
    flat = error <= 1e-12 * np.maximum(1e-12, np.abs(mean))
    with np.errstate(divide="ignore", invalid="ignore"):
        p = np.where(flat, np.abs(mean) <= 1e-12, 2 * stdtr(n - 1, -np.abs(mean / error)))
    return mean, stdtrit(n - 1, (1 + level) / 2) * error, p


def effect(bench: Bench, c: int, delta: np.ndarray, latents: np.ndarray, shared: np.ndarray) -> dict[str, float]:
    """What one intervention on class c (delta (N, d) of every row) does, on rows of the class and on all others.

    Returns
    -------
    dict
        On rows of the class: ``logit`` (mean change of its logit, with a 95 % t interval and ``p``), ``others`` (mean
        change of the other logits), ``rms_others``, ``largest_other`` (the largest fall of another logit's mean) and
        ``largest_class``, ``probability`` (mean change), ``kept`` (accuracy on these rows afterwards, over before),
        ``changed`` (share of rows with another prediction), ``to`` (class that takes most of them, -1: none),
        ``to_share`` and ``runner_up`` (share of them that go to what the head put second on x), ``latents`` (touched),
        ``shared`` (share of them that are of the class's core),
        ``energy`` (squared length of the change), ``efficiency`` (fall of the class's logit against the mean logit, as
        a share of what an equally long change could do at most).
        On rows of other classes: ``others_kept`` (accuracy, over before), ``elsewhere`` (mean change of logit c).
        Rows that a control could not match are left out: ``unmatched`` is their share.
    """
    fine = ~np.isnan(delta[:, 0])  # a row is NaN as a whole
    own, rest = (bench.labels == c) & fine, (bench.labels != c) & fine
    move = delta @ bench.weight.T
    after = bench.logits + move
    now, right = after.argmax(1), bench.predicted == bench.labels
    not_c = np.arange(bench.n_classes) != c
    if not own.any():  # nothing to say
        found = dict.fromkeys(("logit", "logit_lo", "logit_hi", *MEASURES, "largest_other", "to_share"), np.nan)
        return {"class": c, "rows": 0} | found | {"unmatched": 1.0, "p": 1.0, "largest_class": -1, "to": -1}
    mean, reach, p = t_test(move[own])
    gone = own & (now != bench.predicted)
    left = now[gone]
    to = int(np.bincount(left).argmax()) if len(left) else -1
    gain = probabilities(after[own])[:, c] - probabilities(bench.logits[own])[:, c]
    energy = (delta[own] ** 2).sum(1)
    most = np.sqrt(energy).sum() * np.linalg.norm(bench.weight[c] - bench.weight.mean(0))
    relative = (move[own, c] - move[own].mean(1)).sum()
    hits = int(right[own].sum()), int(right[rest].sum())
    return {
        "class": c, "rows": int(own.sum()), "unmatched": float((~fine[bench.labels == c]).mean()),
        "latents": float(latents[own].mean()), "shared": float(shared[own].sum() / max(latents[own].sum(), 1)),
        "energy": float(energy.mean()),
        "logit": float(mean[c]), "logit_lo": float(mean[c] - reach[c]), "logit_hi": float(mean[c] + reach[c]),
        "p": float(p[c]), "others": float(mean[not_c].mean()),
        "rms_others": float(np.sqrt((move[own][:, not_c] ** 2).mean())),
        "largest_other": float(mean[not_c].min()), "largest_class": int(np.flatnonzero(not_c)[mean[not_c].argmin()]),
        "probability": float(gain.mean()), "changed": float((now != bench.predicted)[own].mean()),
        "kept": float((now == bench.labels)[own].sum() / hits[0]) if hits[0] else np.nan,
        "to": to, "to_share": float((left == to).mean()) if len(left) else 0.0,
        "runner_up": float((left == bench.second[gone]).mean()) if len(left) else np.nan,
        "efficiency": float(-relative / most) if most > 0 else np.nan,
        "others_kept": float((now == bench.labels)[rest].sum() / hits[1]) if hits[1] else np.nan,
        "elsewhere": float(move[rest, c].mean()) if rest.any() else np.nan,
    }  # fmt: skip


def effects(bench: Bench, centre: np.ndarray, extra: Mapping | None = None, seed: int = 0) -> tuple:
    """All interventions on all classes.

    Parameters
    ----------
    extra : mapping of names to functions class -> change of values (N, k), optional
        Further interventions, such as :func:`capsae.analyses.causal_curves.attenuation`.

    Returns
    -------
    table : DataFrame
        A row an intervention and class: ``intervention`` and the columns of :func:`effect`.
    matrix : DataFrame
        Deleting the core: ``deleted``, ``logit``, ``change`` (mean over rows of the class deleted), ``p_holm`` (over
        all cells).
    moved : dict of (N, d)
        Change of x, row by row, where the row's own class is the one intervened on.
    """
    rows, cells, moved = [], [], {}
    for c, found in deletions(bench, centre, seed):
        own = np.flatnonzero(bench.labels == c)
        for name, change in (extra or {}).items():
            values = change(c)
            inside = bench.core[c][bench.codes.indices]
            found[name] = bench.delta(values), (values != 0).sum(1), (inside & (values != 0)).sum(1)
        for name, (delta, *counts) in found.items():
            rows.append({"intervention": name} | effect(bench, c, delta, *counts))
            moved.setdefault(name, np.empty_like(bench.x))[own] = delta[own]
        mean, _, p = t_test(found["core"][0][own] @ bench.weight.T)
        cells += list(zip([c] * bench.n_classes, range(bench.n_classes), mean, p, strict=True))
    matrix = pd.DataFrame(cells, columns=["deleted", "logit", "change", "p"])
    return pd.DataFrame(rows), matrix.assign(p_holm=holm(matrix["p"])).drop(columns="p"), moved


def class_interval(values: np.ndarray, seed: int = 0, n_boot: int = 2000) -> dict[str, float]:
    """Mean of values (C,) over classes with a 95 % bootstrap interval over the classes: value, lo, hi; NaN left out."""
    values = np.asarray(values, dtype=np.float64)
    values = values[~np.isnan(values)]
    if not len(values):
        return dict.fromkeys(("value", "lo", "hi"), float("nan"))
    drawn = np.random.default_rng(seed).integers(0, len(values), (n_boot, len(values)))
    return {"value": float(values.mean()), **dict(zip(("lo", "hi"), interval(values[drawn].mean(1)), strict=True))}


def over_classes(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Means over classes of :func:`effects`: intervention, title, measure, value, lo, hi."""
    rows = []
    for name, part in table.groupby("intervention", sort=False):
        for measure in MEASURES:
            about = {"intervention": name, "title": TITLES[name], "measure": measure}
            rows.append(about | class_interval(part[measure].to_numpy(), seed))
    return pd.DataFrame(rows)


def against_controls(bench: Bench, moved: Mapping, names: Iterable[str] = MATCHED, seed: int = 0) -> pd.DataFrame:
    """The core's effect on the class's logit less each control's, on the same rows at the same energy.

    Columns: control, value, lo, hi (mean over classes; negative: the core lowers the logit more), larger and smaller
    (classes in which that is clear: paired t test, Holm over classes), classes.
    """
    own, rows = bench.weight[bench.labels], []
    for name in names:
        gap = ((moved["core"] - moved[name]) * own).sum(1)
        tested = [t_test(gap[bench.labels == c]) for c in range(bench.n_classes)]
        mean, _, p = (np.array(of) for of in zip(*tested, strict=True))
        clear = holm(p) < LEVEL
        counts = {"larger": int((clear & (mean < 0)).sum()), "smaller": int((clear & (mean > 0)).sum())}
        rows.append({"control": name} | class_interval(mean, seed) | counts | {"classes": bench.n_classes})
    return pd.DataFrame(rows)


def epd_after(bench: Bench, moved: Mapping, names: Iterable[str], n_boot: int = 500, seed: int = 0) -> pd.DataFrame:
    """Does EPD notice? Changed features are encoded and classified anew; EPD against that of the untouched rows.

    Columns: intervention, auroc (of changed against untouched rows; 0.5: EPD sees nothing) with lo, hi (rows drawn
    with replacement, the same on both sides). Rows that a control could not match are left out.
    """
    before = energy_profile_divergence(bench.codes, bench.predicted, bench.caps, bench.core_fraction)
    rows = []
    for name in names:
        fine = np.flatnonzero(~np.isnan(moved[name]).any(1))
        x = bench.x[fine] + moved[name][fine]
        predicted = (x @ bench.weight.T + bench.bias).argmax(1)
        codes = bench.sae.encode(x.astype(np.float32))
        after = energy_profile_divergence(codes, predicted, bench.caps, bench.core_fraction)
        drawn = np.random.default_rng(seed).integers(0, len(fine), (n_boot, len(fine)))
        again = np.array([auroc(before[fine][i], after[i]) for i in drawn])
        lo, hi = interval(again)
        rows.append({"intervention": name, "auroc": auroc(before[fine], after), "lo": lo, "hi": hi})
    return pd.DataFrame(rows)
