"""Causal check of a run: all tables of the chapter, the numbers of its findings, and what its tables show."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd

from capsae.stats import holm

from ...figures import tidy
from ...findings import Chapter, Numbers
from . import curves as by_number
from . import effects
from .maths import TITLES, Bench

AGAINST_EPD = ("core", *effects.MATCHED, "head_direction", "head_projection", "outside_plain", "part_first")
PANELS = {
    "logit": "change of the\nclass's logit",
    "kept": "accuracy on\nthe class, %",
    "others_kept": "accuracy on\nother classes, %",
}


def study(run, bench: Bench) -> SimpleNamespace:
    """Every table of the chapter: see the functions of :mod:`.effects` and :mod:`.curves`."""
    train = run.features("train")
    posterior = by_number.Posterior.fit(run.codes("train"), train.labels, run.experiment.n_classes)
    soft = {
        f"app_{where}": partial(by_number.attenuation, bench, posterior, where == "core") for where in ("core", "all")
    }
    table, matrix, moved = effects.effects(bench, train.cls.mean(axis=0, dtype="float64"), soft)
    drawn = effects.draws(bench)
    at = by_number.sizes(run.caps.core_size(run.experiment.caps.core_fraction))
    curves, areas = by_number.curves(bench, by_number.places(bench), at)
    return SimpleNamespace(
        names=tidy.class_names(run), table=table, matrix=matrix, means=effects.over_classes(table),
        plain=effects.plain_gaps(bench, moved), against=effects.against_controls(bench, moved), drawn=drawn,
        overall=effects.over_draws(drawn), curves=curves, areas=areas, steer=by_number.steering(bench),
        pairs=by_number.transplants(bench), shares=effects.core_shares(bench), emptied=effects.emptied(bench),
        frontier=by_number.frontier(bench, posterior, at),
        after=effects.epd_after(bench, moved, AGAINST_EPD),
    )  # fmt: skip


def page(run, bench: Bench) -> tuple[Chapter, SimpleNamespace, Numbers]:
    """What the notebook needs: its captions and findings, :func:`study` and :func:`numbers`."""
    found = study(run, bench)
    return Chapter("12_causal", run), found, numbers(found)


def numbers(found: SimpleNamespace) -> Numbers:
    """What the chapter's findings rest on, from the tables of :func:`study`."""
    made = Numbers()
    percent = {"kept", "others_kept", "changed", "runner_up", "shared", "efficiency", "unmatched"}
    for share in (True, False):
        rows = found.means[found.means["measure"].isin(percent) == share]
        made.rows(rows, "{intervention}_{measure}", "%" if share else "")
    core = found.table[found.table["intervention"] == "core"].set_index("class")
    made.add("classes", len(core))
    made.add("falling", int(((holm(core["p"]) < effects.LEVEL) & (core["logit"] < 0)).sum()))
    rest = found.matrix[found.matrix["deleted"] != found.matrix["logit"]]
    also = (rest["p_holm"] < effects.LEVEL) & (rest["change"] < 0)
    made.add("other_logits_that_fall", float(also.sum() / len(core)))
    high = core.index[core["kept"] > 0.2]
    default = pd.Series(found.emptied).value_counts(normalize=True)
    made.add("classes_that_keep", len(high))
    made.add("emptied_to_them", default.reindex(high).sum(), unit="%")
    made.rows(found.plain, "plain_{of}")
    made.rows(found.overall, "stretched_{control}")
    made.rows(found.overall.drop(columns=["lo", "hi"]).assign(value=found.overall["wins"]), "wins_{control}", "%")
    made.rows(found.against, "stretched_{control}")
    _numbers_of_curves(made, found.curves)
    _numbers_of_moves(made, found)
    after = found.after.set_index("intervention")
    made.rows(found.after.assign(value=found.after["auroc"]), "epd_{intervention}")
    gaps = after.drop(index="core").rename(columns={"gap": "value"})[["value", "gap_lo", "gap_hi"]]
    strongest = gaps.loc[after["auroc"].drop("core").idxmax()]
    made.add("epd_less_strongest_control", *strongest)
    made.add("epd_controls_from_0_9", int((after["auroc"].drop("core") >= 0.9).sum()))
    return made


def _numbers_of_curves(made: Numbers, curves: pd.DataFrame) -> None:
    for order in by_number.ORDERS:
        for test in ("sufficiency", "necessity"):
            enough = by_number.enough(curves, order, test)
            if enough:
                made.add(f"{test}_{order}_latents", enough["n"])
                made.add(f"{test}_{order}", enough["value"], enough["lo"], enough["hi"], unit="%")
    accuracy = curves[(curves["measure"] == "accuracy") & (curves["order"] == "cap")]
    made.rows(accuracy[(accuracy["test"] == "necessity") & (accuracy["n"] == 1)], "first_latent_deleted", "%")
    made.rows(accuracy[(accuracy["test"] == "sufficiency") & (accuracy["n"] == 0)], "no_latent_kept", "%")
    claimed = curves[(curves["measure"] == "claimed") & (curves["n"] > 0)]
    made.rows(claimed.nlargest(1, "value"), "claimed_by_other", "%")


def _numbers_of_moves(made: Numbers, found: SimpleNamespace) -> None:
    steer = found.steer[found.steer["measure"] == "margin"]
    made.rows(steer[steer["alpha"] == steer["alpha"].max()], "amplified_{series}_{rows}")
    made.rows(steer[(steer["alpha"] == 1) & (steer["series"] == "core")], "untouched_{series}_{rows}")
    for name, cell in by_number.transplant_means(found.pairs).items():
        made.add(f"transplant_{name}", **cell, unit="%" if "over" not in name else "points")
    deleted = found.frontier[found.frontier["method"] == "deletion"]
    falls, most = deleted.groupby("n")["fall"].mean(), int(deleted["n"].max())
    few = int(falls.index[(falls >= falls[most] / 2).to_numpy().argmax()])
    made.add("half_of_the_fall_latents", few)
    cell = effects.class_interval(deleted.loc[deleted["n"] == few, "others_kept"].to_numpy())
    made.add("half_of_the_fall_others_kept", **cell, unit="%")
    for method in ("app_core", "app_all"):
        made.add(f"{method}_less_deletion", **by_number.at_equal_suppression(found.frontier, method), unit="points")


# --- what the tables and figures of the page show


def named(found: SimpleNamespace, table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """A table with names of classes in place of their numbers in some columns."""
    return table.assign(**{column: table[column].map(found.names.__getitem__) for column in columns})


def named_draws(found: SimpleNamespace) -> pd.DataFrame:
    """Every draw of every stretched control, with names of classes."""
    drawn = found.drawn
    of = drawn["draw"].where(drawn["control"] != "other_core", drawn["draw"].map(dict(enumerate(found.names))))
    return named(found, drawn, "class").assign(draw=of)


def stretched(found: SimpleNamespace) -> tuple[pd.DataFrame, pd.DataFrame]:
    """How far the controls are stretched: the table, and the same in %."""
    factors, shares = effects.stretching(found.drawn, found.table), ["shrunk", "shared", "unmatched", "unmatched_most"]
    return factors, factors.assign(**{key: 100 * factors[key] for key in shares})


def panels(found: SimpleNamespace) -> pd.DataFrame:
    """Three measures of the interventions at the core's energy, for :func:`.figures.interventions`."""
    apart = found.means["intervention"].isin(["outside_plain", *effects.FAIR])
    shown = found.means[found.means["measure"].isin(PANELS) & ~apart]
    factor = np.where(shown["measure"] == "logit", 1, 100)
    ends = {key: shown[key] * factor for key in ("value", "lo", "hi")}
    return shown.assign(panel=shown["measure"].map(PANELS), **ends)


def by_class(found: SimpleNamespace) -> pd.DataFrame:
    """Deleting each class's core, as the page shows it."""
    core, names = found.table[found.table["intervention"] == "core"], found.names
    shares = {"probability": "probability, points", "changed": "changed, %", "kept": "kept, %", "others_kept": "kept on others, %"}  # fmt: skip  # noqa: E501
    listed = named(found, core, "class").assign(
        **{
            "to": [names[c] if c >= 0 else "" for c in core["to"]],
            "logit": [f"{r.logit:.1f} ({r.logit_lo:.1f} to {r.logit_hi:.1f})" for r in core.itertuples()],
            "falls next": [f"{names[r.largest_class]} {r.largest_other:.1f}" for r in core.itertuples()],
        }
    )
    listed = listed.rename(columns=shares)[["class", "logit", "falls next", *shares.values(), "to"]]
    return listed.assign(**{column: (100 * listed[column]).map("{:.1f}".format) for column in shares.values()})


def areas_wide(areas: pd.DataFrame) -> pd.DataFrame:
    """Areas under the curves, an order a row."""
    text = [f"{r.value:.2f} ({r.lo:.2f} to {r.hi:.2f})" for r in areas.itertuples()]
    wide = areas.assign(text=text).pivot(index="order", columns="test", values="text")
    return wide.loc[list(by_number.ORDERS), list(by_number.TESTS)].reset_index().replace({"order": by_number.ORDERS})


def transplants_by_class(found: SimpleNamespace) -> pd.DataFrame:
    """Share of images taken for the class that was put in, %, mean over the classes they come from."""
    mean = (100 * found.pairs.groupby("into")[list(by_number.TRANSPLANTS)].mean()).reset_index()
    return mean.assign(into=found.names).rename(columns=by_number.TRANSPLANTS)


def shares_of_core(found: SimpleNamespace) -> pd.DataFrame:
    """Means over classes of :func:`.effects.core_shares`, %."""
    return (100 * found.shares.groupby("rows")[["latents", "squares"]].mean()).reset_index()


def titled(table: pd.DataFrame, column: str = "intervention") -> pd.DataFrame:
    """A table with titles in place of names of interventions."""
    return table.replace({column: TITLES})
