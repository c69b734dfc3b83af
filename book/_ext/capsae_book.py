"""What the book needs from Sphinx beyond its configuration: CSVs beside the pages, repository links if there is one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def use_repository_buttons(app, config) -> None:
    """Show the buttons that lead to a hosted repository only when its address is set in _config.yml."""
    known = bool(config.html_theme_options.get("repository_url"))
    for button in ("use_repository_button", "use_issues_button", "use_edit_page_button"):
        config.html_theme_options[button] = known


def copy_data(app, exception) -> None:
    """Copy the ``data`` folders under ``runs`` beside the pages, where the captions of the figures link to it."""
    if exception is not None or app.builder.format != "html":
        return
    source, out = Path(app.srcdir), Path(app.outdir)
    for file in sorted(source.glob("runs/**/data/**/*.csv")):
        target = out / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def write_in_parallel(app, env) -> None:
    """Let several processes write the pages, most of the time; Jupyter Book has no option for it. Reading is over by
    now: some extensions would refuse to do that in parallel."""
    app.parallel = 1 + len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def setup(app) -> dict:
    app.add_config_value("comments_config", {}, "html")  # Jupyter Book sets it even where sphinx_comments is left out
    app.connect("config-inited", use_repository_buttons)
    app.connect("env-updated", write_in_parallel)
    app.connect("build-finished", copy_data)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
