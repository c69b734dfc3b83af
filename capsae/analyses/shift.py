"""Covariate shift: do probes on sparse codes hold better than the probe on the CLS, and what do detectors make of it?

The second paper says that SAE features improve OOD generalisation (arXiv 2508.11277, abstract); how it tests that is
not known to us, so all of this is our own reconstruction [r]: known classes under corruptions, probes fitted and
temperatures chosen on clean ID rows alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from ..detectors import OURS, Observations
from ..featureset import FeatureSet
from ..packs import load_pack, pack_info, packs
from ..stats import bootstrap_p, exact_interval, holm, interval
from . import calibration
from .corruptions import CORRUPTIONS
from .probes import TITLES, Probe, fit_probes

N_BOOT = 5000
UNTESTED = 1000  # replicates where only an interval is wanted
CLEAN = "clean"
MEAN = "mean"  # over all shifted sets, unweighted
LOSS = "change from clean"  # that mean less the clean value
SCALED = {False: "before", True: "after"}  # temperature scaling
TESTED = (("accuracy", "after"), ("nll", "after"), ("ece", "after"), ("ece_adaptive", "after"), ("brier", "after"))
ALARMS = ("epd", OURS, "msp", "energy", "knn", "mds++")
SEEDS = (0, 1, 2)
_SAME = ("model", "pooling", "image_size", "interpolation", "mean", "std", "weights_sha256")  # crop is of the images


def sets(run, pack: str | os.PathLike | None = None) -> dict[str, FeatureSet]:
    """Known classes under other conditions: corrupted copies of the ID test images, and the profile's shifted sets.

    Parameters
    ----------
    run : capsae.pipeline.Run
    pack : name or path, optional
        What :func:`capsae.analyses.shift_pack.make_shift_pack` wrote; default: ``<profile's pack>_shift`` where that is
        embedded.

    Returns
    -------
    dict of FeatureSet
        ``blur/1`` ... from the pack, then ``shifted/<set>`` of the profile.

    Raises
    ------
    ValueError
        Neither is there, or the pack's images or backbone are not the run's.
    """
    if pack is None and f"{run.profile.pack}_shift" in packs():
        pack = f"{run.profile.pack}_shift"
    found: dict[str, FeatureSet] = {}
    if pack is not None:
        _check_backbone(run, pack)
        found = {name: load_pack(pack, name) for name in pack_info(pack)["sets"]}
        known = set(run.features("test").ids.tolist())
        for name, features in found.items():
            strange = [id for id in features.ids.tolist() if id not in known]
            if strange:
                raise ValueError(f"pack {os.fspath(pack)!r}, {name}: {strange[0]!r} is no ID test image of the profile")
    found |= {name: run.features(name) for name in run.profile.shifted}
    if not found:
        raise ValueError(
            f"profile {run.profile.name!r} has no covariate-shifted set: add one to its [shifted], or make corrupted "
            f"test images by `python -m capsae.analyses.shift_pack {run.profile.name}` and give their folder as pack"
        )
    return found


def clean(run, shifted: Mapping[str, FeatureSet]) -> FeatureSet:
    """The clean ID test rows of the corrupted images, in their order; all test rows where no set has such images."""
    test = run.features("test")
    place = {id: row for row, id in enumerate(test.ids.tolist())}
    for name, features in shifted.items():
        if name.split("/")[0] in CORRUPTIONS:
            return test.take(np.array([place[id] for id in features.ids.tolist()]))
    return test


def parts(name: str) -> tuple[str, int | None]:
    """``("blur", 3)`` of ``blur/3``; ``("shifted/fog", None)`` of a set that has no strengths."""
    corruption, _, strength = name.partition("/")
    return (corruption, int(strength)) if corruption in CORRUPTIONS else (name, None)


# --- accuracy and calibration


def evaluate(
    run,
    shifted: Mapping[str, FeatureSet],
    probes: Mapping[str, Probe] | None = None,
    n_boot: int = N_BOOT,
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Measure probes on clean and shifted rows, and test each against the probe on the CLS.

    Temperatures are fitted on the ID validation rows, which no probe was fitted on. A replicate of the bootstrap draws
    images: all corruptions of an image are drawn together.

    Parameters
    ----------
    run : capsae.pipeline.Run
    shifted : what :func:`sets` gives
    probes : what :func:`capsae.analyses.probes.fit_probes` gives; default: all of them. Must hold "cls".
    n_boot : int

    Returns
    -------
    measured : DataFrame
        representation, set, corruption, strength, metric, scaled, value, lo, hi
    compared : DataFrame
        What :func:`compare` gives.
    fitted : DataFrame
        representation, title, strength (C of the penalty), temperature, accuracy on the ID validation rows
    """
    probes = fit_probes(run) if probes is None else dict(probes)
    val = run.features("val")
    given = {CLEAN: clean(run, shifted), **shifted}
    weights = draw({name: features.ids for name, features in given.items()}, n_boot, run.profile.seed)
    rows, replicates, fitted = [], {}, []
    for name, probe in probes.items():
        before = probe.logits(val.cls)
        t = calibration.temperature(before, val.labels)
        right = float((before.argmax(axis=1) == val.labels).mean())
        fitted.append((name, TITLES.get(name, name), probe.strength, t, right))
        for where, features in given.items():
            logits = probe.logits(features.cls)
            for scaled in SCALED:
                of = calibration.per_sample(logits / t if scaled else logits, features.labels)
                some = weights[where] if scaled else weights[where][:UNTESTED]
                values, draws = calibration.measure(of), calibration.measure(of, some)
                for metric, value in values.items():
                    if metric == "accuracy" and not scaled:
                        continue  # a temperature changes no prediction
                    rows.append((name, where, metric, SCALED[scaled], float(value), *interval(draws[metric])))
                    replicates[name, where, metric, SCALED[scaled]] = draws[metric]
    measured = pd.DataFrame(rows, columns=["representation", "set", "metric", "scaled", "value", "lo", "hi"])
    corruption, strength = zip(*map(parts, measured["set"]), strict=True)
    measured.insert(2, "corruption", corruption)
    measured.insert(3, "strength", [0 if c == CLEAN else s for c, s in zip(corruption, strength, strict=True)])
    columns = ["representation", "title", "strength", "temperature", "validation accuracy"]
    return measured, compare(measured, replicates), pd.DataFrame(fitted, columns=columns)


def draw(ids: Mapping[str, np.ndarray], n_boot: int, seed: int = 0) -> dict[str, np.ndarray]:
    """How often each replicate draws each row of each set, (n_boot, N) float32; sets of the same ids share their draws.

    Parameters
    ----------
    ids : mapping of sets to the names (N,) of their images, in the order of their rows
    """
    shared: dict[tuple, np.ndarray] = {}
    found = {}
    for name, of in ids.items():
        key = tuple(np.asarray(of).tolist())
        if key not in shared:
            rng, n = np.random.default_rng([seed, len(shared)]), len(key)
            drawn = rng.integers(0, n, size=(n_boot, n)) + np.arange(n_boot)[:, None] * n
            shared[key] = np.bincount(drawn.ravel(), minlength=n_boot * n).reshape(n_boot, n).astype(np.float32)
        found[name] = shared[key]
    return found


def places(names: Sequence[str]) -> dict[str, list[str]]:
    """What is tested: place -> sets whose mean it is. ``clean``, each corruption, ``mean`` of all shifted sets."""
    found: dict[str, list[str]] = {CLEAN: [CLEAN]}
    for name in names:
        if name != CLEAN:
            found.setdefault(parts(name)[0], []).append(name)
    return found | {MEAN: [name for name in names if name != CLEAN]}


def compare(measured: pd.DataFrame, replicates: Mapping[tuple, np.ndarray], alpha: float = 0.05) -> pd.DataFrame:
    """Each representation less the CLS: on clean rows, per corruption, in the mean, and what the shift changes.

    Parameters
    ----------
    measured : as :func:`evaluate` gives it
    replicates : (representation, set, metric, scaled) -> (n_boot,), drawn together

    Returns
    -------
    DataFrame
        representation, place, metric, scaled, own and cls (the two values), value (own less cls), lo, hi, p, p_holm,
        p_at_most, verdict. Intervals are 95 % and not corrected; ``p_holm`` is corrected over all rows of a metric,
        i.e. all representations and places. ``verdict``: "better" or "worse" where p_holm < alpha, else "undecided".
        ``change from clean`` is the mean of the shifted sets less the clean value: above 0 in accuracy means that the
        representation loses less than the CLS.
    """
    at = measured.set_index(["representation", "set", "metric", "scaled"])["value"]
    over = places(list(dict.fromkeys(measured["set"])))
    rows = []
    for metric, scaled in TESTED:
        for name in dict.fromkeys(measured["representation"]):
            if name == "cls":
                continue
            cells = {}
            for place, of in over.items():
                own, other = (np.mean([at[r, s, metric, scaled] for s in of]) for r in (name, "cls"))
                difference = [replicates[name, s, metric, scaled] - replicates["cls", s, metric, scaled] for s in of]
                cells[place] = (own, other, np.mean(difference, axis=0))
            (own, other, mean), (own0, other0, mean0) = cells[MEAN], cells[CLEAN]
            cells[LOSS] = (own - own0, other - other0, mean - mean0)
            for place, (own, other, draws) in cells.items():
                p, least = bootstrap_p(draws), 2 / (1 + len(draws))
                rows.append((name, place, metric, scaled, own, other, own - other, *interval(draws), p, p <= least))
    columns = ["representation", "place", "metric", "scaled", "own", "cls", "value", "lo", "hi", "p", "p_at_most"]
    table = pd.DataFrame(rows, columns=columns)
    table["p_holm"] = table.groupby(["metric", "scaled"])["p"].transform(holm)
    good = table["value"] * table["metric"].map(lambda m: 1 if calibration.HIGHER_IS_BETTER[m] else -1) > 0
    table["verdict"] = np.where(table["p_holm"] < alpha, np.where(good, "better", "worse"), "undecided")
    return table


def means(measured: pd.DataFrame) -> pd.DataFrame:
    """Means over all shifted sets, accuracy and calibration errors in %. Columns: representation, column, value."""
    rows = measured[measured["corruption"] != CLEAN]
    found = rows.groupby(["representation", "metric", "scaled"], sort=False)["value"].mean().reset_index()
    found["value"] *= found["metric"].map(lambda metric: 100 if metric in calibration.SHARES else 1)
    plain = found["metric"].map(calibration.NAMES)
    found["column"] = plain.where(found["metric"] == "accuracy", plain + ", " + found["scaled"])
    return found[["representation", "column", "value"]]


def over_seeds(
    run, shifted: Mapping[str, FeatureSet], fitted: pd.DataFrame, seeds: Sequence[int] = SEEDS
) -> pd.DataFrame:
    """Accuracy of probes on codes of SAEs from several seeds, at the penalty chosen for the run's own.

    The other SAEs come from the store or are trained. Columns: seed, place, accuracy, difference (less the CLS).
    """
    from ..pipeline import Run
    from .probes import as_matrix, fit_rows

    strength = float(fitted.set_index("representation").loc["codes", "strength"])
    train, given, rows = run.features("train"), {CLEAN: clean(run, shifted), **shifted}, []
    for seed in seeds:
        sae = run.sae
        if seed != run.profile.sae.seed:
            sae = Run(run.profile, {"sae.seed": seed, "n_boot": 0}, run.store, run.device, run.progress).sae
        logits, _ = fit_rows(as_matrix(sae.encode(train.cls)), train.labels, strengths=(strength,))
        right = {}
        for name, features in given.items():
            codes, head = logits(as_matrix(sae.encode(features.cls))), run.head.logits(features.cls)
            right[name] = [float((z.argmax(axis=1) == features.labels).mean()) for z in (codes, head)]
        for place, of in places(list(given)).items():
            own, other = np.mean([right[name] for name in of], axis=0)
            rows.append((seed, place, own, own - other))
    return pd.DataFrame(rows, columns=["seed", "place", "accuracy", "difference"])


# --- false alarms


def alarms(run, shifted: Mapping[str, FeatureSet], methods: Sequence[str] = ALARMS) -> pd.DataFrame:
    """Share of ID images that a detector flags at the threshold that keeps 95 % of the clean ID validation rows.

    Returns
    -------
    DataFrame
        method, title, set, corruption, strength, group, n, value, lo, hi; ``group`` is "all", or "correct": images that
        the head still classifies correctly, where a flag helps nobody. Intervals are Clopper and Pearson's, of one set.
    """
    from ..detectors import info

    rows = []
    detectors = run.detectors(methods)
    given = {CLEAN: clean(run, shifted), **shifted}
    seen = {
        name: Observations(f.cls, labels=f.labels, head=run.head, sae=run.sae, pixels=f.pixels)
        for name, f in given.items()
    }
    for method in methods:
        threshold = run.threshold(method)
        for name, obs in seen.items():
            flagged, right = detectors[method].score(obs) > threshold, obs.predicted == obs.labels
            corruption, strength = (CLEAN, 0) if name == CLEAN else parts(name)
            for group, chosen in (("all", np.ones(len(obs), bool)), ("correct", right)):
                share = float(flagged[chosen].mean()) if chosen.any() else np.nan
                cell = (share, *exact_interval(share, int(chosen.sum())))
                rows.append(
                    (method, info(method)["title"], name, corruption, strength, group, int(chosen.sum()), *cell)
                )
    columns = ["method", "title", "set", "corruption", "strength", "group", "n", "value", "lo", "hi"]
    return pd.DataFrame(rows, columns=columns)


def with_clean(data: pd.DataFrame) -> pd.DataFrame:
    """Rows of corruptions with the clean row as strength 0 of each, for figures; sets of other names are left out."""
    zero = data[data["corruption"] == CLEAN]
    known = data[data["corruption"].isin(list(CORRUPTIONS))]
    frames = [
        frame
        for c in dict.fromkeys(known["corruption"])
        for frame in (zero.assign(corruption=c), known[known["corruption"] == c])
    ]
    return pd.concat(frames, ignore_index=True) if frames else known


def _check_backbone(run, pack) -> None:
    if not run.profile.pack:
        return
    own, theirs = pack_info(run.profile.pack)["backbone"], pack_info(pack)["backbone"]
    for key in _SAME:
        if _plain(own.get(key)) != _plain(theirs.get(key)):
            raise ValueError(
                f"pack {os.fspath(pack)!r} was made with backbone {key} = {theirs.get(key)!r}, the profile's pack "
                f"{run.profile.pack!r} with {own.get(key)!r}: make it again with the profile's backbone"
            )


def _plain(value):
    """A timm name without its tag, which a checkpoint file does not have; anything else as it is."""
    return value.partition(".")[0] if isinstance(value, str) else value
