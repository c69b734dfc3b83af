"""Which latents differ between two sets of rows, with false discoveries controlled.

The main test is on how often a latent fires: Fisher's exact test of fired / silent by A / B, the false discovery rate
controlled by Benjamini and Hochberg. A latent that fires in so few rows that no split of them over A and B could give a
small p is not tested (Tarone 1990, for false discoveries Gilbert 2005 [s]): that depends on how often it fires in both
sets together, a margin on which Fisher's test conditions anyway. Beside it, as a second table of p values: how strongly
a latent fires where it does, by Mann and Whitney. Rows must be independent within a set: copies of one image, or frames
of one film, make any difference significant. What differs is the *sets*: the test does not say why.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from .naming import FDR, false_discovery

FEW = 8  # images of a set below which hardly anything can be concluded
_EXPECTED = 50.0  # the smallest expected cell from which the G test stands in for the exact one
_STRONG = 3  # firing rows a side from which strengths are compared


def compare(a, b, fdr: float = FDR, strength: bool = True) -> pd.DataFrame:
    """Compare two sets, latent by latent.

    Parameters
    ----------
    a, b : SparseCodes of n_a and n_b rows, of one dictionary
    fdr : float
        Share of false ones among the differences found that is accepted, in expectation.
    strength : bool
        Also compare the activations of the rows that fire.

    Returns
    -------
    DataFrame
        One row a latent that fires in some row: latent; n_a, n_b; fired_a, fired_b; frequency_a, frequency_b;
        difference (B less A) with its 95 % interval lo, hi (Newcombe, each by itself); p, q (adjusted; NaN where it is
        not tested); differs (q <= fdr); more ("A", "B", or "" where it does not differ); mean_a, mean_b (activation
        where it fires); p_strength, q_strength (NaN where a side fires in under 3 rows). Most certain first.

    Raises
    ------
    ValueError
        For an empty set, codes of different dictionaries, or an fdr outside (0, 1).
    """
    if not 0 < fdr < 1:
        raise ValueError(f"fdr is {fdr}: a share in (0, 1) would do, the default is {FDR}")
    if a.n_latents != b.n_latents:
        raise ValueError(f"A has codes of {a.n_latents} latents, B of {b.n_latents}: one dictionary for both would do")
    for which, codes in (("A", a), ("B", b)):
        if not len(codes):
            raise ValueError(f"{which} has no rows: give at least one, better {FEW} or more")
    left, right = a.csr().tocsc(), b.csr().tocsc()
    n_a, n_b = len(a), len(b)
    fired_a, fired_b = np.diff(left.indptr), np.diff(right.indptr)
    alive = np.flatnonzero(fired_a + fired_b)
    fired_a, fired_b = fired_a[alive], fired_b[alive]
    lo, hi = newcombe(fired_a, n_a, fired_b, n_b)
    p = fisher(fired_a, n_a, fired_b, n_b)
    q = false_discovery(np.where(testable(fired_a + fired_b, n_a, n_b, fdr), p, np.nan))
    share_a, share_b = fired_a / n_a, fired_b / n_b
    table = pd.DataFrame(
        {
            "latent": alive, "n_a": n_a, "n_b": n_b, "fired_a": fired_a, "fired_b": fired_b, "frequency_a": share_a,
            "frequency_b": share_b, "difference": share_b - share_a, "lo": lo, "hi": hi, "p": p, "q": q,
            "differs": q <= fdr,
        }
    )  # fmt: skip
    table["more"] = np.where(~table["differs"], "", np.where(table["difference"] > 0, "B", "A"))
    for key, m, fired in (("mean_a", left, fired_a), ("mean_b", right, fired_b)):
        total = np.asarray(m.sum(axis=0)).ravel()[alive]
        table[key] = np.divide(total, fired, out=np.full(len(alive), np.nan), where=fired > 0)
    if strength:
        table["p_strength"] = _strength(left, right, alive, fired_a, fired_b)
        table["q_strength"] = false_discovery(table["p_strength"].to_numpy())
    order = np.lexsort((-table["difference"].abs(), table["p"]))
    return table.iloc[order].reset_index(drop=True)


def _strength(left, right, alive, fired_a, fired_b) -> np.ndarray:
    from scipy.stats import mannwhitneyu

    p = np.full(len(alive), np.nan)
    for i in np.flatnonzero((fired_a >= _STRONG) & (fired_b >= _STRONG)):
        x, y = (m.data[m.indptr[alive[i]] : m.indptr[alive[i] + 1]] for m in (left, right))
        exact = min(len(x), len(y)) <= 8 and len(np.unique(np.concatenate([x, y]))) == len(x) + len(y)
        p[i] = mannwhitneyu(x, y, method="exact" if exact else "asymptotic").pvalue
    return p


def fisher(fired_a, n_a: int, fired_b, n_b: int) -> np.ndarray:
    """Two-sided p (M,) of "A and B fire alike" for M tables of fired rows out of n_a and n_b.

    Fisher's exact test (all tables with these margins that are no more likely than the one seen), as
    `scipy.stats.fisher_exact` gives it. Where every expected cell is at least 50, where both agree, the G test: its
    cost does not grow with the number of rows.
    """
    from scipy.special import gammaln, xlogy
    from scipy.stats import chi2

    fired_a, fired_b = np.asarray(fired_a, np.int64), np.asarray(fired_b, np.int64)
    n, fired = n_a + n_b, fired_a + fired_b
    seen = np.array([fired_a, n_a - fired_a, fired_b, n_b - fired_b], dtype=np.float64)
    expected = np.array([n_a * fired, n_a * (n - fired), n_b * fired, n_b * (n - fired)]) / n
    large = expected.min(axis=0) >= _EXPECTED
    with np.errstate(invalid="ignore", divide="ignore"):
        g = 2 * (xlogy(seen, seen) - xlogy(seen, np.where(expected > 0, expected, 1))).sum(axis=0)
    p = chi2.sf(np.maximum(g, 0), 1)

    def log_choose(total, k):
        return gammaln(total + 1) - gammaln(k + 1) - gammaln(total - k + 1)

    known: dict[tuple[int, int], float] = {}
    for i in np.flatnonzero(~large):
        key = (int(fired_a[i]), int(fired[i]))
        if key not in known:
            k = np.arange(max(0, fired[i] - n_b), min(n_a, fired[i]) + 1)
            log_p = log_choose(n_a, k) + log_choose(n_b, fired[i] - k) - log_choose(n, fired[i])
            own = log_p[fired_a[i] - k[0]]
            known[key] = min(1.0, float(np.exp(log_p[log_p <= own + 1e-7]).sum()))
        p[i] = known[key]
    return p


def newcombe(fired_a, n_a: int, fired_b, n_b: int, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Interval (lo, hi) of share B less share A from Wilson's intervals of both.

    Source: method 10 of Newcombe, Statistics in Medicine 17 (1998) 873-890 [s].
    """
    from scipy.stats import norm

    z = norm.isf((1 - level) / 2)

    def wilson(fired, n):
        p = np.asarray(fired, np.float64) / n
        centre, reach = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        return p, (centre - reach) / (1 + z**2 / n), (centre + reach) / (1 + z**2 / n)

    (p_a, low_a, up_a), (p_b, low_b, up_b) = wilson(fired_a, n_a), wilson(fired_b, n_b)
    gap = p_b - p_a
    return gap - np.hypot(p_b - low_b, up_a - p_a), gap + np.hypot(up_b - p_b, p_a - low_a)


def halves(codes, times: int = 100, fdr: float = FDR, seed: int = 0) -> pd.DataFrame:
    """Compare random halves of one set with each other, `times` times: a check, since all that is found is false.

    Where nothing differs, the false discovery rate is the chance to find anything at all. The splits are of the same
    rows and so not independent of each other. Columns: split, found (latents that differ), below (share of the latents
    compared whose p, uncorrected, is at most 5 %).
    """
    if len(codes) < 4:
        raise ValueError(f"the set has {len(codes)} rows: 4 or more can be halved for a check")
    rng, rows = np.random.default_rng(seed), []
    for split in range(times):
        order = rng.permutation(len(codes))
        a, b = order[: len(order) // 2], order[len(order) // 2 :]
        table = compare(codes[a], codes[b], fdr, strength=False)
        rows.append((split, int(table["differs"].sum()), float((table["p"] <= 0.05).mean())))
    return pd.DataFrame(rows, columns=["split", "found", "below"])


def testable(fired, n_a: int, n_b: int, fdr: float = FDR) -> np.ndarray:
    """(M,) bool: latents whose p could be small enough, by Tarone's rule, given the rows of A and B they fire in.

    With m(K) latents whose smallest possible p is at most fdr / K, the first K with m(K) <= K decides: so few are
    tested. An all-False result means that sets of these sizes can tell nothing.
    """
    fired = np.asarray(fired, np.int64)
    rows, of = np.unique(fired, return_inverse=True)
    most, least = np.minimum(rows, n_a), np.maximum(rows - n_b, 0)
    ends = (fisher(k, n_a, rows - k, n_b) for k in (most, least))
    possible = np.minimum(*ends)[of]
    ordered, k = np.sort(possible), 1
    while k <= len(fired) and np.searchsorted(ordered, fdr / k, side="right") > k:
        k += 1
    return possible <= fdr / k


def doubts(n_a: int, n_b: int, tested: int) -> list[str]:
    """What sets of n_a and n_b images, with so many latents tested, cannot show, as text; none for larger ones."""
    found = []
    for which, n in (("A", n_a), ("B", n_b)):
        if n < FEW:
            lo, hi = newcombe(0, 10**9, round(n / 2), n)
            images, reach = f"{n} image{'s' * (n != 1)}", f"±{50 * (hi - lo):.0f} points"
            found.append(
                f"{which} has {images}: a frequency in it is known to about {reach} only; that latents do not differ "
                f"says nothing here ({FEW} or more images would do)"
            )
    if not tested:
        found.append(f"no latent fires often enough for {n_a} and {n_b} images to tell any difference")
    return found


def by_set(a, sets: dict[str, object], fdr: float = FDR, named=None) -> pd.DataFrame:
    """Compare one set with several. False discoveries are controlled within each comparison.

    Columns: set, n_b, alive (latents that fire), tested, differs, more_a, more_b, largest (difference, absolute); with
    ``named`` (M,) bool, which latents have a name: named_a, named_b, how many of more_a and more_b have one.
    """
    rows = []
    for name, b in sets.items():
        table = compare(a, b, fdr, strength=False)
        counts = table["more"].value_counts()
        largest = float(table["difference"].abs().max())
        row = {"set": name, "n_b": len(b), "alive": len(table), "tested": int(table["q"].notna().sum())}
        row |= {"differs": int(table["differs"].sum()), "more_a": counts.get("A", 0), "more_b": counts.get("B", 0)}
        row["largest"] = largest
        if named is not None:
            known = np.asarray(named)[table["latent"]]
            row |= {f"named_{s.lower()}": int(known[table["more"] == s].sum()) for s in "AB"}
        rows.append(row)
    return pd.DataFrame(rows)
