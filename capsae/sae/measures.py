"""What is measured on every SAE and every dictionary: float64, over the whole data set, never a mean of batch values.

Two kinds of functions. Those of the model take ``(sae, x, ...)``, x (N, d) raw features, and read it in blocks; `sae`
is anything with ``normalize``, ``encode``, ``decode`` and ``reconstruct``. Those of the codes take ``(codes, ...)``,
SparseCodes of N rows (numpy or torch), and stay sparse: nothing of size N x M is built. Results are numpy, or floats;
NaN where a quantity is undefined (a latent that never fires has no monosemanticity).
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from ..data.asarray import as_numpy as _numpy

ROWS = 8192  # handled at a time: bounds the memory of a pass whatever N is


def _need_rows(name: str, n: int, n_codes: int, of: str = "codes") -> None:
    if n != n_codes:
        raise ValueError(f"{name} has {n} rows, {of} {n_codes}")


def _labels(labels, n_rows: int, n_classes: int, of: str = "codes") -> np.ndarray:
    labels = _numpy(labels)
    _need_rows("labels", len(labels), n_rows, of)
    if labels.dtype.kind not in "iu" or (len(labels) and (labels.min() < 0 or labels.max() >= n_classes)):
        raise ValueError(f"labels must be whole numbers in 0..{n_classes - 1}, found {labels.dtype}: {labels[:5]}...")
    return labels.astype(np.int64)


# --- the model on rows


def fvu(sae, x, codes=None) -> float:
    """Fraction of variance unexplained, sum |x - x_hat|^2 / sum |x - mean|^2, of normalised rows.

    x (N, d) are raw features; codes are those of these rows, or None to make them. ValueError where the rows are all
    equal after normalisation.
    """
    if codes is not None:
        _need_rows("x", len(x), len(codes))
    total = sum(_numpy(sae.normalize(x[i : i + ROWS])).sum(0, dtype=np.float64) for i in range(0, len(x), ROWS))
    mean, spread, left = total / len(x), 0.0, 0.0
    for i in range(0, len(x), ROWS):
        rows = _numpy(sae.normalize(x[i : i + ROWS])).astype(np.float64)
        x_hat = _numpy(sae.decode(sae.encode(x[i : i + ROWS]) if codes is None else codes[i : i + ROWS]))
        spread += ((rows - mean) ** 2).sum()
        left += ((rows - x_hat) ** 2).sum()
    if spread <= 1e-12 * len(x):
        raise ValueError("x has no variance (equal rows after normalisation): its FVU is undefined")
    return float(left / spread)


def head_accuracy(sae, x, labels, head) -> dict[str, float]:
    """What the exact linear head still knows when x is replaced by x_hat, in the input's own space.

    x (N, d) are raw features, labels (N,) classes of the head, which has ``weight`` (C, d) and ``bias`` (C,). Returned:
    accuracy (of x), reconstructed (of x_hat), kept (their ratio), agreement (share of rows with one prediction).
    """
    weight, bias = _numpy(head.weight).astype(np.float64), _numpy(head.bias).astype(np.float64)
    labels = _labels(labels, len(x), len(weight), "x")
    right = again = same = 0
    for i in range(0, len(x), ROWS):
        rows, true = x[i : i + ROWS], labels[i : i + ROWS]
        before, after = ((_numpy(one) @ weight.T + bias).argmax(1) for one in (rows, sae.reconstruct(rows)))
        right, again, same = (
            right + (before == true).sum(),
            again + (after == true).sum(),
            same + (before == after).sum(),
        )
    n = len(x)
    kept = again / right if right else np.nan
    return {"accuracy": right / n, "reconstructed": again / n, "kept": float(kept), "agreement": same / n}


# --- how often latents fire


def l0(codes) -> float:
    """Mean number of latents that fire in a row."""
    return float((codes.numpy().values != 0).sum() / len(codes))


def density(codes) -> np.ndarray:
    """Share (M,) of the rows in which each latent fires."""
    codes = codes.numpy()
    return np.bincount(codes.indices[codes.values != 0], minlength=codes.n_latents) / len(codes)


def dead_fraction(codes) -> float:
    """Share of the latents that fire in no row."""
    return float((density(codes) == 0).mean())


# --- what latents stand for


def monosemanticity(codes, embeddings) -> np.ndarray:
    """Mean similarity (M,) of the rows that a latent fires on, weighted by how strongly: MS_k in [-1, 1].

        MS_k = sum_{i<j} a_i a_j e_i.e_j / sum_{i<j} a_i a_j
             = (|sum_i a_i e_i|^2 - sum_i a_i^2) / ((sum_i a_i)^2 - sum_i a_i^2)

    The second form is the published mean over all pairs (Pach et al., arXiv 2504.02821) in one pass over the codes. It
    does not depend on the scale of a, which is divided by its maximum only to keep the sums near 1. Subtracting costs
    digits where one row outweighs all others together: the error is about 1e-16 (sum a)^2 / (twice the pairs' sum).

    embeddings (N, D) are of the same images, by a *second* encoder (rows are brought to unit length). Where there is
    none, :func:`stand_in_embeddings`, and then say so beside the number. NaN for a latent that fires in fewer than two
    rows.
    """
    codes = codes.numpy()
    _need_rows("embeddings", len(embeddings), len(codes))
    n_latents = codes.n_latents
    peak = np.zeros(n_latents)
    np.maximum.at(peak, codes.indices.ravel(), np.abs(codes.values.ravel()))
    mean = np.zeros((n_latents, embeddings.shape[1]))
    first, second = np.zeros(n_latents), np.zeros(n_latents)
    for i in range(0, len(codes), ROWS):
        e = _numpy(embeddings[i : i + ROWS]).astype(np.float64)
        length = np.linalg.norm(e, axis=1, keepdims=True)
        bad = ~((length > 0) & np.isfinite(length))
        if bad.any():
            raise ValueError(f"embeddings row {i + int(bad.argmax())} has no direction: it is zero, or not finite")
        a = codes[i : i + ROWS].csr()
        a.data = np.abs(a.data) / peak[a.indices]
        mean += a.T @ (e / length)
        first += a.sum(0)
        second += (a * a).sum(0)
    pairs = first**2 - second
    fired = np.bincount(codes.indices[codes.values != 0], minlength=n_latents)
    return np.divide((mean**2).sum(1) - second, pairs, out=np.full(n_latents, np.nan), where=(fired > 1) & (pairs > 0))


def stand_in_embeddings(x) -> np.ndarray:
    """The rows' own features, centred, unit length (N, d): in place of a second encoder's embeddings.

    A stand-in, to be named beside each number made with it: it asks whether a latent's images are alike *to the
    encoder that the latent was made from*.
    """
    x = _numpy(x).astype(np.float64)
    centred = x - x.mean(0)
    return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-300)


def concept_separability(
    codes, labels, n_classes: int, bins: int = 20, max_pairs: int = 2000, seed: int = 0
) -> np.ndarray:
    """Jensen-Shannon distance (M,) of a latent's activation histograms between classes, mean over pairs of classes.

    0: the latent does the same in all classes; 1: no two classes share a bin. The histogram of a class has one bin for
    silence and `bins` of equal width up to the latent's largest activation; distances are to base 2. The bins and
    the mean over pairs are our choice.

    With more pairs of classes than `max_pairs`, so many are drawn with `seed`, the same for all latents. NaN for a
    latent that never fires. Classes without rows are left out.
    """
    labels = _labels(labels, len(codes), n_classes)
    counts = np.bincount(labels, minlength=n_classes)
    present = np.flatnonzero(counts)
    if len(present) < 2:
        raise ValueError(f"labels hold {len(present)} class; separability needs two")
    left, right = np.triu_indices(len(present), 1)
    if len(left) > max_pairs:
        drawn = np.sort(np.random.default_rng(seed).choice(len(left), max_pairs, replace=False))
        left, right = left[drawn], right[drawn]
    columns = codes.csr().tocsc()
    result = np.full(columns.shape[1], np.nan)
    for latent in np.flatnonzero(np.diff(columns.indptr)):
        part = slice(columns.indptr[latent], columns.indptr[latent + 1])
        value, rows = np.abs(columns.data[part]), columns.indices[part]
        bin_ = np.minimum((value / value.max() * bins).astype(np.int64), bins - 1) + 1
        table = np.bincount(labels[rows] * (bins + 1) + bin_, minlength=n_classes * (bins + 1)).reshape(n_classes, -1)
        table[:, 0] = counts - table.sum(1)
        p = table[present] / counts[present, None]
        h = _entropy(p)
        divergence = _entropy((p[left] + p[right]) / 2) - (h[left] + h[right]) / 2
        result[latent] = np.sqrt(np.maximum(divergence, 0)).mean()
    return result


def _entropy(p: np.ndarray) -> np.ndarray:
    """Bits (n,) of rows of probabilities (n, bins)."""
    return -(p * np.log2(p, out=np.zeros_like(p), where=p > 0)).sum(1)


def class_probing(train, train_labels, test, test_labels, n_classes: int, sizes=(1, 5, 20)) -> pd.DataFrame:
    """How well classes are read from few latents: the best are chosen on `train`, accuracy is measured on `test`.

    For each class, latents are ranked by |t| of the difference between the class and the rest; the n best enter a least
    squares fit of +1 (class) and -1 (rest), to which both sides contribute equally. After the sparse probing of
    Gurnee et al. (arXiv 2305.01610), with a closed form in place of their logistic regression (our choice).

    Every class needs a row in both. Columns: size (latents per class); balanced, the mean over classes of (recall +
    specificity) / 2 of the class against the rest; top1, the accuracy of the class whose fit is largest.
    """
    y, y_test = _labels(train_labels, len(train), n_classes), _labels(test_labels, len(test), n_classes)
    for name, given in (("train_labels", y), ("test_labels", y_test)):
        missing = np.flatnonzero(np.bincount(given, minlength=n_classes) == 0)
        if len(missing) or n_classes < 2:
            none = missing[:5].tolist()
            raise ValueError(f"{name}: probing needs two classes and rows of each; without rows: {none}")
    a, a_test = train.csr().tocsc(), test.csr().tocsc()
    order = np.argsort(-np.abs(class_t(train, y, n_classes)), axis=1, kind="stable")
    rows = []
    for size in sizes:
        outputs = np.empty((len(y_test), n_classes))
        for c in range(n_classes):
            chosen = order[c, :size]
            design, target = _with_one(a[:, chosen].toarray()), np.where(y == c, 1.0, -1.0)
            weight = np.where(y == c, 0.5 / (y == c).sum(), 0.5 / (y != c).sum())
            gram = (design * weight[:, None]).T @ design
            ridge = 1e-9 * np.trace(gram) * np.eye(len(gram))
            solution = np.linalg.solve(gram + ridge, (design * weight[:, None]).T @ target)
            outputs[:, c] = _with_one(a_test[:, chosen].toarray()) @ solution
        chosen_by, is_class = outputs > 0, y_test[:, None] == np.arange(n_classes)
        recall = (chosen_by & is_class).sum(0) / is_class.sum(0)
        specificity = (~chosen_by & ~is_class).sum(0) / (~is_class).sum(0)
        balanced = float(((recall + specificity) / 2).mean())
        rows.append({"size": size, "balanced": balanced, "top1": float((outputs.argmax(1) == y_test).mean())})
    return pd.DataFrame(rows)


def _with_one(a: np.ndarray) -> np.ndarray:
    return np.hstack([np.ones((len(a), 1)), a])


def class_t(codes, labels, n_classes: int) -> np.ndarray:
    """Welch's t (C, M) of each latent between a class and the rest; 0 for a latent that never fires."""
    labels = _labels(labels, len(codes), n_classes)
    a = codes.csr()
    counts = np.bincount(labels, minlength=n_classes).astype(np.float64)[:, None]
    first, second = (np.zeros((n_classes, a.shape[1])) for _ in range(2))
    cell = np.repeat(labels, np.diff(a.indptr)) * a.shape[1] + a.indices
    for sums, values in ((first, a.data), (second, a.data**2)):
        sums += np.bincount(cell, values, minlength=sums.size).reshape(sums.shape)
    parts = []
    for s1, s2, n in ((first, second, counts), (first.sum(0) - first, second.sum(0) - second, counts.sum() - counts)):
        n = np.maximum(n, 1)
        parts.append((s1 / n, np.maximum(s2 / n - (s1 / n) ** 2, 0) / n))
    (mean, error), (rest, rest_error) = parts
    # A latent that is constant on both sides would give 0 / 0 or infinity; the floor ranks one that separates first.
    floor = 1e-12 * (np.abs(mean) + np.abs(rest))
    spread = np.maximum(np.sqrt(error + rest_error), floor)
    return np.divide(mean - rest, spread, out=np.zeros_like(mean), where=spread > 0)


# --- two dictionaries, two classes


def matched_cosines(a, b, signed: bool = True) -> np.ndarray:
    """Cosines of the rows of two dictionaries, a (M, d) and b (M', d), matched one to one with the largest sum.

    The mean over rows is the stability across seeds (Hungarian matching, `scipy.optimize.linear_sum_assignment`). Two
    random dictionaries give more than 0, too: that is the number to compare with. Without `signed`, cosines are
    absolute: for dictionaries whose codes have both signs. (min(M, M'),) in the order of the shorter one's rows.
    """
    from scipy.optimize import linear_sum_assignment

    cosine = _cosines(a, b, signed) if len(a) <= len(b) else _cosines(b, a, signed)
    return cosine[linear_sum_assignment(cosine, maximize=True)]


def max_cosines(planted, learned, signed: bool = True) -> np.ndarray:
    """For each row of `planted` (M, d), its largest cosine (M,) with a row of `learned` (M', d): what was recovered."""
    return _cosines(planted, learned, signed).max(1)


def _cosines(a, b, signed: bool) -> np.ndarray:
    a, b = (_numpy(one).astype(np.float64) for one in (a, b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"dictionaries have shapes {a.shape} and {b.shape}; (M, d) and (M', d) would do")
    a, b = (one / np.maximum(np.linalg.norm(one, axis=1, keepdims=True), 1e-300) for one in (a, b))
    return a @ b.T if signed else np.abs(a @ b.T)


def jaccard(a, b) -> float:
    """|A and B| / |A or B| of two collections of names: such as the training rows that two ITDA dictionaries took."""
    a, b = set(_numpy(a).tolist()), set(_numpy(b).tolist())
    if not a | b:
        raise ValueError("both collections are empty: their Jaccard index is undefined")
    return len(a & b) / len(a | b)


def core_overlap(caps, fraction: float = 0.05) -> float:
    """Mean Jaccard index of the core sets of two different classes (the paper's figure 2 takes the top 5 %)."""
    overlap = caps.jaccard(fraction)
    if len(overlap) < 2:
        raise ValueError(f"profiles have {len(overlap)} class; overlap needs two")
    return float(overlap[~np.eye(len(overlap), dtype=bool)].mean())
