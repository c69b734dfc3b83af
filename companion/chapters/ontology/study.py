"""The ontology analysis of one run: its dictionaries and controls, its tables, and the numbers of its findings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import numpy as np
import pandas as pd

from capsae.caps import ClassActivationProfiles
from capsae.latents import wordnet

from ...findings import Chapter, Numbers
from . import mantel
from .maths import ABOVE, Judged, Units, by_synset, differences, every_class, image_draws, judge, measured, tree_order

SAE, RANDOM, CLS, EVERY = "SAE", "random dictionary", "CLS coordinates", "every class"
MEANS = "CLS class means"
SEEDS = (0, 1, 2)
REPLICATES = 200
MANY, FEW, LARGE = 999, 199, 1000  # permutations; the fewer where classes x synsets are more than LARGE: they take time
HEADLINE = ("cosine", "spearman")  # the distance and the coefficient of the verdicts: path lengths have an order only
ANIMAL = "n00015388"  # the first division of ImageNet's classes: animals, and all else
FAMILIES = (ANIMAL, "n02083346", "n02084071", "n00021939")  # animal, canine, dog, artifact: looked into one by one
LEAST_CLASSES = 8  # of a family that is looked into


def taxonomy(run) -> wordnet.Taxonomy:
    """WordNet above the classes of a run; ValueError where a class is not named as ImageNet names it."""
    names = run.features("train").class_names
    for name in names:
        if wordnet.wnid(name) is None:
            raise ValueError(
                f"experiment {run.experiment.name!r}: class {name!r} is no ImageNet class, such as n01440764_tench"
            )
    return wordnet.load([wordnet.wnid(name) for name in names])


def part_name(run) -> str:
    """The name of the control with as many latents as the CLS has coordinates with signs."""
    return f"{SAE}, {2 * run.features('train').cls.shape[1]} latents"


def dictionaries(run, seeds: Sequence[int] = SEEDS) -> dict[str, list]:
    """The run's SAE first, the same of other seeds; and random dictionaries, which is what an SAE is before it learns.

    The other seeds' SAEs come from the store, where the chapter on scores leaves them, or are trained.
    """
    from capsae.pipeline.run import Run
    from capsae.sae.dictionaries import methods as controls

    config, train = run.experiment.sae, run.features("train").cls
    saes = [run.sae]
    for seed in [seed for seed in seeds if seed != config.seed][: len(seeds) - 1]:
        saes.append(Run(run.experiment, {"sae.seed": seed, "n_boot": 0}, run.store, run.device, run.progress).sae)
    chance = [controls.create("random", config.latents, config.k, config.normalize, seed).fit(train) for seed in seeds]
    return {SAE: saes, RANDOM: chance}


def judged(run, found: Mapping[str, list], seeds: Sequence[int] = SEEDS, permutations: int | None = None) -> dict:
    """Every dictionary and control on every synset: method -> list of Judged, one a draw; first draws are permuted.

    Three controls join ``found`` (of :func:`dictionaries`): the coordinates of the normalised features with both signs,
    as many latents of the SAEs, drawn from those that fire, and calling every class a member. ``permutations``: default
    MANY, or FEW for large trees.
    """
    tree, train, test = taxonomy(run), run.features("train"), run.features("test")
    members = np.stack([tree.members(synset) for synset in tree.synsets], axis=1)
    permutations = (MANY if members.size <= LARGE else FEW) if permutations is None else permutations
    given = (train.labels, test.labels, members, tree_order(tree), image_draws(test.labels, REPLICATES))
    part, n = part_name(run), 2 * train.cls.shape[1]
    out: dict[str, list[Judged]] = {}
    for method, models in found.items():
        for seed, model in zip(seeds, models, strict=False):
            units = Units.of_codes(model.encode(train.cls), model.encode(test.cls))
            mine = out.setdefault(method, [])
            n_permuted = 0 if mine else permutations
            mine.append(judge(units, *given, n_permuted, n_permuted // 4 if method == SAE else 0))
            if method == SAE:
                out.setdefault(part, []).append(judge(units.drawn(n, seed), *given, n_permuted))
    plain = Units.of_features(*(run.sae.normalize(of.cls) for of in (train, test)))
    every = every_class(test.labels, members, REPLICATES)
    return out | {CLS: [judge(plain, *given, permutations)], EVERY: [every]}


def compared(run) -> list[tuple[str, str]]:
    """The pairs whose difference is asked for: the SAE and each control, then as many latents as the CLS has units."""
    part = part_name(run)
    return [(SAE, other) for other in (RANDOM, EVERY, CLS, part)] + [(part, CLS), (part, EVERY)]


def families(tree: wordnet.Taxonomy) -> dict[str, np.ndarray]:
    """Name -> (C,) bool of the families with at least LEAST_CLASSES classes."""
    found = {tree.name(one): tree.members(one) for one in FAMILIES if one in tree.lemmas}
    return {name: members for name, members in found.items() if members.sum() >= LEAST_CLASSES}


def distances(run, found: Mapping[str, list]) -> dict[tuple[str, str], np.ndarray]:
    """Distances between classes on training rows: of the run's CAPs, a random dictionary's, the mean features'."""
    train, n_classes = run.features("train"), run.experiment.n_classes
    codes = found[RANDOM][0].encode(train.cls)
    of = {
        SAE: mantel.cap_distances(run.caps),
        RANDOM: mantel.cap_distances(ClassActivationProfiles.fit(codes, train.labels, n_classes)),
        MEANS: mantel.mean_distances(run.sae.normalize(train.cls), train.labels, n_classes),
    }
    return {(name, kind): matrix for name, kinds in of.items() for kind, matrix in kinds.items()}


# --- tidy data of the figures


def covered(synsets: pd.DataFrame, summary: pd.DataFrame) -> pd.DataFrame:
    """Share of the synsets that are asked for whose F1 reaches each bar. Columns: by, method, bar, share."""
    synsets = synsets[synsets["asked"]]
    rows, bars = [], np.round(np.linspace(0, 1, 51), 2)
    for by, column in (("classes", "f1"), ("unseen classes", "unseen"), ("images", "images")):
        if by in set(summary["by"]):
            for method, part in synsets.groupby("method", sort=False):
                values = part[column].dropna().to_numpy()
                rows += [(by, method, bar, (values >= bar - 1e-9).mean()) for bar in bars]
    return pd.DataFrame(rows, columns=["by", "method", "bar", "share"])


def along_paths(path: np.ndarray, found: Mapping[tuple[str, str], np.ndarray], keys: Sequence) -> pd.DataFrame:
    """Distances by path length, in quantiles. Columns: panel, path, pairs, q05, q25, q50, q75, q95."""
    upper, rows = np.triu_indices(len(path), 1), []
    for key in keys:
        values = found[key][upper]
        for length in np.unique(path[upper]):
            part = values[path[upper] == length]
            quantiles = np.quantile(part, [0.05, 0.25, 0.5, 0.75, 0.95])
            rows.append((f"{key[0]}, {key[1]} distance", length, len(part), *quantiles))
    return pd.DataFrame(rows, columns=["panel", "path", "pairs", "q05", "q25", "q50", "q75", "q95"])


def ordered_pairs(tree: wordnet.Taxonomy, distance: np.ndarray, names: Sequence[str]) -> pd.DataFrame:
    """A distance between classes in the order of the tree. Columns: class_a, class_b, distance, path."""
    order, path = np.argsort(tree_order(tree)), tree.path_distance()
    short = [names[i].split("_", 1)[1].replace("_", " ") for i in order]
    a, b = np.meshgrid(np.arange(len(order)), np.arange(len(order)), indexing="ij")
    cells = distance[np.ix_(order, order)].ravel(), path[np.ix_(order, order)].ravel()
    columns = {"class_a": [short[i] for i in a.ravel()], "class_b": [short[i] for i in b.ravel()]}
    return pd.DataFrame(columns | {"distance": cells[0], "path": cells[1]})


def best_of_means(agreement: pd.DataFrame, column: str = "r") -> str:
    """The distance of the class means that agrees best with the tree, by ranks."""
    rows = agreement[(agreement["of"] == MEANS) & (agreement["method"] == HEADLINE[1])]
    return rows.loc[rows[column].idxmax(), "distance"]


def paths(page_data: SimpleNamespace) -> pd.DataFrame:
    """:func:`along_paths` of the SAE's profiles, the best class means and a random dictionary's profiles."""
    keys = [(SAE, "cosine"), (MEANS, best_of_means(page_data.agreement)), (RANDOM, "cosine")]
    return along_paths(page_data.tree.path_distance(), page_data.distances, keys)


def mean_f1(summary: pd.DataFrame) -> pd.DataFrame:
    """The rows of the summary that the page shows."""
    return summary[summary["measure"] == "mean F1"].drop(columns=["measure", "draws"])


# --- the page's data and the numbers of its findings


def page(run, tree: wordnet.Taxonomy) -> tuple[Chapter, SimpleNamespace, Numbers]:
    """What the notebook needs: its captions and findings, all tables, and the numbers."""
    found = dictionaries(run)
    of = judged(run, found)
    summary, kept = measured(of)
    apart, split = distances(run, found), mantel.split_distance(tree.members(ANIMAL))
    path = tree.path_distance()
    data = SimpleNamespace(
        tree=tree, synsets=by_synset(of, tree), summary=summary, differences=differences(kept, summary, compared(run)),
        distances=apart, agreement=mantel.agreement(path, apart, MEANS, split),
        inside=mantel.inside(path, apart, families(tree), HEADLINE[1]), gains=mantel.gains(path, apart, SAE, RANDOM),
    )  # fmt: skip
    return Chapter("10_ontology", run), data, numbers(data)


def numbers(data: SimpleNamespace) -> Numbers:
    """What the chapter's findings rest on."""
    made, part = Numbers(), re.compile(rf"{SAE}, \d+ latents")
    rows = data.summary.replace({"method": part}, "equal number", regex=True)
    made.rows(rows[rows["measure"] == "mean F1"].drop(columns="p"), "f1_{method}_{by}")
    made.rows(rows[rows["measure"] == ABOVE], "above_chance_{method}_{by}")
    gaps = data.differences[data.differences["measure"] == "mean F1"]
    gaps = gaps.replace({key: part for key in ("dictionary", "other")}, "equal number", regex=True)
    made.rows(gaps, "{dictionary}_less_{other}_{by}")
    own = data.synsets[data.synsets["asked"] & (data.synsets["method"] == SAE)]
    every = data.synsets[data.synsets["asked"] & (data.synsets["method"] == EVERY)].set_index("synset")
    for by, column in (("images", "images"), ("classes", "f1"), ("unseen_classes", "unseen")):
        known = own.set_index("synset")[column].dropna()
        made.add(f"synsets_{by}", len(known))
        made.add(f"won_{by}", int((known > every[column].reindex(known.index) + 1e-9).sum()))
    chance = rows[(rows["method"] == SAE) & (rows["by"] == "classes") & (rows["measure"] == "mean F1")].iloc[0]
    made.add("permuted_classes", chance["null"], chance["null_lo"], chance["null_hi"], chance["p"])
    made.add("synsets_that_stand_out", int((own["q"] < 0.05).sum()))
    headline = (data.agreement["distance"] == HEADLINE[0]) & (data.agreement["method"] == HEADLINE[1])
    row = data.agreement[headline & (data.agreement["of"] == SAE)].iloc[0]
    made.add("r", row["r"], row["lo"], row["hi"], row["p"])
    made.add("split_r", row["split_r"])
    for name in ("within", "beyond"):
        made.add(name, *(row[f"{name}{end}"] for end in ("", "_lo", "_hi", "_p")))
    made.add("gain", row["gain"], row["gain_lo"], row["gain_hi"])
    means = data.agreement[(data.agreement["of"] == MEANS) & (data.agreement["method"] == HEADLINE[1])]
    made.add("class_means_within", means["within"].max())
    own = data.inside[(data.inside["of"] == SAE) & (data.inside["distance"] == HEADLINE[0])]
    made.rows(own.rename(columns={"r": "value"}), "inside_{family}")
    training = (data.gains["distance"] == HEADLINE[0]) & (data.gains["method"] == HEADLINE[1])
    made.rows(data.gains[training], "training")
    return made
