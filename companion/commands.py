"""Commands that a clone adds to ``capsae``: the zoo, the execution of the book, the check of its numbers.

pyproject.toml names :func:`add_commands` in the entry points ``capsae.commands``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from capsae.files import check_folder, replacing


def zoo(options) -> int:
    from companion.publish.plan import root
    from companion.zoo import members, tables
    from companion.zoo.fitting import RATES, SEEDS
    from companion.zoo.runner import EXPERIMENTS, run_backbones, run_zoo

    names = [name for text in options.members for name in text.split(",")] or members()
    seeds = tuple(options.seeds) or SEEDS
    whole = tables.is_whole(names, seeds, RATES)
    if options.out:
        check_folder(options.out, (), "", "")
    folder = Path(options.out) if options.out else root() / (tables.FOLDER if whole else "build/zoo")
    for experiment in options.experiment or EXPERIMENTS:
        found = run_zoo(experiment, names, seeds, options.jobs)
        path = tables.save(*found, folder)
        sys.stdout.write(f"{path}\n")
    if whole and not options.experiment:
        path = folder / "backbones.csv"
        with replacing(path) as temporary:
            run_backbones().to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")
        sys.stdout.write(f"{path}\n")
    return 0


def reproduce(options) -> int:
    from companion import build
    from companion.publish.plan import MAIN, pages

    known = pages()
    for name in options.experiments:
        if not any(page.experiment == name for page in known.values()):
            have = ", ".join(dict.fromkeys(page.experiment for page in known.values()))
            raise ValueError(f"experiment {name!r} has no pages in the book; those of {have} can be reproduced")
    chosen = {name: page for name, page in known.items() if not options.main or page.notebook in MAIN}
    targets = [
        name for name, page in chosen.items() if not options.experiments or page.experiment in options.experiments
    ]
    targets = targets if len(targets) < len(known) else []
    return build.reproduce(jobs=options.jobs, dry_run=options.dry_run, targets=targets, everything=options.all)


def verify(options) -> int:
    from companion.publish.plan import root
    from companion.publish.verify import record, verify

    reports, lines = verify(root(), options.against, shown=sys.maxsize if options.all else 10)
    sys.stdout.writelines(f"{line}\n" for line in lines)
    if options.record:
        sys.stdout.write(f"{record(root(), reports, options.against)}\n")
    return int(any(report.differences for report in reports))


def add_commands(add, common) -> None:
    """Add the parsers; ``add(name, help, parents, run)`` makes one, ``common`` holds the options of all commands."""
    command = add(
        "zoo", "fit and measure every autoencoder and dictionary; a killed run goes on", parents=(common,), run=zoo
    )
    command.add_argument(
        "--experiment", "-p", action="append", metavar="NAME", help="may repeat (default: imagenet20 and mini80)"
    )
    command.add_argument("--members", action="append", default=[], metavar="A,B", help="only these (default: all)")
    command.add_argument("--seeds", type=int, nargs="+", default=[], metavar="N", help="default: 0 1 2 3 4")
    command.add_argument("--jobs", type=int, default=2, help="processes, of one thread each (default: 2)")
    command.add_argument(
        "--out", metavar="FOLDER", help="of the tables (default: book/zoo; build/zoo where not all is run)"
    )

    command = add("reproduce", "execute what is not fresh and build the book", parents=(common,), run=reproduce)
    command.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help="only the pages of these (default: all)")
    command.add_argument("--jobs", type=int, default=None, help="pages at a time (default: 2, or the number of cores)")
    command.add_argument("--dry-run", "-n", action="store_true", help="say what would be executed, and why")
    command.add_argument("--all", "-a", action="store_true", help="execute what is fresh, too")
    command.add_argument("--main", "-m", action="store_true", help="only the main story: notebooks 01 to 06")

    command = add("verify", "compare what was executed here with what is published", parents=(common,), run=verify)
    command.description = "Every value of every page's CSVs, to the printed digit; exit status 1 where one differs."
    command.add_argument("--against", default="HEAD", metavar="REV", help="the commit that counts (default: HEAD)")
    command.add_argument("--record", action="store_true", help="write this machine into book/reproduced_on")
    command.add_argument("--all", "-a", action="store_true", help="list every difference, not ten a page")
