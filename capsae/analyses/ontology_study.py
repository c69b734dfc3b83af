"""The ontology analysis of one run: its dictionaries and controls, its tables, and the sentences that they bear out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from ..caps import ClassActivationProfiles
from ..comparisons import p_text
from . import mantel, wordnet
from .ontology import BARS, Judged, Units, image_draws, judge, tree_order

SAE, RANDOM, UNTRAINED, CLS = "SAE", "random dictionary", "untrained SAE", "CLS coordinates"
MEANS = "CLS class means"
SEEDS = (0, 1, 2)
REPLICATES = 200
MANY, FEW, LARGE = 999, 199, 1000  # permutations; the fewer where classes x synsets are more than LARGE: they take time
HEADLINE = ("cosine", "spearman")  # the distance and the coefficient of the verdicts: path lengths have an order only


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
    """The run's SAE first, the same of other seeds, random dictionaries, and the SAE before its first step.

    The other seeds' SAEs come from the store, where the chapter on scores leaves them, or are trained.
    """
    import torch

    from ..pipeline import Run
    from ..sae import dictionaries as untaught
    from ..sae.rows import start

    config, train = run.profile.sae, run.features("train").cls
    saes = [run.sae]
    for seed in [seed for seed in seeds if seed != config.seed][: len(seeds) - 1]:
        saes.append(Run(run.profile, {"sae.seed": seed, "n_boot": 0}, run.store, run.device, run.progress).sae)
    chance = [untaught.create("random", config.latents, config.k, config.normalize, seed).fit(train) for seed in seeds]
    before = start(torch.as_tensor(np.asarray(train)), config, torch.device("cpu"))[0]
    return {SAE: saes, RANDOM: chance, UNTRAINED: [before]}


def judged(run, found: Mapping[str, list], seeds: Sequence[int] = SEEDS, permutations: int | None = None) -> dict:
    """Every dictionary and control on every synset: method -> list of Judged, one a draw; first draws are permuted.

    Two controls join ``found`` (of :func:`dictionaries`): the coordinates of the normalised features with both signs,
    and as many latents of the SAEs, drawn from those that fire. ``permutations``: default MANY, or FEW for large trees.
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
            n_permuted = 0 if mine or method == UNTRAINED else permutations  # the untrained SAE is a random dictionary
            mine.append(judge(units, *given, n_permuted, n_permuted // 2 if method == SAE else 0))
            if method == SAE:
                out.setdefault(part, []).append(judge(units.drawn(n, seed), *given))
    plain = Units.of_features(*(run.sae.normalize(of.cls) for of in (train, test)))
    return out | {CLS: [judge(plain, *given, permutations)]}


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
    """Share of the synsets whose F1 reaches each bar. Columns: by, method, bar, share."""
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


def chance_text(summary: pd.DataFrame, synsets: pd.DataFrame, method: str = SAE) -> str:
    """What a dictionary finds beside what the same search finds among permuted classes."""
    row, own = _row(summary, method=method, by="classes", measure="mean F1"), synsets[synsets["method"] == method]
    clear, n = int((own["q"] < 0.05).sum()), len(own)
    seeds = f"; {row['least']:.2f} to {row['largest']:.2f} over its draws" if row["largest"] > row["least"] else ""
    told = "more than chance" if row["p"] < 0.05 else "no more than chance"
    return (
        f"By classes, the best unit of the {method} reaches a mean F1 of {row['value']:.2f} ({row['lo']:.2f} to "
        f"{row['hi']:.2f}{seeds}). With the classes of the tree permuted, the same search still reaches "
        f"{row['null']:.2f} ({row['null_lo']:.2f} to {row['null_hi']:.2f}): it is {told}, {p_text(row['p'])}, and "
        f"{clear} of {n} synsets stand out one by one (q < 0.05)."
    )


def _listed(names: Sequence[str]) -> str:
    names = [f"the {name}" for name in names]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def control_text(differences: pd.DataFrame, by: str, measure: str = "mean F1") -> str:
    """Against which controls the SAE is better, worse, undecided, in one measure."""
    rows = differences[(differences["by"] == by) & (differences["measure"] == measure)]
    parts = []
    for verdict, words in (("better", "better than"), ("undecided", "not told from"), ("worse", "worse than")):
        part = rows[rows["verdict"] == verdict]
        if len(part):
            gaps = ", ".join(f"{r.value:+.2f} ({r.lo:+.2f} to {r.hi:+.2f})" for r in part.itertuples())
            parts.append(f"{words} {_listed(part['other'].tolist())}: {gaps}")
    return f"By {by}, in {measure}, the {SAE} is {'; '.join(parts)}."


def ontology_verdict(summary: pd.DataFrame, differences: pd.DataFrame, where: str) -> str:
    """The answer to the chapter's question, from the mean F1 against chance and against each control."""
    p = _row(summary, method=SAE, by="classes", measure="mean F1")["p"]
    rows = differences[(differences["measure"] == "mean F1") & ~differences["other"].str.startswith(SAE)]
    n, better, worse = len(rows), *((rows["verdict"] == word).sum() for word in ("better", "worse"))
    if p >= 0.05:
        return f"On {where}, the best latents fit WordNet no better than chance would ({p_text(p)})."
    if better == n:
        told = f"better than every control, whichever way it is judged ({n} comparisons)"
    elif better > worse:
        told = f"better than its controls in {better} of {n} comparisons and worse in {worse}"
    else:
        told = f"but no better than the controls: better in {better} of {n} comparisons, worse in {worse}"
    return f"On {where}, the best latents fit WordNet better than chance would ({p_text(p)}), {told}."


def coverage_text(summary: pd.DataFrame, method: str = SAE) -> str:
    """The shares of synsets over the bars, by classes and by images."""
    cells = []
    for by in ("classes", "images"):
        rows = [_row(summary, method=method, by=by, measure=f"share of F1 from {bar}") for bar in BARS]
        shares = " and ".join(f"{100 * r['value']:.0f} % ({100 * r['lo']:.0f} to {100 * r['hi']:.0f})" for r in rows)
        cells.append(f"by {by} {shares}")
    bars = " and ".join(f"{bar:g}" for bar in BARS)
    return f"Coverage, the share of synsets with an F1 of at least {bars}: {'; '.join(cells)}."


def mantel_text(table: pd.DataFrame, where: str, of: str = SAE) -> str:
    """Whether CAP distance agrees with path distance."""
    distance, method = HEADLINE
    row = _row(table, of=of, distance=distance, method=method)
    told = "agrees with" if row["p"] < 0.05 else "does not clearly agree with"
    others = table[(table["of"] == of) & (table["p"] < 0.05)]
    return (
        f"On {where}, the {distance} distance of the {of}'s CAPs {told} WordNet's path distance: Mantel's r = "
        f"{row['r']:.2f} ({row['lo']:.2f} to {row['hi']:.2f}; {method.title()}), {p_text(row['p'])}; of all "
        f"{(table['of'] == of).sum()} pairs of a distance and a coefficient, {len(others)} have p < 0.05."
    )


def beyond_text(table: pd.DataFrame, of: str = SAE) -> str:
    """Whether the CAPs add to what the distances of the raw mean features say, and whether they say it better."""
    distance, method = HEADLINE
    row = _row(table, of=of, distance=distance, method=method)
    added = row["beyond_p"] < 0.05
    more = "better" if row["gain_lo"] > 0 else "worse" if row["gain_hi"] < 0 else "neither clearly better nor worse"
    return (
        f"The {of}'s CAPs {'add' if added else 'add nothing clear'} to what the class means of the raw CLS say of the "
        f"tree (partial r = {row['beyond']:.2f} given all their distances, {row['beyond_lo']:.2f} to "
        f"{row['beyond_hi']:.2f}, {p_text(row['beyond_p'])}); alone, they agree with it {more} than the best of those, "
        f"{row['over']} ({row['gain']:+.2f}, {row['gain_lo']:+.2f} to {row['gain_hi']:+.2f})."
    )


def training_text(gains: pd.DataFrame) -> str:
    """Whether the trained dictionary's CAPs agree better with the tree than a random one's."""
    distance, method = HEADLINE
    row = _row(gains, distance=distance, method=method)
    told = "helps" if row["lo"] > 0 else "hurts" if row["hi"] < 0 else "makes no clear difference"
    return (
        f"Training {told}: against a random dictionary's CAPs, r changes by {row['value']:+.2f} ({row['lo']:+.2f} to "
        f"{row['hi']:+.2f})."
    )
