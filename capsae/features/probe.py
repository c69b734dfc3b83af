"""The linear probe: a head fitted on ID features, for backbones whose own head must not be used."""

from __future__ import annotations

import numpy as np

from ..data.asarray import as_labels
from .featureset import LinearHead, as_float32

STRENGTHS = (0.003, 0.01, 0.03, 0.1)


def fit_linear_probe(
    cls: np.ndarray, labels: np.ndarray, n_classes: int, seed: int = 0, strengths=STRENGTHS
) -> LinearHead:
    """Fit a multinomial logistic regression on standardised features and fold the standardisation into its weights.

    The inverse strength of the L2 penalty is the one of ``strengths`` with the lowest log loss on a fifth of the rows
    (stratified by class), then the fit is repeated on all of them. Deterministic for a seed.

    Parameters
    ----------
    cls : (N, d) float
    labels : (N,) int in [0, n_classes)
        Every class needs at least one sample.
    seed : int
        Of the split.
    strengths : tuple of float
        scikit-learn's ``C`` to choose from; one value = no choice.
    """
    from sklearn.metrics import log_loss
    from sklearn.model_selection import StratifiedShuffleSplit

    cls, labels = as_float32(cls), as_labels(labels)
    if cls.ndim != 2 or labels.shape != (len(cls),):
        raise ValueError(f"cls has shape {cls.shape} and labels {labels.shape}, expected (N, d) and (N,)")
    counts = np.bincount(labels[labels >= 0], minlength=n_classes)
    if (labels < 0).any() or len(counts) > n_classes:
        raise ValueError(f"labels lie in [{labels.min()}, {labels.max()}], expected [0, {n_classes - 1}]")
    if n_classes < 2 or (counts == 0).any():
        empty = np.flatnonzero(counts == 0)[:10].tolist()
        raise ValueError(f"a probe needs at least 2 classes and a row of each; classes without rows: {empty}")
    mean, std = cls.mean(axis=0, dtype=np.float64), cls.std(axis=0, dtype=np.float64)
    std = np.where(std > 1e-6 * np.maximum(np.abs(mean), 1e-30), std, 1.0)  # constant up to rounding is constant
    x = ((cls - mean) / std).astype(np.float32)

    best = strengths[0]
    if len(strengths) > 1 and counts.min() >= 2 and len(labels) >= 10 * n_classes:
        inner, outer = next(StratifiedShuffleSplit(1, test_size=0.2, random_state=seed).split(x, labels))
        fits = [_fit(x[inner], labels[inner], c) for c in strengths]
        losses = [log_loss(labels[outer], model.predict_proba(x[outer])) for model in fits]
        best = strengths[int(np.argmin(losses))]
    model = _fit(x, labels, best)
    weight, bias = model.coef_.astype(np.float64), model.intercept_.astype(np.float64)
    if n_classes == 2 and len(weight) == 1:  # scikit-learn keeps one row for two classes
        weight, bias = np.concatenate([-weight / 2, weight / 2]), np.concatenate([-bias / 2, bias / 2])
    weight = weight / std
    return LinearHead(weight=weight.astype(np.float32), bias=(bias - weight @ mean).astype(np.float32))


def _fit(x, labels, strength):
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=strength, max_iter=300, tol=1e-4).fit(x, labels)
