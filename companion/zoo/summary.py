"""From the zoo's tidy table to what its page shows: one row a fit, one row a member, ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from capsae.sae.model import TopKSAE
from capsae.stats import seeds_and_images

from .fitting import NEAR, settings

_METRICS = {"fpr95_ood_pos": "FPR95 (OOD pos.)", "fpr95_id_pos": "FPR95 (ID pos.)", "auroc": "AUROC"}
OOD = {(m, metric): f"{m.upper()} {title}" for m in ("epd", "rpd") for metric, title in _METRICS.items()}
# measure -> (the set it is taken from, title, whether more is better; None: neither)
SINGLE: dict[str, tuple[str, str, bool | None]] = {
    "fvu": ("test", "FVU", False),
    "l0": ("test", "L0", None),
    "dead_fraction": ("train", "dead", False),
    "head_kept": ("test", "head accuracy kept", True),
    "monosemanticity": ("train", "monosemanticity", True),
    "separability": ("train", "concept separability", True),
    "probing_1": ("test", "probing, 1 latent", True),
    "probing_5": ("test", "probing, 5 latents", True),
    "probing_20": ("test", "probing, 20 latents", True),
    "cap_stability": ("train", "CAP stability", True),
    "core_overlap": ("train", "core overlap", None),
    "train_cpu_s": ("train", "training, CPU s", None),  # of kernels as different as fused bfloat16 and plain float32
    "monosemanticity_defined": ("train", "monosemanticity defined for", None),
    "n_latents": ("", "latents", None),
}
INTERPRETABLE = ("monosemanticity", "separability", "probing_1")  # each of one latent at a time
STABILITY, CHANCE = "stability over seeds", "stability by chance"
INTERPRETABILITY = "interpretability rank"
LOOK_INTO = {  # columns of the table of what is best to look into, with their formats
    **{INTERPRETABILITY: "{:.1f}", "monosemanticity": "{:.3f}", "monosemanticity defined for": "{:.1%}"},
    **{"concept separability": "{:.3f}", "probing, 1 latent": "{:.1%}", "probing, 5 latents": "{:.1%}"},
    **{"probing, 20 latents": "{:.1%}", "CAP stability": "{:.3f}", "core overlap": "{:.3f}", "dead": "{:.1%}"},
    **{"head accuracy kept": "{:.1%}", "training, CPU s": "{:.0f}"},
}
BETTER = {title: up for _, title, up in SINGLE.values() if up is not None}  # title -> whether more is better
BETTER |= {title: metric == "auroc" for (_, metric), title in OOD.items()} | {STABILITY: True}
NORMAL = 3.92  # standard errors in a 95 % interval
SPLIT = ("abs_topk", "itda", "pca")  # two latents a direction, one a sign


def fits(table: pd.DataFrame) -> pd.DataFrame:
    """One row a fit: member, title, kind, seed, lr, and a column a measure (names as in `OOD` and `SINGLE`).

    OOD results are means over all sets. Added: `INTERPRETABILITY`, the mean over `INTERPRETABLE` of a fit's rank among
    the fits of its seed (1 = best; a member of one fit takes part in every seed).
    """
    keys = ["member", "title", "kind", "seed", "lr"]
    rows = table[table["seed"] >= 0]
    chosen = [_means(rows)]
    for name, (where, title, _) in SINGLE.items():
        chosen.append(rows[(rows["measure"] == name) & (rows["set"] == where)].assign(column=title))
    long = pd.concat(chosen).dropna(subset="column")
    wide = long.assign(lr=long["lr"].fillna(-1)).pivot(index=keys, columns="column", values="value").reset_index()
    wide = wide.assign(lr=wide["lr"].where(wide["lr"] > 0)).rename_axis(columns=None).sort_values("seed")
    wide = wide[[*keys, *(c for c in (*OOD.values(), *(t for _, t, _ in SINGLE.values())) if c in wide)]]
    wide = in_order(wide, table["member"].unique())
    return wide.assign(**{INTERPRETABILITY: interpretability(wide)})


def _means(rows: pd.DataFrame) -> pd.DataFrame:
    """The means over all OOD sets of some fits, with the column that each belongs to."""
    rows = rows[(rows["set"] == "mean") & (rows["group"] == "all")]
    return rows.assign(column=[OOD.get(key) for key in zip(rows["method"], rows["measure"], strict=True)])


def image_errors(table: pd.DataFrame) -> pd.DataFrame:
    """Standard error over images of each member's mean over seeds: a row a member, a column an OOD result.

    The mean of the seeds' own errors, which is at least the error of their mean: all seeds see the same images.
    """
    rows = _means(table[table["seed"] >= 0]).dropna(subset="column")
    rows["error"] = (rows["hi"] - rows["lo"]) / NORMAL
    return rows.pivot_table(index="member", columns="column", values="error", aggfunc="mean", sort=False)


def interpretability(wide: pd.DataFrame) -> np.ndarray:
    """Mean rank (n,) over `INTERPRETABLE` of each fit among those of its seed, 1 = best.

    A member with fewer seeds than the others stands in for itself at each of them; its own value is that at its first.
    """
    columns, result = [SINGLE[name][1] for name in INTERPRETABLE], np.full(len(wide), np.nan)
    for seed in sorted(set(wide["seed"])):
        own = wide["seed"] == seed
        rows = pd.concat([wide[own], wide[~wide["member"].isin(wide.loc[own, "member"])].drop_duplicates("member")])
        result[own] = rows[columns].rank(ascending=False).mean(axis=1)[: own.sum()]
    return result


def by_member(wide: pd.DataFrame, table: pd.DataFrame, k: int = 32) -> pd.DataFrame:
    """Means over seeds, one row a member: member, title, kind, lr, comparable, seeds, and a column a measure.

    `comparable`: the mean L0 on test rows is off k by at most a tenth. `STABILITY` and `CHANCE`, of the tidy table, are
    NaN for a member of one fit, which is the same with every seed.
    """
    measures = [c for c in wide.columns if c not in ("member", "title", "kind", "seed", "lr")]
    grouped = wide.groupby("member", sort=False)
    first = grouped[["title", "kind", "lr"]].first()
    found = pd.concat([first, grouped.size().rename("seeds"), grouped[measures].mean()], axis=1).reset_index()
    found.insert(4, "comparable", (found["L0"] / k - 1).abs() <= NEAR)
    pairs = table[table["seed"] < 0].groupby(["measure", "member"])["value"].mean()
    for name, column in (("stability", STABILITY), ("stability_chance", CHANCE)):
        found[column] = found["member"].map(pairs.get(name, pd.Series(dtype=float)))
    return found


def over_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """OOD results as means over seeds, with intervals that hold seeds and images.

    The error over images is the mean of the seeds' own, which is at least that of their mean: all see the same images.
    Columns: member, title, kind, method, set, group, metric, value, lo, hi.
    """
    rows = rows[(rows["method"] != "") & (rows["seed"] >= 0)].rename(columns={"measure": "metric"})
    keys, found = ["member", "title", "kind", "method", "set", "group", "metric"], []
    for key, part in rows.groupby(keys, sort=False):
        error = (part["hi"] - part["lo"]).mean() / NORMAL
        cell = seeds_and_images(part["value"].to_numpy(), error)
        found.append((*key, cell["value"], cell["lo"], cell["hi"]))
    return pd.DataFrame(found, columns=[*keys, "value", "lo", "hi"])


def by_set(table: pd.DataFrame, method: str, order: Sequence[str]) -> pd.DataFrame:
    """One score's results on every set, of :func:`over_seeds`, for `results_heatmap`.

    Columns: member, method (the member's title), set, group, metric, value, lo, hi.
    """
    rows = over_seeds(table[table["method"] == method])
    rows = rows.assign(method=rows["title"])
    return in_order(rows, order)[["member", "method", "set", "group", "metric", "value", "lo", "hi"]]


def intervals_text(means: pd.DataFrame, order: Sequence[str]) -> pd.DataFrame:
    """Means over all sets in % with their intervals, of :func:`over_seeds`. Columns: member, those of `OOD`."""
    rows = _means(means.rename(columns={"metric": "measure"}))
    rows["text"] = [f"{100 * r.value:.1f} ({100 * r.lo:.1f}–{100 * r.hi:.1f})" for r in rows.itertuples()]
    cells = in_order(rows, order).pivot_table("text", "title", "column", aggfunc="first", sort=False)
    return cells[list(OOD.values())].rename_axis("member").rename_axis(columns=None).reset_index()


def spread_text(wide: pd.DataFrame, columns: Mapping[str, str]) -> pd.DataFrame:
    """Mean and range over seeds as text, one row a member in order: its title, then `columns` (name -> format).

    A format "{:.1%}" gives per cent without its sign; the unit stands in the caption.
    """

    def spread(values: pd.Series) -> str:
        form, values = columns[values.name], values.dropna()
        if values.empty:
            return ""
        mean, least, largest = (form.format(v).removesuffix("%") for v in (values.mean(), values.min(), values.max()))
        return mean if least == largest else f"{mean} ({least}–{largest})"

    cells = wide.groupby("title", sort=False)[list(columns)].agg(spread)
    return cells.rename_axis("member").reset_index()


def best_first(members: pd.DataFrame, measure: str, ascending: bool = True) -> list[str]:
    """Names of the members, best first by a measure; those whose L0 is another come last."""
    rows = members.assign(_off=~members["comparable"], _key=members[measure] if ascending else -members[measure])
    return list(rows.sort_values(["_off", "_key"], kind="stable")["member"])


def own_sae(run) -> dict[str, float]:
    """The book's own SAE, by the zoo's measures: dead (share of its latents on training rows), epd, rpd.

    epd and rpd are FPR95, OOD positive, mean over all OOD sets, in [0, 1].
    """
    from capsae.sae.measures import dead_fraction

    from .measure import observe, ood

    observed = {name: observe(run, run.sae, name) for name in ("train", "test", *run.experiment.ood_sets)}
    found = ood(run, observed, 2)
    found = found[(found["set"] == "mean") & (found["group"] == "all") & (found["measure"] == "fpr95_ood_pos")]
    return {"dead": float(dead_fraction(observed["train"].codes)), **found.set_index("method")["value"]}


def nulls(x: np.ndarray, sizes: Sequence[tuple[int, bool]], seed: int = 0) -> pd.DataFrame:
    """What two dictionaries that know the data, and learned nothing, have in common: mean matched cosines.

    ``x`` (N, d): rows as the encoder sees them, not centred. ``sizes``: pairs of the number of atoms, at most N, and
    whether their sign means something. Columns: atoms, signed, rows (two independent random choices of centred rows),
    covariance (Gaussian directions with the rows' own).
    """
    from capsae.sae.measures import matched_cosines

    rng, u = np.random.default_rng(seed), np.asarray(x, dtype=np.float64) - np.mean(x, axis=0, dtype=np.float64)
    root, found = np.linalg.cholesky(np.cov(u.T) + 1e-9 * np.eye(u.shape[1])), []
    for n, signed in sizes:
        if n > len(u):
            raise ValueError(f"a choice of {n} rows needs as many: there are {len(u)}")
        at = np.concatenate([rng.permutation(len(u))[:n] for _ in range(2)])
        pairs = {"rows": u[at], "covariance": rng.standard_normal((2 * n, u.shape[1])) @ root.T}
        means = {name: float(matched_cosines(two[:n], two[n:], signed).mean()) for name, two in pairs.items()}
        found.append({"atoms": n, "signed": signed} | means)
    return pd.DataFrame(found)


def with_nulls(members: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    """Members that have a stability, with `rows` and `covariance` of :func:`nulls` for as many atoms as theirs."""
    members = members.dropna(subset=[STABILITY])
    signed = ~members["member"].isin(SPLIT)
    atoms = (members["latents"] / np.where(signed, 1, 2)).round().astype(int)
    return members.assign(atoms=atoms, signed=signed).merge(found, on=["atoms", "signed"], how="left")


def with_data_nulls(members: pd.DataFrame, run) -> pd.DataFrame:
    """:func:`with_nulls` of a run's own training rows."""
    x, config = run.features("train").cls, settings(run.experiment)
    sizes = [(config.latents, True), (config.latents, False), (x.shape[1], True)]
    return with_nulls(members, nulls(TopKSAE(x.shape[1], config).normalize(x), sizes))


def alike(known: pd.DataFrame) -> pd.DataFrame:
    """The page's table of stability, of :func:`with_nulls`: what exceeds two choices of samples by most comes first."""
    titles = {"title": "member", "atoms": "atoms", STABILITY: "two seeds", "rows": "two choices of samples"}
    titles |= {"covariance": "covariance", CHANCE: "alike in all of space"}
    order = (known[STABILITY] - known["rows"]).sort_values(ascending=False, kind="stable").index
    return known.loc[order, list(titles)].rename(columns=titles)


def in_order(data: pd.DataFrame, order: Sequence[str]) -> pd.DataFrame:
    """Rows in the order of the members' names."""
    return data.sort_values("member", key=lambda c: c.map(list(order).index), kind="stable", ignore_index=True)


def panels(wide: pd.DataFrame, measures: Sequence[str], order: Sequence[str], factor: float = 100) -> pd.DataFrame:
    """Every fit's values for `figures.over_seeds`, times a factor. Columns: member, title, kind, seed, panel, value."""
    parts = [wide.assign(panel=name, value=factor * wide[name]) for name in measures]
    data = in_order(pd.concat(parts, ignore_index=True), order)
    return data[["member", "title", "kind", "seed", "panel", "value"]]


def pairs(wide: pd.DataFrame, x: str, y: str, factors: tuple[float, float] = (100, 100)) -> pd.DataFrame:
    """Mean and range over seeds of two measures for `figures.scatter`. Columns: title, kind, x, x_lo, ... y_hi."""
    grouped = wide.groupby("member", sort=False)
    data = grouped[["title", "kind"]].first()
    for axis, measure, factor in (("x", x, factors[0]), ("y", y, factors[1])):
        values = factor * grouped[measure].agg(["mean", "min", "max"])
        data[[axis, f"{axis}_lo", f"{axis}_hi"]] = values
    return data.reset_index(drop=True)


def ranked(members: pd.DataFrame) -> pd.DataFrame:
    """Rank of every member by every measure that has a better side, 1 = best. Columns: title, measure, rank, value.

    Members of another L0 have no rank and take part in none.
    """
    members = members[members["comparable"]]
    long = members.melt("title", [name for name in BETTER if name in members], "measure")
    up = long["measure"].map(BETTER)
    rank = long["value"].where(up, -long["value"]).groupby(long["measure"]).rank(ascending=False)
    return long.assign(rank=rank)[["title", "measure", "rank", "value"]]
