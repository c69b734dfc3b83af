"""Causal check, continued: how many latents suffice and are needed, steering, transplants, soft suppression (APP).

See :mod:`companion.chapters.causal.maths` for what an intervention is. Means over classes carry bootstrap intervals
over the classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

from capsae.caps import check_labels
from capsae.sae.model import SparseCodes

from .effects import class_interval
from .maths import Bench, other_class, random_active, stretch

ALPHAS = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
BINS = 20
_BLOCK = 1024  # rows whose k x C contributions are held at a time
ORDERS = {
    "cap": "profile (CAP)",
    "attribution": "profile x head (direct logit attribution)",
    "union": "profiles of all classes together",
    "random": "random, of those that fire in the class",
    "other": "profile of another class",
}
TESTS = ("sufficiency", "sufficiency, no error", "necessity")


# --- sufficiency and necessity


def places(bench: Bench) -> dict[str, np.ndarray]:
    """Place of each latent in some orders (C, M), 0 = first, from training rows and the head alone.

    ``cap``: by its entry in the class's profile. ``attribution``: by its entry x (what a unit of it adds to the class's
    logit, less what it adds to the mean logit): direct logit attribution. ``union``: its best place in any class's
    profile, so that the first n are the first n of *every* class together, the same for all images. ``random``: random,
    but latents that ever fire in the class come first. ``other``: by its entry in another class's profile. Ties go to
    the lower index.
    """
    mean, rng = bench.caps.mean, np.random.default_rng(0)
    other = other_class(bench.n_classes, np.random.default_rng(0))
    centred = bench.latent_logits - bench.latent_logits.mean(1, keepdims=True)
    found = {
        "cap": _places(-mean),
        "attribution": _places(-mean * centred.T),
        "random": _places(np.where(bench.caps.active > 0, rng.random(mean.shape), 2.0)),
    }
    return found | {"union": np.broadcast_to(found["cap"].min(0), mean.shape), "other": found["cap"][other]}


def _places(keys: np.ndarray) -> np.ndarray:
    """Rank (C, M) of each key in its row, the smallest first."""
    return keys.argsort(axis=1, kind="stable").argsort(axis=1)


def sizes(largest: int, points: int = 12) -> np.ndarray:
    """Numbers of latents: 1 to 10, then ``points`` of them up to ``largest``, evenly on a log scale."""
    first = np.arange(1, min(10, largest) + 1)
    return np.unique(np.concatenate([first, np.geomspace(first[-1], largest, points + 1).round()]).astype(int))


def curves(bench: Bench, by: Mapping[str, np.ndarray], at: Iterable[int]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Keep only, or delete, the first n latents of the *predicted* class's order, row by row: data, areas.

    The order follows the head's own prediction on x, so that no label is used; ``union`` does not even use that.
    Keeping n latents also drops all that speaks for other classes; ``other`` shows what that alone does.
    ``by``: of :func:`places`; ``at``: numbers n >= 1 (0, none kept, none deleted, is added).

    ``data``: order, test ("sufficiency": only they are kept, the SAE's error stays; "sufficiency, no error";
    "necessity": they are deleted), n, latents (that are among the first n, mean over classes), measure, value, lo, hi.
    Measures: ``accuracy`` (as a share of the head's on x, mean over classes), ``logit`` (mean of the predicted class's
    logit less the mean logit, as a share of that on x); ``claimed`` (order "other", sufficiency: share of rows
    predicted as the class whose latents were kept). ``areas``: order, test, value, lo, hi, of accuracy (:func:`area`).
    """
    at, rows, under = np.asarray([0, *at]), [], []
    without = bench.x_hat @ bench.weight.T + bench.bias - bench.logits
    head = bench.mean_by_class((bench.predicted == bench.labels).astype(float))
    head[head == 0] = np.nan  # a class that the head never gets right has no accuracy to keep
    base = bench.mean_by_class(bench.logits.max(1) - bench.logits.mean(1))
    other = other_class(bench.n_classes, np.random.default_rng(0))
    for name, place in by.items():
        right, margin = (np.zeros((len(TESTS), len(at), len(bench.x))) for _ in range(2))
        claimed = np.zeros((len(at), len(bench.x)))
        for start in range(0, len(bench.x), _BLOCK):
            block = slice(start, start + _BLOCK)
            part, of = cumulative(bench, place, at, block), bench.predicted[block]  # part (len(at) + 1, rows, C)
            kept = bench.logits[block] - part[-1] + part[:-1]
            for t, logits in enumerate((kept, kept + without[block], bench.logits[block] - part[:-1])):
                now = logits.argmax(2)
                right[t, :, block] = now == bench.labels[block]
                margin[t, :, block] = logits[:, np.arange(len(of)), of] - logits.mean(2)
                if t == 0:
                    claimed[:, block] = now == other[of]
        for t, test in enumerate(TESTS):
            shares = np.array([bench.mean_by_class(right[t, i]) / head for i in range(len(at))])
            under.append({"order": name, "test": test} | class_interval(area(at[1:], shares[1:])))
            for i, n in enumerate(at):
                about = {"order": name, "test": test, "n": int(n), "latents": float((place < n).sum(1).mean())}
                measured = {"accuracy": shares[i]}
                measured["logit"] = bench.mean_by_class(margin[t, i]) / base
                if name == "other" and t == 0:
                    measured["claimed"] = bench.mean_by_class(claimed[i])
                rows += [about | {"measure": m} | class_interval(v) for m, v in measured.items()]
    return pd.DataFrame(rows), pd.DataFrame(under)


def cumulative(bench: Bench, place: np.ndarray, at: np.ndarray, block: slice) -> np.ndarray:
    """What the first n latents of the predicted class's order add to the logits, (len(at) + 1, rows, C); last: all."""
    indices, last = bench.codes.indices[block], place.max() + 1
    values = bench.codes.values[block].astype(np.float64) * bench.row_scale[block]
    rank = np.where(values != 0, place[bench.predicted[block][:, None], indices], last)
    first = rank.argsort(1, kind="stable")
    rank = np.take_along_axis(rank, first, 1)
    added = np.take_along_axis(values, first, 1)[..., None] * bench.latent_logits[np.take_along_axis(indices, first, 1)]
    added = np.concatenate([np.zeros_like(added[:, :1]), added], 1).cumsum(1)  # (rows, k + 1, C)
    counts = np.stack([(rank < n).sum(1) for n in (*at, last)])
    return added[np.arange(len(rank))[None, :], counts]


def area(n: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Area (...) under curves (len(n), ...) over log n, as a share of the width: 1 for a curve that is 1 throughout."""
    if len(n) < 2:
        return values[0]
    x = np.log(n)
    return np.tensordot(np.diff(x), (values[1:] + values[:-1]) / 2, 1) / (x[-1] - x[0])


def enough(data: pd.DataFrame, order: str, test: str = "sufficiency", share: float = 0.9) -> dict | None:
    """The least n on the grid from which on the accuracy stays at or above a share: n, latents, value, lo, hi, or None.

    With "necessity": at or below 1 - share. The whole 95 % interval must, not its middle alone.
    """
    part = data[(data["order"] == order) & (data["test"] == test) & (data["measure"] == "accuracy") & (data["n"] > 0)]
    fine = (part["hi"] <= 1 - share if test == "necessity" else part["lo"] >= share).to_numpy()
    stays = np.logical_and.accumulate(fine[::-1])[::-1]
    if not stays.any():
        return None
    found = part.iloc[int(stays.argmax())]
    return {"n": int(found["n"]), **{key: float(found[key]) for key in ("latents", "value", "lo", "hi")}}


# --- steering


def steering(bench: Bench, alphas: Iterable[float] = ALPHAS) -> pd.DataFrame:
    """Multiply a class's core by alpha, in its own images and in those of other classes.

    Columns: series ("core"; "random": equally many active latents drawn at random, their change stretched to the core's
    energy; "difference": core less random, class by class), rows ("of the class", "of other classes"), alpha, measure
    ("margin": the class's logit less the best other one's; "predicted": share predicted as the class), value, lo, hi.
    """
    rng, found = np.random.default_rng(0), {}
    for c in range(bench.n_classes):
        inside = bench.core[c][bench.codes.indices]
        change = np.where(inside, bench.codes.values, 0.0)
        count = (change != 0).sum(1)
        core = bench.delta(change)
        drawn = bench.delta(np.where(random_active(bench.codes, count, rng), bench.codes.values, 0.0))
        drawn *= stretch(drawn, (core**2).sum(1))[:, None]
        moves = {"core": core @ bench.weight.T, "random": drawn @ bench.weight.T}
        for series, move in moves.items():
            for alpha in alphas:
                logits = bench.logits + (alpha - 1) * move
                mine = logits[:, c].copy()
                logits[:, c] = -np.inf
                best = logits.max(1)
                for rows, chosen in (("of the class", bench.labels == c), ("of other classes", bench.labels != c)):
                    for measure, of in (("margin", mine - best), ("predicted", (mine > best).astype(float))):
                        found.setdefault((series, rows, alpha, measure), []).append(np.nanmean(of[chosen]))
    for _, *key in [key for key in found if key[0] == "core"]:
        found["difference", *key] = np.subtract(found["core", *key], found["random", *key])
    cells = [(*key, *class_interval(np.array(of)).values()) for key, of in found.items()]
    return pd.DataFrame(cells, columns=["series", "rows", "alpha", "measure", "value", "lo", "hi"])


# --- transplants


TRANSPLANTS = {
    "predicted": "its core profile",
    "top2": "its top 2 latents alone",
    "reordered": "its core's values, shuffled within the core",
    "shuffled": "its core's values, on random latents outside it",
    "deleted": "nothing (both cores out)",
}


def transplants(bench: Bench, draws: int = 20) -> pd.DataFrame:
    """Put class b's core profile into the images of class a, in place of a's core (and of what they have on b's).

    Columns: ``of`` (a), ``into`` (b), ``predicted`` (share of a's rows then predicted as b), ``deleted`` (the same
    share when both cores are only taken out: the difference is what the profile adds), ``before`` (share without any
    intervention). What is put in otherwise, stretched to the length of the profile's change: ``top2`` (b's first two
    latents alone), ``reordered`` (b's values shuffled within its core), ``shuffled`` (the same values on random latents
    outside b's core), the last two means over ``draws``.
    """
    mean, rows, rng = bench.caps.mean, [], np.random.default_rng(0)
    place = _places(-mean)
    own = bench.core[bench.labels[:, None], bench.codes.indices]
    for b in range(bench.n_classes):
        out = own | bench.core[b][bench.codes.indices]
        emptied = bench.logits + bench.logit_delta(np.where(out, -bench.codes.values, 0.0))
        profile = np.where(bench.core[b], mean[b], 0.0)
        core, rest = np.flatnonzero(bench.core[b]), np.flatnonzero(~bench.core[b])
        length = np.linalg.norm(profile @ bench.decoder)

        def seen(put, length=length, b=b, emptied=emptied):
            own = np.linalg.norm(put @ bench.decoder)
            put = put * (length / own if own else 0.0)
            return (emptied + bench.row_scale * (put @ bench.latent_logits)).argmax(1) == b

        def drawn(onto, core=core, profile=profile, seen=seen):
            puts = np.zeros((draws, len(profile)))
            for put in puts:
                some = min(len(core), len(onto))
                put[rng.permutation(onto)[:some]] = rng.permutation(profile[core])[:some]
            return np.mean([seen(put) for put in puts], axis=0)

        found = {
            "predicted": seen(profile), "deleted": emptied.argmax(1) == b, "before": bench.predicted == b,
            "top2": seen(np.where(place[b] < 2, profile, 0.0)), "reordered": drawn(core), "shuffled": drawn(rest),
        }  # fmt: skip
        for a in range(bench.n_classes):
            if a != b:
                mine = bench.labels == a
                rows.append({"of": a, "into": b} | {name: float(share[mine].mean()) for name, share in found.items()})
    return pd.DataFrame(rows)


def transplant_means(pairs: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Means over all pairs, with intervals over the receiving classes: each column, and over each control the gain."""
    gains = {f"over {name}": pairs["predicted"] - pairs[name] for name in TRANSPLANTS if name != "predicted"}
    of = pairs.assign(**gains).groupby("into")
    names = (*TRANSPLANTS, "before", *gains)
    return {name: class_interval(of[name].mean().to_numpy()) for name in names}


# --- attenuation via posterior probabilities


class Posterior:
    """P(class | a latent fires with this value), from histograms of training codes.

    Source: APP of Fereidouni, Haider, Ju, Siddique, "Evaluating Sparse Autoencoders for Monosemantic Representation",
    arXiv 2508.15094 (Findings of EACL 2026) [s]: an activation is scaled by 1 - P(concept | activation), densities of
    activations by concept from histograms. From their abstract alone, their full text not consulted; bins of equal
    width up to the latent's largest training value, classes as concepts, equal priors, and 1/C in a bin that no
    training row fell into are ours [r]. A silent latent stays silent, whatever its posterior.
    """

    def __init__(self, shares: np.ndarray, width: np.ndarray):
        self.shares, self.width = shares, width  # (M, bins, C) posterior; (M,) width of a bin

    @classmethod
    def fit(cls, codes: SparseCodes, labels, n_classes: int, bins: int = BINS) -> Posterior:
        """From training codes of N rows and their labels (N,); ValueError if a class has no row."""
        codes = codes.numpy()
        labels = check_labels(labels, len(codes), n_classes)
        counts = np.bincount(labels, minlength=n_classes)
        if not counts.all():
            raise ValueError(f"class {int((counts == 0).argmax())} has no row: its posterior is undefined")
        fires = codes.values != 0
        values, latents = codes.values[fires].astype(np.float64), codes.indices[fires].astype(np.int64)
        peak = np.zeros(codes.n_latents)
        np.maximum.at(peak, latents, values)
        self = cls(np.empty(0), np.where(peak > 0, peak, 1.0) / bins)
        of = np.broadcast_to(labels[:, None], fires.shape)[fires]
        cell = (latents * bins + self._bin(values, latents, bins)) * n_classes + of
        density = np.bincount(cell, minlength=codes.n_latents * bins * n_classes).reshape(-1, bins, n_classes) / counts
        total = density.sum(2, keepdims=True)
        self.shares = np.divide(density, total, out=np.full_like(density, 1 / n_classes), where=total > 0)
        return self

    def _bin(self, values: np.ndarray, latents: np.ndarray, bins: int) -> np.ndarray:
        return np.clip((values / self.width[latents]).astype(np.int64), 0, bins - 1)

    def __call__(self, codes: SparseCodes, of_class: int) -> np.ndarray:
        """P(class | value) of each slot (N, k)."""
        codes = codes.numpy()
        indices = codes.indices.astype(np.int64)
        return self.shares[indices, self._bin(codes.values.astype(np.float64), indices, self.shares.shape[1]), of_class]


def attenuation(bench: Bench, posterior: Posterior, core_only: bool, c: int) -> np.ndarray:
    """APP as a change of the values (N, k) for a class: -value x P(class | value), on its core or on all latents."""
    share = posterior(bench.codes, c)
    return -bench.codes.values * np.where(bench.core[c][bench.codes.indices] | (not core_only), share, 0.0)


def frontier(bench: Bench, posterior: Posterior, at: Iterable[int]) -> pd.DataFrame:
    """What suppressing a class costs the others: deleting the first n of its profile for each n, beside APP.

    Columns: method ("deletion", "app_core", "app_all"), class, n (latents deleted; -1 for APP), fall (of the class's
    logit on its rows), own_kept and others_kept (accuracy on rows of the class, of other classes, over before).
    """
    place, rows = _places(-bench.caps.mean), []
    right = bench.predicted == bench.labels

    def measure(method, c, n, move):
        own, now = bench.labels == c, (bench.logits + move).argmax(1) == bench.labels
        kept = [now[part].sum() / max(right[part].sum(), 1) for part in (own, ~own)]
        rows.append((method, c, int(n), -move[own, c].mean(), *map(float, kept)))

    for c in range(bench.n_classes):
        rank = place[c][bench.codes.indices]
        for n in (0, *at):
            measure("deletion", c, n, bench.logit_delta(np.where(rank < n, -bench.codes.values, 0.0)))
        for name, core_only in (("app_core", True), ("app_all", False)):
            measure(name, c, -1, bench.logit_delta(attenuation(bench, posterior, core_only, c)))
    return pd.DataFrame(rows, columns=["method", "class", "n", "fall", "own_kept", "others_kept"])


def at_equal_suppression(data: pd.DataFrame, method: str) -> dict[str, float]:
    """Accuracy kept on other classes by APP less that by deletion, at the same fall of the class's logit.

    value, lo, hi over classes. Deletion is interpolated between the numbers of latents tried, class by class; a class
    in which no number reaches APP's fall is compared with the one that comes nearest.
    """
    gaps = []
    for _, part in data.groupby("class"):
        line = part[part["method"] == "deletion"].sort_values("n")
        x, first = np.unique(np.maximum.accumulate(line["fall"].to_numpy()), return_index=True)
        app = part[part["method"] == method].iloc[0]
        gaps.append(app["others_kept"] - np.interp(app["fall"], x, line["others_kept"].to_numpy()[first]))
    return class_interval(np.round(gaps, 12))  # rounding is no difference
