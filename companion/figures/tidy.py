"""Tidy data behind the figures: what a run holds, as one data frame a figure of :mod:`companion.figures.figures`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from capsae.latents.explain import plain_name
from capsae.pipeline.latents import class_names
from capsae.stats import exact_interval, seeds_and_images

METRIC_PANELS = {
    "fpr95_ood_pos": "FPR95, OOD positive",
    "fpr95_id_pos": "FPR95, ID positive",
    "auroc": "AUROC",
}
QUANTILES = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}


def group_of(set_name: str) -> str:
    """``near`` or ``far`` of an OOD set, ``id`` of any other."""
    return set_name.split("/")[0] if "/" in set_name else "id"


def sets(run) -> pd.DataFrame:
    """What the experiment is made of. Columns: set, role, images, classes."""
    roles = {"train": "trains SAE, profiles and detectors", "val": "ID validation", "test": "ID test"}
    roles |= dict.fromkeys(run.experiment.shifted, "covariate-shifted ID")
    rows = []
    for name in run.experiment.sets:
        features = run.features(name)
        known = np.unique(features.labels[features.labels >= 0]).size
        role = roles.get(name, f"{group_of(name)} OOD")
        if excluded := features.meta.get("excluded"):
            role += f", {excluded} images left out by {Path(run.experiment.source(name).exclude).name}"
        rows.append((name, role, len(features), known))
    return pd.DataFrame(rows, columns=["set", "role", "images", "classes"])


def accuracies(run) -> pd.DataFrame:
    """Accuracy of the head by set, with Clopper and Pearson's interval. Columns: set, images, value, lo, hi."""
    rows = []
    for name in ("train", "val", "test"):
        features = run.features(name)
        share = float((features.logits.argmax(axis=1) == features.labels).mean())
        rows.append((name, len(features), share, *exact_interval(share, len(features))))
    return pd.DataFrame(rows, columns=["set", "images", "value", "lo", "hi"])


def fvu_of_seeds(run, limit: int = 100_000) -> pd.DataFrame:
    """Unexplained variance by set, mean over the seeds of the SAE. Columns: set, value, lo, hi, seeds.

    The images' part of the interval is that of a ratio of two means, by the delta method.
    """
    sets = {name: sample_rows(run.features(name), limit).cls for name in ("train", "val", "test")}
    values, parts = {name: [] for name in sets}, {name: [] for name in sets}
    for one in run.seeds():
        for name, cls in sets.items():
            x = one.sae.normalize(cls).astype(np.float64)
            error = ((x - one.sae.decode(one.sae.encode(cls))) ** 2).sum(axis=1)
            spread = ((x - x.mean(axis=0)) ** 2).sum(axis=1)
            values[name].append(error.sum() / spread.sum())
            parts[name].append((error - values[name][-1] * spread) / spread.mean())
    rows = []
    for name, of in values.items():
        part = np.mean(parts[name], axis=0)
        found = seeds_and_images(of, part.std(ddof=1) / np.sqrt(len(part)))
        rows.append({"set": name} | {key: found[key] for key in ("value", "lo", "hi", "seeds")})
    return pd.DataFrame(rows)


def of_training(history: pd.DataFrame, errors: pd.DataFrame) -> pd.DataFrame:
    """What the training page records beside the FVU. Columns: key, value."""
    last = history[history["epoch"] == history.attrs["best_epoch"]].iloc[0]
    median = errors.set_index("set")["q50"]
    ood = median[[name for name in median.index if "/" in name]]
    values = {"best epoch": history.attrs["best_epoch"], "epochs": history["epoch"].max(), "l0": last["l0"]}
    values |= {"dead": last["dead_fraction"], "median test": median["test"], "ood sets": len(ood)}
    values |= {"median of ood, least": ood.min(), "median of ood, largest": ood.max()}
    return pd.DataFrame({"key": list(values), "value": [float(value) for value in values.values()]})


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


def sample_rows(features, limit: int, seed: int = 0):
    """At most ``limit`` rows of a FeatureSet, drawn at random, in their order; all of a smaller one."""
    if len(features) <= limit:
        return features
    return features.take(np.sort(np.random.default_rng(seed).permutation(len(features))[:limit]))


def decode_errors(run, sae, limit: int = 20_000) -> pd.DataFrame:
    """Quantiles, by set, of each sample's unexplained share |x - x_hat|^2 / |x|^2 in the SAE's normalised space."""
    shares = {}
    for name in ("train", "val", "test", *run.experiment.ood_sets):
        features = sample_rows(run.features(name), limit)
        x, x_hat = sae.normalize(features.cls), sae.decode(sae.encode(features.cls))
        shares[name] = ((x - x_hat) ** 2).sum(axis=1) / np.maximum((x**2).sum(axis=1), 1e-12)
    return quantiles(shares)


def embed(run, per_set: int = 300, limit: int = 1500, seed: int = 0) -> pd.DataFrame:
    """PCA, then t-SNE, of a sample of ID test and OOD features. Columns: x, y, set, group, class."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    rng, names = np.random.default_rng(seed), class_names(run)
    chosen = ["test", *run.experiment.ood_sets]
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

    ``scores`` as :func:`capsae.evaluation.evaluate.scores_table` gives them; ``titles`` picks the methods and names
    them.
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


def results(table: pd.DataFrame, groups: Iterable[str]) -> pd.DataFrame:
    """The results table with titles for names, cut to detectors of ``groups``, best first by the mean over all sets."""
    from capsae.detectors import info

    rows = table[(table["method"] != "head") & table["group"].isin(["near", "far", "all"])].copy()
    known = {name: info(name) for name in rows["method"].unique()}
    rows = rows[rows["method"].map(lambda name: known[name]["group"] in set(groups))]
    means = rows[(rows["metric"] == "fpr95_ood_pos") & (rows["set"] == "mean") & (rows["group"] == "all")]
    order = list(means.sort_values("value")["method"])
    rows = rows.sort_values("method", key=lambda names: names.map(order.index), kind="stable")
    return rows.assign(name=rows["method"], method=rows["method"].map(lambda name: known[name]["title"]))


def by_set(data: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One metric in %, a row a method, a column a set or mean; methods in the order of :func:`results`."""
    rows = data[data["metric"] == metric]
    column = np.where(rows["set"] == "mean", "mean " + rows["group"], rows["set"].str.split("/").str[-1])
    cells = rows.assign(column=column, value=100 * rows["value"])
    return cells.pivot_table(index="method", columns="column", values="value", sort=False).reset_index()


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row a detector and group of sets: the means of both FPR95 and AUROC with their intervals, in %.

    Columns: method, kind, group, and value, lo and hi of each metric; best mean FPR95 (OOD positive) first.
    """
    from capsae.detectors import info

    rows = []
    means = table[(table["set"] == "mean") & table["metric"].isin(METRIC_PANELS)]
    means = means[means["group"].isin(["near", "far", "all"])]  # not the full spectrum
    for (name, group), part in means.groupby(["method", "group"], sort=False):
        about, cells = info(name), part.set_index("metric")
        row = {"name": name, "method": about["title"], "kind": about["group"], "group": group}
        for metric in METRIC_PANELS:
            row |= {f"{metric}_{key}": 100 * cells.loc[metric, key] for key in ("value", "lo", "hi")}
        rows.append(row)
    data = pd.DataFrame(rows)
    overall = data[data["group"] == "all"].set_index("name")["fpr95_ood_pos_value"]
    return data.sort_values("name", key=lambda names: names.map(overall), kind="stable", ignore_index=True)


def summary_shown(data: pd.DataFrame) -> pd.DataFrame:
    """:func:`summary` as text, one row a detector, for a page."""
    rows = {}
    for r in data.to_dict("records"):
        row = rows.setdefault(r["name"], {"method": r["method"], "kind": r["kind"]})
        for metric, title in METRIC_PANELS.items():
            value, lo, hi = (r[f"{metric}_{key}"] for key in ("value", "lo", "hi"))
            interval = "" if np.isnan(lo) else f" ({lo:.1f}–{hi:.1f})"
            row[f"{title}: {r['group']}"] = f"{value:.1f}{interval}"
    shown = pd.DataFrame(rows.values())
    order = [c for title in METRIC_PANELS.values() for c in shown.columns if c.startswith(f"{title}: ")]
    return shown[["method", "kind", *order]]


def provenance(run) -> pd.DataFrame:
    """What stands behind a notebook's numbers, without what changes from run to run. Columns: item, value."""
    found = run.provenance()
    rows = [("experiment", f"{found['experiment']}: {found['title']}"), ("backbone", found["backbone"])]
    rows.append(("features", f"embedded pack {found['pack']}" if found.get("pack") else "extracted from the images"))
    rows += [(f"seed, {name}", seed) for name, seed in found["seeds"].items()]
    rows += [(f"digest, {stage}", digest[:20]) for stage, digest in found["digests"].items()]
    rows += [(f"version, {name}", version) for name, version in found["versions"].items()]
    return pd.DataFrame([(item, str(value)) for item, value in rows], columns=["item", "value"])


def explained(table: pd.DataFrame, top: int = 12) -> pd.DataFrame:
    """The latents with the largest shares of one score, and the rest together. Columns: label, kind, share, latent, ...

    ``table`` as :func:`capsae.latents.explain.explain` gives it. The shares still sum to the score.
    """
    table = table[table["share"] != 0]
    table = table.iloc[np.argsort(-table["share"].abs().to_numpy(), kind="stable")]
    head, rest = table.head(top), table.iloc[top:]
    label = [f"{r.latent}: {_short(r.classes)}" if r.latent >= 0 else str(r.kind) for r in head.itertuples()]
    head = head.assign(label=label)
    if len(rest):
        label = f"{len(rest)} further latents"
        last = {"label": label, "kind": "all others", "share": rest["share"].sum(), "latent": -1}
        head = pd.concat([head, pd.DataFrame([last])], ignore_index=True)
    return head


def _short(classes: str) -> str:
    """The first two of a latent's classes, without wordnet numbers."""
    names = [plain_name(name) for name in str(classes).split(", ")]
    return ", ".join(names[:2])


def silent(why: pd.DataFrame, top: int = 8) -> pd.DataFrame:
    """Latents that the class expects and that are silent in a sample. Columns: latent, expected, classes."""
    rows = why[(why["profile"] == 0) & (why["latent"] >= 0)].sort_values("expected", ascending=False).head(top)
    return rows[["latent", "expected", "classes"]].assign(classes=rows["classes"].map(lambda text: _short(text)))


def records(table: pd.DataFrame) -> list[dict]:
    """Rows as plain mappings for JSON; an interval that was not computed is None."""
    plain = table.astype(object).where(table.notna(), None)
    return plain.to_dict("records")
