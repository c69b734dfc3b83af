"""What the paper says of class activation profiles, for the trained dictionary and for the same one before training.

Overlap of cores, stability of a profile, the share of the energy inside the core and its evenness come out favourably
for random directions, too: a claim about training rests on the difference. All numbers are means over the seeds of the
experiment, and their intervals hold images and seeds (:func:`capsae.stats.seeds_and_images`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
from scipy import sparse

from capsae.caps import ClassActivationProfiles, core_activations
from capsae.stats import seeds_and_images

from ...findings import Numbers

OVERLAP = 0.05  # share of the latents that the paper's figure 2 takes for a core
# Measures of samples as signed sums of means: (part of :func:`of_samples`, where, sign); first the single ones.
_LEVELS = {"inside": "inside", "entropy": "entropy", "evenness": "evenness", "activation": "core"}
PARTS = {f"{name}_{where}": [(part, where, 1)] for name, part in _LEVELS.items() for where in ("id", "ood")}
PARTS["activation_ood other"] = [("core", "ood other", 1)]
GAPS = {
    name: [(part, more, 1), (part, less, -1)]
    for name, part, more, less in (
        ("core_share", "inside", "id", "ood"),
        ("entropy", "entropy", "ood", "id"),
        ("evenness", "evenness", "ood", "id"),
        ("core_activation_as", "core", "id", "ood"),
        ("core_activation_other", "core", "ood", "ood other"),
    )
}
PARTS |= GAPS
MEASURES = ("overlap", "stability", "between", *PARTS)


def of_samples(codes, of_class, caps: ClassActivationProfiles, core_fraction: float) -> dict[str, np.ndarray]:
    """Measures of every sample on the core of its class, each (N,).

    ``inside``: share of the code's energy inside the core; ``fired``: core latents that fire, share of k; ``largest``
    share of the core profile; ``entropy`` of the core profile in nats; ``evenness``: the
    entropy over its maximum for so many firing latents, NaN below two; ``core``: mean activation of the core's latents;
    ``other``: the same over the cores of all other classes.
    """
    inside = core_activations(codes, of_class, caps, core_fraction)
    total, fires = inside.sum(1), (inside > 0).sum(1)
    share = np.divide(inside, total[:, None], out=np.zeros_like(inside), where=total[:, None] > 0)
    entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(1)
    evenness = np.full(len(total), np.nan)
    np.divide(entropy, np.log(np.maximum(fires, 2)), out=evenness, where=fires > 1)
    values = np.asarray(codes.values, dtype=np.float64)
    cores = caps.core_mask(core_fraction).sum(0)  # of how many classes each latent is core
    size = caps.core_size(core_fraction)
    other = ((values * cores[np.asarray(codes.indices)]).sum(1) - total) / size / max(caps.n_classes - 1, 1)
    whole = np.maximum(values.sum(1), 1e-12)
    found = {"inside": total / whole, "fired": fires / share.shape[1], "largest": share.max(1), "entropy": entropy}
    return found | {"evenness": evenness, "core": total / size, "other": other}


def of_training(codes, labels, n_classes: int, halves: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Overlap of cores and stability of profiles for each replicate, (R,), of the training images.

    ``halves`` (N,) bool: which half of its class a sample belongs to; images are drawn within the halves, so that no
    image is in both. ``weights`` (R, N): how often each sample was drawn. ``overlap``: mean Jaccard index of the top
    5 % of the latents of two classes; ``stability``: mean cosine of the profiles of a class's halves; ``between``: mean
    cosine of profiles of two classes.
    """
    matrix, row = codes.csr(), 2 * np.asarray(labels) + halves
    found, off = {"overlap": [], "stability": [], "between": []}, ~np.eye(n_classes, dtype=bool)
    size = max(1, round(OVERLAP * codes.n_latents))
    for weight in weights:
        used = np.flatnonzero(weight)
        pick = sparse.csr_matrix((weight[used].astype(np.float64), (row[used], used)), (2 * n_classes, len(weight)))
        halves_of = (pick @ matrix).toarray().reshape(n_classes, 2, -1)
        whole = halves_of.sum(1)
        top = np.zeros(whole.shape)
        np.put_along_axis(top, np.argpartition(-whole, size - 1, axis=1)[:, :size], 1.0, axis=1)
        both = top @ top.T
        unit = whole / np.maximum(np.linalg.norm(whole, axis=1, keepdims=True), 1e-12)
        norms = np.linalg.norm(halves_of, axis=2).prod(1)
        cosine = (halves_of[:, 0] * halves_of[:, 1]).sum(1) / np.maximum(norms, 1e-12)
        found["overlap"].append((both / (2 * size - both))[off].mean())
        found["stability"].append(cosine.mean())
        found["between"].append((unit @ unit.T)[off].mean())
    return {name: np.array(values) for name, values in found.items()}


def claims(run, n_boot: int = 60) -> tuple[pd.DataFrame, pd.DataFrame]:
    """:func:`combined` of a run's seeds; ``n_boot`` replicates for the standard error of overlap and stability."""
    return combined(list(_seeds(run, n_boot)))


def combined(seeds: list[dict]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All measures for the trained and the untrained dictionary and their difference, and every seed by itself.

    Columns: measure, dictionary ("trained", "untrained", "difference"), value, lo, hi, p, seeds; and of the seeds:
    measure, dictionary, seed, value. ``seeds``: what :func:`_seeds` measured.
    """
    tables, dots = [], []
    for measure in seeds[0]["trained"]["values"]:
        sides = {
            side: (np.array([one[side]["values"][measure] for one in seeds]), [one[side] for one in seeds])
            for side in ("trained", "untrained")
        }
        dots += [
            (measure, side, number, value) for side, (values, _) in sides.items() for number, value in enumerate(values)
        ]
        for side, signs in {"trained": (1, 0), "untrained": (0, 1), "difference": (1, -1)}.items():
            values = sum(sign * values for sign, (values, _) in zip(signs, sides.values(), strict=True))
            error = _image_error(measure, [(of, sign) for sign, (_, of) in zip(signs, sides.values(), strict=True)])
            found = seeds_and_images(values, error)
            tables.append((measure, side, *(found[key] for key in ("value", "lo", "hi", "p", "seeds"))))
    columns = ["measure", "dictionary", "value", "lo", "hi", "p", "seeds"]
    return pd.DataFrame(tables, columns=columns), pd.DataFrame(dots, columns=["measure", "dictionary", "seed", "value"])


def _seeds(run, n_boot: int) -> Iterator[dict]:
    """For each seed, by dictionary: ``values`` of all measures, ``draws`` of those of training, each sample's parts."""
    train = run.features("train")
    rng = np.random.default_rng(run.experiment.seed)
    halves = np.zeros(len(train), dtype=bool)
    for c in range(run.experiment.n_classes):
        rows = rng.permutation(np.flatnonzero(train.labels == c))
        halves[rows[len(rows) // 2 :]] = True
    weights = np.zeros((n_boot + 1, len(train)), np.int32)
    weights[0] = 1  # the images as they are
    for half in (halves, ~halves):
        rows = np.flatnonzero(half)
        weights[1:, rows] = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), n_boot)
    sets = {name: run.observations(name) for name in ("test", *run.experiment.ood_sets)}
    labels = run.features("test").labels
    for one in run.seeds():
        found = {}
        for side, sae in {"trained": one.sae, "untrained": one.untrained}.items():
            codes = sae.encode(train.cls)
            caps = ClassActivationProfiles.fit(codes, train.labels, run.experiment.n_classes)
            draws = of_training(codes, train.labels, run.experiment.n_classes, halves, weights)
            parts = {}
            for name, obs in sets.items():
                seen = sae.encode(obs.cls)
                parts[name] = of_samples(seen, obs.predicted, caps, run.experiment.caps.core_fraction)
                if name == "test":  # activation by the true class, as in the paper's figure 5
                    truly = of_samples(seen, labels, caps, run.experiment.caps.core_fraction)
                    parts[name]["core"] = truly["core"]
            values = {name: of[0] for name, of in draws.items()}
            values |= {name: sum(sign * _mean(parts, *at) for *at, sign in of) for name, of in PARTS.items()}
            found[side] = {"values": values, "draws": draws, "parts": parts}
        yield found


def _of(parts: Mapping, part: str, where: str) -> list[np.ndarray]:
    part = "other" if where == "ood other" else part
    return [of[part] for name, of in parts.items() if (name == "test") == (where == "id")]


def _mean(parts: Mapping, part: str, where: str) -> float:
    return float(np.mean([np.nanmean(of) for of in _of(parts, part, where)]))


def _image_error(measure: str, sides: list[tuple[list[dict], int]]) -> float:
    """Standard error over images of the signed sum of dictionaries, each a mean over its seeds."""
    if measure in sides[0][0][0]["draws"]:
        total = sum(sign * np.mean([one["draws"][measure][1:] for one in of], axis=0) for of, sign in sides)
        return float(total.std(ddof=1))
    by_set: dict = {}
    for part, where, plus in PARTS[measure]:
        for of, sign in sides:
            of_seeds = [_of(one["parts"], part, where) for one in of]
            for number, samples in enumerate(zip(*of_seeds, strict=True)):
                key = (where == "id", number)  # the same images, so that what a sample does to both sides cancels
                mean = np.ma.masked_invalid(samples).mean(0).filled(np.nan) * plus * sign / len(of_seeds[0])
                by_set[key] = by_set.get(key, 0) + mean
    return float(np.sqrt(sum(np.nanvar(of, ddof=1) / len(of) for of in by_set.values())))


# --- for the page

SHOWN = {
    "overlap": "Jaccard index of two cores",
    "stability": "cosine of a class's halves",
    "between": "cosine of two classes",
    "inside_id": "energy inside the core, ID",
    "inside_ood": "energy inside the core, OOD",
    "core_share": "energy inside the core, ID less OOD",
    "entropy": "entropy of the profile, OOD less ID, nats",
    "evenness_id": "evenness, ID",
    "evenness_ood": "evenness, OOD",
    "evenness": "evenness, OOD less ID",
    "core_activation_as": "core activation, ID less OOD of that class",
    "core_activation_other": "core activation, OOD of that class less others",
}
DRAWN = ("overlap", "stability", "core_share", "evenness")


def recorded(table: pd.DataFrame, caps: ClassActivationProfiles) -> Numbers:
    """What the page records: every measure of both dictionaries and their difference, and active shares.

    A p is recorded where it tests something: of differences of dictionaries, and of gaps between sets.
    """
    numbers, tests = Numbers(), (table["dictionary"] == "difference") | table["measure"].isin(list(GAPS))
    numbers.rows(table.assign(p=table["p"].where(tests)), "{measure} {dictionary}")
    for name, share in {"active any": caps.active_fraction(), "active 5 percent": caps.active_fraction(0.05)}.items():
        numbers.add(f"{name} mean", share.mean(), unit="%")
        numbers.add(f"{name} std", share.std(), unit="points")
    return numbers


def dots(seeds: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """For :func:`companion.figures.comparison_figures.seeds`: a panel a measure, a row a dictionary."""
    means = table.rename(columns={"value": "mean"}).drop(columns=["seeds", "p"])
    data = seeds.merge(means, on=["measure", "dictionary"])
    data = pd.concat([data[data["measure"] == measure] for measure in DRAWN], ignore_index=True)
    return data.assign(panel=data["measure"].map(SHOWN), title=data["dictionary"])


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """The measures as text, a row a measure: trained, untrained, difference, each with its interval."""
    rows = table[table["measure"].isin(SHOWN)]
    text = [f"{r.value:.3f} ({r.lo:.3f} to {r.hi:.3f})" for r in rows.itertuples()]
    wide = rows.assign(text=text).pivot(index="measure", columns="dictionary", values="text").loc[list(SHOWN)]
    return wide[["trained", "untrained", "difference"]].reset_index().assign(measure=lambda t: t["measure"].map(SHOWN))
