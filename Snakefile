# Executes the notebooks whose published pages are not fresh.  snakemake --cores 2   (or: make reproduce)
#
# What is fresh follows from digests stored in the pages themselves (companion.publish.publish.why_stale), not from file times, so a
# fresh clone runs nothing that is up to date. A page is moved to book/runs only after its notebook succeeded; the files under
# build/ are mere marks, so Snakemake never deletes a page. A dry run tells why each page would be executed:
#     snakemake -n
# One page or one sweep:  snakemake --cores 2 imagenet20/04_score_ood     snakemake --cores 2 sweep-k
# When one machine is too small:  snakemake --executor slurm --jobs 20 (with snakemake-executor-plugin-slurm installed)
import os
import sys
from pathlib import Path

sys.path.insert(0, workflow.basedir)
from companion.publish import plan, publish

PAGES = plan.pages()
STALE = {name: why for name, page in PAGES.items() if (why := publish.why_stale(page))}
if config.get("everything"):  # snakemake --config everything=1: what is fresh is executed again, too
    STALE = {name: STALE.get(name, "everything was asked for") for name in PAGES}
# Threads of one job: two jobs side by side must not both take all cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def mark(name):
    """The file that says "this page was published with this digest in this working tree"."""
    return f"build/published/{name}-{publish.page_digest(PAGES[name])}.ok"


for name in STALE:
    Path(mark(name)).unlink(missing_ok=True)  # a page that is stale in spite of its mark was changed by hand or checked out


rule all:
    input:
        [mark(name) for name in STALE],
    default_target: True


# One process and one kernel execute several pages, one after another: their start takes longer than a short page. In this
# order, so that no two at a time train the same SAE and the short ones keep both cores busy until the end.
def batches(names, size):
    return [names[i : i + size] for i in range(0, len(names), size)]


def stale(*notebooks, experiment=None):
    found = [name for name in STALE if PAGES[name].notebook in notebooks]
    return [name for name in found if experiment in (None, PAGES[name].experiment)]


chapters = [notebook for notebook in plan.MAIN if notebook not in plan.ABLATIONS]
others = dict.fromkeys(page.notebook for page in PAGES.values() if page.notebook not in plan.MAIN)
jobs = sum((batches(stale(*chapters, experiment=experiment), 4) for experiment in plan.BOOK_EXPERIMENTS), [])
jobs += batches(stale(*others), 3)
jobs += sum((batches(stale(notebook), 16) for notebook in plan.ABLATIONS), [])

for number, names in enumerate(jobs):

    rule:
        name: names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        input:
            list(dict.fromkeys(mark(other) for name in names for other in PAGES[name].after if other in STALE)),
        output:
            [touch(mark(name)) for name in names],
        params:
            pages=names,
        message: "; ".join(f"{name}: {STALE.get(name, 'asked for by name')}" for name in names)
        priority: len(jobs) - number
        shell:
            "{sys.executable} -m companion.build run {params.pages}"


for name in [name for names in jobs if len(names) > 1 for name in names]:

    rule:
        name: name
        input:
            mark(name),


for sweep in plan.SWEEPS:

    rule:
        name: f"sweep-{sweep}"
        input:
            [mark(name) for name in (f"{plan.SWEPT}/ablation/sweep-{sweep}",) if name in STALE],
