"""Linear classifiers on other views of the same features: sparse codes, reconstructions, controls.

One rule for all, the CLS included: multinomial logistic regression on the ID training rows, columns standardised or not
and penalty as have the lowest log loss on the ID *validation* rows; the penalty is weakened until it rises. The book's
head takes its penalty from a fifth of the training rows instead; the SAE was trained on those, so that codes of them
would be too good there. Codes stay sparse: their columns are scaled and not centred, which an unpenalised bias makes
the same model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from capsae.sae import SparseCodes
from capsae.sae.dictionaries import methods as dictionaries

from .calibration import log_softmax, temperature

TITLES = {
    "cls": "CLS",
    "normalised": "CLS, normalised",
    "codes": "SAE codes",
    "reconstruction": "SAE reconstruction",
    "caps": "nearest CAP (cosine)",
    "random": "random dictionary's codes",
    "pca": "PCA, k components",
}
READS = {  # what each of them reads
    "cls": "the head's own input, by the rule of this page",
    "normalised": "what the SAE sees: control for its normalisation",
    "codes": "k of D values",
    "reconstruction": "decoded codes, normalised space",
    "caps": "no probe: the class whose profile has the largest cosine",
    "random": "an untrained dictionary of the same D and k: control for sparsity",
    "pca": "as many numbers as the codes have, no dictionary: control for width",
}
GRID = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # scikit-learn's C, the inverse penalty
RULES = ("log loss", "scaled log loss", "accuracy")  # all on ID validation rows; the first chooses
Choice = tuple[bool, float]  # columns standardised, C


@dataclass(frozen=True)
class Probe:
    """A classifier on raw features: ``logits(cls)`` (N, C).

    ``choice`` is (standardised, C), None where nothing was to be chosen; ``others`` holds the logits of all choices.
    """

    name: str
    logits: Callable[[np.ndarray], np.ndarray]
    choice: Choice | None = None
    others: Mapping[Choice, Callable] = field(default_factory=dict)


def fit_rows(rows, labels: np.ndarray, standardise: bool = True, strengths=GRID) -> Iterator[tuple[Choice, Callable]]:
    """Linear probes on rows (N, p), dense or scipy sparse, one for each strength, fitted as they are asked for.

    Yields
    ------
    (standardise, strength), callable
        Rows -> logits (N, C). Each fit starts from the one before, which changes how fast it is, not where it ends.
    """
    from scipy.sparse import issparse
    from sklearn.linear_model import LogisticRegression

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

    x, model = scaled(rows), LogisticRegression(max_iter=300, tol=1e-4, warm_start=True)
    for strength in strengths:
        model.set_params(C=strength).fit(x, labels)
        weight, bias = model.coef_.T.copy(), model.intercept_.copy()

        def logits(rows, weight=weight, bias=bias) -> np.ndarray:
            z = np.asarray(scaled(rows) @ weight) + bias
            return np.hstack([-z / 2, z / 2]) if z.shape[1] == 1 else z  # scikit-learn keeps one row for two classes

        yield (standardise, strength), logits


def quality(logits, labels) -> dict[str, float]:
    """What :data:`RULES` go by, on rows that the probe was not fitted on.

    ``scaled log loss`` is that after temperature scaling, each half of the rows (every other one) at the temperature
    that the other half gives.
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    rows = np.arange(len(labels))
    loss, scaled = -log_softmax(logits)[rows, labels], np.empty(len(labels))
    for half, other in ((rows[::2], rows[1::2]), (rows[1::2], rows[::2])):
        t = temperature(logits[other], labels[other])
        scaled[half] = -log_softmax(logits[half] / t)[np.arange(len(half)), labels[half]]
    right = float((logits.argmax(axis=1) == labels).mean())
    return {"log loss": float(loss.mean()), "scaled log loss": float(scaled.mean()), "accuracy": right}


def choose(tried: pd.DataFrame, name: str, rule: str = RULES[0], standardised: bool | None = None) -> Choice:
    """The choice that a rule makes for a representation; the stronger penalty where two are equal."""
    rows = tried[tried["representation"] == name]
    rows = (rows if standardised is None else rows[rows["standardised"] == standardised]).sort_values("strength")
    if rule not in RULES or rows.empty:
        raise ValueError(f"nothing to choose for {name!r} by {rule!r}: rules are {', '.join(RULES)}")
    best = rows.loc[rows[rule].idxmax() if rule == "accuracy" else rows[rule].idxmin()]
    return bool(best["standardised"]), float(best["strength"])


def nearest_cap(codes: SparseCodes, mean: np.ndarray) -> np.ndarray:
    """Cosine (N, C) between codes and the profiles ``mean`` (C, M): logits once a temperature is fitted."""
    a = codes.csr()
    lengths = np.sqrt(np.asarray(a.multiply(a).sum(axis=1)).ravel())[:, None] * np.linalg.norm(mean, axis=1)
    return (a @ mean.T) / np.where(lengths > 0, lengths, 1)


def view(run, name: str, sae=None, seed: int | None = None) -> Callable:
    """Raw features (N, d) -> rows to probe, by a name of :data:`TITLES`; with another SAE, or seed of the controls."""
    config, sae = run.experiment.sae, run.sae if sae is None else sae
    if name == "cls":
        return lambda x: np.asarray(x, np.float32)
    if name == "normalised":
        return sae.normalize
    if name == "codes":
        return lambda x: sae.encode(x).csr()
    if name == "reconstruction":
        return lambda x: sae.decode(sae.encode(x))
    if name not in ("random", "pca"):
        raise ValueError(f"no rows to probe for {name!r}: it is no linear probe's representation")
    train = run.features("train").cls
    latents = min(config.k, train.shape[1]) if name == "pca" else config.latents
    sized = {"latents": latents, "k": min(config.k, latents), "normalize": config.normalize}
    other = dictionaries.create(name, seed=config.seed if seed is None else seed, **sized).fit(train)
    if name == "pca":  # its k coefficients with their signs, not parted into two latents each
        return lambda x: (sae.normalize(x) - other.pre_bias.numpy()) @ other.atoms.numpy().T
    return lambda x: other.encode(x).csr()


def fit_probes(run, names=tuple(TITLES), strengths=GRID) -> tuple[dict[str, Probe], pd.DataFrame]:
    """Fit the probes of :data:`TITLES` on a run's ID training rows, and choose on its ID validation rows.

    Returns
    -------
    dict of Probe
    DataFrame
        representation, standardised, strength and a column for each of :data:`RULES`: every probe that was fitted.
    """
    unknown = sorted(set(names) - set(TITLES))
    if unknown:
        raise ValueError(f"no probe {unknown[0]!r}; there are {', '.join(TITLES)}")
    train, val = run.features("train"), run.features("val")
    rows, others = [], {}
    views = {name: _remembering(view(run, name)) for name in names if name != "caps"}
    for name, rows_of in views.items():
        others[name] = {}
        for standardise in (True, False):
            before = np.inf
            for choice, fitted in fit_rows(rows_of(train.cls), train.labels, standardise, strengths):
                others[name][choice] = lambda x, rows_of=rows_of, fitted=fitted: fitted(rows_of(x))
                measured = quality(others[name][choice](val.cls), val.labels)
                rows.append((name, *choice, *measured.values()))
                if measured[RULES[0]] > before:
                    break
                before = measured[RULES[0]]
    tried = pd.DataFrame(rows, columns=["representation", "standardised", "strength", *RULES])
    found = {}
    for name in names:
        if name == "caps":
            found[name] = Probe(name, lambda x: nearest_cap(run.sae.encode(x), run.caps.mean))
        else:
            chosen = choose(tried, name)
            found[name] = Probe(name, others[name][chosen], chosen, others[name])
    return found, tried


def _remembering(encode: Callable) -> Callable:
    """``encode`` that keeps what it made of each array it has met: the same rows meet many probes."""
    known: dict[int, tuple] = {}

    def remembered(x):
        if id(x) not in known:
            known[id(x)] = (x, encode(x))  # the array itself as well: its id must not be given to another one
        return known[id(x)][1]

    return remembered
