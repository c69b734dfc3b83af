"""What the book needs from Sphinx beyond its configuration: CSVs beside the pages, the code behind each figure."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
from pathlib import Path

from docutils import nodes
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

LINE = "\n"
CODE = re.compile(r'href="code:([\w.]+)#(\w+)"')


def use_repository_buttons(app, config) -> None:
    """Show the buttons that lead to a hosted repository only when its address is set in _config.yml."""
    known = bool(config.html_theme_options.get("repository_url"))
    for button in ("use_repository_button", "use_issues_button", "use_edit_page_button"):
        config.html_theme_options[button] = known


def link_code(app, doctree, docname: str) -> None:
    """Let the link of a figure lead to the function that drew it, on a page of the book's own."""
    if app.builder.format != "html":
        return
    for node in doctree.findall(nodes.raw):
        for module, name in CODE.findall(node.rawsource or node.astext()):
            page = app.builder.get_relative_uri(docname, f"code/{module}")
            changed = node.astext().replace(f'href="code:{module}#{name}"', f'href="{page}#{name}"')
            node.children = [nodes.Text(changed)]


def drop_silent_cells(app, doctree) -> None:
    """Take out folded cells that show nothing: a button that opens one line of bookkeeping helps no reader."""
    for node in list(doctree.findall(nodes.container)):
        if "tag_hide-input" in node.get("classes", ()):
            if not any("cell_output" in part.get("classes", ()) for part in node.findall(nodes.container)):
                node.parent.remove(node)


def code_pages(app):
    """A page for each module that draws: its source, with an anchor at each function."""
    root = Path(app.srcdir).parent
    for file in sorted((root / "companion").rglob("*.py")):
        text, module = file.read_text(encoding="utf-8"), ".".join(file.relative_to(root).with_suffix("").parts)
        if "-> Figure:" not in text:
            continue
        functions = {node.lineno: node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
        lines = highlight(text, PythonLexer(), HtmlFormatter(nowrap=True)).split(LINE)
        for number, name in functions.items():
            lines[number - 1] = f'<span id="{name}"></span>{lines[number - 1]}'
        body = f'<h1>{module}</h1><div class="highlight"><pre tabindex="0">{LINE.join(lines)}</pre></div>'
        yield f"code/{module}", {"title": module, "body": body}, "page.html"


def copy_data(app, exception) -> None:
    """Copy the ``data`` folders under ``runs`` beside the pages, where the captions of the figures link to it."""
    if exception is not None or app.builder.format != "html":
        return
    source, out = Path(app.srcdir), Path(app.outdir)
    for file in sorted(source.glob("runs/**/data/**/*.csv")):
        target = out / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def make_light(app, exception) -> None:
    """Take out half of the book's weight: outputs of downloaded notebooks, which the pages show, and source maps."""
    if exception is not None or app.builder.format != "html":
        return
    for file in (Path(app.outdir) / "_sources").rglob("*.ipynb"):
        notebook = json.loads(file.read_text(encoding="utf-8"))
        notebook["cells"] = [cell | {"outputs": []} if "outputs" in cell else cell for cell in notebook["cells"]]
        file.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + LINE, encoding="utf-8")
    for file in (Path(app.outdir) / "_static").rglob("*.map"):
        file.unlink()


def write_in_parallel(app, env) -> None:
    """Let several processes write the pages, most of the time; Jupyter Book has no option for it. Reading is over by
    now: some extensions would refuse to do that in parallel."""
    app.parallel = 1 + len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def setup(app) -> dict:
    app.add_config_value("comments_config", {}, "html")  # Jupyter Book sets it even where sphinx_comments is left out
    app.connect("config-inited", use_repository_buttons)
    app.connect("env-updated", write_in_parallel)
    app.connect("doctree-read", drop_silent_cells)
    app.connect("doctree-resolved", link_code)
    app.connect("html-collect-pages", code_pages)
    app.connect("build-finished", copy_data)
    app.connect("build-finished", make_light)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
