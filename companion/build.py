"""The whole book: which pages are stale, their execution by Snakemake, the pages made of data, the build.

``python -m companion.build run PAGE...`` executes pages, ``status`` lists the stale ones, ``pages`` writes those of
data.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from .publish.page_kernel import SharedKernel
from .publish.pages import write_pages
from .publish.plan import pages, root
from .publish.publish import PublishError, page_name, publish, why_stale
from .publish.verify import keep_published

log = logging.getLogger(__name__)


def reproduce(
    jobs: int | None = None,
    dry_run: bool = False,
    book: bool = True,
    targets: Iterable[str | Path] = (),
    everything: bool = False,
) -> int:
    """Execute the pages that are not fresh (by Snakemake), write the pages made of data, build the book.

    Parameters
    ----------
    jobs : int, optional
        Pages at a time; default 2, or the number of cores.
    dry_run : bool
        Say what would be executed, and why.
    targets : page names or paths of their files, optional
        Only these; default all.
    everything : bool
        Execute fresh pages, too.

    Returns
    -------
    int
        Exit status; the place of the book goes to stdout.
    """
    names = [page_name(target) for target in targets]
    why = {name: why_stale(pages()[name]) for name in names or pages()}
    wanted = [name for name, reason in why.items() if everything or reason]
    if dry_run:
        sys.stdout.writelines(f"{name}: {why[name] or 'fresh; everything was asked for'}\n" for name in wanted)
        sys.stdout.write(f"{len(wanted)} of {len(why)} pages would be executed\n")
        return 0
    keep_published(root())
    command = [sys.executable, "-m", "snakemake", "--cores", str(jobs or min(2, os.cpu_count() or 1))]
    command += ["--quiet", "host", "--keep-going", *["--config", "everything=1"] * everything]
    status = 0
    if wanted:
        # All of them: Snakemake finds the same ones, and their names would make a long line.
        command += ["--", *wanted] if names else []
        status = subprocess.run(command, cwd=root(), check=False).returncode
    if status:
        return status
    write_pages()
    if not book:
        return 0
    tool = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()"]
    status = subprocess.run([*tool, "build", "-W", "-n", "--keep-going", "book/"], cwd=root(), check=False).returncode
    if status == 0:
        sys.stdout.write(f"\nThe book lies at {root() / '_build' / 'html' / 'index.html'}\n")
    return status


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m companion.build", description="Execute and publish pages of the book.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute pages and publish those that succeed")
    run.add_argument("page", nargs="+", help="e.g. imagenet20/04_score_ood")
    commands.add_parser("status", help="list the pages that are not fresh, and why; exit status 1 if there are any")
    commands.add_parser("pages", help="write the pages that are made from data: claims and detectors")
    chosen = parser.parse_args(arguments)
    if chosen.command == "run":
        known, failed = pages(), 0
        for name in chosen.page:
            if name not in known:
                parser.error(f"no page {name!r}; there are {', '.join(known)}")
        with SharedKernel() as kernel:
            for name in chosen.page:
                try:
                    log.info("published %s", publish(known[name], kernel=kernel))
                except (PublishError, ValueError) as error:
                    sys.stderr.write(f"{error}\n")
                    failed += 1
        return 1 if failed else 0
    if chosen.command == "pages":
        write_pages()
        return 0
    stale = {name: why for name, page in pages().items() if (why := why_stale(page))}
    sys.stdout.writelines(f"{name}: {why}\n" for name, why in stale.items())
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
