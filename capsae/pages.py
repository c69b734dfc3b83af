"""Pages of the book that are made from data: the table of claims and the list of detectors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .plan import BOOK_PROFILES, read_notebook, root
from .publish import path_of, results, template_digest
from .speed_page import speed_page

NOT_RUN = "not run here yet"
BROKEN = "This benchmark is broken"  # how `comparisons.pixel_verdict` begins where a pixel control wins
RESULTS = Path("benchmarks/results")
SELECTION = Path("benchmarks/results/rpd_selection.csv")
PARITY = Path("benchmarks/results/parity.json")
DICTIONARIES = "the metadata in capsae/sae"
# Metrics in which a difference is tested, and the sign that is better.
DIFFERENCES = {
    "fpr95_ood_pos": ("FPR95, OOD positive", -1),
    "fpr95_id_pos": ("FPR95, ID positive", -1),
    "auroc": ("AUROC", 1),
}
_HEADING = "<!-- Made by `python -m capsae.build pages`; edit {source} and make it again. -->\n\n"
Results = Callable[[str], Mapping[str, Any]]


def write_pages() -> list[Path]:
    """Write the pages of claims, detectors, parity, RPD, speed and dictionaries into book/; return their paths."""
    from .zoo.page import dictionaries_page

    book = root() / "book"
    made = {
        "claims.md": claims_page(read_claims(book / "claims.yml"), _published),
        "detectors.md": detectors_page(),
        "parity.md": parity_page(root() / PARITY),
        "rpd.md": rpd_page(root() / SELECTION),
        "speed.md": speed_page(root() / RESULTS),
        "dictionaries.md": dictionaries_page(book / "references.bib", _HEADING.format(source=DICTIONARIES)),
    }
    for name, text in made.items():
        (book / name).write_text(text, encoding="utf-8")
    return [book / name for name in made]


def _published(page: str) -> Mapping[str, Any]:
    """What a page recorded; nothing where it is not published, or was executed from another text of its notebook."""
    if not path_of(page).is_file():
        return {}
    stamped = read_notebook(path_of(page))["metadata"]["capsae"]
    template = read_notebook(root() / "notebooks" / f"{stamped['notebook']}.ipynb")
    return results(page) if stamped["inputs"]["notebook"] == template_digest(template) else {}


def read_claims(path: Path) -> dict[str, Any]:
    """The claims file, checked: every entry has an id, a claim and what its kind needs. ValueError names what lacks."""
    import yaml

    claims = yaml.safe_load(path.read_text(encoding="utf-8"))
    needed = {
        "numbers": {"id", "claim", "setting", "source", "paper", "tolerance", "run"},
        "statements": {"id", "claim", "source", "measured", "page", "test"},
    }
    for kind, keys in needed.items():
        for entry in claims[kind]:
            missing = sorted(keys - set(entry))
            if missing:
                raise ValueError(f"{path.name}, {kind}, {entry.get('id', entry)}: has no {missing[0]!r}")
    ids = [entry["id"] for kind in needed for entry in claims[kind]]
    twice = sorted({name for name in ids if ids.count(name) > 1})
    if twice:
        raise ValueError(f"{path.name}: two entries are named {twice[0]!r}")
    return claims


def value_at(found: Mapping[str, Any], path: str) -> dict[str, float | None]:
    """A recorded number by its dotted path, as value, lo, hi; KeyError if the run did not record it.

    A part may hold dots or blanks itself ("mds++", "OOD, predicted as another"): parts are divided by " / ".
    """
    at: Any = found
    for part in path.split(" / "):
        if not isinstance(at, Mapping) or part not in at:
            raise KeyError(f"no {path!r} among what the run recorded")
        at = at[part]
    return dict(at) if isinstance(at, Mapping) else {"value": float(at), "lo": None, "hi": None}


def judge(test: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[str, list[dict]]:
    """Whether a statement holds in a run: the verdict, and the numbers it rests on.

    ``test`` is {"order": [paths, from large to small]}, {"value": path, "below": number} or {"value": path, "above":
    number}, {"show": [paths]} for numbers without a verdict, or {"difference": path, "better": -1 or 1}: a paired
    difference, whose whole interval must lie on the better side.
    """
    if "difference" in test:
        cell = value_at(found, test["difference"])
        if "verdict" in cell:
            words = {"better": "holds", "worse": "does not hold", "undecided": "undecided"}
            return words[cell["verdict"]], [cell]
        ends = sorted((test["better"] * cell["lo"], test["better"] * cell["hi"]))
        return ("holds" if ends[0] > 0 else "does not hold" if ends[1] < 0 else "undecided"), [cell]
    if "show" in test:
        return "shown, not compared", [value_at(found, path) for path in test["show"]]
    if "order" in test:
        values = [value_at(found, path) for path in test["order"]]
        holds = all(a["value"] > b["value"] for a, b in zip(values, values[1:], strict=False))
        apart = all(_apart(a, b) for a, b in zip(values, values[1:], strict=False))
        known = all(value.get("lo") is not None for value in values)
        doubt = " (no interval)" if not known else "" if apart else " (intervals overlap)"
        return ("holds" if holds else "does not hold") + doubt, values
    value = value_at(found, test["value"])
    holds = value["value"] < test["below"] if "below" in test else value["value"] > test["above"]
    doubt = " (no interval)" if value.get("lo") is None else ""
    return ("holds" if holds else "does not hold") + doubt, [value]


def _apart(a: Mapping, b: Mapping) -> bool:
    if a.get("lo") is None or b.get("lo") is None:
        return True
    return a["lo"] > b["hi"] or b["lo"] > a["hi"]


def _number(cell: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    factor, digits = (100, 1) if entry.get("unit") == "%" else (1, entry.get("digits", 3))
    text = f"{factor * cell['value']:.{digits}f}"
    if cell.get("lo") is not None:
        text += f" ({factor * cell['lo']:.{digits}f}–{factor * cell['hi']:.{digits}f})"
    return text


def claims_page(claims: Mapping[str, Any], results_of: Results) -> str:
    """The Markdown of claims.md."""
    lines = [
        _HEADING.format(source="claims.yml").rstrip(),
        "",
        "# Claims",
        "",
        "Made from `book/claims.yml` and from the numbers that the runs recorded. Sources are public notes on the "
        "paper {cite:p}`oh2026sparsity`; its full text was not at hand.",
        "",
        "## Statements, measured on our profiles",
        "",
        "A statement of the paper is put as a test with a tolerance of ours, and the test is applied to each profile "
        "of this book. *Holds* means: in this run, at this scale, with one seed. Intervals in brackets are 95 % "
        "bootstrap intervals. Differences of scores are paired: both see the same draws of samples. Their intervals "
        "are uncorrected; the verdict is that of the scores chapter, from p values corrected for all its comparisons.",
        "",
    ]
    broken = [p for p in BOOK_PROFILES if _pixels(results_of(f"{p}/04_score_ood")).startswith(BROKEN)]
    if broken:
        lines += [
            "On some OOD sets of " + " and ".join(broken) + " a control that reads pixel statistics alone does better "
            "than every score: verdicts there, means included, say little about what images show.",
            "",
        ]
    for entry in claims["statements"]:
        lines += _statement(entry, results_of)
    lines += ["## Numbers at the paper's setting", "", claims["numbers_note"].strip(), ""]
    lines += ["| claim | setting | paper | ours | tolerance | run |", "|---|---|---|---|---|---|"]
    for entry in claims["numbers"]:
        ours = NOT_RUN
        if entry["run"]:
            cell = value_at(results_of(entry["run"]), entry["value"])
            verdict = "within" if abs(100 * cell["value"] - entry["paper"]) <= entry["tolerance"] else "outside"
            ours = f"{_number(cell, entry)}, {verdict} tolerance"
        page = f"{{doc}}`runs/{entry['run']}`" if entry["run"] else "none"
        cells = (entry["claim"], entry["setting"], f"{entry['paper']} %", ours, f"± {entry['tolerance']}", page)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _pixels(found: Mapping[str, Any]) -> str:
    return found.get("pixels", "")


def _statement(entry: Mapping[str, Any], results_of: Results) -> list[str]:
    lines = [f"### {entry['claim']}", "", f"*{entry['source']}.* Measured: {entry['measured']}.", ""]
    pair = entry["test"].get("difference")
    lines += [
        f"| profile | {'metric | difference' if pair else 'numbers'} | verdict | run |",
        "|---" * (4 + bool(pair)) + "|",
    ]
    for profile in BOOK_PROFILES:
        page = f"{profile}/{entry['page']}"
        found = results_of(page)
        if found and pair:
            for metric, (title, better) in DIFFERENCES.items():
                path = {"difference": f"differences / {pair} / {metric}", "better": better}
                verdict, (cell,) = judge(path, found)
                number = _number(cell, {"unit": "%"})
                lines.append(f"| {profile} | {title} | {number} | {verdict} | {{doc}}`page <runs/{page}>` |")
            continue
        if not found:
            lines.append(f"| {profile} | {'| ' if pair else ''}| {NOT_RUN} | none |")
            continue
        verdict, values = judge(entry["test"], found)
        sign = " against " if "order" in entry["test"] else "; "
        unit = " %" if entry.get("unit") == "%" else ""
        numbers = sign.join(_number(value, entry) for value in values) + unit
        lines.append(f"| {profile} | {numbers} | {verdict} | {{doc}}`page <runs/{page}>` |")
    if entry.get("note"):
        lines += ["", entry["note"].strip()]
    return [*lines, ""]


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
    from .detectors import available, info

    lines = [
        _HEADING.format(source="the metadata in capsae/detectors").rstrip(),
        "",
        "# Detectors",
        "",
        "Every score of this book, made from the program's own metadata. All follow one rule: **higher = more out of "
        "distribution**. $z$ is the feature, $l = Wz + b$ are the logits, $p$ is their softmax, $\\mu_c$ a class mean, "
        "$h$ the sparse code, $P$ and $Q$ are the core profiles of sample and class.",
        "",
    ]
    found = [info(name) for name in available()]
    for kind, title in _KINDS.items():
        of_kind = [one for one in found if one["group"] == kind]
        if not of_kind:
            continue
        lines += [f"## {title}", "", _KIND_NOTES[kind], ""]
        for one in of_kind:
            options = _options(one["defaults"])
            openood = one["presets"].get("openood")
            if openood is not None and openood != one["defaults"]:
                options += f" (OpenOOD: {_options({k: v for k, v in openood.items() if v != one['defaults'][k]})})"
            fitted = {"validation": " Fitted on validation rows.", "nothing": " Not fitted."}.get(one["fitted_on"], "")
            lines += [
                f"### {one['title']} (`{one['name']}`)",
                "",
                f"$$\n{one['formula']}\n$$",
                "",
                " ".join(_plain(one["description"]).split()),
                "",
                f"Needs: {', '.join(one['needs'])}.{fitted} Parameters: {options}. Source: {_source(one['source'])}.",
                "",
            ]
    return "\n".join(lines)


def _options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}={value!r}`" for key, value in options.items()) or "none"


def parity_page(measured: Path) -> str:
    """The Markdown of parity.md, from what benchmarks/parity.py measured."""
    import json

    from .detectors import info

    found = json.loads(measured.read_text(encoding="utf-8"))
    lines = [
        _HEADING.format(source=f"{PARITY} by `python -m benchmarks.parity`").rstrip(),
        "",
        "# Parity",
        "",
        "Scores of one name differ between libraries in their constants, their defaults and sometimes their formula. "
        "Each baseline of this book was compared, on equal arrays with 768 dimensions and 20 classes, with pytorch-ood "
        "{cite:p}`kirchheim2022pytorchood` wherever that has the same formula, and with the formula itself, written "
        "with loops in float64 (`benchmarks/closed_forms.py`). The difference is the largest over 300 rows, after the "
        f"constant, in standard deviations of the score; {found['bar']:.0e} is the bar, and a test holds it. MDS, RMDS "
        "and KNN of pytorch-ood were given float64 arrays. Options are passed to both; *ours* are "
        "those of {doc}`detectors`.",
        "",
        "| method | reference | version | options | constant | largest difference |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        options = _options(row["options"]) if row["options"] else "ours"
        cells = (row["reference"], row["version"] or "–", options, row["constant"], f"{row['difference']:.1e}")
        lines.append(f"| {info(row['method'])['title']} | " + " | ".join(cells) + " |")
    lines += ["", "Not compared with pytorch-ood, because its score of that name is another one:", ""]
    lines += [f"- {info(name)['title']}: {why}." for name, why in found["not_the_same"].items()]
    lines += [
        "",
        "MDS++, RMDS++, Residual and NECO are not in pytorch-ood. TempScale is compared at the temperature that "
        "pytorch-ood's 50 steps reach, and at the optimum with the closed form. OpenOOD's own code needs a network and "
        "its data loaders; its defaults are the preset `openood`. How long both take is in {doc}`speed`.",
        "",
    ]
    return "\n".join(lines)


def rpd_page(grid: Path) -> str:
    """The Markdown of rpd.md: what our own score is, and the whole grid its constants were chosen from."""
    import pandas as pd

    from .detectors import info

    table, ours = pd.read_csv(grid), info("rpd")
    numbers = [name for name in table.columns if name.startswith(("fpr95", "auroc"))]
    forms = table[table.method == "profile"]
    best, epd, rmds = forms.iloc[0], *(table[table.method == name].iloc[0] for name in ("epd", "rmds"))
    names = {"fpr95_ood_pos": "FPR95 (OOD pos.)", "fpr95_id_pos": "FPR95 (ID pos.)", "auroc": "AUROC"}
    heads = [f"{names[name.split(' ', 1)[0]]}, {name.split(' ', 1)[1]}" for name in numbers]
    lines = [
        _HEADING.format(source=f"{SELECTION} by benchmarks/rpd_selection.py").rstrip(),
        "",
        "# Our own score: RPD",
        "",
        "EPD looks at the core of one class. This project's own score, Relative Profile Divergence, keeps the idea of "
        "a profile and changes three things. It stands beside EPD in every table, never in its place.",
        "",
        f"$$\n{ours['formula']}\n$$",
        "",
        " ".join(_plain(ours["description"]).split()),
        "",
        "## How it was chosen",
        "",
        "No OOD set took part, only ID training and validation rows. Two stand-ins for OOD were made from the training "
        "classes of `imagenet20`: *held-out classes* (in each of four folds, SAE, head and profiles never see five of "
        "the classes, whose rows are then scored) and *chimeras* (validation rows with a random half of their "
        "coordinates from a row of another class). The criterion is the mean of both FPR95 over both. A grid of three "
        "parameters was compared: the temperature of the posterior (0 = the predicted class alone), the share of "
        "background mixed into a profile, and the weight of the background term (0 = a smoothed KL divergence over the "
        "whole dictionary, 1 = RPD). Before the grid, other forms were tried on the same stand-ins and dropped as no "
        "better: Hellinger distances, plain and whitened, of square-rooted profiles; a Bernoulli-exponential "
        "likelihood of the code; unnormalised KL; an extra cell for the residual; and adding the Mahalanobis distance "
        "of what the SAE leaves out.",
        "",
        f"The best form has temperature {best.temperature:g}, share {best.epsilon:g} and weight {best.weight:g}, with "
        f"a criterion of {100 * best.criterion:.1f} %, against {100 * epd.criterion:.1f} % for EPD; these are the "
        "defaults everywhere in this book, on all profiles. That is the best of a grid, in sample; EPD, "
        f"RMDS ({100 * rmds.criterion:.1f} %) and the other rows had nothing chosen by this criterion. What RPD gains "
        "over EPD also depends on the SAE: in the {doc}`sweep over k <runs/imagenet20/ablation/sweep-k>` EPD comes "
        "close to it at the largest k. The form was drafted by the same criterion with an earlier "
        "SAE recipe, and its results on the OOD sets were then looked at once. After that only the SAE's recipe "
        "changed, by held-out FVU; the grid below was run again with it, and its best row is unchanged, if by a small "
        "margin. The page on {doc}`tuning <runs/imagenet20/07_tuning>` has no chimeras, draws other rows of the "
        "held-out classes and keeps the best epoch of each SAE, so that its numbers differ from these.",
        "",
        "```{dropdown} The whole grid, % (best first)",
        "",
        "| method | temperature | share | weight | criterion | " + " | ".join(heads) + " |",
        "|" + "---|" * (5 + len(heads)),
    ]
    for row in table.itertuples(index=False):
        cells = dict(zip(table.columns, row, strict=True))
        settings = ["" if pd.isna(cells[key]) else f"{cells[key]:g}" for key in ("temperature", "epsilon", "weight")]
        shown = [f"{100 * cells[key]:.1f}" for key in ("criterion", *numbers)]
        lines.append("| " + " | ".join([cells["method"], *settings, *shown]) + " |")
    return "\n".join([*lines, "```", ""])


def _plain(docstring: str) -> str:
    """The prose of a docstring: up to its first underlined section, roles and double backticks as Markdown has them."""
    prose = re.split(r"\n[A-Z][a-z]+\n-{3,}", docstring)[0]
    prose = re.sub(r":\w+:`[~.]?([^`]+)`", r"`\1`", prose)
    return prose.replace("``", "`")


def _source(source: str) -> str:
    return f"{{cite:p}}`{source}`" if re.fullmatch(r"[a-z]+\d{4}[a-z]+", source) else source
