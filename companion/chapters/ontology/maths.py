"""Does the dictionary know WordNet? Each synset above the classes against the best unit of a dictionary.

A unit (a latent, or a coordinate of the features) is turned into a set of classes by a threshold on its class
activation profile, and the set is held against the classes under a synset by F1:

    classes(u, t) = {c : CAP_c(u) > t};   F1 = 2 |classes and members| / (|classes| + |members|)

Unit and threshold are the best on training rows; the F1 that is reported comes from test rows. That removes what noise
of images gives to the best of many units, not what chance gives it among few classes, so there are two more guards: the
same search with the synsets' classes permuted (p values), and a search that does not see the classes it is judged by.

Our own reconstruction [r] of the "ontological coverage" of Olson et al., arXiv 2508.11277, of which we know
the abstract alone: F1, its bars, the guards and the controls are our choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy.sparse import csc_array

from capsae.latents.wordnet import Taxonomy

from .search import LEAST, Choice, Search, f1, image_choice, permuted_f1, unseen_f1

BARS = (0.7, 0.9)  # a synset whose F1 reaches the bar is covered
FEWEST = 8  # synsets below which a difference gets no verdict: they are drawn again for its interval


@dataclass(frozen=True)
class Units:
    """What a dictionary makes of the rows: activations of U units, > 0 where a unit is active at all.

    Attributes
    ----------
    train, test : (N, U) scipy csc_array
    """

    train: csc_array
    test: csc_array

    @classmethod
    def of_codes(cls, train, test) -> Units:
        """Units of SparseCodes of training and test rows."""
        return cls(*(_sparse(codes) for codes in (train, test)))

    @classmethod
    def of_features(cls, train, test) -> Units:
        """Each coordinate of features (N, d) with either sign: 2 d units.

        Moved up by a constant each, so that all training rows are above 0: a threshold may lie anywhere.
        """
        train, test = (np.hstack([x, -np.asarray(x)]).astype(np.float64) for x in (train, test))
        floor = train.min(axis=0) - 1
        return cls(csc_array(train - floor), csc_array(test - floor))

    def drawn(self, n: int, seed: int) -> Units:
        """``n`` of the units that are active in some training row, drawn at random."""
        alive = np.flatnonzero(np.diff(self.train.indptr))
        chosen = np.sort(np.random.default_rng(seed).choice(alive, min(n, len(alive)), replace=False))
        return Units(self.train[:, chosen], self.test[:, chosen])


def _sparse(codes) -> csc_array:
    codes = codes.numpy()
    rows, slots = np.nonzero(codes.values > 0)
    cells = codes.values[rows, slots].astype(np.float64), (rows, codes.indices[rows, slots])
    return csc_array(cells, shape=(len(codes), codes.n_latents))


def profiles(activations: csc_array, labels, n_classes: int) -> np.ndarray:
    """Mean activation (C, U) of each unit in each class: the CAPs. ValueError if a class has no rows."""
    labels = np.asarray(labels)
    counts = np.bincount(labels, minlength=n_classes)
    if len(labels) != activations.shape[0] or len(counts) != n_classes or not counts.all():
        raise ValueError(
            f"labels are {len(labels)} in {np.count_nonzero(counts)} classes, rows {activations.shape[0]}: "
            f"one a row, and rows of each of the {n_classes} classes would do"
        )
    of_class = csc_array((1 / counts[labels], (labels, np.arange(len(labels)))), shape=(n_classes, len(labels)))
    return (of_class @ activations).toarray()


def trivial_f1(members: np.ndarray) -> np.ndarray:
    """F1 (S,) of calling every class a member, for members (C, S): what a large synset gives away."""
    sizes = members.sum(axis=0)
    return 2 * sizes / (len(members) + sizes)


def asked(members: np.ndarray) -> np.ndarray:
    """(S,) bool: the synsets above at most half of the classes, for members (C, S); means are over these.

    Of one above nearly all classes, a unit that fires everywhere is a good account.
    """
    return 2 * members.sum(axis=0) <= len(members)


def p_values(observed: np.ndarray, null: np.ndarray) -> np.ndarray:
    """(1 + permutations at least as good) / (1 + n), along the first axis of null (n, ...): never 0."""
    return (1 + (null >= observed - 1e-12).sum(axis=0)) / (1 + len(null))


# --- one dictionary


@dataclass
class Judged:
    """One dictionary's F1 by synset: by_class, by_image, unseen (S,); asked (S,), which of them means are over; of the
    first two, replicates (R, S); by permutations of the first and the third, null (n, S), empty where none were made.
    """

    choice: Choice
    by_class: np.ndarray
    by_image: np.ndarray
    unseen: np.ndarray
    asked: np.ndarray
    replicates: dict[str, np.ndarray] = field(default_factory=dict)
    null: dict[str, np.ndarray] = field(default_factory=dict)

    def around(self, key: str, of=lambda x: x) -> np.ndarray:
        """(R, S) replicates of ``of(F1)`` about its estimate: a bootstrap adds noise to noise, which takes F1 away."""
        again = np.asarray(of(self.replicates[key]), np.float64)
        return of(getattr(self, key)) + again - again.mean(axis=0)


def every_class(labels, members: np.ndarray, n: int) -> Judged:
    """The control that calls every class, and every test image, a member; its n replicates are all alike."""
    labels, n_synsets = np.asarray(labels), members.shape[1]
    found, images = trivial_f1(members), trivial_f1(members[labels])
    choice = Choice(np.full(n_synsets, -1), np.full(n_synsets, -np.inf), found)
    again = {"by_class": np.tile(found, (n, 1)), "by_image": np.tile(images, (n, 1))}
    unseen = np.where(members.sum(axis=0) >= LEAST, found, np.nan)
    return Judged(choice, found, images, unseen, asked(members), again, {"by_class": found[None]})


def judge(
    units: Units, labels, test_labels, members: np.ndarray, place, weights, permutations=0, for_unseen=0, seed=0
) -> Judged:
    """All that is asked of one dictionary.

    ``members`` (C, S) bool, ``place`` (C,) as for :func:`unseen_f1`, ``weights`` (R, N_test) of :func:`image_draws`;
    ``permutations`` by classes and ``for_unseen`` by unseen classes (each of those is a search a fold).
    """
    n_classes, test_labels = len(members), np.asarray(test_labels)
    train, test = profiles(units.train, labels, n_classes), profiles(units.test, test_labels, n_classes)
    choice, images = Search(train)(members), image_choice(units.train, labels, members)
    chosen, fired = units.test[:, choice.unit].toarray(), units.test[:, images.unit].toarray() > images.threshold
    of_rows = members[test_labels]
    again = {"by_class": np.empty((len(weights), members.shape[1])), "by_image": None}
    means = np.stack([weights[:, test_labels == c] @ chosen[test_labels == c] for c in range(n_classes)], axis=1)
    means /= np.bincount(test_labels, minlength=n_classes)[:, None]  # (R, C, S)
    again["by_class"] = f1(means > choice.threshold, np.broadcast_to(members, means.shape), axis=1)
    hits, called = weights @ (fired & of_rows).astype(weights.dtype), weights @ fired.astype(weights.dtype)
    again["by_image"] = 2 * hits / (called + of_rows.sum(axis=0))  # the rows of a class keep their number
    unseen, of_unseen = unseen_f1(train, test, members, place, for_unseen, seed)
    null = {"by_class": permuted_f1(train, test, members, permutations, seed)} if permutations else {}
    null |= {"unseen": of_unseen} if for_unseen else {}
    by_class, by_image = f1(choice.classes(test), members), f1(fired, of_rows)
    return Judged(choice, by_class, by_image, unseen, asked(members), again, null)


def image_draws(labels, n: int, seed: int = 0) -> np.ndarray:
    """(n, N) float32: how often each row was drawn in n bootstrap draws of as many rows from each class."""
    labels, rng = np.asarray(labels), np.random.default_rng(seed)
    weights = np.zeros((n, len(labels)), np.float32)
    for c in np.unique(labels):
        rows = np.flatnonzero(labels == c)
        weights[:, rows] = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=n)
    return weights


def tree_order(taxonomy: Taxonomy) -> np.ndarray:
    """(C,) each class's place when the tree is walked through in depth, by the deepest parent of each synset."""
    ways = [tree_way(taxonomy, leaf) for leaf in taxonomy.leaves]
    place = np.empty(len(ways), int)
    place[sorted(range(len(ways)), key=ways.__getitem__)] = np.arange(len(ways))
    return place


def tree_way(taxonomy: Taxonomy, synset: str) -> tuple[str, ...]:
    """From the root down to a synset, by the deepest parent of each."""
    way = [synset]
    while taxonomy.parents[way[-1]]:
        way.append(max(taxonomy.parents[way[-1]], key=lambda parent: (taxonomy.depth(parent), parent)))
    return tuple(reversed(way))


def indents(taxonomy: Taxonomy, synsets: Sequence[str]) -> list[int]:
    """How many of the synsets lie above each: its indentation in a list."""
    return [len(taxonomy.ancestors(synset) & set(synsets)) - 1 for synset in synsets]


# --- several dictionaries, in tables


def by_synset(judged: Mapping[str, Sequence[Judged]], taxonomy: Taxonomy) -> pd.DataFrame:
    """One row a dictionary and synset, in the order of the tree.

    Columns: method, synset, name, members, indent, asked (whether means are over it), unit (of the first draw),
    f1_train, f1, lo, hi (over test images), p and q (permutations; q by Benjamini and Hochberg over a dictionary's
    synsets that are asked for; NaN without), unseen, images. Where a dictionary was drawn several times, F1s are means
    over the draws, p of the first.
    """
    from scipy.stats import false_discovery_control

    synsets = taxonomy.synsets
    members = np.stack([taxonomy.members(s) for s in synsets], axis=1)
    about = {
        "synset": synsets,
        "name": [taxonomy.name(s) for s in synsets],
        "members": members.sum(axis=0),
        "indent": indents(taxonomy, synsets),
        "asked": asked(members),
    }
    order = sorted(range(len(synsets)), key=lambda i: tree_way(taxonomy, synsets[i]))
    frames = []
    for method, draws in judged.items():
        first = draws[0]
        permuted = len(first.null.get("by_class", ())) > 1
        around = np.clip(np.mean([one.around("by_class") for one in draws], axis=0), 0, 1)
        lo, hi = np.quantile(around, [0.025, 0.975], axis=0)
        p = p_values(first.by_class, first.null["by_class"]) if permuted else np.full(len(synsets), np.nan)
        q = np.full(len(synsets), np.nan)
        if permuted:
            q[about["asked"]] = false_discovery_control(p[about["asked"]])
        found = {
            "unit": first.choice.unit,
            "f1_train": np.mean([one.choice.f1 for one in draws], axis=0),
            "f1": np.mean([one.by_class for one in draws], axis=0),
            "lo": lo,
            "hi": hi,
            "p": p,
            "q": q,
            "unseen": np.mean([one.unseen for one in draws], axis=0),
            "images": np.mean([one.by_image for one in draws], axis=0),
        }
        frames.append(pd.DataFrame({"method": method} | about | found).iloc[order])
    return pd.concat(frames, ignore_index=True)


_MEASURES = {"mean F1": lambda x: x, **{f"share of F1 from {b}": (lambda x, b=b: (x >= b - 1e-9) * 1.0) for b in BARS}}
ABOVE = "above chance"
_BY = {"images": "by_image", "unseen classes": "unseen", "classes": "by_class"}


def _measures(null: np.ndarray | None) -> dict:
    """What is averaged over synsets: measure -> function of F1 (..., S); above chance only where there is a null."""
    return _MEASURES | ({} if null is None else {ABOVE: lambda x: x - null.mean(axis=0)})


def measured(judged: Mapping[str, Sequence[Judged]], seed: int = 0) -> tuple[pd.DataFrame, dict]:
    """Means over the synsets that are asked for (:func:`asked`) with intervals, and the replicates that they come from.

    A replicate draws test images within each class (but for unseen classes) and synsets, the same for all dictionaries.
    Synsets overlap, so an interval is a guide and not a level. Draws of a dictionary (seeds) are averaged; their spread
    stands beside. "above chance" is F1 less the mean of the first draw's permutations, synset by synset: searches among
    more units, or among units of other kinds, find more by chance.

    Returns
    -------
    DataFrame
        method, by ("images", "unseen classes", "classes"), measure, synsets (how many), draws, value, lo, hi, least,
        largest (over the draws), null, null_lo, null_hi, p, permutations (of the first draw; NaN where nothing was
        permuted).
    dict
        (method, by, measure) -> (value, replicates (R,)).
    """
    one = next(iter(judged.values()))[0]
    n, rows, kept = len(one.replicates["by_class"]), [], {}
    for by, key in _BY.items():
        which = np.flatnonzero(one.asked & ~np.isnan(getattr(one, key)))
        if not len(which):
            continue
        rng = np.random.default_rng(seed)  # the same synsets for all dictionaries
        drawn = which[rng.integers(0, len(which), size=(n, len(which)))]
        for method, draws in judged.items():
            null = draws[0].null.get(key)
            for measure, of in _measures(null).items():
                values = [float(of(getattr(draw, key))[which].mean()) for draw in draws]
                if key == "unseen":
                    again = np.mean([of(draw.unseen)[drawn].mean(axis=1) for draw in draws], axis=0)
                else:
                    around = np.mean([draw.around(key, of) for draw in draws], axis=0)
                    again = np.take_along_axis(around, drawn, axis=1).mean(axis=1)
                chance = np.full(1, np.nan) if null is None else of(null)[:, which].mean(axis=1)
                p = float(p_values(values[0], chance)) if len(chance) > 1 else np.nan
                lo, hi = np.quantile(again, [0.025, 0.975])
                null_lo, null_hi = np.quantile(chance, [0.025, 0.975])
                about = {"method": method, "by": by, "measure": measure, "synsets": len(which), "draws": len(draws)}
                least = -1 if measure == ABOVE else 0
                about |= {"value": float(np.mean(values)), "lo": max(lo, least), "hi": min(hi, 1)}
                about |= {"least": min(values), "largest": max(values), "null": chance.mean()}
                about |= {"null_lo": null_lo, "null_hi": null_hi, "p": p}
                rows.append(about | {"permutations": len(chance) if len(chance) > 1 else np.nan})
                kept[method, by, measure] = float(np.mean(values)), again
    return pd.DataFrame(rows), kept


def differences(kept: Mapping, summary: pd.DataFrame, pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """Mean F1, and mean F1 above chance, of one dictionary less another's, by the same replicates.

    Columns: dictionary, other, by, measure, synsets, value, lo, hi, verdict ("better", "worse" where the interval is on
    one side of 0, else "undecided"; "too few synsets" where there are fewer than FEWEST).
    """
    rows, counts = [], summary.groupby("by")["synsets"].first()
    for by in dict.fromkeys(summary["by"]):
        for measure in ("mean F1", ABOVE):
            for method, other in pairs:
                if (method, by, measure) in kept and (other, by, measure) in kept:
                    (own, own_again), (value, again) = kept[method, by, measure], kept[other, by, measure]
                    lo, hi = np.quantile(own_again - again, [0.025, 0.975])
                    verdict = "better" if lo > 0 else "worse" if hi < 0 else "undecided"
                    about = {"dictionary": method, "other": other, "by": by, "measure": measure, "synsets": counts[by]}
                    verdict = verdict if counts[by] >= FEWEST else "too few synsets"
                    rows.append(about | {"value": own - value, "lo": lo, "hi": hi, "verdict": verdict})
    return pd.DataFrame(rows)
