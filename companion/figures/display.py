"""Shows a figure or a table in a notebook: SVG that follows the theme, alt text, caption, provenance, its data as CSV.

Where the CSV goes: :mod:`companion.publish.publish` sets ``CAPSAE_PAGE_DATA`` to a folder relative to the page; the CSV
is written there and linked. Without it (Jupyter, plain papermill) nothing is written and the link carries the data
itself.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from capsae.metrics import require_convention

PAGE_DATA = "CAPSAE_PAGE_DATA"
RESULT_MIME = "application/vnd.capsae.result+json"
EMBEDDED = 2_000_000  # bytes of CSV that a link may carry
ROWS = 24  # of a table on a page, without its head; the CSV holds all
POINTS = 800  # a scatter or a mesh of more is drawn as pixels, or the page would weigh megabytes

# Page, text and grid. A figure is drawn once: in its SVG these three become variables that follow the page's theme.
INK = {"page": ("#fffffe", "#121212"), "text": ("#222832", "#d6dbe1"), "grid": ("#c9cdd2", "#4a5160")}

# Beside book/_static/book.css, so that figures also work in Jupyter and VS Code, whose themes say so on <body>.
_DARK = ':is(html[data-theme="dark"],[data-jp-theme-light="false"],.vscode-dark)'
_CSS = "".join(
    f"{where}.capsae-figure{{{''.join(f'--capsae-{name}:{pair[i]};' for name, pair in INK.items())}}}"
    for i, where in enumerate(("", f"{_DARK} "))
)


@contextmanager
def style() -> Iterator[None]:
    """Set colours and sizes for one figure; sizes are such that a figure stays legible on a phone."""
    page, text, grid = (light for light, _ in INK.values())
    settings = {
        "figure.facecolor": page, "axes.facecolor": page, "savefig.facecolor": page,
        "text.color": text, "axes.labelcolor": text, "axes.edgecolor": grid, "axes.titlecolor": text,
        "xtick.color": text, "ytick.color": text, "grid.color": grid, "grid.linewidth": 0.6, "grid.alpha": 0.6,
        "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
        "legend.frameon": False, "font.size": 12, "axes.titlesize": 12.5, "axes.labelsize": 12, "legend.fontsize": 11,
        "lines.linewidth": 1.9, "figure.dpi": 100, "font.family": "DejaVu Sans", "patch.edgecolor": text,
        "svg.fonttype": "none",
    }  # fmt: skip
    with mpl.rc_context(settings):
        yield


def ink_on(colour: Sequence[float]) -> str:
    """Black or white, whichever stands out more on a colour (red, green, blue, ... in 0..1), by WCAG 2's contrast."""
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3])
    return "#000000" if 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 else "#ffffff"


def render_svg(figure: Figure, name: str, alt: str = "") -> str:
    """The figure as an SVG element of its own ids, the same on every run; text stays text, colours follow the theme."""
    for drawn in (artist for ax in figure.axes for artist in ax.collections):
        if max(len(drawn.get_offsets()), np.size(drawn.get_array())) > POINTS:
            drawn.set_rasterized(True)
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", dpi=150, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", buffer.getvalue(), flags=re.DOTALL)
    svg = re.sub(r' id="(?!C\d)[A-Za-z][\w.]*_\d+"', "", svg[svg.index("<svg") :])
    svg = re.sub(r"(\d\.\d\d)\d+", r"\1", re.sub(r"\s+", " ", svg))
    svg = re.sub(r' transform="rotate\(-?0 [^"]*"', "", svg)
    svg = re.sub(r' d="[^"]*"', lambda m: re.sub(r"(?<=[A-Za-z]) | (?=[A-Za-z\"])", "", m[0][1:]).join((" ", "")), svg)
    svg = _shared_styles(_without_bare_groups(svg), f"c{hashlib.sha256(name.encode()).hexdigest()[:8]}")
    for of, (light, _) in INK.items():
        svg = svg.replace(light, f"var(--capsae-{of})")
    box = re.search(r'viewBox="[^"]*"', svg)[0]
    head = f'<svg role="img" aria-label="{html.escape(alt)}" {box} style="width:{figure.get_size_inches()[0]:g}in"'
    head += ' xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return head + svg[svg.index(">") :].strip()


def _without_bare_groups(svg: str) -> str:
    """The SVG without the ``<g>`` that carry no attribute."""
    kept, parts = [], []
    for part in re.split(r"(<g>|<g [^>]*[^/]>|</g>)", svg):
        if part.startswith("<g"):
            kept.append(part != "<g>")
        if part != "<g>" and (part != "</g>" or kept.pop()):
            parts.append(part.strip() if part.isspace() else part)
    return re.sub("> <(?!/?tspan)", "><", "".join(parts))


def _shared_styles(svg: str, prefix: str) -> str:
    """The SVG with the styles that its elements repeat in one sheet; ``prefix`` keeps its classes apart on a page."""
    counted = Counter(re.findall(r' style="([^"]*)"', svg))
    classes = {style: f"{prefix}-{i}" for i, style in enumerate(of for of, n in counted.items() if n > 1)}
    svg = re.sub(r' style="([^"]*)"', lambda m: f' class="{classes[m[1]]}"' if m[1] in classes else m[0], svg)
    sheet = "".join(f".{name}{{{style}}}" for style, name in classes.items())
    return svg.replace(">", f"><style>{sheet}</style>", 1)


def provenance_line(run, stage: str = "table") -> str:
    """Experiment, backbone, data and digest of a run, as the text that stands under each figure; a text is itself."""
    if isinstance(run, str):
        return run
    experiment = run.experiment
    data = f"embedded pack {experiment.pack}" if getattr(experiment, "pack", None) else "computed from its images"
    backbone, digest = experiment.backbone.model, run.digest(stage)[:12]
    return f"Experiment {experiment.name} · backbone {backbone} · data: {data} · digest {digest}"


def _csv_link(data: pd.DataFrame, name: str) -> str:
    text = data.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    folder = os.environ.get(PAGE_DATA)
    if folder:
        path = Path(folder) / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        target = path.as_posix()
    elif len(text) > EMBEDDED:
        return f"CSV of {len(data)} rows: too large for a notebook, set {PAGE_DATA} to a folder"
    else:
        target = "data:text/csv;base64," + base64.b64encode(text.encode()).decode()
    return f'<a href="{html.escape(target)}" download="{html.escape(name)}.csv">CSV</a>'


def _caption(caption: str, data: pd.DataFrame, name: str, run, stage: str, code: str = "") -> str:
    require_convention([*data.columns, *(data["metric"].unique() if "metric" in data else ())])
    links = _csv_link(data, name)
    # The book's build makes a page of the source (book/_ext/capsae_book.py); a page made of data names its run in text.
    if code and (os.environ.get(PAGE_DATA) or isinstance(run, str)):
        links += f' · <a href="code:{code}">code</a>'
    return (
        f"<figcaption>{html.escape(caption)} "
        f'<span class="capsae-provenance">{html.escape(provenance_line(run, stage))} · {links}</span></figcaption>'
    )


def figure_html(function, data, name, caption, alt, run, stage="table", **kwargs) -> str:
    """The HTML of :func:`show`."""
    if not alt.strip() or not caption.strip():
        raise ValueError(f"figure {name!r} has no {'caption' if alt.strip() else 'alt text'}: say what it shows")
    with style():
        svg = render_svg(function(data, **kwargs), name, alt)
    code = f"{function.__module__}#{function.__name__}"
    return (
        f'<figure class="capsae-figure" id="fig-{name}"><style>{_CSS}</style><div class="capsae-scroll">{svg}</div>'
        f"{_caption(caption, data, name, run, stage, code)}</figure>"
    )


def show(function, data: pd.DataFrame, name: str, caption: str, alt: str, run, stage: str = "table", **kwargs) -> None:
    """Draw ``function(data, **kwargs)`` as SVG and display it with its caption and its CSV.

    Parameters
    ----------
    function : callable
        One of :mod:`companion.figures.figures`.
    data : DataFrame
        Its tidy data; written as ``<name>.csv``.
    name, caption, alt : str
        ``alt`` says what the figure shows to whoever cannot see it; an empty one is refused with ValueError.
    run : pipeline.Run
        Whose experiment, backbone, data and digest stand under the caption.
    stage : str
        The stage of the run that the data come from.
    """
    from IPython.display import HTML, display

    display(HTML(figure_html(function, data, name, caption, alt, run, stage, **kwargs)))


def table_html(data, name, caption, run, stage="table", formats=None, links=None, shown=None) -> str:
    """The HTML of :func:`table`."""
    whole, data = data, data if shown is None else shown
    if len(data) > ROWS:
        caption += f" {ROWS} of {len(data)} rows; the CSV holds all."
        data = data.head(ROWS)
    require_convention(data.columns)
    formats, links = dict(formats or {}), dict(links or {})
    columns = [column for column in data.columns if column not in links.values()]
    cells = {}
    for column in columns:
        form = formats.get(column, _plain)
        # A cell that a row does not have is blank, not "nan".
        written = (("" if v != v else form(v) if callable(form) else form.format(v)) for v in data[column])
        cells[column] = [html.escape(text) for text in written]
    for column, address in links.items():
        pairs = zip(cells[column], data[address], strict=True)
        cells[column] = [f'<a href="{html.escape(a)}">{c}</a>' for c, a in pairs]
    head = "".join(f'<th scope="col">{html.escape(str(column))}</th>' for column in columns)
    rows = zip(*cells.values(), strict=True)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<figure class="capsae-table" id="table-{name}"><div class="capsae-scroll"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        f"{_caption(caption, whole, name, run, stage)}</figure>"
    )


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.4g}"
    return str(value)


def table(data, name, caption, run, stage="table", formats=None, links=None, shown=None) -> None:
    """Display a table that scrolls in its own box, with caption, provenance and CSV.

    Parameters
    ----------
    data, name, caption, run, stage : as for :func:`show`
    formats : mapping of columns to a format text or a function
    links : mapping of columns to the column that holds their link's address; the latter is not shown
    shown : DataFrame to show in place of ``data``, which is what the CSV holds
    """
    from IPython.display import HTML, display

    display(HTML(table_html(data, name, caption, run, stage, formats, links, shown)))


def result(values: Mapping[str, Any]) -> None:
    """Record numbers of this notebook: named on the page, kept in the notebook for pages, sweeps and claims.

    ``values`` is JSON: numbers, texts, lists and mappings of them. NaN is not JSON and is refused.
    """
    from IPython.display import display

    plain = json.loads(json.dumps(dict(values), allow_nan=False, default=float))
    display({RESULT_MIME: plain, "text/plain": f"recorded: {', '.join(plain)}"}, raw=True)
