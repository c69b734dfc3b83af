"""Every baseline score written as its formula reads, in float64, with loops: slow, short, and made without capsae.

``CLOSED_FORMS[name](train, val, test, **options)`` gives scores (N,), higher = more OOD. The three are anything with
``cls``, ``logits``, ``labels`` and ``head``.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logsumexp, softmax
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler


def _z(obs) -> np.ndarray:
    return obs.cls.astype(np.float64)


def _l(obs) -> np.ndarray:
    return obs.logits.astype(np.float64)


def _head(obs) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(obs.head.weight, np.float64), np.asarray(obs.head.bias, np.float64)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _energy_of(features: np.ndarray, obs) -> np.ndarray:
    weight, bias = _head(obs)
    return np.array([-logsumexp(weight @ z + bias) for z in features])


def msp(train, val, test):
    return np.array([-softmax(logit).max() for logit in _l(test)])


def tempscale(train, val, test, temperature=None):
    if temperature is None:
        logits, labels = _l(val), val.labels

        def nll(log_t):
            return -np.mean([row[y] for row, y in zip(log_softmax(logits / np.exp(log_t), 1), labels, strict=True)])

        temperature = np.exp(minimize_scalar(nll, bounds=(-3, 3), method="bounded", options={"xatol": 1e-10}).x)
    return np.array([-softmax(logit / temperature).max() for logit in _l(test)])


def maxlogit(train, val, test):
    return np.array([-logit.max() for logit in _l(test)])


def energy(train, val, test, temperature=1.0):
    return np.array([-temperature * np.log(np.exp(logit / temperature).sum()) for logit in _l(test)])


def entropy(train, val, test):
    return np.array([-sum(p * np.log(p) for p in softmax(logit) if p > 0) for logit in _l(test)])


def gen(train, val, test, gamma=0.1, top=100):
    return np.array([sum(p**gamma * (1 - p) ** gamma for p in sorted(softmax(x))[-top:]) for x in _l(test)])


def klm(train, val, test):
    p_val = softmax(_l(val), axis=1)
    typical = [p_val[p_val.argmax(1) == c].mean(0) for c in range(p_val.shape[1]) if (p_val.argmax(1) == c).any()]
    return np.array([min((p * np.log(p / d)).sum() for d in typical) for p in softmax(_l(test), axis=1)])


def _mahalanobis(train, test, unit: bool, relative: bool):
    x, z, y = _z(train), _z(test), train.labels
    x, z = (_unit(x), _unit(z)) if unit else (x, z)
    means = [x[y == c].mean(0) for c in range(y.max() + 1)]
    tied = sum((x[y == c] - means[c]).T @ (x[y == c] - means[c]) for c in range(len(means))) / len(x)
    inverse = np.linalg.inv(tied)
    distance = np.min([np.einsum("nd,de,ne->n", z - m, inverse, z - m, optimize=True) for m in means], axis=0)
    if not relative:
        return distance
    background = np.linalg.inv(np.cov(x.T, bias=True))
    return distance - np.einsum("nd,de,ne->n", z - x.mean(0), background, z - x.mean(0), optimize=True)


def mds(train, val, test):
    return _mahalanobis(train, test, unit=False, relative=False)


def rmds(train, val, test):
    return _mahalanobis(train, test, unit=False, relative=True)


def mds_plus(train, val, test):
    return _mahalanobis(train, test, unit=True, relative=False)


def rmds_plus(train, val, test):
    return _mahalanobis(train, test, unit=True, relative=True)


def knn(train, val, test, k=50):
    bank = _unit(_z(train))
    return np.array([np.sort(((bank - z) ** 2).sum(1))[k - 1] for z in _unit(_z(test))])


def _residuals(train, test, dim):
    weight, bias = _head(train)
    origin = -np.linalg.pinv(weight) @ bias
    x = _z(train) - origin
    principal = np.linalg.svd(x, full_matrices=True)[2][:dim]
    away = [_z(obs) - origin for obs in (train, test)]
    return [np.array([np.linalg.norm(r - principal.T @ (principal @ r)) for r in rows]) for rows in away]


def residual(train, val, test, dim=None):
    d = train.cls.shape[1]
    return _residuals(train, test, dim or (512 if d >= 768 else d // 2))[1]


def vim(train, val, test, dim=None):
    d = train.cls.shape[1]
    on_train, on_test = _residuals(train, test, dim or (512 if d >= 768 else d // 2))
    return _l(train).max(1).mean() / on_train.mean() * on_test + energy(train, val, test)


def neco(train, val, test, dim=None, max_logit=True):
    d = train.cls.shape[1]
    scaler = StandardScaler().fit(_z(train))
    components = PCA(d, svd_solver="full").fit(scaler.transform(_z(train)))
    scores = []
    for z, logit in zip(scaler.transform(_z(test)), _l(test), strict=True):
        reduced = components.transform(z[None])[0, : dim or min(100, d // 2)]
        scores.append(-np.linalg.norm(reduced) / np.linalg.norm(z) * (logit.max() if max_logit else 1))
    return np.array(scores)


def react(train, val, test, percentile=90.0):
    threshold = np.percentile(_z(val), percentile)
    return _energy_of([np.where(z > threshold, threshold, z) for z in _z(test)], test)


def _shape(z, percentile):
    """Mask of the kept activations, and exp(s1 / s2)."""
    k = len(z) - round(len(z) * percentile / 100)
    kept = np.zeros(len(z), bool)
    kept[np.argsort(-z, kind="stable")[:k]] = True
    return kept, np.exp(z.sum() / z[kept].sum())


def ash_b(train, val, test, percentile=90.0):
    kept = [_shape(z, percentile)[0] for z in _z(test)]
    return _energy_of([mask * z.sum() / mask.sum() for mask, z in zip(kept, _z(test), strict=True)], test)


def ash_p(train, val, test, percentile=90.0):
    return _energy_of([z * _shape(z, percentile)[0] for z in _z(test)], test)


def ash_s(train, val, test, percentile=65.0):
    return _energy_of([z * _shape(z, percentile)[0] * _shape(z, percentile)[1] for z in _z(test)], test)


def scale(train, val, test, percentile=85.0):
    return _energy_of([z * _shape(z, percentile)[1] for z in _z(test)], test)


def dice(train, val, test, percentile=90.0):
    weight, bias = _head(train)
    contribution = weight * _z(train).mean(0)
    kept = weight * (contribution > np.percentile(contribution, percentile))
    return np.array([-logsumexp(kept @ z + bias) for z in _z(test)])


def she(train, val, test):
    hit = train.logits.argmax(1) == train.labels
    means = [_z(train)[hit & (train.labels == c)].mean(0) for c in range(train.logits.shape[1])]
    return np.array([-z @ means[logit.argmax()] for z, logit in zip(_z(test), _l(test), strict=True)])


def nnguide(train, val, test, k=10):
    bank = [_unit(z[None])[0] * logsumexp(logit) for z, logit in zip(_z(train), _l(train), strict=True)]
    scores = []
    for z, logit in zip(_unit(_z(test)), _l(test), strict=True):
        scores.append(-logsumexp(logit) * np.mean(sorted(np.array(bank) @ z)[-k:]))
    return np.array(scores)


def fdbd(train, val, test, average=True, centre=True):
    (weight, _), mean, scores = _head(train), _z(train).mean(0), []
    for z, logit in zip(_z(test), _l(test), strict=True):
        y, others = logit.argmax(), [c for c in range(len(logit)) if c != logit.argmax()]
        boundaries = [(logit[y] - logit[c]) / np.linalg.norm(weight[y] - weight[c]) for c in others]
        away = np.linalg.norm(z - mean if centre else z)
        scores.append(-(np.mean(boundaries) if average else np.sum(boundaries)) / away)
    return np.array(scores)


def nci(train, val, test, alpha=1e-4):
    (weight, _), mean, scores = _head(train), _z(train).mean(0), []
    for z, logit in zip(_z(test), _l(test), strict=True):
        along = weight[logit.argmax()] @ (z - mean) / np.linalg.norm(z - mean)
        scores.append(-(along + alpha * np.abs(z).sum()))
    return np.array(scores)


def gradnorm(train, val, test, average=True):
    scores = []
    for z, logit in zip(_z(test), _l(test), strict=True):
        slope = softmax(logit) - 1 / len(logit)
        scores.append(-np.abs(np.outer(slope, z)).sum() * (1 if average else len(logit)))
    return np.array(scores)


CLOSED_FORMS = {
    "react": react, "ash_b": ash_b, "ash_p": ash_p, "ash_s": ash_s, "scale": scale, "dice": dice,
    "mds": mds, "rmds": rmds, "mds++": mds_plus, "rmds++": rmds_plus, "knn": knn,
    "she": she, "nnguide": nnguide, "fdbd": fdbd, "nci": nci, "gradnorm": gradnorm,
    "msp": msp, "tempscale": tempscale, "maxlogit": maxlogit, "energy": energy, "entropy": entropy, "gen": gen,
    "klm": klm, "residual": residual, "vim": vim, "neco": neco,
}  # fmt: skip
