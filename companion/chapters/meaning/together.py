"""Which latents fire together, and whether that is more than their classes explain.

Rows in which both of two latents fire are counted from the sparse codes. Under independence given a class (stratum s of
n_s rows) the expected count is

    E_ij = sum_s f_is f_js / n_s                 (f: rows of the stratum in which a latent fires)

with one stratum for all rows (do they meet at all?) or one a class (do they meet beyond their classes?). Given how
often each latent fires in each stratum, the count is a sum of independent hypergeometric variables: the test is that of
Mantel and Haenszel (1959) [s], one-sided. Where the variance

    V_ij = sum_s f_is f_js (n_s - f_is) (n_s - f_js) / (n_s^2 (n_s - 1))

is at least 5, the tail is that of a gamma variable with the count's mean, variance and skewness, at the count less one
half [r] (a normal tail, without the skewness, is too thin where latents are rare). Elsewhere it is Poisson's with mean
E, which from E + 1 on is never below the exact one (Anderson and Samuels 1967) [s].
A code of k latents makes latents compete for places, which lowers counts: that, too, errs on the safe side.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.sparse import coo_array, csr_array
from scipy.special import gammainc, gammaincc, ndtr
from sklearn.cluster import SpectralClustering
from sklearn.metrics import adjusted_rand_score

from capsae.caps import check_labels
from capsae.latents.naming import FDR, false_discovery
from capsae.sae import SparseCodes

LEAST_ROWS = 10  # rows in which a latent must fire to be paired
_VARIANCE = 5.0  # from which the tail is that of three moments


def pairs(codes, labels=None, n_classes: int = 1, least: int = LEAST_ROWS) -> pd.DataFrame:
    """Pairs of latents that fire together in at least one row.

    ``labels`` (N,): classes, as strata; None for one stratum. ``least``: rows in which both latents must fire, each by
    itself. Columns: i, j (i < j), together (rows), expected, sd (of the count, within strata), z (together - expected,
    over sd: the partial association), pmi (log2 together / expected), phi (correlation of firing, over all rows), p, q.
    ``attrs["pairs"]``: all pairs of such latents; those that are no row never meet: p = 1.
    """
    fires = codes.csr()
    fires.data[:] = 1
    n = fires.shape[0]
    labels = np.zeros(n, np.int64) if labels is None else check_labels(labels, n, n_classes)
    fired = np.asarray(fires.sum(axis=0)).ravel()
    kept = np.flatnonzero(fired >= least)
    columns = fires[:, kept]
    counts = (columns.T @ columns).tocoo()
    upper = counts.row < counts.col
    i, j, together = counts.row[upper], counts.col[upper], counts.data[upper]
    classes = csr_array((np.ones(n), (labels, np.arange(n))), shape=(n_classes, n))
    by_class = (classes @ columns).toarray()  # (C, kept)
    size = np.bincount(labels, minlength=n_classes)
    expected, variance, third = (m[i, j] for m in _moments(by_class, size))
    p, total = _upper_tail(together, expected, variance, third), len(kept) * (len(kept) - 1) // 2
    q = false_discovery(np.concatenate([p, np.ones(total - len(p))]))[: len(p)]
    f = fired[kept] / n
    spread = np.sqrt(f * (1 - f))
    phi = (together / n - f[i] * f[j]) / np.maximum(spread[i] * spread[j], 1e-300)
    with np.errstate(divide="ignore"):
        pmi = np.log2(together / expected)
    sd = np.sqrt(variance)
    z = np.divide(together - expected, sd, out=np.zeros(len(sd)), where=sd > 0)
    table = pd.DataFrame(
        {"i": kept[i], "j": kept[j], "together": together.astype(int), "expected": expected, "sd": sd, "z": z,
         "pmi": pmi, "phi": phi, "p": p, "q": q}
    )  # fmt: skip
    table.attrs["pairs"] = total
    return table


def _moments(by_class: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, variance and third central moment (K, K) of sums of hypergeometric counts over the strata.

    ``by_class`` (C, K): rows of each of C strata of ``size`` rows in which each latent fires.
    """
    n, f = np.maximum(size, 1)[:, None].astype(np.float64), by_class.astype(np.float64)
    mean = f / np.sqrt(n)
    variance = f * (n - f) / (n * np.sqrt(np.maximum(n - 1, 1)))
    # All three moments are products of a term of i and a term of j: 0 in strata of one or two rows, where undefined.
    third = variance * (n - 2 * f) / np.sqrt(n * np.maximum(n - 2, 1)) * (n > 2)
    return mean.T @ mean, variance.T @ variance, third.T @ third


def _upper_tail(count: np.ndarray, expected: np.ndarray, variance: np.ndarray, third: np.ndarray) -> np.ndarray:
    """P(a count at least as large), given the moments; 1 at or below the expected count."""
    p = np.where(count >= expected + 1, gammainc(np.maximum(count, 1), expected), 1.0)
    large = variance >= _VARIANCE
    sd = np.sqrt(variance[large])
    z, skew = (count[large] - 0.5 - expected[large]) / sd, third[large] / sd**3
    # Pearson's type III: x = (gamma(a) - a) / sqrt(a), mirrored where the skewness is negative; normal without any.
    flat = np.abs(skew) < 1e-3
    a = 4 / np.where(flat, 1.0, skew) ** 2
    at = np.maximum(a + np.sign(skew) * z * np.sqrt(a), 0)
    tail = np.where(flat, ndtr(-z), np.where(skew > 0, gammaincc(a, at), gammainc(a, at)))
    p[large] = np.where(count[large] > expected[large], tail, 1.0)
    return p


def found(table: pd.DataFrame) -> int:
    """How many pairs meet more often than expected."""
    return int((table["q"] <= FDR).sum())


def excess(alone: pd.DataFrame, within: pd.DataFrame) -> float:
    """Of the rows in which the pairs found in ``alone`` meet beyond expectation, the share that classes account for.

    1 - (together - expected within classes) / (together - expected), summed over the pairs; NaN without any. The pairs
    are chosen on the same rows: a description, no test.
    """
    of = (alone["q"] <= FDR).to_numpy()
    met, left = (float((table["together"] - table["expected"])[of].sum()) for table in (alone, within))
    return 1 - left / met if met > 0 else float("nan")


def shuffled(codes, labels, n_classes: int, seed: int = 0):
    """SparseCodes in which each latent fires in other rows of the same classes: nothing meets beyond its class.

    A check for :func:`pairs`. The number of latents that fire then differs from row to row.
    """
    a = codes.csr().tocoo()
    rng, by_class = np.random.default_rng(seed), [np.flatnonzero(labels == c) for c in range(n_classes)]
    cell = a.col.astype(np.int64) * n_classes + np.asarray(labels)[a.row]
    order = np.argsort(cell, kind="stable")
    row = np.empty(len(order), np.int64)
    starts = np.flatnonzero(np.r_[True, np.diff(cell[order]) > 0, True])
    for start, stop in zip(starts, starts[1:], strict=False):
        members = by_class[cell[order[start]] % n_classes]
        row[order[start:stop]] = rng.choice(members, stop - start, replace=False)
    m = coo_array((a.data, (row, a.col)), shape=a.shape).tocsr()
    width = int(np.diff(m.indptr).max())
    values, indices = np.zeros((a.shape[0], width), np.float32), np.zeros((a.shape[0], width), np.int32)
    at = np.arange(m.nnz) - np.repeat(m.indptr[:-1], np.diff(m.indptr))
    rows = np.repeat(np.arange(a.shape[0]), np.diff(m.indptr))
    values[rows, at], indices[rows, at] = m.data, m.indices
    return SparseCodes(values, indices, codes.n_latents)


def communities(table: pd.DataFrame, n: int) -> pd.DataFrame:
    """Groups of latents that fire together: spectral clustering of the graph of the pairs found, weighted by phi.

    Columns: latent, community (0 .. n-1, the largest first). Latents without any pair are left out.
    """
    edges = table[(table["q"] <= FDR) & (table["phi"] > 0)]
    latents = np.unique(np.concatenate([edges["i"], edges["j"]]))
    if len(latents) <= n:
        raise ValueError(f"{len(latents)} latents have a partner: too few for {n} groups")
    i, j = (np.searchsorted(latents, edges[key]) for key in ("i", "j"))
    shape = (len(latents), len(latents))
    graph = coo_array((edges["phi"], (i, j)), shape=shape).tocsr()
    # Latents without a path between them: a faint edge, so that the graph's one component has distinct vectors.
    affinity = (graph + graph.T).toarray() + 1e-6
    np.fill_diagonal(affinity, 1)
    given = {"affinity": "precomputed", "assign_labels": "cluster_qr", "random_state": 0}
    label = SpectralClustering(n, **given).fit_predict(affinity)
    place = np.argsort(-np.bincount(label, minlength=n), kind="stable").argsort()
    return pd.DataFrame({"latent": latents, "community": place[label]})


def follow_classes(groups: pd.DataFrame, shares: np.ndarray, n_boot: int = 200) -> dict[str, float]:
    """Agreement of communities with each latent's strongest class: adjusted Rand index, basic bootstrap over latents.

    ``shares`` (M, C) of :func:`capsae.latents.naming.posterior`. ``value`` is 0 as chance has it, 1 for one partition.
    """
    label = groups["community"].to_numpy()
    top = shares[groups["latent"]].argmax(axis=1)
    rng, ari = np.random.default_rng(0), adjusted_rand_score(top, label)
    drawn = (rng.integers(0, len(label), len(label)) for _ in range(n_boot))
    again = [adjusted_rand_score(top[rows], label[rows]) for rows in drawn]
    # Latents drawn twice agree with themselves, so replicates lie too high: the basic interval turns them around.
    lo, hi = np.minimum(2 * ari - np.quantile(again, [0.975, 0.025]), 1)
    return {"value": ari, "lo": float(lo), "hi": float(hi)}


def group_classes(groups: pd.DataFrame, shares: np.ndarray, class_names) -> pd.DataFrame:
    """Latents of each group by their strongest class. Columns: community, class, latents; every pair has its row."""
    top = shares[groups["latent"]].argmax(axis=1)
    n = int(groups["community"].max()) + 1
    counts = np.zeros((n, len(class_names)), np.int64)
    np.add.at(counts, (groups["community"].to_numpy(), top), 1)
    c, k = np.indices(counts.shape).reshape(2, -1)
    return pd.DataFrame({"community": c, "class": np.take(list(class_names), k), "latents": counts.ravel()})


def strongest(table: pd.DataFrame, names: pd.DataFrame, top: int = 10) -> pd.DataFrame:
    """The pairs found with the largest z, each latent called by its name or its classes. ``names``: Named.table.

    Only pairs whose count has a variance of at least 5: for rarer ones z is large by one row.
    """
    found = table[(table["q"] <= FDR) & (table["sd"] ** 2 >= _VARIANCE)]
    found = found.sort_values("z", ascending=False, kind="stable").head(top)
    called = names["name"].where(names["name"] != "", names["classes"]).to_numpy()
    columns = {"i": found["i"], "i fires for": called[found["i"]], "j": found["j"], "j fires for": called[found["j"]]}
    kept = {key: found[key] for key in ("together", "expected", "sd", "z", "phi", "q")}
    return pd.DataFrame(columns | kept).reset_index(drop=True)
