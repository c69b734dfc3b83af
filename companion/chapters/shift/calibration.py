"""Accuracy and calibration of a classifier's logits, sample by sample, so that a bootstrap only has to weigh them.

Lower is better for all but accuracy. Calibration errors are binned: they depend on the bins, and that of a small sample
is too high; differences on the same samples suffer less from both.
"""

from __future__ import annotations

import numpy as np

BINS = 15
LOSSES = ("accuracy", "nll", "brier")  # means over samples
ERRORS = ("ece", "ece_adaptive")  # from bins
METRICS = (*LOSSES, *ERRORS)
NAMES = {
    "accuracy": "accuracy",
    "nll": "log loss",
    "brier": "Brier score",
    "ece": "ECE",
    "ece_adaptive": "ECE of equally filled bins",
}
SHARES = ("accuracy", *ERRORS)  # given in % and points
HIGHER_IS_BETTER = {metric: metric == "accuracy" for metric in METRICS}


def log_softmax(logits) -> np.ndarray:
    """Log probabilities (N, C) float64."""
    z = np.asarray(logits, np.float64)
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def temperature(logits, labels) -> float:
    """The T > 0 at which softmax(logits / T) has the lowest log loss; between 1/100 and 100.

    Temperature scaling (Guo et al. 2017) [s]: it changes no prediction. Fit it on rows that the classifier was not
    fitted on.
    """
    from scipy.optimize import minimize_scalar

    logits, labels = _checked(logits, labels)
    rows = np.arange(len(labels))

    def loss(log_t: float) -> float:
        return -log_softmax(logits / np.exp(log_t))[rows, labels].mean()

    reach = np.log(100)
    return float(np.exp(minimize_scalar(loss, bounds=(-reach, reach), method="bounded", options={"xatol": 1e-4}).x))


def per_sample(logits, labels) -> dict[str, np.ndarray]:
    """What each sample adds: accuracy, nll (nats), brier (sum over classes), and confidence, all (N,) float64."""
    logits, labels = _checked(logits, labels)
    log_p, rows = log_softmax(logits), np.arange(len(labels))
    p = np.exp(log_p)
    one = np.zeros_like(p)
    one[rows, labels] = 1
    return {
        "accuracy": (logits.argmax(axis=1) == labels).astype(np.float64),
        "nll": -log_p[rows, labels],
        "brier": ((p - one) ** 2).sum(axis=1),
        "confidence": p.max(axis=1),
    }


def bins_of(confidence: np.ndarray, adaptive: bool = False, bins: int = BINS) -> np.ndarray:
    """Bin (N,) of each confidence: of equal width on (0, 1], or, ``adaptive``, of equally many samples.

    Equal confidences may be parted by adaptive bins; their order is that of the samples.
    """
    if adaptive:
        order = np.argsort(confidence, kind="stable")
        found = np.empty(len(confidence), np.int64)
        found[order] = np.arange(len(confidence)) * bins // max(len(confidence), 1)
        return found
    return np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)


def measure(of: dict[str, np.ndarray], weights: np.ndarray | None = None, bins: int = BINS) -> dict[str, np.ndarray]:
    """All :data:`METRICS` from :func:`per_sample`.

    Returns
    -------
    dict of metric -> (B,), or a scalar without weights
        ``ece`` is sum over bins of |mean confidence - accuracy| times the bin's share, 15 bins of equal width (Guo et
        al. 2017) [s]; ``ece_adaptive`` the same with bins of equal size (Nixon et al. 2019, top label alone) [r].
    """
    n = len(of["accuracy"])
    if n == 0:
        raise ValueError("no samples to measure: give at least one")
    drawn = np.ones((1, n), np.float32) if weights is None else np.asarray(weights, np.float32)
    if drawn.shape[1] != n:
        raise ValueError(f"weights have {drawn.shape[1]} columns, the samples are {n}")
    found = {metric: drawn @ of[metric].astype(np.float32) / n for metric in LOSSES}
    gap = (of["confidence"] - of["accuracy"]).astype(np.float32)
    for metric in ERRORS:
        gaps = np.zeros((n, bins), np.float32)
        gaps[np.arange(n), bins_of(of["confidence"], metric == "ece_adaptive", bins)] = gap
        found[metric] = np.abs(drawn @ gaps).sum(axis=1) / n
    return {metric: value[0] if weights is None else value for metric, value in found.items()}


def centred(draws: np.ndarray, value: float) -> np.ndarray:
    """Replicates (B,) of a binned error, moved so that their mean is the estimate; none below 0.

    A resample repeats rows, so its bins are noisier and its error higher than the sample's: without this, the interval
    of a small error lies above it. The estimate's own upward bias stays.
    """
    return np.maximum(draws - (draws.mean() - value), 0)


def _checked(logits, labels) -> tuple[np.ndarray, np.ndarray]:
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels, np.int64)
    if logits.ndim != 2 or labels.shape != (len(logits),):
        raise ValueError(f"logits have shape {logits.shape} and labels {labels.shape}, expected (N, C) and (N,)")
    if len(labels) and (labels.min() < 0 or labels.max() >= logits.shape[1]):
        raise ValueError(f"labels lie in [{labels.min()}, {labels.max()}], the logits have {logits.shape[1]} classes")
    return logits, labels
