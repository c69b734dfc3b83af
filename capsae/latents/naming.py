"""What a latent means: the classes that hold its activation name it, WordNet generalises the name, test rows check it.

    p_i(c) = hbar_ci / sum_c' hbar_c'i        (hbar: class activation profiles, so every class counts the same)

The name of latent i comes from the fewest classes that together hold the share ``hold`` of p_i: one class names it by
itself; several do by the lowest WordNet synset above them all, if they are at least the share ``fill`` of the classes
below that synset ("dog" for eight of ten breeds, not "animal" for a fish and a beagle). All of this is our own [r].
``hold`` is four fifths by convention: no data chose it, and what it decides is shown at other values.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..caps import ClassActivationProfiles, check_labels
from ..stats import interval

log = logging.getLogger(__name__)

HOLD, FILL = 0.8, 0.5
HOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
BROAD = 0.25  # share of the rows above which a name's classes are called broad
LEAST = 5  # training rows that a latent must fire in to be named: fewer fit any name
FDR = 0.05
KINDS = ("class", "synset", "none", "rare", "dead")
KIND_TITLES = {
    "class": "one class",
    "synset": "a synset",
    "none": "no name",
    "rare": f"fires in under {LEAST} rows",
    "dead": "never fires",
}


@dataclass(frozen=True)
class Named:
    """Latents with their names.

    ``table`` has a row a latent: latent, kind (one of KINDS), name ("" without one), held (classes that hold ``hold``
    of its activation), under (classes below the name), base (share of the training rows that they have), fired
    (training rows), density, selectivity (1 - entropy of p_i / log C), classes (the held ones, strongest first, at
    most three).
    """

    table: pd.DataFrame
    members: np.ndarray  # (M, C) bool: the classes below each latent's name; none without a name

    @property
    def named(self) -> np.ndarray:
        """(M,) bool: which latents have a name."""
        return self.members.any(axis=1)


def posterior(caps: ClassActivationProfiles) -> np.ndarray:
    """Share (M, C) of each latent's summed activation by class, classes alike; zeros for a latent that never fires."""
    total = caps.mean.sum(axis=0)
    return np.divide(caps.mean, total, out=np.zeros_like(caps.mean), where=total > 0).T


def held(shares: np.ndarray, hold: float = HOLD) -> np.ndarray:
    """(M, C) bool: the fewest classes that together have the share ``hold`` of each row; ties go to the lower class."""
    if not 0 < hold <= 1:
        raise ValueError(f"hold is {hold}: a share of the activation in (0, 1] would do, the default is {HOLD}")
    order = np.argsort(-shares, axis=1, kind="stable")
    before = np.cumsum(np.take_along_axis(shares, order, axis=1), axis=1)
    before = np.hstack([np.zeros((len(shares), 1)), before[:, :-1]])
    mask = np.zeros(shares.shape, bool)
    np.put_along_axis(mask, order, before < hold - 1e-12, axis=1)
    return mask & (shares > 0)


def selectivity(shares: np.ndarray) -> np.ndarray:
    """1 - H(p) / log C (M,) of rows that sum to 1: 1 for one class alone, 0 for all alike; NaN for rows of zeros."""
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    found = 1 + (shares * logs).sum(axis=1) / np.log(shares.shape[1])
    return np.where(shares.sum(axis=1) > 0, found, np.nan)


def name_latents(
    caps: ClassActivationProfiles, class_names: Sequence[str], taxonomy=None, hold: float = HOLD, fill: float = FILL
) -> Named:
    """Name every latent after the classes that hold its activation.

    Parameters
    ----------
    caps : ClassActivationProfiles of C classes and M latents, of the *training* rows
    class_names : (C,) readable names
    taxonomy : capsae.latents.wordnet.Taxonomy over the classes in their order, or None: then only classes are names
    hold : share of a latent's summed activation that the classes of a name must hold
    fill : share of a synset's classes that must be among them
    """
    n_classes, n_latents = caps.sums.shape
    if len(class_names) != n_classes:
        raise ValueError(f"class_names has {len(class_names)} names, the profiles {n_classes} classes")
    if taxonomy is not None and len(taxonomy.leaves) != n_classes:
        raise ValueError(f"taxonomy has {len(taxonomy.leaves)} leaves, the profiles {n_classes} classes")
    shares, fired = posterior(caps), caps.active.sum(axis=0)
    inside = held(shares, hold)
    count = inside.sum(axis=1)
    members = np.where((count == 1)[:, None], inside, False)
    names = np.array(list(class_names), dtype=object)
    name = np.where(count == 1, names[shares.argmax(axis=1)], "").astype(object)
    kind = np.where(count == 1, "class", "none").astype(object)
    for latent, synset, below in _lowest(inside, taxonomy, fill):
        members[latent], name[latent], kind[latent] = below, taxonomy.name(synset), "synset"
    unfit = fired < LEAST
    kind[unfit], name[unfit], members[unfit] = "rare", "", False
    kind[fired == 0] = "dead"
    order = np.argsort(-shares, axis=1, kind="stable")[:, :3]
    strongest = [", ".join(names[c] for c in row if inside[i, c]) for i, row in enumerate(order)]
    table = pd.DataFrame({"latent": np.arange(n_latents), "kind": kind, "name": name, "held": count})
    table["under"], table["fired"] = members.sum(axis=1), fired
    table.insert(5, "base", members @ caps.counts / max(caps.counts.sum(), 1))
    table["density"], table["selectivity"] = fired / max(caps.counts.sum(), 1), selectivity(shares)
    return Named(table.assign(classes=strongest), members)


def _lowest(inside: np.ndarray, taxonomy, fill: float):
    """Latent, synset and its leaves, for the lowest synset above two or more held classes that they fill enough."""
    if taxonomy is None:
        return
    masks = {synset: taxonomy.members(synset) for synset in taxonomy.synsets}
    if not masks:
        return
    synsets = sorted(masks, key=lambda synset: (masks[synset].sum(), -taxonomy.depth(synset), str(synset)))
    below = np.array([masks[synset] for synset in synsets])  # (S, C), smallest first
    count = inside.sum(axis=1)
    outside = inside.astype(np.float32) @ (~below).T.astype(np.float32)  # held classes that a synset lacks
    for latent in np.flatnonzero((count > 1) & (outside == 0).any(axis=1)):
        lowest = int(np.flatnonzero(outside[latent] == 0)[0])
        if count[latent] >= fill * below[lowest].sum():
            yield latent, synsets[lowest], below[lowest]


# --- chance


def permuted(codes, labels, n_classes: int, permutations: int = 200, seed: int = 0) -> np.ndarray:
    """P value (M,) of each latent's selectivity: share of label permutations that make it as selective, one added.

    Rows keep their codes, so a latent's few strong rows stay strong. NaN for a latent that never fires.
    """
    a = codes.csr()
    labels = check_labels(labels, a.shape[0], n_classes)
    counts = np.maximum(np.bincount(labels, minlength=n_classes), 1)[:, None]
    row = np.repeat(np.arange(a.shape[0]), np.diff(a.indptr))

    def measured(labels):
        cell = labels[row] * a.shape[1] + a.indices
        mean = np.bincount(cell, a.data, minlength=n_classes * a.shape[1]).reshape(n_classes, -1) / counts
        total = mean.sum(axis=0)
        return selectivity(np.divide(mean, total, out=np.zeros_like(mean), where=total > 0).T)

    own, rng, above = measured(labels), np.random.default_rng(seed), np.zeros(a.shape[1])
    for _ in range(permutations):
        above += measured(rng.permutation(labels)) >= own - 1e-12
    return np.where(np.isnan(own), np.nan, (1 + above) / (1 + permutations))


def false_discovery(p: np.ndarray) -> np.ndarray:
    """P values adjusted by Benjamini and Hochberg (1995); NaN stays NaN and counts as no test."""
    from scipy.stats import false_discovery_control

    p = np.asarray(p, dtype=np.float64)
    adjusted, known = np.full(p.shape, np.nan), ~np.isnan(p)
    if known.any():
        adjusted[known] = false_discovery_control(p[known])
    return adjusted


# --- shares, beside controls


def kind_shares(named: Named) -> dict[str, float]:
    """Share of all latents by kind; "named" (one class or a synset), "narrow" (of classes with few rows: not BROAD)."""
    kind, narrow = named.table["kind"], named.named & (named.table["base"] <= BROAD)
    found = {name: float((kind == name).mean()) for name in KINDS}
    return found | {"named": found["class"] + found["synset"], "narrow": float(narrow.mean())}


def name_counts(named: Named) -> pd.DataFrame:
    """How many latents have each synset's name. Columns: name, latents, classes (below it), base, share (of names)."""
    of = named.table[named.table["kind"] == "synset"]
    groups = of.groupby("name", sort=False)
    found = groups.agg(latents=("latent", "size"), classes=("under", "first"), base=("base", "first")).reset_index()
    found["share"] = found["latents"] / max(len(of), 1)
    return found.sort_values(["latents", "name"], ascending=[False, True], ignore_index=True)


def compare_shares(
    codes: Mapping[str, object],
    labels,
    class_names: Sequence[str],
    taxonomy=None,
    holds: Sequence[float] = (HOLD,),
    halves: int = 20,
    seed: int = 0,
) -> pd.DataFrame:
    """Shares of the kinds for several dictionaries on the same rows, with intervals, and each less the first.

    The spread is that over random halves of the rows, the same for all: the delete-half jackknife, whose standard
    deviation over halves estimates that of the full sample. It is the rows' alone: a dictionary is not trained again.

    Parameters
    ----------
    codes : mapping of a dictionary's title to SparseCodes of N rows; the first is compared with the others
    labels : (N,) int
    class_names, taxonomy : as for :func:`name_latents`
    holds : thresholds of :func:`name_latents`

    Returns
    -------
    DataFrame
        dictionary, hold, kind (KINDS, named, narrow), value, lo, hi (shares); difference, difference_lo, difference_hi:
        the first less this one, with intervals that cover all thresholds together (Bonferroni).
    """
    from scipy.stats import norm

    n_classes = len(class_names)
    labels = check_labels(labels, len(next(iter(codes.values()))), n_classes)
    rng, keys = np.random.default_rng(seed), [*KINDS, "named", "narrow"]

    def measured(rows):
        parts = []
        for of in codes.values():
            caps = ClassActivationProfiles.empty(n_classes, of.n_latents).update(of[rows], labels[rows])
            shares = [kind_shares(name_latents(caps, class_names, taxonomy, hold)) for hold in holds]
            parts.append([[at[key] for key in keys] for at in shares])
        return np.array(parts)

    whole, parts = measured(np.arange(len(labels))), []
    for _ in range(halves):
        parts.append(measured(np.sort(rng.permutation(len(labels))[: len(labels) // 2])))
    parts = np.array(parts)  # (halves, dictionaries, holds, kinds)
    lo, hi = (np.clip(whole + sign * 1.96 * parts.std(axis=0), 0, 1) for sign in (-1, 1))
    gap, z = whole[:1] - whole, norm.isf(0.025 / len(holds))
    reach, rows = z * (parts[:, :1] - parts).std(axis=0), []
    for i, title in enumerate(codes):
        for j, hold in enumerate(holds):
            for k, kind in enumerate(keys):
                at = i, j, k
                cells = (gap[at], gap[at] - reach[at], gap[at] + reach[at]) if i else (np.nan,) * 3
                rows.append((title, hold, kind, whole[at], lo[at], hi[at], *cells))
    gaps = ["difference", "difference_lo", "difference_hi"]
    return pd.DataFrame(rows, columns=["dictionary", "hold", "kind", "value", "lo", "hi", *gaps])


# --- the name on rows that it was not made from


def check_names(named: Named, codes, labels, n_boot: int = 500, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Precision and recall of the names on other rows.

    Parameters
    ----------
    named : Named, from training rows
    codes, labels : SparseCodes of N test rows, (N,) int
    n_boot : int
        Replicates over rows, the same for all latents.

    Returns
    -------
    (one row a named latent, one row a kind)
        latent, kind, name, fired (test rows), precision (share of these whose class is below the name), recall (share
        of the rows of the name's classes in which it fires), f1, base (the share of all rows that these classes have:
        the precision of a latent that knows nothing). By kind ("named": both): measure (precision, base, lift =
        precision - base, recall, f1), value, lo, hi: means over the latents that fire in some test row; latents.
        "narrow": names of classes with at most the share BROAD of the training rows.
    """
    fires = codes.csr()
    fires.data[:] = 1
    labels = check_labels(labels, fires.shape[0], named.members.shape[1])
    chosen = np.flatnonzero(named.named)
    below = named.members[chosen].T[labels].astype(np.float64)  # (N, named)
    part = fires[:, chosen]
    hits = part.multiply(below).tocsr()

    def rates(weight):  # (B, N) -> dict of (B, named)
        fired, hit, size = (np.asarray((m.T @ weight.T).T) for m in (part, hits, below))
        rows = weight.sum(axis=1, keepdims=True)
        with np.errstate(invalid="ignore", divide="ignore"):
            found = {"precision": hit / fired, "recall": hit / size, "base": size / rows}
            found["f1"] = 2 * hit / (fired + size)
        found["lift"] = found["precision"] - found["base"]
        return found, fired

    found, fired = rates(np.ones((1, len(labels))))
    keep = ["precision", "recall", "f1", "base"]
    about = named.table.loc[chosen, ["latent", "kind", "name"]].reset_index(drop=True)
    each = about.assign(fired=fired[0].astype(int), **{key: found[key][0] for key in keep})
    rng = np.random.default_rng(seed)
    weight = rng.multinomial(len(labels), np.full(len(labels), 1 / len(labels)), size=n_boot).astype(np.float64)
    again, fired_again = rates(weight)
    alive, rows = fired[0] > 0, []
    narrow = named.table["base"].to_numpy()[chosen] <= BROAD
    for kind in ("class", "synset", "named", "narrow"):
        of = alive & {"named": np.ones_like(alive), "narrow": narrow}.get(kind, about["kind"].eq(kind).to_numpy())
        for key in ("precision", "base", "lift", "recall", "f1"):
            value = float(np.nanmean(found[key][0, of])) if of.any() else np.nan
            # A latent that fires in no row drawn has no precision; its recall is 0.
            silent = np.nan if key in ("precision", "lift") else 0.0
            replicates = np.where((fired_again > 0) | (key == "base"), again[key], silent)[:, of]
            lo, hi = interval(np.nanmean(replicates, axis=1)) if of.any() and n_boot else (np.nan, np.nan)
            rows.append((kind, key, value, lo, hi, int(of.sum())))
    return each, pd.DataFrame(rows, columns=["kind", "measure", "value", "lo", "hi", "latents"])


def top_rows(codes, latents: Sequence[int], features, class_names: Sequence[str], n: int = 8) -> pd.DataFrame:
    """The rows in which latents fire most, of the same codes and features. Columns: latent, rank, row, activation, id,
    class.
    """
    columns, rows = codes.csr().tocsc(), []
    for latent in latents:
        part = slice(columns.indptr[latent], columns.indptr[latent + 1])
        value, row = columns.data[part], columns.indices[part]
        for rank, i in enumerate(np.lexsort((row, -value))[:n]):
            label = int(features.labels[row[i]])
            known = class_names[label] if 0 <= label < len(class_names) else ""
            rows.append((int(latent), rank + 1, int(row[i]), float(value[i]), str(features.ids[row[i]]), known))
    return pd.DataFrame(rows, columns=["latent", "rank", "row", "activation", "id", "class"])


# --- of a run


def taxonomy_of(class_names: Sequence[str]):
    """WordNet above classes named as ImageNet names them ("n02088364_beagle"); None for others.

    Classes that neither the embedded extract nor the folder in CAPSAE_WORDNET knows are logged as a warning, once.
    """
    from . import wordnet

    wnids = [wordnet.wnid(name) for name in class_names]
    if not wnids or None in wnids:
        return None
    try:
        return wordnet.load(wnids)
    except ValueError as error:
        log.warning("latents are named by classes alone, not by WordNet: %s", error)
        return None


def over_holds(
    codes: Mapping[str, object], labels, class_names: Sequence[str], taxonomy=None, holds=HOLDS, seed: int = 0
) -> pd.DataFrame:
    """:func:`compare_shares` at several thresholds, and the first dictionary under permuted labels (no intervals)."""
    found = compare_shares(codes, labels, class_names, taxonomy, holds, seed=seed)
    first, of = next(iter(codes.items()))
    known = np.random.default_rng(seed).permutation(labels)
    caps, rows = ClassActivationProfiles.empty(len(class_names), of.n_latents).update(of, known), []
    for hold in holds:
        shares = kind_shares(name_latents(caps, class_names, taxonomy, hold))
        rows += [(f"{first}, labels permuted", hold, kind, value) for kind, value in shares.items()]
    return pd.concat([found, pd.DataFrame(rows, columns=["dictionary", "hold", "kind", "value"])], ignore_index=True)
