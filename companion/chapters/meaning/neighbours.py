"""Clustering and retrieval on codes, beside the CLS that they come from and dictionaries that were not trained.

All rows are brought to unit length first, so that distances are cosines for every representation alike. A code stays
sparse: similarities are made for a block of queries at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from sklearn.cluster import KMeans

from capsae.sae.dictionaries import methods as dictionaries
from capsae.stats import interval

K = 10
SAE, RANDOM = "SAE codes", "random dictionary"  # titles of representations
_QUERIES = 256


def unit_rows(x):
    """SparseCodes as a csr matrix (N, M), or an array (N, d), with rows of unit length (zero rows stay zero)."""
    if not hasattr(x, "indices"):
        x = np.asarray(x, dtype=np.float32)
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)
    a = x.csr().astype(np.float32)
    length = np.sqrt(np.asarray((a * a).sum(axis=1)).ravel())
    if a.nnz < 2**31:  # k-means of scikit-learn takes no others
        a.indices, a.indptr = a.indices.astype(np.int32), a.indptr.astype(np.int32)
    a.data /= np.repeat(np.maximum(length, 1e-30), np.diff(a.indptr)).astype(np.float32)
    return a


def representations(run) -> dict[str, tuple]:
    """What is compared: title -> (training rows, test rows), as SparseCodes or arrays.

    The SAE's codes; the CLS as the SAE sees it, and the same less its training mean; signed top-k of all principal
    components, and a random dictionary of the SAE's size, both with the SAE's k.
    """
    train, test = (run.features(name).cls for name in ("train", "test"))
    sae, settings = run.sae, run.experiment.sae
    dense = [np.asarray(sae.normalize(rows), np.float32) for rows in (train, test)]
    mean = dense[0].mean(axis=0, dtype=np.float64).astype(np.float32)
    found = {SAE: (run.codes("train"), run.codes("test")), "CLS": tuple(dense)}
    found["CLS, centred"] = tuple(rows - mean for rows in dense)
    given = {"k": min(settings.k, train.shape[1]), "normalize": settings.normalize, "seed": 0}
    controls = {"PCA, top k": ("pca", train.shape[1]), RANDOM: ("random", settings.latents)}
    for title, (method, latents) in controls.items():
        fitted = dictionaries.create(method, latents=latents, **given).fit(train)
        found[title] = (fitted.encode(train), fitted.encode(test))
    return found


# --- clustering


def cluster(sets: Mapping[str, tuple], n_clusters: int, seeds: Sequence[int] = range(10)) -> dict[str, np.ndarray]:
    """k-means fitted on training rows, applied to test rows: title -> clusters (S, Q) of the Q test rows, S starts."""
    found = {}
    for title, (train, test) in sets.items():
        train, test = unit_rows(train), unit_rows(test)
        starts = (KMeans(n_clusters, n_init=1, random_state=seed, max_iter=100).fit(train) for seed in seeds)
        found[title] = np.stack([start.predict(test) for start in starts])
    return found


def agreement(tables: np.ndarray) -> dict[str, np.ndarray]:
    """nmi, ari and purity (B,) of contingency tables (B, C, K) of classes by clusters, weighted counts allowed.

    nmi: mutual information over the mean of both entropies; ari: adjusted Rand index, 0 in expectation by chance;
    purity: share of the rows whose class is the most common one of their cluster.
    """
    total = tables.sum(axis=(1, 2))
    rows, columns = tables.sum(axis=2), tables.sum(axis=1)

    def entropy(counts):
        p = counts.reshape(len(counts), -1) / total[:, None]
        return -(p * np.log(p, out=np.zeros_like(p), where=p > 0)).sum(axis=1)

    def within(counts):
        return (counts * (counts - 1) / 2).reshape(len(counts), -1).sum(axis=1)

    of_rows, of_columns = entropy(rows), entropy(columns)
    mean = (of_rows + of_columns) / 2
    nmi = np.divide(of_rows + of_columns - entropy(tables), mean, out=np.ones_like(mean), where=mean > 0)
    chance = within(rows) * within(columns) / (total * (total - 1) / 2)
    most = (within(rows) + within(columns)) / 2
    ari = np.divide(within(tables) - chance, most - chance, out=np.ones_like(mean), where=most != chance)
    return {"nmi": nmi, "ari": ari, "purity": tables.max(axis=1).sum(axis=1) / total}


def judge(clusters: Mapping[str, np.ndarray], labels, n_boot: int = 500) -> pd.DataFrame:
    """How well ``clusters`` (of :func:`cluster`) agree with classes ``labels`` (Q,), and the first less each other.

    As :func:`retrieve` gives it, for the measures of :func:`agreement`: means over the starts. Replicates draw both
    test rows (the same for all representations) and starts. Intervals are basic (2 value - quantiles): a row drawn
    twice agrees with itself, which lifts all replicates.
    """
    labels, n, rng = np.asarray(labels), len(labels), np.random.default_rng(0)
    weight = rng.multinomial(n, np.full(n, 1 / n), size=n_boot).astype(np.float64)
    weight = np.vstack([np.ones(n), weight])  # first the rows as they are
    n_classes, measured = int(labels.max()) + 1, {}
    for title, starts in clusters.items():
        size, found = int(starts.max()) + 1, []
        for start in starts:
            cell = np.zeros((n, n_classes * size))
            cell[np.arange(n), labels * size + start] = 1
            found.append(agreement((weight @ cell).reshape(-1, n_classes, size)))
        drawn = rng.multinomial(len(starts), np.full(len(starts), 1 / len(starts)), size=n_boot) / len(starts)
        drawn = np.vstack([np.full(len(starts), 1 / len(starts)), drawn])
        measured[title] = {key: sum(d * f[key] for d, f in zip(drawn.T, found, strict=True)) for key in found[0]}
    return _beside(measured, basic=True)


def _beside(measured: Mapping[str, Mapping[str, np.ndarray]], basic: bool = False) -> pd.DataFrame:
    """Tabulate title -> measure -> (1 + B,): the value, then its replicates, drawn alike for all titles."""

    def reach(values, level=0.95):
        lo, hi = interval(values[1:], level)
        return (2 * values[0] - hi, 2 * values[0] - lo) if basic else (lo, hi)

    first, rows = next(iter(measured.values())), []
    level = 1 - 0.05 / max(len(measured) - 1, 1)
    for title, of in measured.items():
        for measure, values in of.items():
            gap = first[measure] - values
            cells = (gap[0], *reach(gap, level)) if of is not first else (np.nan,) * 3
            lo, hi = reach(values)
            rows.append((title, measure, values[0], lo, min(hi, 1.0), *cells))
    gaps = ["difference", "difference_lo", "difference_hi"]
    return pd.DataFrame(rows, columns=["representation", "measure", "value", "lo", "hi", *gaps])


# --- retrieval


def retrieval(train, test, train_labels, test_labels, k: int = K) -> dict[str, np.ndarray]:
    """Search the training rows by cosine, one test row at a time: precision (Q,), map (Q,).

    ``precision``: share of the k nearest that have the query's class. ``map``: average precision over the whole
    ranking, equal similarities (no latent in common) counted as one place, the last; NaN for a query whose class no
    training row has. Training rows are shuffled first: ties among the k nearest must not fall in the
    order of the classes.
    """
    train, test = unit_rows(train), unit_rows(test)
    if not 1 <= k <= train.shape[0]:
        raise ValueError(f"k is {k}: of {train.shape[0]} training rows, 1 to {train.shape[0]} can be retrieved")
    order = np.random.default_rng(0).permutation(train.shape[0])
    train, labels = train[order].T, np.asarray(train_labels)[order]
    test_labels = np.asarray(test_labels)
    precision, average = np.empty(len(test_labels)), np.empty(len(test_labels))
    for start in range(0, len(test_labels), _QUERIES):
        block = slice(start, start + _QUERIES)
        near = test[block] @ train
        near = near.toarray() if hasattr(near, "toarray") else near
        hit = labels == test_labels[block, None]
        nearest = np.argpartition(near, len(labels) - k, axis=1)[:, -k:]
        precision[block] = np.take_along_axis(hit, nearest, axis=1).mean(axis=1)
        for i, (every, own) in enumerate(zip(np.sort(near, axis=1), hit, strict=True)):
            found = np.sort(near[i, own])
            at_least = [len(all_) - np.searchsorted(all_, found, "left") for all_ in (found, every)]
            average[start + i] = (at_least[0] / at_least[1]).mean() if len(found) else np.nan
    return {"precision": precision, "map": average}


def retrieve(sets: Mapping[str, tuple], train_labels, test_labels, k: int = K, n_boot: int = 1000) -> pd.DataFrame:
    """:func:`retrieval` of several representations, with intervals over the queries, and the first less each other.

    Columns: representation, measure (precision, map), value, lo, hi (95 %, bootstrap over test rows); difference: the
    first less this one, paired, with difference_lo, difference_hi at a level that covers all others together
    (Bonferroni). The training rows and the dictionaries are taken as given.
    """
    n = len(test_labels)
    weight = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=n_boot) / n
    weight = np.vstack([np.full(n, 1 / n), weight])
    found = {title: retrieval(*pair, train_labels, test_labels, k) for title, pair in sets.items()}
    return _beside({title: {key: weight @ value for key, value in of.items()} for title, of in found.items()})


PANELS = {"precision": f"precision at {K}", "map": "mean average precision"}
PANELS |= {"nmi": "NMI of k-means", "ari": "ARI of k-means"}


def panels(*tables: pd.DataFrame) -> pd.DataFrame:
    """Tables of :func:`retrieve` and :func:`judge` as one for a figure, with a column panel."""
    both = pd.concat(tables, ignore_index=True)
    both = both[both["measure"].isin(list(PANELS))]
    both.insert(0, "panel", both["measure"].map(PANELS))
    return both.sort_values("measure", key=lambda m: m.map(list(PANELS).index), kind="stable", ignore_index=True)
