"""Covariate shift: do probes on sparse codes hold better than the probe on the CLS, and what do detectors make of it?

arXiv 2508.11277 (August 2025) says in its abstract that SAE features improve OOD generalisation; how it tests that is
not known to us, so all of this is our own reconstruction [r]: known classes under corruptions, probes fitted, their
scaling, penalty and temperature chosen on clean ID rows alone. What detectors make of it:
:mod:`companion.chapters.shift.false_alarms`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from capsae.features.featureset import FeatureSet
from capsae.pipeline.packs import load_pack, pack_info, packs
from capsae.stats import bootstrap_p, interval, verdicts

from . import calibration
from .corruptions import CORRUPTIONS
from .probes import RULES, TITLES, Probe, choose, fit_probes, fit_rows, view

N_BOOT = 5000
UNTESTED = 1000  # replicates where only an interval is wanted
CLEAN = "clean"
MEAN = "mean"  # over all shifted sets, unweighted
LOSS = "change from clean"  # that mean less the clean value
SCALED = {False: "before", True: "after"}  # temperature scaling
TESTED = (("accuracy", "after"), ("nll", "after"), ("ece", "after"), ("ece_adaptive", "after"), ("brier", "after"))
PAIRS = (("codes", "cls"), ("codes", "random"), ("random", "cls"), ("pca", "cls"), ("normalised", "cls"))
PRIMARY = (MEAN, LOSS)  # of PAIRS: the few tests that the page is about
WAYS = {  # of choosing a probe on ID validation rows: rule, columns standardised (None = either)
    "log loss (the page's)": (RULES[0], None),
    "log loss, standardised alone": (RULES[0], True),
    "log loss, not standardised alone": (RULES[0], False),
    "log loss after temperature": (RULES[1], None),
    "accuracy": (RULES[2], None),
}
SEEDS = (0, 1, 2)
_SAME = ("model", "pooling", "image_size", "interpolation", "mean", "std", "weights_sha256")  # crop is of the images


def sets(run, pack: str | os.PathLike | None = None) -> dict[str, FeatureSet]:
    """Known classes under other conditions: corrupted copies of the ID test images, and the experiment's shifted sets.

    Returns
    -------
    dict of FeatureSet
        ``blur/1`` ... from the pack, then ``shifted/<set>`` of the experiment.
    """
    if pack is None and f"{run.experiment.pack}_shift" in packs():
        pack = f"{run.experiment.pack}_shift"
    found: dict[str, FeatureSet] = {}
    if pack is not None:
        _check_backbone(run, pack)
        found = {name: load_pack(pack, name) for name in pack_info(pack)["sets"]}
        known = set(run.features("test").ids.tolist())
        for name, features in found.items():
            strange = [id for id in features.ids.tolist() if id not in known]
            if strange:
                raise ValueError(
                    f"pack {os.fspath(pack)!r}, {name}: {strange[0]!r} is no ID test image of the experiment"
                )
    found |= {name: run.features(name) for name in run.experiment.shifted}
    if not found:
        raise ValueError(
            f"experiment {run.experiment.name!r} has no covariate-shifted set: add one to its [shifted], or "
            f"make corrupted test images by `python -m companion.chapters.shift.make_pack {run.experiment.name}` "
            "and give their folder as pack"
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
    images: all corruptions of an image are drawn together. Replicates of binned errors are centred on the estimate
    (:func:`companion.chapters.shift.calibration.centred`).

    Returns
    -------
    measured : DataFrame
        representation, set, corruption, strength, metric, scaled, value, lo, hi
    compared : DataFrame
        What :func:`compare` gives.
    fitted : DataFrame
        representation, title, standardised, strength (C), temperature, accuracy on the ID validation rows
    """
    probes = fit_probes(run)[0] if probes is None else dict(probes)
    val = run.features("val")
    given = {CLEAN: clean(run, shifted), **shifted}
    weights = draw({name: features.ids for name, features in given.items()}, n_boot, run.experiment.seed)
    rows, replicates, fitted = [], {}, []
    for name, probe in probes.items():
        before = probe.logits(val.cls)
        t = calibration.temperature(before, val.labels)
        right = float((before.argmax(axis=1) == val.labels).mean())
        fitted.append((name, TITLES.get(name, name), *(probe.choice or (None, None)), t, right))
        for where, features in given.items():
            logits = probe.logits(features.cls)
            for scaled in SCALED:
                of = calibration.per_sample(logits / t if scaled else logits, features.labels)
                some = weights[where] if scaled else weights[where][:UNTESTED]
                values, draws = calibration.measure(of), calibration.measure(of, some)
                for metric, value in values.items():
                    if metric == "accuracy" and not scaled:
                        continue  # a temperature changes no prediction
                    drawn = draws[metric]
                    if metric in calibration.ERRORS:
                        drawn = calibration.centred(drawn, value)
                    rows.append((name, where, metric, SCALED[scaled], float(value), *interval(drawn)))
                    replicates[name, where, metric, SCALED[scaled]] = drawn
    measured = pd.DataFrame(rows, columns=["representation", "set", "metric", "scaled", "value", "lo", "hi"])
    corruption, strength = zip(*map(parts, measured["set"]), strict=True)
    measured.insert(2, "corruption", corruption)
    measured.insert(3, "strength", [0 if c == CLEAN else s for c, s in zip(corruption, strength, strict=True)])
    columns = ["representation", "title", "standardised", "strength", "temperature", "validation accuracy"]
    return measured, compare(measured, replicates), pd.DataFrame(fitted, columns=columns)


def draw(ids: Mapping[str, np.ndarray], n_boot: int, seed: int = 0) -> dict[str, np.ndarray]:
    """How often each replicate draws each row of each set, (n_boot, N) float32; sets of equal ids share their draws."""
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
    """Each representation less the CLS, and codes less the random dictionary's: clean, by corruption, mean, change.

    Returns
    -------
    DataFrame
        representation, other, place, metric, scaled, own and than (the two values), value (own less than), lo, hi, p,
        family, p_holm, p_at_most, verdict. Intervals are 95 % and not corrected; ``p_holm`` is corrected within a
        metric's family: "primary" holds :data:`PAIRS` in the mean and in what the shift changes, "further" the rest.
        ``verdict``: "better" or "worse" where p_holm < alpha, else "undecided". ``change from clean`` is the mean of
        the shifted sets less the clean value: above 0 in accuracy means that the representation loses less.
    """
    at = measured.set_index(["representation", "set", "metric", "scaled"])["value"]
    over = places(list(dict.fromkeys(measured["set"])))
    known = list(dict.fromkeys(measured["representation"]))
    if "cls" not in known:
        raise ValueError(f"measured are {', '.join(known)}: without 'cls' there is nothing to compare with")
    tested = [(a, b) for a, b in PAIRS if {a, b} <= set(known)]
    pairs = dict.fromkeys([*tested, *((a, "cls") for a in known if a != "cls")])
    rows = []
    for metric, scaled in TESTED:
        for name, than in pairs:
            cells = {}
            for place, of in over.items():
                own, other = (np.mean([at[r, s, metric, scaled] for s in of]) for r in (name, than))
                difference = [replicates[name, s, metric, scaled] - replicates[than, s, metric, scaled] for s in of]
                cells[place] = (own, other, np.mean(difference, axis=0))
            (own, other, mean), (own0, other0, mean0) = cells[MEAN], cells[CLEAN]
            cells[LOSS] = (own - own0, other - other0, mean - mean0)
            for place, (own, other, draws) in cells.items():
                p, least = bootstrap_p(draws), 2 / (1 + len(draws))
                family = "primary" if (name, than) in PAIRS and place in PRIMARY else "further"
                cell = (own, other, own - other, *interval(draws), p, p <= least, family)
                rows.append((name, than, place, metric, scaled, *cell))
    columns = ["representation", "other", "place", "metric", "scaled", "own", "than", "value", "lo", "hi", "p"]
    table = pd.DataFrame(rows, columns=[*columns, "p_at_most", "family"])
    gain = table["value"] * table["metric"].map(lambda m: 1 if calibration.HIGHER_IS_BETTER[m] else -1)
    families = [table[column] for column in ("metric", "scaled", "family")]
    return table.join(verdicts(gain, table["p"], families, alpha))


def means(measured: pd.DataFrame) -> pd.DataFrame:
    """Means over all shifted sets, accuracy and calibration errors in %. Columns: representation, column, value."""
    rows = measured[measured["corruption"] != CLEAN]
    found = rows.groupby(["representation", "metric", "scaled"], sort=False)["value"].mean().reset_index()
    found["value"] *= found["metric"].map(lambda metric: 100 if metric in calibration.SHARES else 1)
    plain = found["metric"].map(calibration.NAMES)
    found["column"] = plain.where(found["metric"] == "accuracy", plain + ", " + found["scaled"])
    return found[["representation", "column", "value"]]


def sensitivity(
    run,
    shifted: Mapping[str, FeatureSet],
    probes: Mapping[str, Probe],
    tried: pd.DataFrame,
    n_boot: int = N_BOOT,
) -> pd.DataFrame:
    """Codes less CLS and less the random dictionary's, mean accuracy under shift, by the way of choosing the probes.

    Returns
    -------
    DataFrame
        way (:data:`WAYS`, and "the book's head": the page's codes against it), other, codes chose and other chose (as
        text), own, than, value, lo, hi. Intervals are not corrected.
    """
    weights = draw({name: features.ids for name, features in shifted.items()}, n_boot, run.experiment.seed)
    known: dict[tuple, tuple] = {}

    def accuracy(key, logits):
        if key not in known:
            right = {n: (logits(f.cls).argmax(axis=1) == f.labels).astype(np.float32) for n, f in shifted.items()}
            shared = {id(weights[n]): (weights[n], []) for n in shifted}
            for n, of in right.items():
                shared[id(weights[n])][1].append(of)
            draws = sum(w @ (np.sum(of, axis=0) / len(of[0])) for w, of in shared.values()) / len(right)
            known[key] = (float(np.mean([of.mean() for of in right.values()])), draws)
        return known[key]

    def chosen(name, way):
        choice = choose(tried, name, *WAYS[way])
        return accuracy((name, choice), probes[name].others[choice]), choice_text(choice)

    rows = []
    for way in WAYS:
        own, mine = chosen("codes", way)
        for other in ("cls", "random"):
            than, theirs = chosen(other, way)
            rows.append((way, other, mine, theirs, own, than))
    own, mine = chosen("codes", next(iter(WAYS)))
    rows.append(("the book's head", "cls", mine, "on training rows", own, accuracy("head", run.head.logits)))
    cells = [(*row[:4], row[4][0], row[5][0], row[4][0] - row[5][0], *interval(row[4][1] - row[5][1])) for row in rows]
    return pd.DataFrame(
        cells, columns=["way", "other", "codes chose", "other chose", "own", "than", "value", "lo", "hi"]
    )


def choice_text(choice) -> str:
    """``standardised, C 0.03``."""
    return f"{'' if choice[0] else 'not '}standardised, C {choice[1]:g}"


def over_seeds(
    run, shifted: Mapping[str, FeatureSet], probes: Mapping[str, Probe], seeds: Sequence[int] = SEEDS
) -> pd.DataFrame:
    """Accuracy of probes on codes of SAEs and random dictionaries from several seeds, chosen as for the run's own.

    The other SAEs come from the store or are trained; the probe on the CLS is the same for all. Columns: seed, place,
    accuracy, less cls, less random (of the same seed).
    """
    from capsae.pipeline.run import Run

    train, given, rows = run.features("train"), {CLEAN: clean(run, shifted), **shifted}, []
    for seed in seeds:
        of = {name: probes[name].logits for name in ("cls", "codes", "random")}
        if seed != run.experiment.sae.seed:
            sae = Run(run.experiment, {"sae.seed": seed, "n_boot": 0}, run.store, run.device, run.progress).sae
            for name in ("codes", "random"):
                standardised, strength = probes[name].choice
                rows_of = view(run, name, sae, seed)
                _, logits = next(fit_rows(rows_of(train.cls), train.labels, standardised, (strength,)))
                of[name] = lambda x, rows_of=rows_of, logits=logits: logits(rows_of(x))
        right = {
            name: [float((z(f.cls).argmax(axis=1) == f.labels).mean()) for z in (of["codes"], of["cls"], of["random"])]
            for name, f in given.items()
        }
        for place, sets_of in places(list(given)).items():
            own, cls, random = np.mean([right[name] for name in sets_of], axis=0)
            rows.append((seed, place, own, own - cls, own - random))
    return pd.DataFrame(rows, columns=["seed", "place", "accuracy", "less cls", "less random"])


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
    """An experiment without a pack says what it wants of its backbone; the rest is not compared."""
    experiment, theirs = run.experiment, pack_info(pack)["backbone"]
    own = (
        pack_info(experiment.pack)["backbone"] if experiment.pack else experiment.backbone.model_dump(exclude_none=True)
    )
    for key in _SAME if experiment.pack else [key for key in _SAME if key in own]:
        if _plain(own.get(key)) != _plain(theirs.get(key)):
            what = f"pack {experiment.pack!r}" if experiment.pack else f"backbone of experiment {experiment.name!r}"
            raise ValueError(
                f"pack {os.fspath(pack)!r} was made with backbone {key} = {theirs.get(key)!r}, the {what} "
                f"with {own.get(key)!r}: make it again with the experiment's backbone"
            )


def _plain(value):
    """A timm name without its tag, which a checkpoint file does not have; a list for a tuple; else as it is."""
    if isinstance(value, tuple):
        return list(value)
    return value.partition(".")[0] if isinstance(value, str) else value
