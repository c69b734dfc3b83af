"""Scores on the parts of the input that an SAE splits it into: where is the OOD signal?

What runs where. Detectors that read features alone (:data:`ON_PARTS`) are fitted on rows of a part and score the same
part of other rows, all in the SAE's normalised space: on training rows, and those that are judged on validation rows as
well (:data:`FITS`), since the SAE's errors on training rows are not like others. Detectors that read logits or the head
run on the features and on the reconstruction, brought back to the features' space, through the experiment's own head.
On error, linear part and rest they do not apply: logits are evidence for a class, the head's constants belong to whole
features, and an error has no class. EPD and RPD read the code, of which the reconstruction is a linear map, so they
stand in its column.

The linear part is a linear map of the input: a score that no invertible linear map changes (MDS, RMDS) gives it and
the input the same result, whatever the SAE does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import norm

from capsae import detectors
from capsae.data.asarray import as_numpy
from capsae.detectors import Detector, Observations
from capsae.evaluation.evaluate import compare
from capsae.evaluation.tables import group_of
from capsae.metrics import Thresholds, fpr95_id_pos, fpr95_ood_pos
from capsae.sae.dictionaries import methods as dictionaries
from capsae.stats import FPR95, bootstrap, delong, exact_interval, interval, placements, verdicts

from . import maths as dark_matter

COLUMNS = {
    "features": "features",
    "input": "input u",
    "reconstruction": "reconstruction",
    "error": "error",
    "linear": "linear part",
    "rest": "rest",
    "pca_rest": "PCA's error",
}
PARTS = tuple(part for part in COLUMNS if part != "features")
ON_PARTS = ("mds", "mds++", "rmds", "rmds++", "distance")
JUDGED = ("mds", "mds++", "distance")
HEADED = ("energy", "vim")  # of those through the head: compared on the reconstruction and on the features
INVARIANT = ("mds", "rmds")  # under invertible linear maps: they give the linear part and the input one result
SLOW = ("knn", "nnguide")  # left out: neighbours among all training rows, seven times over
FITS = {"train": "training rows", "val": "validation rows"}  # what a detector is fitted on
EXTRA = {"distance": "Distance", "epd+error": "EPD + error's length"}
SEP = " | "
REPLICATES, PAIRED = 300, 4000  # of the bootstrap: of intervals, and of paired comparisons
_SHARES = {"fpr95_ood_pos": fpr95_ood_pos, "fpr95_id_pos": fpr95_id_pos}


@dataclass
class Length(Detector):
    """Distance of a part from its mean over the fitting rows; the longer, the more OOD."""

    def fit(self, obs: Observations, validation: Observations | None = None) -> Length:
        self._mean = obs.cls64.mean(0)
        return self

    def score(self, obs: Observations) -> np.ndarray:
        return np.linalg.norm(obs.cls64 - self._mean, axis=1)


@dataclass
class Distance(Length):
    """How far a part's :class:`Length` lies from the median of the fitting rows, in MADs, to either side.

    The normalised input has one length, so on it this is a function of the direction.
    """

    def fit(self, obs: Observations, validation: Observations | None = None) -> Distance:
        super().fit(obs)
        length = super().score(obs)
        self._median = np.median(length)
        self._mad = np.median(np.abs(length - self._median)) or 1.0
        return self

    def score(self, obs: Observations) -> np.ndarray:
        return np.abs(super().score(obs) - self._median) / self._mad


@dataclass
class Summed(Detector):
    """Sum of scores of fitted detectors, each less its mean over its standard deviation on ID validation rows."""

    members: tuple

    def fit(self, obs, validation=None) -> Summed:
        scores = [member.score(validation) for member in self.members]
        self._units = [(s.mean(), s.std() or 1.0) for s in scores]
        return self

    def score(self, obs) -> np.ndarray:
        return sum((m.score(obs) - mean) / std for m, (mean, std) in zip(self.members, self._units, strict=True))


class PartObservations:
    """The same N samples as several :class:`Observations`, one a part; ``labels`` and ``predicted`` of the samples."""

    def __init__(self, parts: Mapping[str, Observations], labels=None, predicted=None):
        self.parts, self.labels, self.predicted = dict(parts), labels, predicted
        self.scores: dict[OnPart, np.ndarray] = {}  # computed once: the table and the comparisons ask for them

    def __len__(self) -> int:
        return len(next(iter(self.parts.values())))


class OnPart:
    """A fitted detector that sees one part of :class:`PartObservations`."""

    def __init__(self, detector, part: str):
        self.detector, self.part = detector, part

    def score(self, obs: PartObservations) -> np.ndarray:
        if self not in obs.scores:
            obs.scores[self] = self.detector.score(obs.parts[self.part])
        return obs.scores[self]


def title(name: str) -> str:
    """The title of a detector of these tables."""
    return EXTRA.get(name) or detectors.info(name)["title"]


def through_head() -> list[str]:
    """Baselines that read logits or the head, without :data:`SLOW`: for them the errors are not applicable."""
    known = {name: detectors.info(name) for name in detectors.available()}
    headed = [n for n, of in known.items() if of["group"] == "baseline" and {"logits", "head"} & set(of["needs"])]
    return [name for name in headed if name not in SLOW]


def observe(run, linear: dark_matter.Linear, sets: Iterable[str]) -> dict[str, PartObservations]:
    """The parts of a run's sets, by set: :data:`COLUMNS`, "own" (the run's observations, with codes and logits) and
    "decoded" (the reconstruction in the features' own space, with the head)."""
    train, val = run.features("train").cls, run.features("val").cls
    rank = dark_matter.equal_rank(run.sae, train, val)
    config = run.experiment.sae
    pca = dictionaries.create("pca", rank, rank, normalize=config.normalize, seed=config.seed).fit(train)
    found = {}
    for name in sets:
        own, x = run.observations(name), run.features(name).cls
        arrays = {"features": own.cls} | dark_matter.parts(run.sae, linear, x)
        arrays["pca_rest"] = dark_matter.errors(pca, x)[1]
        parts = {part: Observations(array, labels=own.labels) for part, array in arrays.items()}
        decoded = as_numpy(run.sae.reconstruct(x))
        parts |= {"own": own, "decoded": Observations(decoded, labels=own.labels, head=run.head)}
        found[name] = PartObservations(parts, own.labels, own.predicted)
    return found


def arrays(observed: Mapping[str, PartObservations]) -> dict[str, dict[str, np.ndarray]]:
    """The parts of :func:`dark_matter.structure`, by set."""
    wanted = ("input", *dark_matter.THREE)
    return {name: {part: obs.parts[part].cls64 for part in wanted} for name, obs in observed.items()}


def key(name: str, part: str, fit: str = "train") -> str:
    """The name of a detector on a part, fitted on rows of :data:`FITS`."""
    return SEP.join((name, part, fit))


def fitted(run, train: PartObservations, val: PartObservations) -> dict[str, OnPart]:
    """Every detector on every part where it applies, by :func:`key`; :data:`JUDGED` fitted on validation rows, too."""
    found = {}
    for fit, rows, names in (("train", train, ON_PARTS), ("val", val, JUDGED)):
        for name in names:
            for part in PARTS:
                one = Distance() if name == "distance" else detectors.create(name, **run.detector_options(name))
                found[key(name, part, fit)] = OnPart(one.fit(rows.parts[part], val.parts[part]), part)
    for name in through_head():
        for column, part in (("features", "own"), ("reconstruction", "decoded")):
            one = detectors.create(name, **run.detector_options(name))
            found[key(name, column)] = OnPart(one.fit(train.parts[part], val.parts[part]), part)
    for name in ("epd", "rpd"):
        found[key(name, "reconstruction")] = OnPart(run.detectors([name])[name], "own")
    length = OnPart(Length().fit(train.parts["error"]), "error")
    found[key("epd+error", "input")] = Summed((found[key("epd", "reconstruction")], length)).fit(train, val)
    return found


def lengths(observed: Mapping[str, PartObservations], ood: Iterable[str]) -> pd.DataFrame:
    """How often an OOD row of a part lies farther from the training mean than an ID test row.

    Columns: part (reconstruction, error), set ("mean": over all OOD sets), value, lo, hi: the share of pairs of an ID
    and an OOD row, 0.5 where neither lies farther, with DeLong's 95 % interval.
    """
    rows = []
    for part in ("reconstruction", "error"):
        one, placed = Length().fit(observed["train"].parts[part]), {}
        known = one.score(observed["test"].parts[part])
        for where in ood:
            placed[where] = placements(known, one.score(observed[where].parts[part]))
        for where, over in {**{w: [w] for w in placed}, "mean": list(placed)}.items():
            rows.append((part, where, *_auroc([placed[w] for w in over])))
    return pd.DataFrame(rows, columns=["part", "set", "value", "lo", "hi"])


def _auroc(placed: list) -> tuple[float, float, float]:
    """Value and DeLong's 95 % interval, within 0 to 1."""
    value, error = delong(placed)
    reach = norm.isf(0.025) * error
    return value, max(0, value - reach), min(1, value + reach)


def part_table(scorers: Mapping, id_test, ood: Mapping, n_boot: int = REPLICATES) -> pd.DataFrame:
    """Results of scorers named by :func:`key`: three of :func:`capsae.evaluate`'s metrics, at a tenth of its cost.

    Columns: method (the detector), part, fit (of :data:`FITS`), set ("mean" with group "near", "far" and "all"), group,
    metric (both FPR95, AUROC), value, lo, hi: shares, 95 % intervals by a bootstrap over ID and OOD samples for FPR95
    (Clopper and Pearson's where no replicate differs), DeLong's for AUROC.
    """
    sets = {"": id_test, **ood}
    scores = {name: {where: one.score(obs) for where, obs in sets.items()} for name, one in scorers.items()}
    groups, draws = {where: group_of(where) for where in ood}, {}
    for stream, where in enumerate(ood):
        thresholds = {name: Thresholds.of(of[""], of[where]) for name, of in scores.items()}
        draws[where] = bootstrap(thresholds, n_boot, 0, stream, FPR95)
    cells = [(where, group, [where]) for where, group in groups.items()]
    cells += [("mean", g, [w for w in groups if groups[w] == g]) for g in ("near", "far") if g in groups.values()]
    cells.append(("mean", "all", list(groups)))
    rows = []
    for name, of in scores.items():
        placed = {where: placements(of[""], of[where]) for where in ood}
        exact = {metric: {w: share(of[""], of[w]) for w in ood} for metric, share in _SHARES.items()}
        for label, group, over in cells:
            for metric in FPR95:
                value = float(np.mean([exact[metric][w] for w in over]))
                lo, hi = interval(np.mean([draws[w][name][metric] for w in over], axis=0))
                if lo == hi and label != "mean":
                    lo, hi = exact_interval(value, len(id_test) if metric == FPR95[0] else len(ood[label]))
                rows.append((*name.split(SEP), label, group, metric, value, lo, hi))
            rows.append((*name.split(SEP), label, group, "auroc", *_auroc([placed[w] for w in over])))
    return pd.DataFrame(rows, columns=["method", "part", "fit", "set", "group", "metric", "value", "lo", "hi"])


def pairs() -> list[tuple[str, str]]:
    """What is compared, all in one correction, by :func:`key`.

    For each of :data:`JUDGED`, fitted on training and on validation rows, the reconstruction with the input, the three
    parts with each other (the linear one not where the score is invariant), and the error with PCA's; and for
    :data:`HEADED` the reconstruction with the features.
    """
    found = []
    for fit in FITS:
        for name in JUDGED:
            apart = [p for p in dark_matter.CROSSED if name not in INVARIANT or "linear" not in p]
            wanted = [("reconstruction", "input"), *apart, ("error", "pca_rest")]
            found += [(key(name, a, fit), key(name, b, fit)) for a, b in wanted]
    return [*found, *((key(name, "reconstruction"), key(name, "features")) for name in HEADED)]


def compared(scorers: Mapping, id_test, ood: Mapping, n_boot: int = PAIRED) -> pd.DataFrame:
    """:func:`capsae.evaluation.evaluate.compare` of :func:`pairs`, by FPR95 (OOD positive) and AUROC.

    Columns: method, part, other_part, fit, set, metric, ...
    """
    table = compare(scorers, id_test, ood, pairs(), metrics=(FPR95[0], "auroc"), n_boot=n_boot)
    left, right = (table[c].str.split(SEP, expand=True, regex=False) for c in ("method", "other"))
    about = pd.DataFrame({"method": left[0], "part": left[1], "other_part": right[1], "fit": left[2]})
    return pd.concat([about, table.drop(columns=["method", "other"])], axis=1)


def beside_epd(scorers: Mapping, id_test, ood: Mapping, n_boot: int = PAIRED) -> pd.DataFrame:
    """EPD with the error's length less EPD, by FPR95 (OOD positive), set by set; p corrected by Holm over the sets.

    Columns of :func:`capsae.evaluation.evaluate.compare`, without the mean: it hides that sets differ in sign.
    """
    pair = key("epd+error", "input"), key("epd", "reconstruction")
    table = compare(scorers, id_test, ood, [pair], metrics=(FPR95[0],), n_boot=n_boot)
    table = table[table["set"] != "mean"]
    return table.assign(**verdicts(-table["value"], table["p"]))
