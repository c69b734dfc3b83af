"""Uncertainty of detection metrics: bootstrap over both the ID and the OOD samples.

The ID replicates are shared by all methods and all OOD sets (same seed), so differences of methods are paired and a
mean over sets keeps the sets' common dependence on the ID samples.
"""

from __future__ import annotations

import numpy as np

from .metrics import METRICS, Thresholds, all_metrics

_CELLS = 2**22  # replicates x samples held at a time


def _draws(rng: np.random.Generator, n: int, replicates: int) -> np.ndarray:
    """(n, replicates) float64: how often each of n samples was drawn in n draws with replacement."""
    drawn = rng.integers(0, n, size=(replicates, n)) * replicates + np.arange(replicates)[:, None]
    return np.bincount(drawn.ravel(), minlength=replicates * n).reshape(n, replicates).astype(np.float64)


def bootstrap(
    methods: dict[str, Thresholds], n_boot: int, seed: int = 0, stream: int = 0
) -> dict[str, dict[str, np.ndarray]]:
    """Bootstrap replicates of every metric, the same draws for all methods.

    Parameters
    ----------
    methods : dict of Thresholds
        ID and OOD scores of each method on the same samples.
    n_boot : int
        Number of replicates.
    seed : int
        Seeds the ID draws; two calls with equal N and seed draw the same ID samples.
    stream : int
        Number of the OOD set: seeds its draws, together with ``seed``.

    Returns
    -------
    dict of method -> metric (:data:`capsae.metrics.METRICS`) -> (n_boot,) float64
    """
    first = next(iter(methods.values()))
    n_id, n_ood = first.n_id, len(first.order) - first.n_id
    id_rng, ood_rng = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1 + stream])
    out = {method: {metric: np.empty(n_boot) for metric in METRICS} for method in methods}
    chunk = max(1, min(256, _CELLS // (n_id + n_ood)))  # 256 replicates of 2,000 samples fit a core's cache
    for start in range(0, n_boot, chunk):
        part = slice(start, min(start + chunk, n_boot))
        size = part.stop - part.start
        id_weights, ood_weights = _draws(id_rng, n_id, size), _draws(ood_rng, n_ood, size)
        for method, thresholds in methods.items():
            for metric, values in all_metrics(thresholds, id_weights, ood_weights).items():
                out[method][metric][part] = values
    return out


def interval(replicates: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval (lo, hi) of replicates (n_boot,)."""
    lo, hi = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return float(lo), float(hi)
