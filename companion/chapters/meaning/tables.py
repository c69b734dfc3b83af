"""The chapter's tables as text for a narrow page; their CSVs hold the numbers."""

from __future__ import annotations

import numpy as np
import pandas as pd

from capsae.latents.naming import BROAD, KIND_TITLES

_NARROW = f"at most {100 * BROAD:.0f} % of the images"


def _interval(value: float, lo: float, hi: float, sign: str = "") -> str:
    return "" if np.isnan(value) else f"{100 * value:{sign}.1f} ({100 * lo:{sign}.1f} to {100 * hi:{sign}.1f})"


def shares(table: pd.DataFrame) -> pd.DataFrame:
    """:func:`meaning.compare_shares`, a row a kind and a column a dictionary, in %."""
    titles = KIND_TITLES | {"named": "a name: one class or a synset", "narrow": f"a name of {_NARROW}"}
    if not (table.loc[table["kind"] == "synset", "value"] > 0).any():
        titles = {key: title for key, title in KIND_TITLES.items() if key != "synset"}
    cells = table.assign(text=[_interval(*row) for row in table[["value", "lo", "hi"]].to_numpy()])
    wide = cells.pivot(index="kind", columns="dictionary", values="text")[list(dict.fromkeys(table["dictionary"]))]
    wide = wide.loc[list(titles)].reset_index()
    return wide.assign(kind=wide["kind"].map(titles)).rename(columns={"kind": "latents, %"})


def checked(summary: pd.DataFrame) -> pd.DataFrame:
    """:func:`meaning.check_names`' summary, a row a kind and a column a measure, in %."""
    titles = {"class": "one class", "synset": "a synset", "named": "both", "narrow": _NARROW}
    counts = summary.drop_duplicates("kind").set_index("kind")["latents"]
    kinds = [kind for kind in titles if counts[kind] > 0] if counts["synset"] else ["class"]
    cells = summary.assign(text=[_interval(*row) for row in summary[["value", "lo", "hi"]].to_numpy()])
    wide = cells.pivot(index="kind", columns="measure", values="text")
    wide = wide.loc[kinds, ["precision", "base", "lift", "recall", "f1"]].reset_index()
    wide.insert(1, "latents", counts.loc[kinds].to_numpy())
    return wide.assign(kind=wide["kind"].map(titles)).rename(columns={"kind": "name, %", "base": "chance", "f1": "F1"})


def synsets(counts: pd.DataFrame) -> pd.DataFrame:
    """:func:`meaning.name_counts` with shares in %."""
    shown = counts.assign(**{key: (100 * counts[key]).map("{:.0f}".format) for key in ("base", "share")})
    return shown.rename(columns={"base": "images of its classes, %", "share": "of all such names, %"})


def by_set(table: pd.DataFrame, a: str) -> pd.DataFrame:
    """Names among latents that fire more or less often, of :func:`contrast.by_set`: a row a set."""

    def part(side):
        pairs = table[[f"named_{side}", f"more_{side}"]].to_numpy()
        return [f"{k} of {n} ({100 * k / n:.1f} %)" if n else "0 of 0" for k, n in pairs]

    return pd.DataFrame({"set": table["set"], f"more often in {a}, named": part("a"), "more often here": part("b")})


def top_rows(rows: pd.DataFrame, n: int = 8) -> pd.DataFrame:
    """:func:`meaning.top_rows` with a column name: classes of each latent's n first rows, counted, and three ids."""
    found = []
    for (latent, name), part in rows[rows["rank"] <= n].groupby(["latent", "name"], sort=False):
        counts = part["class"].value_counts()
        classes = ", ".join(f"{known} × {count}" if count > 1 else str(known) for known, count in counts.items())
        found.append((latent, name, classes, ", ".join(part["id"].head(3))))
    return pd.DataFrame(found, columns=["latent", "name", "classes of its top rows", "such as"])


def contrast(table: pd.DataFrame, a: str, b: str, top: int = 6) -> pd.DataFrame:
    """The latents of :func:`contrast.compare` with the largest differences to either side. Needs name, classes."""
    sides = (table[table["more"] == side].sort_values("difference", key=abs, ascending=False) for side in "BA")
    part = pd.concat([side.head(top) for side in sides])
    called = part["name"].where(part["name"] != "", "(" + part["classes"] + ")")
    difference = [_interval(*row, sign="+") for row in part[["difference", "lo", "hi"]].to_numpy()]
    frequencies = {
        name: (100 * part[key]).map("{:.1f}".format) for name, key in ((a, "frequency_a"), (b, "frequency_b"))
    }
    return pd.DataFrame(
        {"latent": part["latent"], "name, or (classes)": called} | frequencies | {"difference, points": difference}
    ).reset_index(drop=True)


def differences(table: pd.DataFrame) -> pd.DataFrame:
    """:func:`neighbours.retrieve` or :func:`neighbours.judge`: a row a representation, in %."""
    gaps = table[["difference", "difference_lo", "difference_hi"]].to_numpy()
    value = [_interval(*row) for row in table[["value", "lo", "hi"]].to_numpy()]
    cells = table.assign(value=value, gap=[_interval(*row, sign="+") for row in gaps])
    first, columns = table["representation"].iloc[0], {}
    for measure, part in cells.groupby("measure", sort=False):
        part = part.set_index("representation")
        columns |= {f"{measure}, %": part["value"], f"{measure}: {first} less this": part["gap"]}
    return pd.DataFrame(columns).loc[list(dict.fromkeys(table["representation"]))].reset_index()
