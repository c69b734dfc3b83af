"""Scores on the parts of the input that an SAE splits it into: where is the OOD signal?

What runs where. Detectors that read features alone (:data:`ON_PARTS`) are fitted on training rows of a part and score
the same part of other rows, all in the SAE's normalised space (the features themselves in their own). Detectors that
read logits or the head run on the features and on the reconstruction, brought back to the features' space, through the
profile's own head. On error, linear part and rest they do not apply: logits are evidence for a class, the head's
constants belong to whole features, and an error has no class. EPD and RPD read the code, of which the reconstruction is
a linear map, so they stand in its column.

The linear part is a linear map of the input: a score that no invertible linear map changes (MDS, RMDS) gives it and
the input the same result, whatever the SAE does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
from scipy.stats import norm

from .. import detectors
from ..caps import as_numpy
from ..detectors import Detector, Observations
from ..evaluate import compare, group_of
from ..metrics import Thresholds, fpr95_id_pos, fpr95_ood_pos
from ..sae import dictionaries
from ..stats import FPR95, bootstrap, delong, exact_interval, interval, placements
from . import dark_matter

COLUMNS = {
    "features": "features",
    "input": "input u",
    "reconstruction": "reconstruction",
    "error": "error",
    "linear": "linear part",
    "rest": "rest",
    "pca_rest": "PCA's error",
}
ON_PARTS = ("mds", "mds++", "rmds", "rmds++", "knn", "feature_norm")  # and "length"
JUDGED = ("mds", "mds++", "length")  # the whole geometry; direction alone; length alone
INVARIANT = ("mds", "rmds")  # under invertible linear maps: they give the linear part and the input one result
EXTRA = {"length": "Length", "epd+error": "EPD + error's length"}
SEP = " | "
_SHARES = {"fpr95_ood_pos": fpr95_ood_pos, "fpr95_id_pos": fpr95_id_pos}


@dataclass
class Length(Detector):
    """Distance of a part from its mean over the training rows; the longer, the more OOD, whatever the part."""

    title: ClassVar[str] = "Length"
    group: ClassVar[str] = "control"
    formula: ClassVar[str] = r"\lVert z - \bar z \rVert"
    source: ClassVar[str] = "our control"
    needs: ClassVar[tuple[str, ...]] = ("features",)

    def fit(self, obs: Observations, validation: Observations | None = None) -> Length:
        self._mean = obs.cls64.mean(0)
        return self

    def score(self, obs: Observations) -> np.ndarray:
        return np.linalg.norm(obs.cls64 - self._mean, axis=1)


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
    """Baselines that read logits or the head: for them the errors are not applicable."""
    known = {name: detectors.info(name) for name in detectors.available()}
    return [n for n, of in known.items() if of["group"] == "baseline" and {"logits", "head"} & set(of["needs"])]


def observe(run, linear: dark_matter.Linear, sets: Iterable[str]) -> dict[str, PartObservations]:
    """The parts of a run's sets, by set: :data:`COLUMNS`, "own" (the run's observations, with codes and logits) and
    "decoded" (the reconstruction in the features' own space, with the head)."""
    train, val = run.features("train").cls, run.features("val").cls
    rank = dark_matter.equal_rank(run.sae, train, val)
    config = run.profile.sae
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


def fitted(run, train: PartObservations, val: PartObservations) -> dict[str, OnPart]:
    """Every detector on every part where it applies, by "detector | column", fitted on training rows of that part."""
    found = {}
    for name in (*ON_PARTS, "length"):
        for part in COLUMNS:
            one = Length() if name == "length" else detectors.create(name, **run.detector_options(name))
            found[name + SEP + part] = OnPart(one.fit(train.parts[part], val.parts[part]), part)
    for name in through_head():
        for column, part in (("features", "own"), ("reconstruction", "decoded")):
            one = detectors.create(name, **run.detector_options(name))
            found[name + SEP + column] = OnPart(one.fit(train.parts[part], val.parts[part]), part)
    for name in ("epd", detectors.OURS):
        found[name + SEP + "reconstruction"] = OnPart(run.detectors([name])[name], "own")
    both = Summed((found["epd" + SEP + "reconstruction"], found["length" + SEP + "error"]))
    found["epd+error" + SEP + "input"] = both.fit(train, val)
    return found


def part_table(scorers: Mapping, id_test, ood: Mapping, n_boot: int = 300, seed: int = 0) -> pd.DataFrame:
    """Results of scorers named "detector | column": three of :func:`capsae.evaluate`'s metrics, at a tenth of its cost.

    Returns
    -------
    DataFrame
        method (the detector), part (the column), set ("mean" with group "near", "far" and "all"), group, metric
        (both FPR95, AUROC), value, lo, hi: shares, 95 % intervals by a bootstrap over ID and OOD samples for FPR95
        (Clopper and Pearson's where no replicate differs), DeLong's for AUROC.
    """
    sets = {"": id_test, **ood}
    scores = {name: {where: one.score(obs) for where, obs in sets.items()} for name, one in scorers.items()}
    groups, draws = {where: group_of(where) for where in ood}, {}
    for stream, where in enumerate(ood):
        thresholds = {name: Thresholds.of(of[""], of[where]) for name, of in scores.items()}
        draws[where] = bootstrap(thresholds, n_boot, seed, stream, FPR95)
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
            value, error = delong([placed[w] for w in over])
            reach = norm.isf(0.025) * error
            rows.append((*name.split(SEP), label, group, "auroc", value, max(0, value - reach), min(1, value + reach)))
    return pd.DataFrame(rows, columns=["method", "part", "set", "group", "metric", "value", "lo", "hi"])


def pairs() -> list[tuple[str, str]]:
    """What is compared, all in one correction, by "detector | column".

    For each of :data:`JUDGED` the reconstruction with the input, the three parts with each other (the linear one not
    where the score is invariant), the error with PCA's; and EPD with the error's length added with EPD.
    """
    found = []
    for name in JUDGED:
        apart = [p for p in dark_matter.CROSSED if name not in INVARIANT or "linear" not in p]
        wanted = [("reconstruction", "input"), *apart, ("error", "pca_rest")]
        found += [(name + SEP + a, name + SEP + b) for a, b in wanted]
    return [*found, ("epd+error" + SEP + "input", "epd" + SEP + "reconstruction")]


def compared(scorers: Mapping, id_test, ood: Mapping, n_boot: int = 6000, seed: int = 0) -> pd.DataFrame:
    """:func:`capsae.evaluate.compare` of :func:`pairs`. Columns: method, part, other, other_part, set, metric, ..."""
    table = compare(scorers, id_test, ood, pairs(), n_boot=n_boot, seed=seed)
    for column, part in (("method", "part"), ("other", "other_part")):
        table[[column, part]] = table[column].str.split(SEP, expand=True, regex=False).to_numpy()
    first = ["method", "part", "other", "other_part"]
    return table[[*first, *(column for column in table.columns if column not in first)]]
