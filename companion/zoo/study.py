"""Everything that the zoo's page shows, of the committed tables and a run: for its one-line cells."""

from __future__ import annotations

from types import SimpleNamespace

from capsae.pipeline.run import Run

from ..findings import Chapter, Numbers
from . import summary, tables, verdicts

SECOND = "mini80"  # the experiment that stands beside the page's own
OOD_COLUMNS = {"latents": "{:.0f}", "L0": "{:.1f}", "FVU": "{:.3f}"} | dict.fromkeys(summary.OOD.values(), "{:.1%}")


def page(run: Run) -> tuple[Chapter, SimpleNamespace, SimpleNamespace, Numbers]:
    """The chapter, :func:`of` the run's experiment and of `SECOND`, and the numbers of the findings."""
    own, other = of(run), of(Run(SECOND, progress=False))
    both = {run.experiment.name: own, SECOND: other}
    return Chapter("08_zoo", run), own, other, verdicts.numbers(both, tables.backbones(), summary.own_sae(run))


def of(run: Run) -> SimpleNamespace:
    """One experiment's committed tables, and what :mod:`summary` and :mod:`verdicts` make of them."""
    name = run.experiment.name
    table = tables.load(name)
    fits, errors = summary.fits(table), summary.image_errors(table)
    members = summary.by_member(fits, table, run.experiment.sae.k)
    return SimpleNamespace(
        table=table,
        grid=tables.load_grid(name),
        line=tables.line(name),
        fits=fits,
        errors=errors,
        members=members,
        known=summary.with_data_nulls(members, run),
        order=summary.best_first(members, verdicts.SCORES[0]),
        by_rank=summary.best_first(members, summary.INTERPRETABILITY),
        compared=verdicts.both(fits, errors),
        means=summary.over_seeds(table),
    )
