"""Uncertainty of detection metrics: bootstrap over both the ID and the OOD samples.

The ID replicates are shared by all methods and all OOD sets (same seed), so differences of methods are paired and a
mean over sets keeps the sets' common dependence on the ID samples.
"""

from __future__ import annotations

import numpy as np

from .metrics import METRICS, Thresholds, all_metrics

_CELLS = 2**22  # replicates x samples held at a time


def _weights(rng: np.random.Generator, n: int, replicates: int) -> np.ndarray:
    """(replicates, n) float64: how often each of n samples was drawn in n draws with replacement."""
    drawn = rng.integers(0, n, size=(replicates, n)) + n * np.arange(replicates)[:, None]
    return np.bincount(drawn.ravel(), minlength=replicates * n).reshape(replicates, n).astype(np.float64)


def bootstrap(id_scores, ood_scores, n_boot: int, seed: int = 0, stream: int = 0) -> dict[str, np.ndarray]:
    """Bootstrap replicates of every metric.

    Parameters
    ----------
    id_scores, ood_scores : (N,), (K,) arrays
    n_boot : int
        Number of replicates.
    seed : int
        Seeds the ID draws; two calls with equal N and seed draw the same ID samples.
    stream : int
        Number of the OOD set: seeds its draws, together with ``seed``.

    Returns
    -------
    dict of (n_boot,) float64, keys :data:`capsae.metrics.METRICS`
    """
    thresholds = Thresholds.of(id_scores, ood_scores)
    n_id, n_ood = thresholds.n_id, len(thresholds.order) - thresholds.n_id
    id_rng, ood_rng = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1 + stream])
    parts, chunk = [], max(1, _CELLS // (n_id + n_ood))
    for start in range(0, n_boot, chunk):
        size = min(chunk, n_boot - start)
        parts.append(all_metrics(thresholds, _weights(id_rng, n_id, size), _weights(ood_rng, n_ood, size)))
    return {metric: np.concatenate([part[metric] for part in parts]) for metric in METRICS}


def interval(replicates: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval (lo, hi) of replicates (n_boot,)."""
    lo, hi = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return float(lo), float(hi)
