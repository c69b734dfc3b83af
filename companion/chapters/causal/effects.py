"""Causal check: what interventions do to logits, probabilities and predictions, and how surely.

See :mod:`companion.chapters.causal.maths` for the interventions. Intervals of a class run over its rows (Student's t),
those of a mean over classes over the classes (bootstrap).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from scipy.special import softmax, stdtr, stdtrit

from capsae.caps import energy_profile_divergence
from capsae.metrics import auroc
from capsae.stats import holm, interval

from .maths import TITLES, Bench, deletions, random_active, stretch

LEVEL = 0.05
MATCHED = ("random_active", "outside", "other_core", "random_order")  # each at exactly the core's energy
MEASURES = ("logit", "others", "rms_others", "probability", "changed", "kept", "runner_up", "others_kept", "elsewhere",
            "efficiency", "energy", "latents", "shared", "unmatched", "stretch", "shrunk")  # fmt: skip
FAIR = ("part_first", "part_random")  # as much of the core as the deletion of all outside takes


def t_test(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean of columns (n, ...), reach of its 95 % t interval, and two-sided p of "mean zero" by Student's t.

    Columns of equal values: p is 1 where they are zero, else 0. NaN rows are left out (all columns share them).
    """
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
    return mean, stdtrit(n - 1, 0.975) * error, p


def effect(bench: Bench, c: int, delta: np.ndarray, latents, shared, factor) -> dict[str, float]:
    """What one intervention on class c (delta (N, d) of every row) does, on rows of the class and on all others.

    On rows of the class: ``logit`` (mean change of its logit, with a 95 % t interval and ``p``), ``others`` (mean
    change of the other logits), ``rms_others``, ``largest_other`` (the largest fall of another logit's mean) and
    ``largest_class``, ``probability`` (mean change), ``kept`` (accuracy on these rows afterwards, over before),
    ``changed`` (share of rows with another prediction), ``to`` (class that takes most of them, -1: none), ``to_share``
    and ``runner_up`` (share of them that go to what the head put second on x), ``latents`` (touched), ``shared`` (share
    of them that are of the class's core), ``energy`` (squared length of the change), ``efficiency`` (fall of the
    class's logit against the mean logit, as a share of what an equally long change could do at most). On rows of other
    classes: ``others_kept`` (accuracy, over before), ``elsewhere`` (mean change of logit c). Rows that a control could
    not match are left out: ``unmatched`` is their share. ``stretch``: median factor over rows of the class, ``shrunk``:
    share of these rows with a factor below 1.
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
    gain = softmax(after[own], axis=1)[:, c] - softmax(bench.logits[own], axis=1)[:, c]
    energy = (delta[own] ** 2).sum(1)
    most = np.sqrt(energy).sum() * np.linalg.norm(bench.weight[c] - bench.weight.mean(0))
    relative = (move[own, c] - move[own].mean(1)).sum()
    hits = int(right[own].sum()), int(right[rest].sum())
    return {
        "class": c, "rows": int(own.sum()), "unmatched": float((~fine[bench.labels == c]).mean()),
        "latents": float(latents[own].mean()), "shared": float(shared[own].sum() / max(latents[own].sum(), 1)),
        "energy": float(energy.mean()),
        "stretch": float(np.median(factor[own])), "shrunk": float((factor[own] < 1).mean()),
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


def effects(bench: Bench, centre: np.ndarray, extra: Mapping | None = None) -> tuple:
    """All interventions on all classes: table, matrix, moved.

    ``extra``: further ones, name -> function of a class that gives a change of the values (N, k).
    ``table``: a row an intervention and class, ``intervention`` and the columns of :func:`effect`. ``matrix``: deleting
    the core, ``deleted``, ``logit``, ``change`` (mean over rows of the class deleted), ``p_holm`` (over all cells).
    ``moved``: by intervention, change of x (N, d) where the row's own class is the one intervened on.
    """
    rows, cells, moved = [], [], {}
    for c, found in deletions(bench, centre):
        own = np.flatnonzero(bench.labels == c)
        for name, change in (extra or {}).items():
            values = change(c)
            inside = bench.core[c][bench.codes.indices]
            counts = (values != 0).sum(1), (inside & (values != 0)).sum(1)
            found[name] = bench.delta(values), *counts, np.ones(len(values))
        for name, (delta, *counts) in found.items():
            rows.append({"intervention": name} | effect(bench, c, delta, *counts))
            moved.setdefault(name, np.empty_like(bench.x))[own] = delta[own]
        mean, _, p = t_test(found["core"][0][own] @ bench.weight.T)
        cells += list(zip([c] * bench.n_classes, range(bench.n_classes), mean, p, strict=True))
    matrix = pd.DataFrame(cells, columns=["deleted", "logit", "change", "p"])
    return pd.DataFrame(rows), matrix.assign(p_holm=holm(matrix["p"])).drop(columns="p"), moved


def class_interval(values: np.ndarray, n_boot: int = 2000) -> dict[str, float]:
    """Mean of values (C,) over classes with a 95 % bootstrap interval over the classes: value, lo, hi; NaN left out."""
    values = np.asarray(values, dtype=np.float64)
    values = values[~np.isnan(values)]
    if not len(values):
        return dict.fromkeys(("value", "lo", "hi"), float("nan"))
    drawn = np.random.default_rng(0).integers(0, len(values), (n_boot, len(values)))
    return {"value": float(values.mean()), **dict(zip(("lo", "hi"), interval(values[drawn].mean(1)), strict=True))}


def over_classes(table: pd.DataFrame) -> pd.DataFrame:
    """Means over classes of :func:`effects`: intervention, title, measure, value, lo, hi."""
    return pd.DataFrame(
        {"intervention": name, "title": TITLES[name], "measure": m} | class_interval(part[m].to_numpy())
        for name, part in table.groupby("intervention", sort=False)
        for m in MEASURES
    )


def against_controls(bench: Bench, moved: Mapping, name: str = "outside", of: str = "core") -> pd.DataFrame:
    """Effect on the class's logit of one intervention (the core's) less that of another, on the same rows.

    Columns: control, value, lo, hi (mean over classes; negative: the first lowers the logit more), larger and smaller
    (classes in which that is significant: paired t test over rows, Holm over classes), classes.
    """
    gap = ((moved[of] - moved[name]) * bench.weight[bench.labels]).sum(1)
    tested = [t_test(gap[bench.labels == c]) for c in range(bench.n_classes)]
    mean, _, p = (np.array(part) for part in zip(*tested, strict=True))
    return pd.DataFrame([{"control": name} | class_interval(mean) | _clear(mean, p)])


def plain_gaps(bench: Bench, moved: Mapping) -> pd.DataFrame:
    """:func:`against_controls` without stretching, as much of the core (``of``) less all outside it deleted."""
    rows = [against_controls(bench, moved, "outside_plain", of).assign(of=of) for of in FAIR]
    return pd.concat(rows, ignore_index=True)


def _clear(mean: np.ndarray, p: np.ndarray) -> dict[str, int]:
    clear = holm(p) < LEVEL
    return {"larger": int((clear & (mean < 0)).sum()), "smaller": int((clear & (mean > 0)).sum()), "classes": len(mean)}


def draws(bench: Bench, directions: int = 20) -> pd.DataFrame:
    """The core's effect on the class's logit less that of each of many controls, at the core's energy.

    Controls: the cores of *all* other classes; sets as large as the core along random directions (the same directions
    for all classes); equally many random active latents, drawn anew.

    Columns: control, class, draw (the other class, or a number), gap (mean over the class's rows; negative: the core
    lowers the logit more), stretch (median factor), shrunk (share of rows with a factor below 1), shared (share of the
    active latents touched that are of the core), unmatched (share of rows that nothing could be taken from, left out).
    """
    rng, rows = np.random.default_rng(0), []
    size = bench.caps.core_size(bench.core_fraction)
    drawn = rng.normal(size=(directions, bench.decoder.shape[1]))
    along = np.zeros((directions, bench.codes.n_latents), bool)
    np.put_along_axis(along, np.argsort(-drawn @ bench.decoder.T, axis=1)[:, :size], True, axis=1)
    for c in range(bench.n_classes):
        own = np.flatnonzero(bench.labels == c)
        inside, values = bench.core[c][bench.codes.indices], -bench.codes.values[own]
        core = bench.delta(np.where(inside[own], values, 0.0), own)
        energy, count = (core**2).sum(1), (inside & (bench.codes.values != 0)).sum(1)
        mine = core @ bench.weight[c]
        sets = [("other_core", o, bench.core[o][bench.codes.indices]) for o in range(bench.n_classes) if o != c]
        sets += [("random_order", i, mask[bench.codes.indices]) for i, mask in enumerate(along)]
        sets += [("random_active", i, random_active(bench.codes, count, rng)) for i in range(directions)]
        for name, draw, slots in sets:
            change = np.where(slots[own], values, 0.0)
            delta = bench.delta(change, own)
            factor = stretch(delta, energy)
            fine, touched = ~np.isnan(factor), change != 0
            gap = mine[fine] - factor[fine] * (delta[fine] @ bench.weight[c])
            of = {"control": name, "class": c, "draw": draw, "gap": np.nan, "stretch": np.nan, "shrunk": np.nan}
            if fine.any():
                of |= {"gap": gap.mean(), "stretch": np.median(factor[fine]), "shrunk": (factor[fine] < 1).mean()}
            shared = (touched & inside[own]).sum() / max(touched.sum(), 1)
            rows.append(of | {"shared": float(shared), "unmatched": float((~fine).mean())})
    return pd.DataFrame(rows)


def over_draws(data: pd.DataFrame, n_boot: int = 2000) -> pd.DataFrame:
    """:func:`draws` in short, a row a control.

    Columns: control, value, lo, hi (mean gap; classes and draws, such as the other classes, both drawn with
    replacement), larger and smaller (classes in which the core lowers the logit significantly more or less: t test
    over the *draws*, Holm over classes), classes, wins (share of the pairs of class and draw in which the control
    lowers the logit more), pairs, unmatched (mean, and ``unmatched_most`` over classes).
    """
    rows = []
    for name, part in data.groupby("control", sort=False):
        wide = part.pivot(index="class", columns="draw", values="gap").to_numpy()
        rng, again = np.random.default_rng(0), []
        for _ in range(n_boot):
            i, j = (rng.integers(0, n, n) for n in wide.shape)
            again.append(np.nanmean(wide[np.ix_(i, j)]))
        lo, hi = interval(np.array(again))
        tested = [t_test(row[~np.isnan(row)]) for row in wide]
        mean, p = np.array([t[0] for t in tested]), np.array([t[2] for t in tested])
        lost = part.groupby("class")["unmatched"].mean()
        known = part["gap"].dropna()
        about = {"control": name, "value": float(np.nanmean(wide)), "lo": float(lo), "hi": float(hi)} | _clear(mean, p)
        about |= {"wins": float((known > 0).mean()), "pairs": len(known)}
        rows.append(about | {"unmatched": float(lost.mean()), "unmatched_most": float(lost.max())})
    return pd.DataFrame(rows)


def stretching(drawn: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """How far the controls are stretched, and what they touch: a row a control.

    Columns: control (title), stretch (mean over classes and draws of the median factor, with least and most), shrunk,
    shared, unmatched (means), unmatched_most (of one class and draw). From :func:`draws` and :func:`effects`.
    """
    outside = table[table["intervention"] == "outside"].assign(control="outside")
    rows = []
    for name, part in pd.concat([drawn, outside]).groupby("control", sort=False):
        about = {"control": TITLES[name], "stretch": part["stretch"].mean()}
        about |= {"least": part["stretch"].min(), "most": part["stretch"].max()}
        about |= {key: part[key].mean() for key in ("shrunk", "shared", "unmatched")}
        rows.append(about | {"unmatched_most": part["unmatched"].max()})
    return pd.DataFrame(rows)


def core_shares(bench: Bench) -> pd.DataFrame:
    """Share of a row's active ``latents``, and of its ``squares``' sum, in a class's core. Columns: class, rows, ..."""
    values, found = bench.codes.values.astype(np.float64), []
    fires = values != 0
    for c in range(bench.n_classes):
        inside = bench.core[c][bench.codes.indices] & fires
        latents = inside.sum(1) / fires.sum(1)
        squares = (values**2 * inside).sum(1) / (values**2).sum(1)
        for rows, chosen in (("of the class", bench.labels == c), ("of other classes", bench.labels != c)):
            found.append((c, rows, latents[chosen].mean(), squares[chosen].mean()))
    return pd.DataFrame(found, columns=["class", "rows", "latents", "squares"])


def emptied(bench: Bench) -> np.ndarray:
    """What the head says (N,) where the whole code is taken out: pre-bias, the SAE's error and the head's bias."""
    return (bench.logits + bench.logit_delta(-bench.codes.values)).argmax(1)


def epd_after(bench: Bench, moved: Mapping, names: Iterable[str], n_boot: int = 200) -> pd.DataFrame:
    """Does EPD notice? Changed features are encoded and classified anew; EPD against that of the untouched rows.

    A row an intervention: ``auroc`` (of changed against untouched rows; 0.5: EPD sees nothing) with lo, hi (rows drawn
    with replacement, the same on both sides); ``gap`` with gap_lo, gap_hi (the first intervention's AUROC less this
    one's, on the same draws of the same rows); ``changed`` (share of rows whose prediction changed), ``auroc_changed``
    and ``auroc_same`` (on these rows and on the others, with rows_changed and rows_same; NaN below 20 rows). Rows that
    a control could not match are left out (of the gap, on both sides).
    """
    before = energy_profile_divergence(bench.codes, bench.predicted, bench.caps, bench.core_fraction)
    rows, first, n = [], None, len(bench.x)
    drawn = np.random.default_rng(0).integers(0, n, (n_boot, n))

    def areas(after, fine):
        return np.array([auroc(before[i], after[i]) for i in (i[fine[i]] for i in drawn)])

    for name in names:
        fine = ~np.isnan(moved[name]).any(1)
        x = np.where(fine[:, None], bench.x + moved[name], bench.x)
        predicted = (x @ bench.weight.T + bench.bias).argmax(1)
        codes = bench.sae.encode(x.astype(np.float32))
        after = energy_profile_divergence(codes, predicted, bench.caps, bench.core_fraction)
        again = areas(after, fine)
        if first is None:
            first = after, fine, again
        both = fine & first[1]
        reference = first[2] if (both == first[1]).all() else areas(first[0], both)
        gaps = reference - (again if (both == fine).all() else areas(after, both))
        (lo, hi), (gap_lo, gap_hi) = interval(again), interval(gaps)
        about = {"intervention": name, "auroc": auroc(before[fine], after[fine]), "lo": lo, "hi": hi}
        about |= {"gap": auroc(before[both], first[0][both]) - auroc(before[both], after[both])}
        about |= {"gap_lo": gap_lo, "gap_hi": gap_hi, "changed": float((predicted != bench.predicted)[fine].mean())}
        for kind, part in (("changed", predicted != bench.predicted), ("same", predicted == bench.predicted)):
            part = part & fine
            about[f"rows_{kind}"] = int(part.sum())
            about[f"auroc_{kind}"] = auroc(before[part], after[part]) if part.sum() >= 20 else np.nan
        rows.append(about)
    return pd.DataFrame(rows)
