"""Arrays of your own -> the table of this project: an SAE, every detector that they allow, intervals and tests.

What can be read is listed in :mod:`capsae.pipeline.arrays_io`. ``capsae evaluate FILE`` is this module on the command
line.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .. import detectors as _detectors
from ..data.splits import holdout_mask
from ..detectors import Observations
from ..evaluation.evaluate import compare, evaluate
from ..features.copies import check_copies
from ..features.featureset import LinearHead
from ..files import Output, beside
from .arrays_io import LAYOUT, Arrays, arrays_from, load_arrays

__all__ = ["LAYOUT", "Arrays", "Evaluation", "arrays_from", "default_sae", "evaluate_arrays", "load_arrays"]

VAL_FRACTION = 0.1
MAX_DEAD = 0.01  # with more dead latents the profiles miss what those would hold
OVERFITTED = 3  # a held-out FVU so many times that of the training rows is reported
_PROBE_CELLS = 5e8  # rows x columns x classes up to which a logistic probe takes about a minute on two cores


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate_arrays` found.

    Attributes
    ----------
    table : DataFrame
        Of :func:`capsae.evaluate`: method, set, group, metric, value, lo, hi; and options, those of the method as JSON.
    comparison : DataFrame
        Of :func:`capsae.evaluation.evaluate.compare`, each method against ``settings["against"]``; empty with one
        method.
    left_out : dict
        Detectors that these arrays do not allow, with the reason.
    notes : list of str
        What a reader of the table has to know: where the logits come from, how the SAE trained, what is missing.
    settings : dict
        Everything that was set, and the digests of what it was set on, as plain values.
    """

    table: pd.DataFrame
    comparison: pd.DataFrame
    left_out: dict[str, str]
    notes: list[str]
    settings: dict[str, Any]

    def save(self, path: str | os.PathLike) -> list[Path]:
        """Write the table to ``path``, and beside it ``<path less .csv>.compared.csv`` and ``.json``: settings, notes,
        what was left out. Returns the three files; raises FileExistsError for a file that is no such table.
        """
        table, compared, settings = outputs(path)
        record = {"table": Path(path).name, "settings": self.settings, "notes": self.notes, "left_out": self.left_out}
        table.table(self.table)
        compared.table(self.comparison)
        settings.write(json.dumps(record, indent=1) + "\n")
        return [Path(path), beside(path, ".compared.csv"), beside(path, ".json")]


def outputs(path: str | os.PathLike) -> tuple[Output, Output, Output]:
    """The three files of :meth:`Evaluation.save`, checked: a name that another table's files have is refused."""
    head = json.dumps({"table": Path(path).name}, indent=1).removesuffix("\n}")
    settings = Output(beside(path, ".json"), head)
    return Output(path, "method,set,"), Output(beside(path, ".compared.csv"), "method,"), settings


def evaluate_arrays(
    arrays: Arrays,
    methods: Sequence[str] | None = None,
    *,
    sae=None,
    sae_settings: Mapping[str, Any] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    preset: str | None = None,
    against: str | None = None,
    n_boot: int = 1000,
    seed: int = 0,
    device: str = "auto",
    progress: bool = True,
) -> Evaluation:
    """Compare detectors on arrays of your own.

    Parameters
    ----------
    arrays : Arrays
        Of :func:`load_arrays` or :func:`arrays_from`.
    methods : names, optional
        Default: all that the arrays allow.
    sae : TopKSAE, path or False, optional
        Default: one is trained on the training features, the epoch with the lowest held-out FVU kept. A folder of
        ``TopKSAE.save`` (or of SAELens and others, see :mod:`capsae.sae.exchange.folders`) is loaded. False: no SAE,
        and none of the detectors that need one.
    sae_settings : mapping, optional
        Over :func:`default_sae`, such as ``{"k": 64}``.
    options : mapping of detector names to their options, optional
    preset : str, optional
        Of the detectors that have it: "ours" or "openood".
    against : str, optional
        The method that all others are tested against; default: EPD, or the first method without it.
    n_boot : int
        Bootstrap replicates of the intervals; comparisons take ten times as many, for p values that survive Holm's
        correction. 0: no intervals and no comparison.
    seed : int
        Of the held-out rows, the probe, the SAE and the bootstrap.
    device : str
    progress : bool
        A bar while the SAE trains.

    Returns
    -------
    Evaluation

    Raises
    ------
    ValueError
        An unknown method, one that was asked for by name and that the arrays do not allow, an SAE of another width, or
        a set most of whose rows are those of another (:func:`capsae.features.copies.check_copies`).
    """
    notes: list[str] = []
    options = dict(options or {})
    names = _names(arrays, methods, options, against)
    for number, name in enumerate(arrays.sets, start=1):
        notes += check_copies(name, dict(list(arrays.sets.items())[:number]), arrays.source)
    sets = _with_val(arrays, seed, notes)
    head, sets = _with_logits(arrays, sets, seed, notes)
    notes.append(_check_accuracy(arrays.source, sets["train"], arrays.n_classes))
    if sae is None and not any("codes" in _detectors.info(name)["needs"] for name in names):
        sae = False  # nobody would look at it
    sae = None if sae is False else _sae(sae, sae_settings or {}, sets, seed, device, progress, notes)
    observed = {}
    for name, one in sets.items():
        labels = one.labels if not name.startswith(("near/", "far/")) and (one.labels >= 0).any() else None
        given = {"logits": one.logits, "labels": labels, "head": head, "sae": sae, "pixels": one.pixels}
        observed[name] = Observations(one.cls, **given)
    unknown = int((sets["test"].labels < 0).sum())
    if observed["test"].labels is None:
        notes.append("test/labels are not given: no accuracy, no OSCR, no AUROC of correctly classified ID")
    elif unknown:
        what = f"{unknown} of {len(sets['test'])} test/labels are -1 (none)"
        notes.append(f"{what}: accuracy is over the others; no OSCR, no AUROC of correctly classified ID")

    fitted, left_out = _fit(names, methods is not None, _reasons(arrays, head, sae), observed, options, preset)
    wanted = ["test", *arrays.ood_sets, *arrays.shifted]
    kept = {name: _Scored() for name in (*fitted, *arrays.scores)}
    for where in wanted:  # each set is scored once, for the table and for the comparison
        for name, scores in _detectors.score_all(fitted, observed[where]).items():
            kept[name].of[id(observed[where])] = scores
        for name, of in arrays.scores.items():
            kept[name].of[id(observed[where])] = of[where]
    if not kept:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        raise ValueError(f"{arrays.source}: no detector is left ({reasons})")
    ood = {name: observed[name] for name in arrays.ood_sets}
    shifted = {name: observed[name] for name in arrays.shifted}
    table = evaluate(kept, observed["test"], ood, n_boot=n_boot, seed=seed, shifted=shifted)
    against = against or ("epd" if "epd" in kept else next(iter(kept)))
    if against not in kept:
        raise ValueError(f"against {against!r}: {left_out.get(against, 'not among the methods')}")
    comparison = pd.DataFrame()
    if n_boot and len(kept) > 1:
        comparison = compare(kept, observed["test"], ood, against, n_boot=10 * n_boot, seed=seed)

    in_force = {name: detector.options for name, detector in fitted.items()}
    as_text = {name: json.dumps(of) for name, of in in_force.items()}
    table["options"] = table["method"].map(as_text | dict.fromkeys(arrays.scores, '"given scores"')).fillna("")
    settings = {
        "source": arrays.source,
        "sets": {name: {"rows": len(one), "sha256": one.digest()} for name, one in sets.items()},
        "dim": sets["train"].cls.shape[1],
        "n_classes": arrays.n_classes,
        "sae": dataclasses.asdict(sae.config) if sae is not None else None,
        "detectors": in_force,
        "preset": preset or "ours",
        "against": against,
        "n_boot": {"intervals": n_boot, "comparison": 10 * n_boot},
        "seed": seed,
        "device": str(device),
    }
    return Evaluation(table, comparison, left_out, notes, settings)


def default_sae(n_rows: int, dim: int, seed: int = 0):
    """The settings of an SAE for n_rows x dim features when nobody knows better; tuned on no OOD set.

    The shape follows the paper (M = 10 d, k = d / 6). The schedule follows ``benchmarks/sae_recipe_grid.py``, where on
    some ten thousand rows about 800 steps at a rate of 8e-3 with a long fall had the lowest held-out FVU: batches as
    large as leave 800 steps in 25 epochs, and 8 epochs at least. With more steps the rate falls on a power law towards
    that of large runs, 2e-4 / sqrt(M / 2^14) at 10^5 steps. Between the two it is a guess: look at the FVU.

    Returns
    -------
    SAEConfig
    """
    from ..sae import SAEConfig

    latents, k = 10 * dim, max(1, min(round(dim / 6), 10 * dim))
    batch = next((size for size in (64, 128, 256, 512, 1024, 2048) if n_rows / size <= 50), 4096)
    per_epoch = math.ceil(n_rows / batch)
    epochs = min(max(round(800 / per_epoch), 8), 25)
    large = 2e-4 / (latents / 2**14) ** 0.5
    share = min(max(math.log(epochs * per_epoch / 800) / math.log(1e5 / 800), 0), 1)
    lr = float(f"{8e-3 * (large / 8e-3) ** share:.2g}")
    return SAEConfig(latents, k, epochs=epochs, batch_size=batch, lr=lr, decay=0.8, seed=seed)


# --- the parts


class _Scored:
    """A detector whose scores are known, by the observations they are of."""

    def __init__(self):
        self.of: dict[int, np.ndarray] = {}

    def score(self, obs: Observations) -> np.ndarray:
        return self.of[id(obs)]


def _names(arrays: Arrays, methods, options: Mapping, against: str | None) -> list[str]:
    """Names of the detectors to fit; what nobody knows is refused before any work."""
    for name in [*(methods or ()), *options, *([against] if against else ())]:
        if name not in arrays.scores:
            known = _detectors.info(name)["defaults"]
            unknown = sorted(set(options.get(name, {})) - set(known))
            if unknown:
                has = ", ".join(known) or "none"
                raise ValueError(f"detector {name!r} has no option {unknown[0]!r}; it has {has}")
    clash = [name for name in arrays.scores if name in _detectors.available()]
    if clash:
        raise ValueError(f"{arrays.source}: scores/{clash[0]} has the name of a detector; give it another")
    names = list(dict.fromkeys(methods)) if methods is not None else _detectors.available()
    if methods is not None and against and against not in names:
        names.append(against)
    return [name for name in names if name not in arrays.scores]


def _with_val(arrays: Arrays, seed: int, notes: list[str]) -> dict:
    sets = dict(arrays.sets)
    if "val" not in sets:
        held_out = holdout_mask(sets["train"].labels, VAL_FRACTION, seed)
        sets |= {"train": arrays.sets["train"].take(~held_out), "val": arrays.sets["train"].take(held_out)}
        notes.append(
            f"no val/features: {held_out.sum()} rows are held out of train, by class (seed {seed}); if your network "
            "was trained on them, what is fitted on val (temperature, prototypes) is too sure of itself"
        )
    return sets


def _with_logits(arrays: Arrays, sets: dict, seed: int, notes: list[str]) -> tuple[LinearHead | None, dict]:
    """The head, and the sets with logits: those given, the head's, or those of a probe that is fitted here."""
    head = arrays.head
    if sets["train"].logits is not None:
        whose = "given, and the head's agree with them" if head is not None else "given; no head"
        notes.append(f"logits: {whose}")
        return head, sets
    if head is None:
        from ..features.probe import fit_linear_probe

        train = sets["train"]
        if train.cls.size * arrays.n_classes <= _PROBE_CELLS:
            head, kind = fit_linear_probe(train.cls, train.labels, arrays.n_classes, seed), "a logistic regression"
        else:
            head, kind = discriminant_head(train.cls, train.labels, arrays.n_classes), "a linear discriminant"
        notes.append(
            f"NO HEAD AND NO LOGITS ARE GIVEN: {kind} fitted on train stands in for your classifier; every score that "
            "reads logits or a head is that probe's"
        )
    else:
        notes.append("logits: the given head's" + ("" if np.any(head.bias) else ", which has no bias"))
    return head, {name: dataclasses.replace(one, logits=head.logits(one.cls)) for name, one in sets.items()}


def _check_accuracy(source: str, train, n_classes: int) -> str:
    """Refuse logits that know nothing of the labels: a head that was written transposed, labels in another order."""
    hit = train.logits.argmax(axis=1) == train.labels
    accuracy = float(hit.mean())
    counts = np.maximum(np.bincount(train.labels, minlength=n_classes), 1)
    balanced = float((np.bincount(train.labels, hit, n_classes) / counts).mean())  # a large class counts once
    if balanced <= (1.5 if n_classes > 2 else 1) / n_classes:
        raise ValueError(
            f"{source}: the logits are right on {accuracy:.1%} of the training rows, and on {balanced:.1%} of a class "
            f"in the mean; always naming one class would be right on {1 / n_classes:.1%}. Is it the right head, are "
            "its rows in the order of the labels, were arrays contiguous when they were written (np.ascontiguousarray)?"
        )
    return f"accuracy on train: {accuracy:.1%}"


def discriminant_head(cls: np.ndarray, labels: np.ndarray, n_classes: int, shrink: float = 1e-2) -> LinearHead:
    """Linear discriminant analysis: class means and one covariance in a single pass, for what is too large for a
    logistic probe. ``shrink`` of each column's variance is added to the covariance's diagonal.
    """
    counts = np.bincount(labels, minlength=n_classes)
    centre = cls.mean(axis=0, dtype=np.float64)
    means, second = np.zeros((n_classes, cls.shape[1])), np.zeros((cls.shape[1],) * 2)
    for start in range(0, len(cls), 8192):
        x = cls[start : start + 8192].astype(np.float64) - centre
        np.add.at(means, labels[start : start + 8192], x)
        second += x.T @ x
    means /= counts[:, None]
    tied = (second - (means * counts[:, None]).T @ means) / len(cls)
    spread = np.diag(tied)
    tied = tied + np.diag(np.where(spread > 0, shrink * spread, 1))  # a constant column says nothing
    weight = np.linalg.solve(tied, means.T).T
    bias = np.log(counts / counts.sum()) - (weight * means).sum(axis=1) / 2 - weight @ centre
    return LinearHead(weight.astype(np.float32), bias.astype(np.float32))


def _sae(sae, settings: Mapping, sets: dict, seed: int, device: str, progress: bool, notes: list[str]):
    from ..sae import SAEConfig, TopKSAE, train_sae

    train, val = sets["train"].cls, sets["val"].cls
    if sae is None:
        default = dataclasses.asdict(default_sae(len(train), train.shape[1], seed))
        config = SAEConfig.from_dict(default | dict(settings))
        sae, history = train_sae(train, config, device, held_out=val, keep="best", progress=progress)
        at = history.set_index("epoch").loc[history.attrs["best_epoch"]]
        size = f"M = {config.latents}, k = {config.k}, batch {config.batch_size}, lr {config.peak_lr:g}"
        fvu = f"FVU {at['fvu']:.3f}, held out {at['held_out_fvu']:.3f}, dead {at['dead_fraction']:.1%}"
        notes.append(f"SAE trained: {size}; epoch {at.name} of {config.epochs} kept; {fvu}")
        if at["held_out_fvu"] > OVERFITTED * at["fvu"] + 0.01:
            notes.append(
                "SAE: overfitted, it explains held-out rows much worse than its training rows; more rows, or fewer "
                "latents (--set sae.latents=), would do"
            )
        if at["dead_fraction"] > MAX_DEAD:
            notes.append(
                f"SAE: more than {MAX_DEAD:.0%} of the latents are dead: the features span few directions, or the rate "
                "is too high; fewer latents or a lower rate may do better (--set sae.latents=, sae.lr=)"
            )
        return sae
    if settings:
        raise ValueError(f"sae.{next(iter(settings))} is set, but the SAE is loaded, not trained; give one of the two")
    if isinstance(sae, str | os.PathLike):
        notes.append(f"SAE loaded from {os.fspath(sae)}")
        sae = TopKSAE.load(sae)
    width = len(sae.pre_bias)
    if width != train.shape[1]:
        raise ValueError(f"the SAE reads {width} columns, the features have {train.shape[1]}; give one trained on them")
    with_rows = "held out" if "val" in sets else "train"
    notes.append(f"SAE: M = {sae.config.latents}, k = {sae.config.k}; FVU {with_rows} {sae.fvu(val):.3f}")
    return sae


def _reasons(arrays: Arrays, head, sae) -> dict[str, str]:
    """Why what a detector may need is not there."""
    reasons = {}
    if head is None:
        reasons["head"] = "needs head/weight and head/bias; logits alone are given"
    if sae is None:
        reasons["codes"] = "needs an SAE, and none is wanted"
    without = [name for name, one in arrays.sets.items() if one.pixels is None and name != "val"]
    if without:
        reasons["pixels"] = f"needs pixels, and {without[0]}/pixels is not given"
    return reasons


def _fit(names, by_name: bool, reasons: Mapping, observed: Mapping, options: Mapping, preset: str | None):
    """Fitted detectors, and those that cannot be, with the reason; ValueError if one was asked for by name."""
    fitted, left_out = {}, {}
    for name in names:
        about = _detectors.info(name)
        why = next((reasons[need] for need in about["needs"] if need in reasons), None)
        if why is None:
            chosen = preset if preset in about["presets"] else None
            detector = _detectors.create(name, chosen, **options.get(name, {}))
            try:
                tried = detector.fit(observed["train"], observed["val"]).score(observed["train"].take(slice(8)))
                if np.isfinite(tried).all():
                    fitted[name] = detector
                    continue
                why = "its scores of training rows are not finite"
            except ValueError as error:  # such as a k larger than the bank, or a share that leaves no activation
                why = str(error)
        if by_name:
            raise ValueError(f"detector {name!r}: {why}")
        left_out[name] = why
    return fitted, left_out
