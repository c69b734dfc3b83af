"""Linear classifiers on other views of the same features: sparse codes, reconstructions, controls.

Every probe follows :func:`capsae.probe.fit_linear_probe`: standardised columns, multinomial logistic regression, the
penalty with the lowest log loss on a fifth of the ID training rows, then a fit on all of them. Codes stay sparse: their
columns are scaled and not centred, which an unpenalised bias makes the same model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..probe import STRENGTHS, _fit
from ..sae import SparseCodes, dictionaries

TITLES = {
    "cls": "CLS",
    "normalised": "CLS, normalised",
    "codes": "SAE codes",
    "codes_unscaled": "SAE codes, not standardised",
    "reconstruction": "SAE reconstruction",
    "caps": "nearest CAP (cosine)",
    "random": "random dictionary's codes",
    "pca": "PCA, k components",
}
TOLD = {
    "cls": "the head's own input",
    "normalised": "what the SAE sees: control for its normalisation",
    "codes": "k of D values, standardised as the CLS is",
    "codes_unscaled": "the same without standardising, with a grid of weaker penalties",
    "reconstruction": "decoded codes, normalised space",
    "caps": "no probe: the class whose profile has the largest cosine",
    "random": "an untrained dictionary of the same D and k: control for sparsity",
    "pca": "as many numbers as the codes have, no dictionary: control for width",
}
WIDER = (*STRENGTHS[1:], 0.3, 1.0)


@dataclass(frozen=True)
class Probe:
    """A classifier on raw features: ``logits(cls)`` (N, C); ``strength`` is the chosen C of its penalty, or None."""

    name: str
    logits: Callable[[np.ndarray], np.ndarray]
    strength: float | None = None


def as_matrix(codes: SparseCodes):
    """Codes as a scipy sparse matrix (N, M) float64, without the unused slots."""
    from scipy.sparse import csr_array

    codes = codes.numpy()
    fired = codes.values != 0
    starts = np.concatenate([[0], np.cumsum(fired.sum(axis=1))])
    shape = (len(codes), codes.n_latents)
    return csr_array((codes.values[fired].astype(np.float64), codes.indices[fired], starts), shape=shape)


def fit_rows(rows, labels: np.ndarray, seed: int = 0, strengths=STRENGTHS, standardise: bool = True):
    """A linear probe on rows (N, p), dense or scipy sparse.

    Returns
    -------
    (callable, float)
        Rows -> logits (N, C), and the chosen strength (scikit-learn's C).
    """
    from scipy.sparse import issparse
    from sklearn.metrics import log_loss
    from sklearn.model_selection import StratifiedShuffleSplit

    labels = np.asarray(labels)
    if len(labels) != rows.shape[0]:
        raise ValueError(f"labels has {len(labels)} rows, the representation {rows.shape[0]}")
    sparse = issparse(rows)
    mean = np.asarray(rows.mean(axis=0)).ravel()
    squares = rows.multiply(rows) if sparse else np.square(rows, dtype=np.float64)
    std = np.sqrt(np.maximum(np.asarray(squares.mean(axis=0)).ravel() - mean**2, 0))
    std = np.where(std > 1e-6 * max(std.max(), 1e-30), std, 1.0) if standardise else np.ones_like(std)

    def scaled(rows):
        return (rows * (1 / std)[None]).tocsr() if sparse else ((rows - mean) / std).astype(np.float32)

    x, best = scaled(rows), strengths[0]
    if len(strengths) > 1:
        inner, outer = next(StratifiedShuffleSplit(1, test_size=0.2, random_state=seed).split(labels, labels))
        tried = [_fit(x[inner], labels[inner], strength).predict_proba(x[outer]) for strength in strengths]
        best = strengths[int(np.argmin([log_loss(labels[outer], p) for p in tried]))]
    model = _fit(x, labels, best)

    def logits(rows) -> np.ndarray:
        z = np.asarray(scaled(rows) @ model.coef_.T) + model.intercept_
        return np.hstack([-z / 2, z / 2]) if z.shape[1] == 1 else z  # scikit-learn keeps one row for two classes

    return logits, best


def nearest_cap(codes: SparseCodes, mean: np.ndarray) -> np.ndarray:
    """Cosine (N, C) between codes and the profiles ``mean`` (C, M): logits once a temperature is fitted."""
    a = as_matrix(codes)
    lengths = np.sqrt(np.asarray(a.multiply(a).sum(axis=1)).ravel())[:, None] * np.linalg.norm(mean, axis=1)
    return (a @ mean.T) / np.where(lengths > 0, lengths, 1)


def fit_probes(run, names=tuple(TITLES)) -> dict[str, Probe]:
    """Fit the probes of :data:`TITLES` on a run's ID training rows.

    Parameters
    ----------
    run : capsae.pipeline.Run
    names : which of them

    Returns
    -------
    dict of Probe
        ``cls`` is the run's own head.
    """
    unknown = sorted(set(names) - set(TITLES))
    if unknown:
        raise ValueError(f"no probe {unknown[0]!r}; there are {', '.join(TITLES)}")
    train, sae, config, seed = run.features("train"), run.sae, run.profile.sae, run.profile.seed
    sized = {"latents": config.latents, "k": config.k, "normalize": config.normalize, "seed": config.seed}

    def view(name: str) -> tuple[Callable, dict]:
        """Raw features -> rows to probe, and settings of the fit."""
        if name == "normalised":
            return sae.normalize, {}
        if name == "reconstruction":
            return (lambda x: sae.decode(encode(x))), {}
        if name in ("random", "pca"):
            own = sized | ({"latents": min(config.k, train.cls.shape[1])} if name == "pca" else {})
            own["k"] = min(own["k"], own["latents"])
            other = dictionaries.create(name, **own).fit(train.cls)
            if name == "pca":  # its k coefficients with their signs, not parted into two latents each
                return (lambda x: (sae.normalize(x) - other.pre_bias.numpy()) @ other.atoms.numpy().T), {}
            return (lambda x: as_matrix(other.encode(x))), {}
        wider = {"standardise": False, "strengths": WIDER} if name == "codes_unscaled" else {}
        return (lambda x: as_matrix(encode(x))), wider

    encode = _remembering(sae.encode)
    found = {}
    for name in names:
        if name == "cls":
            found[name] = Probe(name, run.head.logits)
        elif name == "caps":
            found[name] = Probe(name, lambda x: nearest_cap(encode(x), run.caps.mean))
        else:
            rows_of, settings = view(name)
            logits, strength = fit_rows(rows_of(train.cls), train.labels, seed, **settings)
            found[name] = Probe(name, lambda x, rows_of=rows_of, logits=logits: logits(rows_of(x)), strength)
    return found


def _remembering(encode: Callable) -> Callable:
    """``encode`` that keeps the codes of each array it has met: the same rows are probed in several views."""
    known: dict[int, tuple] = {}

    def remembered(x):
        if id(x) not in known:
            known[id(x)] = (x, encode(x))  # the array itself as well: its id must not be given to another one
        return known[id(x)][1]

    return remembered
