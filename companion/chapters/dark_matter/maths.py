r"""Dark matter: what an SAE leaves out, split into what is linear in its input and the rest.

In the SAE's own normalised space, u is the input, u_hat its reconstruction and e = u - u_hat the error:

    u = u_hat + e_lin + e_rest,   e_lin = the linear (affine) prediction of e from u,   e_rest = e - e_lin

After Engels, Smith and Tegmark, "Decomposing the dark matter of sparse autoencoders" (arXiv 2410.14670) [s]; theirs is
on language models. Ours [r]: errors of the rows that the SAE was trained on are smaller than those of others, so each
regression is fitted in three ways (:data:`FITS`), and the part e_lin is the second of them. Every share so found is a
lower bound of what is linear: of finitely many rows a map predicts less than of many.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd

from capsae.data.asarray import as_numpy
from capsae.pipeline.run import Run
from capsae.sae.dictionaries import methods as dictionaries
from capsae.stats import interval

PENALTIES = tuple(10.0 ** np.arange(-6, 3))  # of the ridge, in units of the inputs' mean variance
FITS = {
    "train": "training rows",
    "rescaled": "training rows, rescaled on validation rows",
    "unseen": "rows the SAE has not seen",
}
MAIN = "rescaled"  # of FITS: that of the part e_lin, and of all comparisons
TARGETS = {"vector": "error vector", "norm2": "squared norm"}
FOLDS = 10


@dataclass(frozen=True)
class Linear:
    """An affine map of rows u (N, d): ``target_mean + scale * ((u - mean) @ weight - offset)``, weight (d, t)."""

    weight: np.ndarray
    mean: np.ndarray
    target_mean: np.ndarray
    offset: np.ndarray | float = 0.0
    scale: float = 1.0
    penalty: float = np.nan  # the ridge's, in units of the inputs' mean variance

    def __call__(self, u: np.ndarray) -> np.ndarray:
        """Predictions (N, t)."""
        return self.target_mean + self.scale * ((u - self.mean) @ self.weight - self.offset)


class Ridge:
    """Ridge regression on rows u (N, d) for many targets and penalties: one decomposition serves all of them."""

    def __init__(self, u: np.ndarray):
        if u.ndim != 2 or len(u) < 2:
            raise ValueError(f"u has shape {u.shape}; (N, d) with two rows or more would do")
        self.mean = u.mean(0)
        values, self.axes = np.linalg.eigh((u - self.mean).T @ (u - self.mean))
        self.values, self.turned = np.maximum(values, 0), (u - self.mean) @ self.axes
        if not self.values.max() > 0:
            raise ValueError("the rows of u are all equal: nothing can be predicted from them")

    def path(self, y: np.ndarray, penalties: Iterable[float] = PENALTIES) -> list[Linear]:
        """The maps of u to targets y (N, t), one a penalty."""
        if len(y) != len(self.turned):
            raise ValueError(f"y has {len(y)} rows, u {len(self.turned)}")
        mean = y.mean(0)
        seen, unit = self.turned.T @ (y - mean), self.values.mean()
        weights = (self.axes @ (seen / (self.values + p * unit)[:, None]) for p in penalties)
        return [Linear(w, self.mean, mean, penalty=p) for w, p in zip(weights, penalties, strict=True)]

    def choose(self, y, u_val, y_val, penalties: Iterable[float] = PENALTIES) -> Linear:
        """The map at the penalty with the highest R^2 on validation rows."""
        return max(self.path(y, penalties), key=lambda one: r2(y_val, one(u_val)))


def rescaled(linear: Linear, u_val: np.ndarray, y_val: np.ndarray) -> Linear:
    """The same directions with one factor (for all targets together) and the means fitted on validation rows.

    Errors of training rows are smaller than others', so what is fitted on them predicts too little.
    """
    raw = (u_val - linear.mean) @ linear.weight
    offset = raw.mean(0)
    spread = ((raw - offset) ** 2).sum()
    scale = float(((raw - offset) * (y_val - y_val.mean(0))).sum() / spread) if spread > 0 else 0.0
    return Linear(linear.weight, linear.mean, y_val.mean(0), offset, scale, linear.penalty)


class CrossFit:
    """Predictions for test rows from rows that the SAE was not trained on: validation rows and the other test folds.

    The penalty is chosen on the validation rows alone, by folds among them.
    """

    def __init__(self, u_val: np.ndarray, u_test: np.ndarray):
        if min(len(u_val), len(u_test)) < 2 * FOLDS:
            raise ValueError(f"{len(u_val)} validation and {len(u_test)} test rows are too few for {FOLDS} folds")
        rng = np.random.default_rng(0)
        self.u_val, self.u_test = u_val, u_test
        self.of_val, self.of_test = (rng.permutation(len(u)) % FOLDS for u in (u_val, u_test))
        self.inner = [Ridge(u_val[self.of_val != f]) for f in range(FOLDS)]
        self.outer = [Ridge(np.concatenate([u_val, u_test[self.of_test != f]])) for f in range(FOLDS)]

    def predict(self, y_val: np.ndarray, y_test: np.ndarray, penalties: Sequence[float] = PENALTIES) -> np.ndarray:
        """(N_test, t), each row predicted without itself."""
        left = np.zeros(len(penalties))
        for f, ridge in enumerate(self.inner):
            out = self.of_val == f
            left += [((y_val[out] - one(self.u_val[out])) ** 2).sum() for one in ridge.path(y_val[~out], penalties)]
        best, guess = penalties[int(left.argmin())], np.empty_like(y_test)
        for f, ridge in enumerate(self.outer):
            out = self.of_test == f
            guess[out] = ridge.path(np.concatenate([y_val, y_test[~out]]), [best])[0](self.u_test[out])
        return guess


def r2(y: np.ndarray, guess: np.ndarray) -> float:
    """1 - sum |y - guess|^2 / sum |y - mean|^2 of targets (N, t); at or below 0 for what predicts nothing."""
    total = ((y - y.mean(0)) ** 2).sum()
    if not total > 0:
        raise ValueError("the targets do not vary: their R^2 is undefined")
    return float(1 - ((y - guess) ** 2).sum() / total)


def r2_intervals(
    y: np.ndarray, guesses: Mapping[str, np.ndarray], n_boot: int = 1000, seed: int = 0
) -> dict[str, dict[str, float]]:
    """R^2 of several guesses of y (N, t), each with a 95 % percentile interval over rows: value, lo, hi.

    The fits stay as they are. Replicates are paired: all guesses see the same rows.
    """
    n, weights, centred = len(y), row_weights(len(y), n_boot, seed), y - y.mean(0)
    total = weights @ (centred**2).sum(1) - ((weights @ centred) ** 2).sum(1) / n
    total *= n / (n - 1)  # a replicate's variance about its own mean is too small by that
    found = {}
    for name, guess in guesses.items():
        lo, hi = interval(1 - weights @ ((y - guess) ** 2).sum(1) / np.maximum(total, 1e-300))
        found[name] = {"value": r2(y, guess), "lo": lo, "hi": hi}
    return found


@lru_cache(maxsize=16)
def row_weights(n: int, n_boot: int, seed: int = 0) -> np.ndarray:
    """(n_boot, n): how often each of n rows is drawn in n draws with replacement."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_boot).astype(np.float64)


# --- what is predictable


def _targets(e: np.ndarray) -> dict[str, np.ndarray]:
    return {"vector": e, "norm2": (e**2).sum(1, keepdims=True)}


def predictability(coders: Mapping[str, object], train, val, test, n_boot: int = 1000) -> pd.DataFrame:
    """How much of each coder's error is linear in its normalised input, on ID test rows.

    All ``coders`` have the same normalisation: their inputs are the same rows. The first is the one in question; it
    gets a control of its own, "shuffled rows", whose errors are dealt to other rows of the same split. The ridge is
    fitted on ``train``, its penalty chosen on ``val``; other fits: :data:`FITS`.

    Columns: coder, target (of :data:`TARGETS`), fit (of :data:`FITS`; for the vector also "one number": e is a constant
    times u, both means taken off, the constant from validation rows; for the norm also "constant": the training rows'
    mean), value, lo, hi (R^2 with a 95 % interval over test rows; the fit itself stays as it is), penalty (NaN where
    there is none, or one for each fold), rows (how many it is fitted on, validation rows of a rescaled fit aside),
    fvu_train and fvu_test (share of the variance that the coder leaves unexplained).
    """
    rows, control, bases, shuffle = [], [], None, np.random.default_rng(0)
    for name, coder in coders.items():
        split = [errors(coder, x) for x in (train, val, test)]
        if bases is None:
            first = [u for u, _ in split]
            bases = Ridge(first[0]), CrossFit(first[1], first[2])
        elif not all(np.array_equal(u, one) for (u, _), one in zip(split, first, strict=True)):
            raise ValueError(f"{name} normalises its input in another way than {next(iter(coders))}")
        ys = [_targets(e) for _, e in split]
        fvu = [float((e**2).sum() / ((u - u.mean(0)) ** 2).sum()) for u, e in split]
        about = {"fvu_train": fvu[0], "fvu_test": fvu[2]}
        rows += [{"coder": name} | row | about for row in _fits(*bases, *ys, n_boot)]
        if coder is next(iter(coders.values())):
            dealt = [_targets(e[shuffle.permutation(len(e))]) for _, e in split]
            control = [{"coder": "shuffled rows"} | row | about for row in _fits(*bases, *dealt, n_boot)]
    return pd.DataFrame(rows + control)


def _fits(ridge: Ridge, crossed: CrossFit, train, val, test, n_boot: int) -> list[dict]:
    rows = []
    for target in TARGETS:
        y, y_val, y_test = train[target], val[target], test[target]
        plain = ridge.choose(y, crossed.u_val, y_val)
        guesses = {"train": plain(crossed.u_test)}
        guesses["rescaled"] = rescaled(plain, crossed.u_val, y_val)(crossed.u_test)
        guesses["unseen"] = crossed.predict(y_val, y_test)
        if target == "vector":
            same = Linear(np.eye(y.shape[1]), ridge.mean, ridge.mean)
            guesses["one number"] = rescaled(same, crossed.u_val, y_val)(crossed.u_test)
        else:
            guesses["constant"] = np.repeat(y.mean(0)[None], len(y_test), axis=0)
        seen = {"unseen": len(y_val) + len(y_test) * (FOLDS - 1) // FOLDS, "one number": len(y_val)}
        for fit, cell in r2_intervals(y_test, guesses, n_boot).items():
            penalty = plain.penalty if fit in ("train", "rescaled") else np.nan
            rows.append({"target": target, "fit": fit, **cell, "penalty": penalty, "rows": seen.get(fit, len(y))})
    return rows


def errors(coder, x) -> tuple[np.ndarray, np.ndarray]:
    """Normalised inputs u (N, d) and errors u - u_hat (N, d) of raw rows x, float64."""
    u = as_numpy(coder.normalize(x)).astype(np.float64)
    return u, u - as_numpy(coder.decode(coder.encode(x))).astype(np.float64)


def coders(run, ks: Iterable[int] = ()) -> dict[str, object]:
    """The SAE of a run, the same with other k, and controls. Keys are their titles.

    Controls: random unit atoms with a fitted gain; as many principal components as leave the SAE's share of the
    variance on validation rows, all kept (their error is linear: R^2 is 1 by construction); and all principal
    components, the k largest of a row kept (a sparse code without a learned dictionary).
    """
    config, train, val = run.experiment.sae, run.features("train").cls, run.features("val").cls
    found = {f"SAE, k = {config.k}": run.sae}
    for k in ks:
        if k != config.k:
            found[f"SAE, k = {k}"] = Run(run.experiment, {"sae.k": k}, run.store, run.device, run.progress).sae
    d, common = train.shape[1], {"normalize": config.normalize, "seed": config.seed}
    found["random dictionary"] = dictionaries.create("random", config.latents, config.k, **common).fit(train)
    rank = equal_rank(run.sae, train, val)
    found[f"PCA, first {rank}"] = dictionaries.create("pca", rank, rank, **common).fit(train)
    found[f"PCA, largest {config.k} of {d}"] = dictionaries.create("pca", d, min(config.k, d), **common).fit(train)
    return found


def equal_rank(coder, train, val) -> int:
    """The number of principal components of `train` that leave at most the coder's error on `val` (1 to d - 1)."""
    (u, _), (v, e) = errors(coder, train), errors(coder, val)
    axes = np.linalg.eigh((u - u.mean(0)).T @ (u - u.mean(0)))[1][:, ::-1]
    whole = ((v - u.mean(0)) ** 2).sum()
    left = whole - np.cumsum((((v - u.mean(0)) @ axes) ** 2).sum(0))
    return int(np.clip((left > (e**2).sum()).sum() + 1, 1, u.shape[1] - 1))


# --- the three parts


def linear_part(coder, train, val) -> Linear:
    """The map u -> e_lin: ridge on training rows, its penalty, one factor and the means from validation rows."""
    (u, e), (v, e_val) = errors(coder, train), errors(coder, val)
    return rescaled(Ridge(u).choose(e, v, e_val), v, e_val)


def parts(coder, linear: Linear, x) -> dict[str, np.ndarray]:
    """Parts of raw rows x (N, d) in the coder's normalised space, float64.

    input = reconstruction + error; error = linear + rest.
    """
    u, e = errors(coder, x)
    guess = linear(u)
    return {"input": u, "reconstruction": u - e, "error": e, "linear": guess, "rest": e - guess}


THREE = ("reconstruction", "linear", "rest")
CROSSED = (("reconstruction", "linear"), ("reconstruction", "rest"), ("linear", "rest"))


def structure(split: Mapping[str, Mapping[str, np.ndarray]], n_boot: int = 1000) -> pd.DataFrame:
    """Shares of the three parts and of their overlaps in the input's variance, set by set; ``split`` of :func:`parts`.

    Variances of every set are about the means of the set "train", which has no rows of its own in the result, nor has
    "val". Columns: set, group ("id", "near", "far"), what, value, lo, hi, with 95 % intervals over rows: the share of
    each part, 2 <a, b> of each pair ("a x b"), and of all pairs ("cross"), over the sum of |u - mean|^2; parts and
    cross sum to 1.
    """
    rows, means = [], {part: split["train"][part].mean(0) for part in ("input", *THREE)}
    for where, of in split.items():
        if where in ("train", "val"):
            continue
        group = where.split("/")[0] if "/" in where else "id"
        centred = {part: of[part] - means[part] for part in ("input", *THREE)}
        weights = row_weights(len(of["input"]), n_boot)
        square = {part: (a**2).sum(1) for part, a in centred.items()}
        top = {part: square[part] for part in THREE}
        top |= {f"{a} x {b}": 2 * (centred[a] * centred[b]).sum(1) for a, b in CROSSED}
        top["cross"] = sum(top[f"{a} x {b}"] for a, b in CROSSED)
        for what, values in top.items():
            draws = (weights @ values) / (weights @ square["input"])
            cell = (float(values.sum() / square["input"].sum()), *interval(draws))
            rows.append((where, group, what, *cell))
    return pd.DataFrame(rows, columns=["set", "group", "what", "value", "lo", "hi"])
