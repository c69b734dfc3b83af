"""The few computations that several scores share. Sums, means and covariances are float64, made block by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from ..observations import Observations

RCOND = 1e-10  # directions of standardised columns under this share of the largest eigenvalue are cut
_PRODUCTS = 2**24  # inner products held at a time: 64 MiB
_BANK = 65_536

Features = Callable[[Observations], np.ndarray]  # rows of a block -> (n, d) float64


def both(array: np.ndarray) -> dict[np.dtype, np.ndarray]:
    """An array in float32 and in float64, by dtype: what a fit keeps for products with features of either precision."""
    return {np.dtype(kind): np.ascontiguousarray(array, kind) for kind in (np.float32, np.float64)}


def free_energy(logits: np.ndarray) -> np.ndarray:
    """-logsumexp over the classes of logits (N, C), float64; exponentials in the logits' precision, sums float64."""
    largest = logits.max(axis=1, keepdims=True)
    exp = logits - largest
    total = np.exp(exp, out=exp).sum(axis=1, dtype=np.float64)
    return -(largest[:, 0].astype(np.float64) + np.log(total))


def class_sums(x: np.ndarray, labels: np.ndarray, n_classes: int) -> np.ndarray:
    """Sum (C, d) of the rows of x of each class."""
    onehot = csr_matrix((np.ones(len(x)), (labels, np.arange(len(x)))), shape=(n_classes, len(x)))
    return onehot @ x


def class_means(
    obs: Observations, labels: np.ndarray, n_classes: int, features: Features, keep: np.ndarray | None = None
) -> np.ndarray:
    """Mean (C, d) of ``features`` of the rows of each class (those in the mask ``keep``); ValueError without any."""
    keep = np.ones(len(labels), bool) if keep is None else keep
    counts = np.bincount(labels[keep], minlength=n_classes)
    if (counts == 0).any():
        raise ValueError(f"class {int((counts == 0).argmax())} has no training row: give every class at least one")
    total: Any = 0.0
    start = 0
    for block in obs.blocks():
        rows = slice(start, start + len(block))
        total = total + class_sums(features(block)[keep[rows]], labels[rows][keep[rows]], n_classes)
        start = rows.stop
    return total / counts[:, None]


def mean_row(obs: Observations, features: Features) -> np.ndarray:
    """Mean (d,) of ``features`` over all rows."""
    return sum(features(block).sum(axis=0) for block in obs.blocks()) / len(obs)


def covariance(obs: Observations, features: Features, centres: np.ndarray, labels: np.ndarray | None = None):
    """Covariance (d, d) about ``centres``, divided by N: one centre (d,), or with labels one a class (C, d)."""
    total, start = 0.0, 0
    for block in obs.blocks():
        rows = slice(start, start + len(block))
        x = features(block) - (centres if labels is None else centres[labels[rows]])
        total, start = total + x.T @ x, rows.stop
    return total / len(obs)


def whitening(covariance: np.ndarray) -> np.ndarray:
    """Matrix (d, r) that makes a covariance (d, d) the identity, on its r non-null directions.

    Columns are standardised first: what is null is a matter of their correlations, not of their units.
    """
    std = np.sqrt(np.diag(covariance))
    std = np.where(std > 0, std, 1)
    values, vectors = np.linalg.eigh(covariance / np.outer(std, std))
    keep = (values > RCOND * values[-1]) & (values > 0)
    if not keep.any():
        raise ValueError("all training features of a class are equal: a Mahalanobis distance needs some spread")
    return vectors[:, keep] / np.sqrt(values[keep]) / std[:, None]


def largest_products(queries: np.ndarray, bank: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest inner products (n, k) of each query with the rows of a bank, largest first, and the rows' indices.

    Exact in float32: every product is computed, in blocks of queries and of the bank.
    """
    import torch

    x, rest = torch.from_numpy(queries), torch.from_numpy(bank)
    rows = max(1, _PRODUCTS // min(len(bank), _BANK))
    values, indices = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    for at in range(0, len(queries), rows):
        block = x[at : at + rows]
        best = torch.empty(len(block), 0), torch.empty(len(block), 0, dtype=torch.int64)
        for start in range(0, len(bank), _BANK):
            products = block @ rest[start : start + _BANK].T
            top = products.topk(min(k, products.shape[1]), dim=1)
            found = torch.cat([best[0], top.values], 1), torch.cat([best[1], top.indices + start], 1)
            order = found[0].topk(min(k, found[0].shape[1]), dim=1)
            best = order.values, found[1].gather(1, order.indices)
        values[at : at + rows], indices[at : at + rows] = best[0].numpy(), best[1].numpy()
    return values, indices


def keep_largest(z: np.ndarray, k: int) -> np.ndarray:
    """Mask (N, d) of the k largest entries of each row; of equal ones at the border the first are kept."""
    border = np.partition(z, z.shape[1] - k, axis=1)[:, z.shape[1] - k, None]
    mask = z >= border
    tied = np.flatnonzero(mask.sum(axis=1) > k)
    if len(tied):
        above = z[tied] > border[tied]
        at_border = z[tied] == border[tied]
        room = k - above.sum(axis=1, keepdims=True)
        mask[tied] = above | (at_border & (at_border.cumsum(axis=1) <= room))
    return mask
