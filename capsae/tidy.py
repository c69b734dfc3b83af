"""Tidy data behind the figures: what a run holds, as one data frame a figure of :mod:`capsae.figures`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

from .caps import ClassActivationProfiles, core_activations, core_reference, energy_profile_divergence

QUANTILES = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}


def group_of(set_name: str) -> str:
    """``near`` or ``far`` of an OOD set, ``id`` of any other."""
    return set_name.split("/")[0] if "/" in set_name else "id"


def class_names(run) -> list[str]:
    """Readable names of the profile's classes: ``n02086240_Shih-Tzu`` -> ``Shih-Tzu``."""
    n_classes = run.profile.n_classes
    names = run.features("test").class_names or run.features("train").class_names
    if len(names) != n_classes:
        return [f"class {c}" for c in range(n_classes)]
    return [re.sub(r"^n\d{8}_", "", str(name)).replace("_", " ") for name in names]


def sets(run) -> pd.DataFrame:
    """What the profile is made of. Columns: set, role, images, classes."""
    roles = {"train": "trains SAE, profiles and detectors", "val": "ID validation", "test": "ID test"}
    rows = []
    for name in ("train", "val", "test", *run.profile.ood_sets):
        features = run.features(name)
        known = np.unique(features.labels[features.labels >= 0]).size
        rows.append((name, roles.get(name, f"{group_of(name)} OOD"), len(features), known))
    return pd.DataFrame(rows, columns=["set", "role", "images", "classes"])


def training(history: pd.DataFrame) -> pd.DataFrame:
    """The SAE's history for :func:`figures.training_curves`."""
    panels = {
        "fvu": ("FVU", "training rows"),
        "held_out_fvu": ("FVU", "held-out rows"),
        "loss": ("loss", "loss"),
        "dead_fraction": ("dead latents, %", "dead"),
        "l0": ("latents that fire per sample", "L0"),
    }
    rows = []
    for column, (panel, series) in panels.items():
        if column in history:
            factor = 100 if column == "dead_fraction" else 1
            part = pd.DataFrame({"epoch": history["epoch"], "panel": panel, "series": series})
            rows.append(part.assign(value=history[column] * factor))
    return pd.concat(rows, ignore_index=True).dropna(subset="value")


def quantiles(values: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Quantiles of each set's values. Columns: set, group, samples, mean, q05 ... q95."""
    rows = [
        {"set": name, "group": group_of(name), "samples": len(v), "mean": float(np.mean(v))}
        | {key: float(np.quantile(v, q)) for key, q in QUANTILES.items()}
        for name, v in values.items()
    ]
    return pd.DataFrame(rows)


def decode_errors(run) -> pd.DataFrame:
    """Quantiles, by set, of each sample's unexplained share |x - x_hat|^2 / |x|^2 in the SAE's normalised space."""
    shares = {}
    for name in ("train", "val", "test", *run.profile.ood_sets):
        x = run.sae.normalize(run.features(name).cls)
        x_hat = run.sae.decode(run.codes(name))
        shares[name] = ((x - x_hat) ** 2).sum(axis=1) / np.maximum((x**2).sum(axis=1), 1e-12)
    return quantiles(shares)


def core_overlap(caps: ClassActivationProfiles, names: Iterable[str], fraction: float) -> pd.DataFrame:
    """Jaccard index of the classes' core sets. Columns: class_a, class_b, jaccard."""
    names, matrix = list(names), caps.jaccard(fraction)
    a, b = np.indices(matrix.shape).reshape(2, -1)
    return pd.DataFrame({"class_a": np.take(names, a), "class_b": np.take(names, b), "jaccard": matrix.ravel()})


def core_activity(run) -> pd.DataFrame:
    """Mean activation of each class's core latents. Columns: class, kind, activation.

    Kinds: ID test samples of the class, OOD samples predicted as it, OOD samples predicted as another (all OOD sets
    together). A class as which no OOD sample is predicted has no row of the second kind.
    """
    caps, names = run.caps, class_names(run)
    mask = caps.core_mask(run.profile.caps.core_fraction)
    known = ClassActivationProfiles.empty(caps.n_classes, caps.n_latents)
    known.update(run.codes("test"), run.features("test").labels)
    ood = ClassActivationProfiles.empty(caps.n_classes, caps.n_latents)
    for name in run.profile.ood_sets:
        ood.update(run.observations(name).codes, run.observations(name).predicted)
    others = (ood.sums.sum(0) - ood.sums, ood.counts.sum() - ood.counts)
    kinds = {
        "ID": (known.sums, known.counts),
        "OOD, predicted\nas this class": (ood.sums, ood.counts),
        "OOD, predicted\nas another": others,
    }
    rows = []
    for kind, (sums, counts) in kinds.items():
        activation = (sums * mask).sum(1) / np.maximum(counts, 1) / mask.sum(1)
        rows += [(names[c], kind, activation[c]) for c in np.flatnonzero(counts)]
    return pd.DataFrame(rows, columns=["class", "kind", "activation"])


def _core_shares(run, name: str) -> np.ndarray:
    """P of every sample of a set on its predicted class's core, (N, k), unsorted."""
    obs = run.observations(name)
    inside = core_activations(obs.codes, obs.predicted, run.caps, run.profile.caps.core_fraction)
    total = inside.sum(axis=1, keepdims=True)
    return np.divide(inside, total, out=np.zeros_like(inside), where=total > 0)


def sorted_shares(run, smallest: float = 1e-4) -> pd.DataFrame:
    """Mean over samples of the sorted core profile. Columns: set, group, rank, share (cut where below ``smallest``)."""
    frames = []
    for name in ("test", *run.profile.ood_sets):
        share = -np.sort(-_core_shares(run, name), axis=1)
        mean = share.mean(axis=0)
        rank = np.arange(1, len(mean) + 1)
        frames.append(pd.DataFrame({"set": name, "group": group_of(name), "rank": rank, "share": mean}))
    data = pd.concat(frames, ignore_index=True)
    return data[data["share"] >= smallest]


def peakedness(run) -> pd.DataFrame:
    """How peaked and how full core profiles are, by set.

    Columns: set, group, inside (share of the code's energy inside the core), fired (firing core latents, share of k),
    largest (largest share), entropy (nats); means over samples.
    """
    rows = []
    for name in ("test", *run.profile.ood_sets):
        obs, share = run.observations(name), _core_shares(run, name)
        inside = core_activations(obs.codes, obs.predicted, run.caps, run.profile.caps.core_fraction).sum(1)
        whole = obs.codes.values.astype(np.float64).sum(1)
        entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(1)
        row = {"inside": inside / np.maximum(whole, 1e-12), "fired": (share > 0).mean(1), "largest": share.max(1)}
        means = {key: float(value.mean()) for key, value in row.items()}
        rows.append({"set": name, "group": group_of(name)} | means | {"entropy": float(entropy.mean())})
    return pd.DataFrame(rows)


def embed(run, per_set: int = 300, limit: int = 1500, seed: int = 0) -> pd.DataFrame:
    """PCA, then t-SNE, of a sample of ID test and OOD features. Columns: x, y, set, group, class."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    rng, names = np.random.default_rng(seed), class_names(run)
    chosen = ["test", *run.profile.ood_sets]
    per_set = min(per_set, limit // (len(chosen) + 1))
    frames, vectors = [], []
    for name in chosen:
        features = run.features(name)
        wanted = 2 * per_set if name == "test" else per_set
        rows = np.sort(rng.permutation(len(features))[:wanted])
        label = [names[c] for c in features.labels[rows]] if name == "test" else [""] * len(rows)
        frames.append(pd.DataFrame({"set": name, "group": group_of(name), "class": label}))
        vectors.append(features.cls[rows])
    x = np.concatenate(vectors).astype(np.float64)
    x = PCA(min(50, *x.shape), random_state=seed).fit_transform((x - x.mean(0)) / np.maximum(x.std(0), 1e-12))
    perplexity = min(30, (len(x) - 1) / 4)
    place = TSNE(perplexity=perplexity, init="pca", max_iter=500, random_state=seed).fit_transform(x)
    return pd.concat(frames, ignore_index=True).assign(x=place[:, 0], y=place[:, 1]).round({"x": 3, "y": 3})


def histograms(scores: pd.DataFrame, titles: Mapping[str, str], bins: int = 48) -> pd.DataFrame:
    """Densities of scores by group, each OOD set with equal weight. Columns: method, group, left, right, density.

    ``scores`` as :func:`capsae.evaluate.scores_table` gives them; ``titles`` picks the methods and names them.
    """
    rows, scores = [], scores[scores["set"] != "val"]
    for method, title in titles.items():
        part = scores[scores["method"] == method]
        lo, hi = part["score"].quantile([0.002, 0.998])
        edges = np.linspace(lo, hi if hi > lo else lo + 1, bins + 1)
        for group, of_group in part.groupby("group", sort=False):
            weight = 1 / of_group.groupby("set")["score"].transform("size")
            clipped = of_group["score"].clip(edges[0], edges[-1])
            density = np.histogram(clipped, edges, weights=weight, density=True)[0]
            cells = {"left": edges[:-1], "right": edges[1:], "density": density}
            rows.append(pd.DataFrame({"method": title, "group": group} | cells))
    return pd.concat(rows, ignore_index=True)


def roc(scores: pd.DataFrame, titles: Mapping[str, str], points: int = 120) -> pd.DataFrame:
    """ROC curves, OOD positive, thinned to about ``points``. Columns: set, method, fpr, tpr."""
    rows, scores = [], scores[scores["set"] != "val"]
    for method, title in titles.items():
        part = scores[scores["method"] == method]
        known = np.sort(part.loc[part["group"] == "id", "score"].to_numpy())
        for name, of_set in part[part["group"] != "id"].groupby("set", sort=False):
            ood = np.sort(of_set["score"].to_numpy())
            levels = np.unique(np.concatenate([known, ood]))[::-1]
            # Share at or above each level; ties move together, as in the metrics.
            fpr = np.append(0, 1 - np.searchsorted(known, levels, "left") / len(known))
            tpr = np.append(0, 1 - np.searchsorted(ood, levels, "left") / len(ood))
            keep = np.unique(np.linspace(0, len(fpr) - 1, points).round().astype(int))
            rows.append(pd.DataFrame({"set": name, "method": title, "fpr": fpr[keep], "tpr": tpr[keep]}))
    data = pd.concat(rows, ignore_index=True)
    order = list(dict.fromkeys(scores.loc[scores["group"] != "id", "set"]))
    return data.sort_values("set", key=lambda s: s.map(order.index), kind="stable", ignore_index=True)


def class_divergences(codes, row: int, caps: ClassActivationProfiles, core_fraction: float) -> np.ndarray:
    """EPD (C,) of one sample under every class, had that class been the predicted one."""
    repeated = codes[np.full(caps.n_classes, row)]
    return energy_profile_divergence(repeated, np.arange(caps.n_classes), caps, core_fraction)


def profile_under(codes, row: int, of_class: int, caps, core_fraction: float, panel: str) -> pd.DataFrame:
    """One sample's profile against a class's, on that class's core. Columns: panel, rank, latent, expected, profile."""
    core = caps.core(core_fraction)[of_class]
    expected = core_reference(caps, core_fraction)[0][of_class, core]
    inside = codes[row : row + 1].dense()[0, core].astype(np.float64)
    total = inside.sum()
    return pd.DataFrame(
        {
            "panel": panel,
            "rank": np.arange(1, len(core) + 1),
            "latent": core,
            "expected": expected,
            "profile": inside / total if total > 0 else inside,
        }
    )


def pick(table: pd.DataFrame, method: str, metric: str, group: str = "all", set_name: str = "mean") -> dict:
    """One cell of the results table as ``{"value", "lo", "hi"}`` (shares); ValueError if the table does not hold it."""
    wanted = {"method": method, "metric": metric, "group": group, "set": set_name}
    rows = table[np.logical_and.reduce([table[column] == value for column, value in wanted.items()])]
    if len(rows) != 1:
        raise ValueError(f"the table holds {len(rows)} rows of {method}, {metric}, {set_name}, {group}: expected one")
    value, lo, hi = rows[["value", "lo", "hi"]].to_numpy(float)[0]
    return {"value": value, "lo": None if np.isnan(lo) else lo, "hi": None if np.isnan(hi) else hi}


def percent(cell: Mapping[str, float]) -> str:
    """``{"value": .115, "lo": .1, "hi": .13}`` -> ``11.5 % (10.0 to 13.0)``."""
    text = f"{100 * cell['value']:.1f} %"
    return text if cell.get("lo") is None else f"{text} ({100 * cell['lo']:.1f} to {100 * cell['hi']:.1f})"
