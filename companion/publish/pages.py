"""Pages made from data by templates: start, claims, detectors, parity, RPD, speed, dictionaries."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from .. import widgets
from ..chapters.claims import table as claims_table
from ..figures import hero
from ..figures.display import ROWS, figure_html
from ..findings import FAILS, HOLDS, MISSING, UNDECIDED, Finding, Numbers, index_page, judge, of_page, render, text
from .plan import BOOK_EXPERIMENTS, read_notebook, root
from .publish import path_of, template_digest
from .speed_page import speed_page

NOT_RUN, SHOWN = "not run here yet", "shown, not judged"
STANDING = ("epd", "rpd", "rpdp", "epd_untrained", "mdspp", "vim", "msp")  # columns of the start page
RESULTS = Path("benchmarks/results")
SELECTION = Path("benchmarks/results/rpd_selection.csv")
PARITY = Path("benchmarks/results/parity.json")
DICTIONARIES = "the metadata in capsae/sae"
_HEADING = "<!-- Made by `python -m companion.build pages`; edit {source} and make it again. -->\n\n"


def write_pages() -> list[Path]:
    """Write the start page and those of claims, detectors, parity, RPD, speed, dictionaries; return their paths."""
    from ..zoo.page import dictionaries_page

    book = root() / "book"
    made = {
        "intro.md": intro_page(claims := read_claims(book / "claims.yml"), published),
        "claims.md": claims_page(claims, published),
        "findings.md": index_page(),
        "results.md": results_page(),
        "detectors.md": detectors_page(),
        "parity.md": parity_page(root() / PARITY),
        "rpd.md": rpd_page(root() / SELECTION),
        "speed.md": speed_page(root() / RESULTS),
        "dictionaries.md": dictionaries_page(book / "references.bib", _HEADING.format(source=DICTIONARIES)),
    }
    for name, page in made.items():
        (book / name).write_text(page, encoding="utf-8")
    return [book / name for name in made]


def _page(template: str, **values: Any) -> str:
    return render(template, **values).rstrip() + "\n"


def published(page: str) -> Numbers:
    """What a page recorded; nothing where it is not published, or was executed from another text of its notebook."""
    if not path_of(page).is_file():
        return Numbers()
    stamped = read_notebook(path_of(page))["metadata"]["capsae"]
    template = read_notebook(root() / "notebooks" / f"{stamped['notebook']}.ipynb")
    return of_page(page) if stamped["inputs"]["notebook"] == template_digest(template) else Numbers()


def read_claims(path: Path) -> dict[str, Any]:
    """The claims file, checked: every entry has what its kind needs. ValueError names what lacks."""
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    needed = {
        "numbers": {"id", "claim", "setting", "source", "paper", "tolerance", "run"},
        "claims": {"sentence", "source", "page", "numbers"},
    }
    found["claims"] = claims_table.expanded(found["claims"])
    entries = {"numbers": {one.get("id"): one for one in found["numbers"]}, "claims": found["claims"]}
    for kind, keys in needed.items():
        for name, entry in entries[kind].items():
            missing = sorted(keys - set(entry))
            if missing:
                raise ValueError(f"{path.name}, {kind}, {name}: has no {missing[0]!r}")
    if len(entries["numbers"]) < len(found["numbers"]):
        raise ValueError(f"{path.name}: two numbers have one id")
    return found


def claims_page(claims: Mapping[str, Any], numbers_of: Callable[[str], Numbers], experiments=BOOK_EXPERIMENTS) -> str:
    """The Markdown of claims.md; ``numbers_of`` gives what a page recorded (:func:`published`)."""
    marks = _marks(claims["claims"], numbers_of, experiments)
    rows = [
        {"labels": list(of["numbers"].values()), "cells": claims_table.cells(marks, name), "rows": []}
        | {key: of.get(key) for key in ("sentence", "source", "measured", "note")}
        for name, of in claims["claims"].items()
    ]
    for experiment in experiments:
        for row, of in zip(rows, claims["claims"].values(), strict=True):
            page = f"{experiment}/{of['page']}"
            recorded = numbers_of(page)
            texts = [text(recorded[key]) if key in recorded else "–" for key in of["numbers"]]
            link = f"{{doc}}`page <runs/{page}>`" if recorded else "none"
            mark = row["cells"][experiment] or NOT_RUN
            row["rows"].append({"experiment": experiment, "mark": mark, "texts": texts, "link": link})
    given = {
        "claims": rows, "broken": [one for one in experiments if _broken(numbers_of(f"{one}/04_score_ood"))],
        "numbers": [_beside(entry, numbers_of) for entry in claims["numbers"]],
        "runs": sum(bool(entry["run"]) for entry in claims["numbers"]), "note": claims["numbers_note"].strip(),
    }  # fmt: skip
    return _page("claims.md", **given)


def intro_page(claims: Mapping[str, Any], numbers_of: Callable[[str], Numbers], experiments=BOOK_EXPERIMENTS) -> str:
    """The Markdown of intro.md: the idea in one figure, where EPD stands, how many claims of the paper hold."""
    rows = []
    tested = {name: of for name, of in claims["claims"].items() if of.get("family") == "paper"}
    marks = _marks(tested, numbers_of, experiments)
    counts = pd.DataFrame([claims_table.cells(marks, name) for name in tested])
    for column in counts:
        recorded = numbers_of(f"{column}/04_score_ood")
        cells = [text(recorded[key]) if (key := f"{name}_fpr95_ood_pos") in recorded else "–" for name in STANDING]
        rank = f"{recorded['epd_rank'].value:g} of {recorded['detectors'].value:g}" if "epd_rank" in recorded else "–"
        of = [int((counts[column] == mark).sum()) for mark in (HOLDS, UNDECIDED, FAILS)]
        if counts[column].isin(["", claims_table.NOT_RUN]).all():
            of = [claims_table.NOT_RUN, "", ""]
        row = {"experiment": column, "rank": rank, "cells": cells, "counts": of, "own": column in experiments}
        rows.append(row)
    return _page("intro.md", rows=rows, of=len(tested), hero=_hero())


def results_page(experiments=BOOK_EXPERIMENTS) -> str:
    """The Markdown of results.md: every score on every experiment that is published, as an interactive table."""
    files = {
        name: path_of(f"{name}/04_score_ood").parent / "data/04_score_ood/all_detectors.csv" for name in experiments
    }
    tables = {name: pd.read_csv(file) for name, file in files.items() if file.is_file()}
    return _page("results.md", explorer=widgets.results(tables), experiments=list(tables))


def _hero(page: str = "imagenet20/03_discover_caps") -> str:
    """The figure of the start page, drawn from what the chapter on profiles published; "" before there is any."""
    data = path_of(page).parent / "data" / path_of(page).stem / "hero.csv"
    if not data.is_file():
        return ""
    captions = yaml.safe_load((root() / "notebooks" / "03_discover_caps.findings.yml").read_text())["captions"]["hero"]
    return figure_html(hero.hero, pd.read_csv(data), "hero", captions["caption"], captions["alt"], f"Data: runs/{page}")


def _broken(recorded: Numbers) -> bool:
    return "pixel_wins" in recorded and recorded["pixel_wins"].value > 0


def _marks(claims: Mapping[str, Mapping], numbers_of: Callable[[str], Numbers], experiments) -> dict[str, dict]:
    """The mark of every claim by experiment, none of one that was not run.

    A family may have claims of several pages, so all go at once.
    """
    found = {}
    for experiment in experiments:
        judged, numbers = [], Numbers()
        for name, of in claims.items():
            numbers.update(numbers_of(f"{experiment}/{of['page']}"))
            if "test" in of:
                parts = {key: of.get(key) for key in ("test", "decided", "family", "page")}
                judged.append(Finding(name, of["sentence"], numbers=of["numbers"], **parts))
        shown = {name: SHOWN if of["numbers"].keys() <= numbers.keys() else MISSING for name, of in claims.items()}
        marks = {row["key"]: row["mark"] for row in judge(judged, numbers)}
        found[experiment] = shown | marks if numbers else {}
    return found


def _beside(entry: Mapping[str, Any], numbers_of: Callable[[str], Numbers]) -> dict[str, Any]:
    """A number of the paper beside ours."""
    if not entry["run"]:
        return {**entry, "ours": NOT_RUN, "link": "none"}
    cell = numbers_of(entry["run"])[entry["value"]]
    within = abs(cell.value - entry["paper"]) <= entry["tolerance"]
    ours = f"{text(cell)}, {'within' if within else 'outside'} tolerance"
    return {**entry, "ours": ours, "link": f"{{doc}}`runs/{entry['run']}`"}


_KINDS = {
    "paper": "The paper's score",
    "ours": "Our own score",
    "control": "Controls",
    "baseline": "Baselines",
}
_KIND_NOTES = {
    "paper": "EPD as the {doc}`method <method>` has it.",
    "ours": "This project's own; no part of the paper.",
    "control": "They read the same features, most of them also the same codes and profiles, and tell what in EPD does "
    "the work. The two on the code's flatness use neither class nor profile. The last ones never look at what an image "
    "shows: where one of them wins, it is the benchmark that is broken.",
    "baseline": "With the parameters that our tables use, none of them tuned on this book's data. Where the "
    "defaults of OpenOOD v1.5 "
    '{cite:p}`zhang2023openood` are others, they stand in brackets, and `create(name, preset="openood")` takes them; '
    "a score that OpenOOD does not have refuses that preset. These are where OpenOOD's search starts: its tables take, "
    "for several scores, the parameters that did best on an OOD validation set, which the preset cannot know. "
    "{doc}`Parity <parity>` tells what each was compared with, "
    "and {doc}`own_score` how to add another.",
}


def detectors_page() -> str:
    """The Markdown of detectors.md, from the metadata of every registered detector."""
    from capsae.detectors import available, info

    found = []
    for one in map(info, available()):
        openood, own = one["presets"].get("openood") or one["defaults"], one["defaults"]
        changed = {key: value for key, value in openood.items() if value != own[key]}
        prose = " ".join(_plain(one["description"]).split())
        extra = {"prose": prose, "options": _options(own), "openood": _options(changed) if changed else ""}
        found.append(one | extra | {"cite": _source(one["source"])})
    kinds = [
        {"title": title, "note": _KIND_NOTES[kind], "detectors": [one for one in found if one["group"] == kind]}
        for kind, title in _KINDS.items()
    ]
    return _page("detectors.md", kinds=kinds)


def _options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}={value!r}`" for key, value in options.items()) or "none"


def parity_page(measured: Path) -> str:
    """The Markdown of parity.md, from what benchmarks/parity.py measured."""
    from capsae.detectors import info

    found = json.loads(measured.read_text(encoding="utf-8"))
    rows = [
        {
            **row,
            "title": info(row["method"])["title"],
            "options": _options(row["options"]) if row["options"] else "ours",
        }
        for row in found["rows"]
    ]
    others = [(info(name)["title"], why) for name, why in found["not_the_same"].items()]
    return _page("parity.md", found=found, rows=rows, others=others)


def rpd_page(grid: Path) -> str:
    """The Markdown of rpd.md: what our own score is, and the best of the grid its constants were chosen from."""
    from capsae.detectors import info

    table, ours = pd.read_csv(grid), info("rpd")
    numbers = [name for name in table.columns if name.startswith("fpr95_ood_pos")]
    heads = [f"FPR95 (OOD pos.), {name.split(' ', 1)[1]}" for name in numbers]
    first = {name: table[table["method"] == name].iloc[0] for name in ("profile", "epd", "rmds")}
    rows = [
        [row["method"]]
        + ["" if pd.isna(row[key]) else f"{row[key]:g}" for key in ("temperature", "epsilon", "weight")]
        + [f"{100 * row[key]:.1f}" for key in ("criterion", *numbers)]
        for row in table.head(ROWS).to_dict("records")
    ]
    prose = " ".join(_plain(ours["description"]).split())
    best = {"best": first["profile"], "epd": first["epd"], "rmds": first["rmds"]}
    codes = _codes(grid.parents[2] / "book" / "zoo")
    plus = info("rpd+")
    given = {"plus": plus["formula"], "plus_description": " ".join(_plain(plus["description"]).split())}
    return _page(
        "rpd.md", formula=ours["formula"], description=prose, **given, heads=heads, grid=rows, codes=codes, **best
    )


CODES = {
    "dense_relu": "dense ReLU of the CLS feature, no SAE",
    "random": "random dictionary, nothing trained",
    "kmeans": "k-means",
    "relu": "ReLU SAE",
    "topk": "Top-k SAE",
}


def _codes(zoo: Path) -> list[list[str]]:
    """RPD and EPD on other codes than the SAE's: mean FPR95 (OOD positive) over all sets and seeds, from the zoo."""
    cells = []
    for experiment in ("imagenet20", "mini80"):
        table = pd.read_csv(zoo / f"{experiment}.csv")
        rows = table[(table["measure"] == "fpr95_ood_pos") & (table["set"] == "mean") & (table["group"] == "all")]
        means = rows.groupby(["member", "method"])["value"].mean()
        cells.append([[means[member, method] for method in ("rpd", "epd")] for member in CODES])
    found = zip(CODES.values(), *cells, strict=True)
    return [[title, *(f"{100 * value:.1f}" for of in parts for value in of)] for title, *parts in found]


def _plain(docstring: str) -> str:
    """The prose of a docstring: up to its first underlined section, roles and double backticks as Markdown has them."""
    prose = re.split(r"\n[A-Z][a-z]+\n-{3,}", docstring)[0]
    prose = re.sub(r":\w+:`[~.]?([^`]+)`", r"`\1`", prose)
    return prose.replace("``", "`")


def _source(source: str) -> str:
    return f"{{cite:p}}`{source}`" if re.fullmatch(r"[a-z]+\d{4}[a-z]+", source) else source
