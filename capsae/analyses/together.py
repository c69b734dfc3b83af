"""Which latents fire together, and whether that is more than their classes explain.

Rows in which both of two latents fire are counted from the sparse codes. Under independence given a class (stratum s of
n_s rows) the expected count is

    E_ij = sum_s f_is f_js / n_s                 (f: rows of the stratum in which a latent fires)

with one stratum for all rows (do they meet at all?) or one a class (do they meet beyond their classes?). Given the
margins, the count is a sum of hypergeometric variables, so of independent Bernoulli variables; its upper tail is at
most Poisson's with mean E from E + 1 on (Anderson and Samuels 1967), which gives p values that are safe for any E [r].
A code of k latents makes latents compete for places, which lowers counts: that, too, errs on the safe side.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from ..caps import check_labels
from ..sae.measures import _matrix
from .meaning import FDR, false_discovery

LEAST_ROWS = 10  # rows in which a latent must fire to be paired


def pairs(codes, labels=None, n_classes: int = 1, least: int = LEAST_ROWS) -> pd.DataFrame:
    """Pairs of latents that fire together in at least one row.

    Parameters
    ----------
    codes : SparseCodes of N rows
    labels : (N,) int or None
        Classes, as strata; None for one stratum.
    least : int
        Rows in which both latents must fire, each by itself.

    Returns
    -------
    DataFrame
        i, j (i < j), together (rows), expected, pmi (log2 together / expected), phi (correlation of firing, over all
        rows), p, q. ``attrs``: latents (paired), pairs (of these, all; the others never meet: p = 1).
    """
    fires = _matrix(codes)
    fires.data[:] = 1
    n = fires.shape[0]
    labels = np.zeros(n, np.int64) if labels is None else check_labels(labels, n, n_classes)
    fired = np.asarray(fires.sum(axis=0)).ravel()
    kept = np.flatnonzero(fired >= least)
    columns = fires[:, kept]
    counts = (columns.T @ columns).tocoo()
    upper = counts.row < counts.col
    i, j, together = counts.row[upper], counts.col[upper], counts.data[upper]
    by_class = _by_class(columns, labels, n_classes)  # (C, kept)
    size = np.maximum(np.bincount(labels, minlength=n_classes), 1)
    expected = np.zeros(len(i))
    for f, n_s in zip(by_class, size, strict=True):
        expected += f[i] * f[j] / n_s
    p, total = _upper_tail(together, expected), len(kept) * (len(kept) - 1) // 2
    q = false_discovery(np.concatenate([p, np.ones(total - len(p))]))[: len(p)]
    f = fired[kept] / n
    spread = np.sqrt(f * (1 - f))
    phi = (together / n - f[i] * f[j]) / np.maximum(spread[i] * spread[j], 1e-300)
    with np.errstate(divide="ignore"):
        pmi = np.log2(together / expected)
    table = pd.DataFrame(
        {"i": kept[i], "j": kept[j], "together": together.astype(int), "expected": expected, "pmi": pmi, "phi": phi,
         "p": p, "q": q}
    )  # fmt: skip
    table.attrs.update(latents=len(kept), pairs=total)
    return table


def _by_class(columns, labels: np.ndarray, n_classes: int) -> np.ndarray:
    from scipy.sparse import csr_array

    where = (labels, np.arange(len(labels)))
    return (csr_array((np.ones(len(labels)), where), shape=(n_classes, len(labels))) @ columns).toarray()


def _upper_tail(count: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """P(Poisson(expected) >= count), 1 where the bound does not hold."""
    from scipy.special import gammainc

    return np.where(count >= expected + 1, gammainc(np.maximum(count, 1), expected), 1.0)


def found(table: pd.DataFrame, fdr: float = FDR) -> dict[str, float]:
    """How many pairs meet more often than expected: latents, pairs, found, share."""
    n = int((table["q"] <= fdr).sum())
    total = table.attrs["pairs"]
    return {"latents": table.attrs["latents"], "pairs": total, "found": n, "share": n / total if total else 0.0}


def shuffled(codes, labels, n_classes: int, seed: int = 0):
    """SparseCodes in which each latent fires in other rows of the same classes: nothing meets beyond its class.

    A check for :func:`pairs`. The number of latents that fire then differs from row to row.
    """
    from scipy.sparse import coo_array

    from ..sae import SparseCodes

    a = _matrix(codes).tocoo()
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


def communities(table: pd.DataFrame, n: int, seed: int = 0, fdr: float = FDR) -> pd.DataFrame:
    """Groups of latents that fire together: spectral clustering of the graph of the pairs found, weighted by phi.

    Parameters
    ----------
    table : of :func:`pairs`
    n : int
        Groups.

    Returns
    -------
    DataFrame
        latent, community (0 .. n-1, the largest first). Latents without any pair are left out.
    """
    from scipy.sparse import coo_array
    from sklearn.cluster import SpectralClustering

    edges = table[(table["q"] <= fdr) & (table["phi"] > 0)]
    latents = np.unique(np.concatenate([edges["i"], edges["j"]]))
    if len(latents) <= n:
        raise ValueError(f"{len(latents)} latents have a partner: too few for {n} groups")
    i, j = (np.searchsorted(latents, edges[key]) for key in ("i", "j"))
    shape = (len(latents), len(latents))
    graph = coo_array((edges["phi"], (i, j)), shape=shape).tocsr()
    # Latents without a path between them: a faint edge, so that the graph's one component has distinct vectors.
    affinity = (graph + graph.T).toarray() + 1e-6
    np.fill_diagonal(affinity, 1)
    given = {"affinity": "precomputed", "assign_labels": "cluster_qr", "random_state": seed}
    label = SpectralClustering(n, **given).fit_predict(affinity)
    order = np.argsort(-np.bincount(label, minlength=n), kind="stable")
    place = np.empty(n, np.int64)
    place[order] = np.arange(n)
    return pd.DataFrame({"latent": latents, "community": place[label]})


def follow_classes(groups: pd.DataFrame, shares: np.ndarray, n_boot: int = 200, seed: int = 0) -> dict[str, float]:
    """Agreement of communities with each latent's strongest class: adjusted Rand index, bootstrap over latents.

    Parameters
    ----------
    groups : of :func:`communities`
    shares : (M, C) of :func:`capsae.analyses.meaning.posterior`

    Returns
    -------
    dict
        ari (0: as chance has it, 1: the same partition), lo, hi, purity (share of latents whose strongest class is its
        community's most common), latents.
    """
    from sklearn.metrics import adjusted_rand_score

    label = groups["community"].to_numpy()
    top = shares[groups["latent"]].argmax(axis=1)
    rng = np.random.default_rng(seed)
    drawn = (rng.integers(0, len(label), len(label)) for _ in range(n_boot))
    again = [adjusted_rand_score(top[rows], label[rows]) for rows in drawn]
    table = pd.crosstab(label, top).to_numpy()
    lo, hi = np.quantile(again, [0.025, 0.975]) if again else (np.nan, np.nan)
    found = {"ari": adjusted_rand_score(top, label), "lo": lo, "hi": hi}
    return {key: float(v) for key, v in found.items()} | {
        "purity": float(table.max(axis=1).sum() / table.sum()),
        "latents": len(label),
    }


def group_classes(groups: pd.DataFrame, shares: np.ndarray, class_names) -> pd.DataFrame:
    """Latents of each group by their strongest class. Columns: community, class, latents; every pair has its row."""
    top = shares[groups["latent"]].argmax(axis=1)
    n = int(groups["community"].max()) + 1
    counts = np.zeros((n, len(class_names)), np.int64)
    np.add.at(counts, (groups["community"].to_numpy(), top), 1)
    c, k = np.indices(counts.shape).reshape(2, -1)
    return pd.DataFrame({"community": c, "class": np.take(list(class_names), k), "latents": counts.ravel()})


def strongest(table: pd.DataFrame, names: pd.DataFrame, fdr: float = FDR, top: int = 10) -> pd.DataFrame:
    """The pairs found with the largest phi, each latent called by its name or its classes. ``names``: Named.table."""
    found = table[table["q"] <= fdr].sort_values("phi", ascending=False, kind="stable").head(top)
    called = names["name"].where(names["name"] != "", names["classes"]).to_numpy()
    columns = {"i": found["i"], "i fires for": called[found["i"]], "j": found["j"], "j fires for": called[found["j"]]}
    kept = {key: found[key] for key in ("together", "expected", "pmi", "phi", "q")}
    return pd.DataFrame(columns | kept).reset_index(drop=True)
