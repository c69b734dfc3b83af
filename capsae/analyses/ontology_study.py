"""The ontology analysis of one run: its dictionaries and controls, its tables, and the sentences that they bear out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from ..caps import ClassActivationProfiles
from ..comparisons import p_text
from . import mantel, wordnet
from .ontology import ABOVE, LEAST, Judged, Units, every_class, image_draws, judge, tree_order

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
                f"profile {run.profile.name!r}: class {name!r} is no ImageNet class, such as n01440764_tench"
            )
    return wordnet.load([wordnet.wnid(name) for name in names])


def part_name(run) -> str:
    """The name of the control with as many latents as the CLS has coordinates with signs."""
    return f"{SAE}, {2 * run.features('train').cls.shape[1]} latents"


def dictionaries(run, seeds: Sequence[int] = SEEDS) -> dict[str, list]:
    """The run's SAE first, the same of other seeds; and random dictionaries, which is what an SAE is before it learns.

    The other seeds' SAEs come from the store, where the chapter on scores leaves them, or are trained.
    """
    from ..pipeline import Run
    from ..sae import dictionaries as untaught

    config, train = run.profile.sae, run.features("train").cls
    saes = [run.sae]
    for seed in [seed for seed in seeds if seed != config.seed][: len(seeds) - 1]:
        saes.append(Run(run.profile, {"sae.seed": seed, "n_boot": 0}, run.store, run.device, run.progress).sae)
    chance = [untaught.create("random", config.latents, config.k, config.normalize, seed).fit(train) for seed in seeds]
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
    train, n_classes = run.features("train"), run.profile.n_classes
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


# --- sentences


def _row(table: pd.DataFrame, **wanted) -> pd.Series:
    for column, value in wanted.items():
        table = table[table[column] == value]
    return table.iloc[0]


def _p(p: float, permutations: float) -> str:
    """A p of permutations in words: "≤" where none of them did as well, so that more might have made it smaller."""
    return p_text(p, at_most=p <= 1.0001 / (1 + permutations))


def _gap(row: Mapping) -> str:
    return f"{row['value']:+.2f}, {row['lo']:+.2f} to {row['hi']:+.2f}"


NONE = "too few synsets"  # for a verdict
_WORDS = {"better": "better than", "worse": "worse than", "undecided": "not told from"}
_COLUMNS = {"images": "images", "classes": "f1", "unseen classes": "unseen"}


def beaten(synsets: pd.DataFrame, by: str, method: str = SAE, other: str = EVERY) -> tuple[int, int]:
    """On how many of the synsets given, and of how many, a dictionary's F1 is above another's."""
    own, others = (
        synsets[synsets["method"] == name].set_index("synset")[_COLUMNS[by]].dropna() for name in (method, other)
    )
    return int((own > others + 1e-9).sum()), len(own)


def against_text(summary: pd.DataFrame, differences: pd.DataFrame, synsets: pd.DataFrame, by: str) -> str:
    """The SAE beside random dictionaries and beside calling every class a member, in one way of judging."""
    mean = {name: _row(summary, method=name, by=by, measure="mean F1") for name in (SAE, RANDOM, EVERY)}
    gaps = [_row(differences, dictionary=SAE, other=name, by=by, measure="mean F1") for name in (EVERY, RANDOM)]
    own = synsets[synsets["asked"]]
    won, n = beaten(own, by)
    parts = {
        f"of at least {LEAST} classes": own[own["members"] >= LEAST],
        "left out as too large": synsets[~synsets["asked"]],
    }
    counts = {name: beaten(part, by) for name, part in parts.items() if len(part)}
    also = "; ".join(f"{some} of {of} {name}" for name, (some, of) in counts.items() if of and (some, of) != (won, n))
    also = f" ({also})" if also else ""
    names = ("every class", "random dictionaries")
    if gaps[0]["verdict"] == NONE:
        told = " and ".join(f"{_gap(gap)} from {name}" for gap, name in zip(gaps, names, strict=True))
        told = f"{n} synsets are too few for a verdict, the {SAE} differs by {told}"
    else:
        told = " and ".join(
            f"{_WORDS[gap['verdict']]} {name} ({_gap(gap)})" for gap, name in zip(gaps, names, strict=True)
        )
        told = f"the {SAE} is {told}"
    return (
        f"By {by}, the best latents of the {SAE} reach a mean F1 of {mean[SAE]['value']:.2f} over {n} synsets, "
        f"calling every class a member {mean[EVERY]['value']:.2f}, random dictionaries {mean[RANDOM]['value']:.2f}: "
        f"{told}, and beats every class on {won} of {n} synsets{also}."
    )


def equal_text(differences: pd.DataFrame) -> str:
    """As many latents as the CLS has coordinates with signs, against these."""
    rows = differences[(differences["other"] == CLS) & (differences["dictionary"] != SAE)]
    rows = rows[rows["measure"] == "mean F1"]
    cells = []
    for _, row in rows.iterrows():
        few = row["verdict"] == NONE
        told = f"without a verdict on {row['synsets']} synsets" if few else f"{_WORDS[row['verdict']]} these"
        cells.append(f"{told} by {row['by']} ({_gap(row)})")
    n = rows["dictionary"].iloc[0].split()[1]
    return f"{n} latents of the {SAE}, as many as the CLS has coordinates with either sign, are {', '.join(cells)}."


def chance_text(summary: pd.DataFrame, synsets: pd.DataFrame, method: str = SAE) -> str:
    """What a dictionary finds by classes beside what the same search finds among permuted classes, and others do."""
    row, own = _row(summary, method=method, by="classes", measure="mean F1"), synsets[synsets["method"] == method]
    clear, n = int((own["q"] < 0.05).sum()), int(own["asked"].sum())
    told = "more than chance" if row["p"] < 0.05 else "no more than chance"
    above = summary[(summary["by"] == "classes") & (summary["measure"] == ABOVE) & (summary["method"] != EVERY)]
    others = ", ".join(f"{r.method} {r.value:.2f}" for r in above.itertuples())
    return (
        f"By classes, the best unit of the {method} reaches a mean F1 of {row['value']:.2f} ({row['lo']:.2f} to "
        f"{row['hi']:.2f}; {row['least']:.2f} to {row['largest']:.2f} over {row['draws']} draws). With the classes of "
        f"the tree permuted ({row['permutations']:.0f} times, first draw), the same search still reaches "
        f"{row['null']:.2f}: it is {told} ({_p(row['p'], row['permutations'])}), and {clear} of {n} synsets stand out "
        f"one by one (q < 0.05). F1 above each one's own chance: {others}."
    )


def _best(table: pd.DataFrame, column: str, **wanted) -> pd.Series:
    for name, value in wanted.items():
        table = table[table[name] == value]
    return table.sort_values(column).iloc[-1]


def mantel_text(table: pd.DataFrame, inside: pd.DataFrame, where: str, of: str = SAE) -> str:
    """How much of the agreement with path distance is the split between animals and all else."""
    distance, method = HEADLINE
    row = _row(table, of=of, distance=distance, method=method)
    means = _best(table, "within", of=MEANS, method=method)
    own = inside[(inside["of"] == of) & (inside["distance"] == distance)]
    clear = [f"{r.family}s" for r in own.itertuples() if r.p < 0.05 and r.lo > 0]
    cells = ", ".join(f"{r.family}s {r.r:.2f} ({_p(r.p, r.permutations)})" for r in own.itertuples())
    names = "each" if len(clear) == len(own) else f"{' and '.join(clear)} only" if clear else "none"
    return (
        f"On {where}, the {distance} distance of the {of}'s profiles follows WordNet's paths with r = {row['r']:.2f}, "
        f'but "one is an animal, the other not" alone has r = {row["split_r"]:.2f}'
        f"{', no less' if row['split_r'] >= row['r'] - 0.005 else ''}; given that split, r is {row['within']:.2f} "
        f"({row['within_lo']:.2f} to {row['within_hi']:.2f}, {_p(row['within_p'], row['permutations'])}) beside "
        f"{means['within']:.2f} of class means ({means['distance']}), and inside families agreement is clear "
        f"(p < 0.05, interval above 0) for {names}: {cells}."
    )


def beyond_text(table: pd.DataFrame, inside: pd.DataFrame, of: str = SAE) -> str:
    """Whether the CAPs add to the split and the raw mean features, say it better, and how these do inside families."""
    distance, method = HEADLINE
    row = _row(table, of=of, distance=distance, method=method)
    added = row["beyond_p"] < 0.05 and row["beyond_lo"] > 0
    more = "better" if row["gain_lo"] > 0 else "worse" if row["gain_hi"] < 0 else "neither clearly better nor worse"
    best = [_best(inside, "r", of=MEANS, family=family) for family in dict.fromkeys(inside["family"])]
    cells = ", ".join(f"{r['family']}s {r['r']:.2f} ({r['distance']})" for r in best)
    return (
        f"The {of}'s profiles {'add' if added else 'add nothing clear'} to what the split and all distances of the "
        f"class means of the raw CLS say together (partial r = {row['beyond']:.2f}, {row['beyond_lo']:.2f} to "
        f"{row['beyond_hi']:.2f}, {_p(row['beyond_p'], row['permutations'])}); given the split alone, they agree with "
        f"the tree {more} than the best of the means, {row['over']} ({row['gain']:+.2f}, {row['gain_lo']:+.2f} to "
        f"{row['gain_hi']:+.2f}). Inside families, the best of the class means has r: {cells}."
    )


def training_text(gains: pd.DataFrame) -> str:
    """Whether the trained dictionary's CAPs agree better with the tree than a random one's."""
    distance, method = HEADLINE
    row = _row(gains, distance=distance, method=method)
    told = "helps" if row["lo"] > 0 else "hurts" if row["hi"] < 0 else "makes no clear difference"
    return (
        f"Training {told}: against a random dictionary's CAPs, r over all pairs changes by {row['value']:+.2f} "
        f"({row['lo']:+.2f} to {row['hi']:+.2f})."
    )
