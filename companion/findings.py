"""Findings: sentences that a person typed in a notebook, the tests they rest on, and whether a run agrees with them.

In the notebook's markdown, a paragraph or a list item of its own::

    **Finding** (core-logit). Deleting the core of a class lowers the logit of that class.

Beside it, ``notebooks/<notebook>.findings.yml``::

    findings:
      core-logit:
        test: core_logit < 0                # an expression over the recorded numbers: holds, or does not hold
        decided: core_logit                 # optional; where it is false, the finding is undecided
        family: cores                       # optional: Holm's correction over the findings of this family
        numbers: {core_logit: change of the logit}   # shown beside the sentence, with these labels
        page: 03_discover_caps              # optional: the notebook that records the numbers, if it is another one

A page records its numbers rounded as they are printed (:class:`Numbers`, ``numbers.csv`` among the page's data), and
the tests see the rounded numbers: a mark made again from the CSV is the same mark. In an expression a name is a value;
``low(x)``, ``high(x)`` are the ends of its interval, ``p(x)`` its p, ``apart(x)`` and ``apart(x, 5)`` tell whether the
interval leaves out 0 or 5. ``decided: x`` alone means ``p(x) < 0.05`` where x has a p, else ``apart(x)``.
"""

from __future__ import annotations

import ast
import io
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from capsae.stats import holm

from .publish.plan import pages, read_notebook, root

HOLDS, UNDECIDED, FAILS, MISSING = "holds", "undecided", "does not hold on this run", "not measured here"
LEVEL = 0.05
LONGEST = 40  # of a sentence, split at its spaces
CSV = "numbers"
COLUMNS = ("key", "value", "lo", "hi", "p", "unit")
_START = r"^(?:[-*] )?\*\*Finding\*\* \("
_SENTENCE = re.compile(_START + r"([^)\n]+)\)\. (.+?)(?=\n\s*\n|" + _START + r"|\Z)", re.M | re.S)


# --- recorded numbers


@dataclass(frozen=True)
class Number:
    """A recorded number, in its unit and rounded as it is printed; ``lo``, ``hi`` and ``p`` are None where unknown."""

    value: float
    lo: float | None = None
    hi: float | None = None
    p: float | None = None
    unit: str = ""


class Numbers(dict):
    """What a page records for its findings: key -> :class:`Number`. Keys are names (letters, digits, underscores)."""

    def add(self, key: str, value, lo=None, hi=None, p=None, unit: str = "", digits: int | None = None) -> None:
        """Record one number; ``key``: what is no letter or digit in it becomes an underscore.

        ``p``: corrected. NaN counts as unknown; an unknown value is not recorded. A unit ``"%"`` or ``"points"`` is
        given as a share and recorded times 100, any other is taken as it is. ``digits``: decimals; by default such that
        the largest of value and interval has three significant digits; a share has one decimal at least, an integer
        none.
        """
        key = slug(key)
        if key in self:
            raise ValueError(f"the number {key!r} is recorded twice")
        whole = isinstance(value, (int, bool)) or (hasattr(value, "dtype") and value.dtype.kind in "iub")
        value, lo, hi, p = (None if v is None or math.isnan(v) else float(v) for v in (value, lo, hi, p))
        if value is None:
            return
        factor = 100 if unit in ("%", "points") else 1
        parts = [None if v is None else factor * v for v in (value, lo, hi)]
        if digits is None:
            largest = max(abs(v) for v in parts if v is not None)
            digits = 0 if (whole and factor == 1) or not largest else 2 - math.floor(math.log10(largest))
            digits = min(max(digits, int(factor == 100)), 6)
        value, lo, hi = (None if v is None else round(v, digits) + 0.0 for v in parts)  # + 0.0: no minus zero
        self[key] = Number(value, lo, hi, None if p is None else float(f"{p:.2g}"), unit)

    def rows(self, frame: pd.DataFrame, key: str, unit: str = "", digits: int | None = None) -> None:
        """Record every row of a table: ``key`` is filled from its columns, ``"{method}_less_{other}_{metric}"``.

        Columns value and, where the table has them, lo, hi and p_holm, else p.
        """
        p = "p_holm" if "p_holm" in frame else "p"
        for row in frame.to_dict("records"):
            self.add(key.format(**row), row["value"], row.get("lo"), row.get("hi"), row.get(p), unit, digits)

    def frame(self) -> pd.DataFrame:
        """The tidy table: key, value, lo, hi, p, unit."""
        cells = [(key, one.value, one.lo, one.hi, one.p, one.unit) for key, one in self.items()]
        return pd.DataFrame(cells, columns=list(COLUMNS))

    @classmethod
    def read(cls, file: Path | io.StringIO) -> Numbers:
        """The numbers of a CSV that :meth:`frame` was written to."""
        found = cls()
        data = pd.read_csv(file, keep_default_na=False, dtype=str)
        for row in data.to_dict("records"):
            ends = (float(row[name]) if row[name] else None for name in ("lo", "hi", "p"))
            found[row["key"]] = Number(float(row["value"]), *ends, row["unit"])
        return found


def slug(text: str) -> str:
    """A text as the name of a number: ``MDS++, far/textures`` -> ``mds_plus_plus_far_textures``."""
    return re.sub(r"[^a-z0-9]+", "_", str(text).lower().replace("+", "_plus_")).strip("_")


# --- expressions

_OPERATORS: dict[type, Callable] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq,
    ast.NotEq: operator.ne, ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv, ast.USub: operator.neg, ast.Not: operator.not_,
}  # fmt: skip
_OF_NUMBERS = {"low": "lo", "high": "hi", "p": "p", "apart": "lo"}
_OF_VALUES: dict[str, Callable] = {"abs": abs, "min": min, "max": max}


def names_in(expression: str) -> set[str]:
    """The recorded numbers that an expression uses; ValueError if it is none."""
    tree = _parse(expression)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in called}
    texts = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return names | texts


def evaluate(expression: str, numbers: Mapping[str, Number]) -> bool | float:
    """The value of an expression: comparisons, and, or, not, + - * /, the functions of this module. No other Python.

    Raises
    ------
    ValueError
        The text is no such expression, or asks for an interval or a p that was not recorded.
    KeyError
        A number was not recorded.
    """
    return _value(_parse(expression), numbers)


def _parse(expression: str) -> ast.expr:
    try:
        return ast.parse(str(expression), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"not an expression: {expression!r} ({error.msg})") from None


def _value(node: ast.expr, numbers: Mapping[str, Number]) -> Any:
    match node:
        case ast.Constant(value=bool() | int() | float()):
            return node.value
        case ast.Name() | ast.Constant(value=str()):
            return _number(node, numbers).value
        case ast.BoolOp():
            both = (_value(part, numbers) for part in node.values)
            return all(both) if isinstance(node.op, ast.And) else any(both)
        case ast.UnaryOp() if type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](_value(node.operand, numbers))
        case ast.BinOp() if type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](_value(node.left, numbers), _value(node.right, numbers))
        case ast.Compare() if all(type(op) in _OPERATORS for op in node.ops):
            sides = [_value(side, numbers) for side in (node.left, *node.comparators)]
            return all(_OPERATORS[type(op)](a, b) for op, a, b in zip(node.ops, sides, sides[1:], strict=False))
        case ast.Call(func=ast.Name(id=name), keywords=[]) if name in _OF_VALUES:
            return _OF_VALUES[name](*(_value(part, numbers) for part in node.args))
        case ast.Call(func=ast.Name(id=name), args=[of, *more], keywords=[]) if name in _OF_NUMBERS:
            one = _number(of, numbers)
            if getattr(one, _OF_NUMBERS[name]) is None:
                raise ValueError(f"{ast.unparse(node)}: recorded without {'p' if name == 'p' else 'an interval'}")
            if name != "apart":
                return getattr(one, _OF_NUMBERS[name])
            than = _value(more[0], numbers) if more else 0
            return one.lo > than or one.hi < than
    raise ValueError(f"{ast.unparse(node)!r} is no part of a finding's expression")


def _number(node: ast.expr, numbers: Mapping[str, Number]) -> Number:
    if not isinstance(node, ast.Name | ast.Constant):
        raise ValueError(f"{ast.unparse(node)!r} is not the name of a recorded number")
    return numbers[node.id if isinstance(node, ast.Name) else node.value]


# --- findings and their marks


@dataclass(frozen=True)
class Finding:
    """One typed sentence with its test; fields as in the yml."""

    key: str
    sentence: str
    test: str
    decided: str | None = None
    family: str | None = None
    numbers: Mapping[str, str] = field(default_factory=dict)
    page: str | None = None

    @property
    def names(self) -> set[str]:
        """The recorded numbers that it uses."""
        return names_in(self.test) | (names_in(self.decided) if self.decided else set()) | set(self.numbers)


def sentences(text: str) -> dict[str, str]:
    """The findings typed in a Markdown text: key -> sentence; ValueError if a key stands twice."""
    found: dict[str, str] = {}
    for key, sentence in _SENTENCE.findall(text):
        if key in found:
            raise ValueError(f"the finding {key!r} is typed twice")
        found[key] = " ".join(sentence.split())
    return found


def load(typed: str, entries: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Findings in the order in which they are typed; ValueError where text and yml do not belong together.

    ``typed`` is the Markdown, ``entries`` what the yml holds under ``findings``.
    """
    written = sentences(typed)
    if written.keys() != entries.keys():
        odd = sorted(written.keys() ^ entries.keys())[0]
        where = "typed but has no entry in the yml" if odd in written else "in the yml but nowhere typed"
        raise ValueError(f"the finding {odd!r} is {where}")
    found = [Finding(key, sentence, **entries[key]) for key, sentence in written.items()]
    for one in found:
        if len(one.sentence.split()) > LONGEST:
            raise ValueError(
                f"the finding {one.key!r} is too long: {len(one.sentence.split())}, where {LONGEST} will do"
            )
        if one.family and not (one.decided or "").isidentifier():
            raise ValueError(f"the finding {one.key!r} is of a family: its 'decided' must be the name of one number")
    return found


def beside(notebook: str) -> dict[str, Any]:
    """What ``notebooks/<notebook>.findings.yml`` holds: ``findings`` and ``captions``; empty where there is none."""
    import yaml

    path = root() / "notebooks" / f"{notebook}.findings.yml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def of_notebook(notebook: str) -> list[Finding]:
    """The findings of a notebook's source."""
    return load("\n\n".join(markdown(notebook)), beside(notebook).get("findings", {}))


def markdown(notebook: str) -> list[str]:
    """The Markdown cells of a notebook's source."""
    cells = read_notebook(root() / "notebooks" / f"{notebook}.ipynb")["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]


def judge(findings: Iterable[Finding], numbers: Mapping[str, Number]) -> list[dict[str, Any]]:
    """Mark each finding by a run's numbers: key, sentence, mark, and ``numbers`` (label, text) to show."""
    findings = list(findings)
    corrected: dict[str, float] = {}
    for family in {one.family for one in findings} - {None}:
        keys = [one.decided for one in findings if one.family == family and one.decided in numbers]
        corrected |= dict(zip(keys, holm([numbers[key].p for key in keys]), strict=True))
    seen = {k: Number(n.value, n.lo, n.hi, corrected.get(k, n.p), n.unit) for k, n in numbers.items()}
    return [
        {
            "key": one.key, "sentence": one.sentence, "mark": _mark(one, seen),
            "numbers": [(label, text(seen[key])) for key, label in one.numbers.items() if key in seen],
        }
        for one in findings
    ]  # fmt: skip


def _mark(one: Finding, numbers: Mapping[str, Number]) -> str:
    if not one.names <= numbers.keys():
        return MISSING
    decided = one.decided
    if decided and decided.isidentifier():
        decided = f"apart({decided})" if numbers[decided].p is None else f"p({decided}) < {LEVEL}"
    if decided and not evaluate(decided, numbers):
        return UNDECIDED
    return HOLDS if evaluate(one.test, numbers) else FAILS


def text(one: Number) -> str:
    """A number as it is shown: ``-7.70 (-8.10 to -7.30) points, p = 0.004``."""
    known = [v for v in (one.value, one.lo, one.hi) if v is not None]
    digits = max(len(str(v).partition(".")[2]) if v % 1 else 0 for v in known)
    shown = f"{one.value:.{digits}f}"
    if one.lo is not None and one.hi is not None:
        shown += f" ({one.lo:.{digits}f} to {one.hi:.{digits}f})"
    p = "" if one.p is None else ", p < 0.001" if one.p < 0.001 else f", p = {one.p:.2g}"
    return f"{shown} {one.unit}".strip() + p


# --- rendering


def render(name: str, /, **values: Any) -> str:
    """A template of ``templates/`` filled; in one that ends in .html, text is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).with_name("templates"))
    escaped = name.endswith(".html")
    return Environment(loader=loader, autoescape=escaped, undefined=StrictUndefined).get_template(name).render(**values)


def box(rows: Iterable[Mapping[str, Any]], experiment: str, csv: str = "", name: str = "findings") -> str:
    """The HTML box of marked findings (of :func:`judge`); ``csv`` is the HTML of a link."""
    from markupsafe import Markup

    return render("findings_box.html", rows=list(rows), experiment=experiment, csv=Markup(csv), name=name)


def of_page(page: str) -> Numbers:
    """What a published page recorded, empty if it is not published or records nothing: ``imagenet20/12_causal``."""
    folder, _, name = page.rpartition("/")
    path = root() / "book/runs" / folder / "data" / name / f"{CSV}.csv"
    return Numbers.read(path) if path.is_file() else Numbers()


def index_page() -> str:
    """The Markdown of findings.md: all findings of all chapters, with a mark for each published experiment."""
    chapters = []
    for notebook in sorted({page.notebook for page in pages().values()}):
        found = of_notebook(notebook)
        of = {page.experiment: page.name for page in pages().values() if page.name == f"{page.experiment}/{notebook}"}
        marked = {
            (row["key"], name): row
            for name in of
            for one in found
            for row in judge([two for two in found if two.page == one.page], of_page(f"{name}/{one.page or notebook}"))
            if row["key"] == one.key
        }
        rows = [{"sentence": one.sentence, "cells": [marked[one.key, name] for name in of]} for one in found]
        if rows and of:
            title = markdown(notebook)[0].partition("\n")[0].strip("# ")
            chapters.append({"title": title, "pages": of, "rows": rows})
    return render("findings_index.md", chapters=chapters)


class Chapter:
    """A notebook's findings, figures and tables, each by one line; captions come from the yml beside the notebook.

    >>> chapter = Chapter("12_causal", run)                          # doctest: +SKIP
    >>> chapter.show(causal_figures.number_curves, curves, "curves")  # doctest: +SKIP
    >>> chapter.findings(numbers)                                    # doctest: +SKIP
    """

    def __init__(self, notebook: str, run, experiment: str | None = None) -> None:
        self.notebook, self.run, self.experiment = notebook, run, experiment or run.experiment.name
        self.captions = beside(notebook).get("captions", {})

    def show(self, function, data: pd.DataFrame, name: str, **options) -> None:
        """:func:`~companion.figures.display.show` with the caption, alt text and options that the yml has."""
        from .figures.display import show

        show(function, data, name, **{"run": self.run, **self.captions[name], **options})

    def table(self, data: pd.DataFrame, name: str, **options) -> None:
        """:func:`companion.figures.display.table` with the caption and options that the yml has under this name."""
        from .figures.display import table

        table(data, name, **{"run": self.run, **self.captions[name], **options})

    def findings(self, numbers: Numbers, part: int | None = None) -> None:
        """Record the page's numbers and show its findings with their marks.

        ``part``: only those of one Markdown cell of typed sentences, counted from 1.
        """
        from IPython.display import HTML, display

        from .figures.display import _csv_link

        typed = [found for text in markdown(self.notebook) if (found := sentences(text))]
        shown = set().union(*typed) if part is None else typed[part - 1]
        rows = [row for row in judge(of_notebook(self.notebook), numbers) if row["key"] in shown]
        display(HTML(box(rows, self.experiment, _csv_link(numbers.frame(), CSV), f"findings-{part or 'all'}")))
