"""Causal check in words: every sentence is made from the tables, so that a test can hold it against them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from ..stats import holm
from .causal import TITLES
from .causal_curves import at_equal_suppression, enough, transplant_means
from .causal_effects import LEVEL, class_interval

_SHORT = {"other_core": "cores of other classes", "random_order": "sets along random directions",
          "random_active": "random active latents"}  # fmt: skip
DEFAULT = 0.2  # accuracy kept from which on a class is told apart from the rest

SPARED = 0.99  # of the other classes' accuracy: what an intervention on "only that one" must keep


def _range(cell: Mapping, factor: float = 1.0, digits: int = 1, unit: str = "") -> str:
    value, lo, hi = (f"{factor * cell[key]:.{digits}f}" for key in ("value", "lo", "hi"))
    return f"{value}{unit} ({lo} to {hi})"


def percent(cell: Mapping) -> str:
    """``80.8 % (75.9 to 85.7)`` of a share with its interval."""
    return _range(cell, 100, 1, " %")


def pick(means: pd.DataFrame, intervention: str, measure: str) -> dict[str, float]:
    """One cell of :func:`capsae.analyses.causal_effects.over_classes`: value, lo, hi."""
    rows = means[(means["intervention"] == intervention) & (means["measure"] == measure)]
    if len(rows) != 1:
        raise ValueError(f"the means hold {len(rows)} rows of {measure!r} of {intervention!r}, not one")
    return {key: float(rows.iloc[0][key]) for key in ("value", "lo", "hi")}


def falling(table: pd.DataFrame) -> int:
    """In how many classes deleting the core clearly lowers the class's logit (Holm over the classes)."""
    core = table[table["intervention"] == "core"]
    return int(((holm(core["p"]) < LEVEL) & (core["logit"] < 0)).sum())


def falls(table: pd.DataFrame, means: pd.DataFrame) -> str:
    """Does the class's logit fall?"""
    n, classes = falling(table), int((table["intervention"] == "core").sum())
    some = f"Clearly so in {n} of {classes} classes" if n else "No, clearly so in no class"
    told = f"Yes, clearly so in all {classes} classes" if n == classes else some
    return (
        f"Does the logit fall when a class's core is deleted? {told} (t test over the class's rows, "
        "Holm, level "
        f"{LEVEL}): the mean change is {_range(pick(means, 'core', 'logit'))}, and the head keeps "
        f"{percent(pick(means, 'core', 'kept'))} of its accuracy on these images."
    )


def only_that_one(table: pd.DataFrame, matrix: pd.DataFrame, means: pd.DataFrame, names: Sequence[str]) -> str:
    """And only that one? By single logits on the class's images, and by what the head still knows of other classes.

    "Yes" takes: the own logit falls most in every class, no other logit falls clearly, and the other classes keep at
    least 99 % of their accuracy (lower end of the interval).
    """
    own = matrix[matrix["deleted"] == matrix["logit"]].set_index("deleted")["change"]
    rest = matrix[matrix["deleted"] != matrix["logit"]]
    most = int((own < rest.groupby("deleted")["change"].min()).sum())
    clear = (rest["p_holm"] < LEVEL) & (rest["change"] < 0)
    kept, core = pick(means, "core", "others_kept"), table[table["intervention"] == "core"]
    worst = core.loc[core["others_kept"].idxmin()]
    yes = most == len(own) and not clear.any() and kept["lo"] >= SPARED
    return (
        f"And only that one? {'Yes' if yes else 'No'}: it is the logit that falls most in {most} of {len(own)} "
        "classes; "
        f"of the {len(own) - 1} other logits, {clear.sum() / len(own):.1f} fall clearly, too, in the mean (Holm "
        "over all "
        f"cells). On images of the other classes the same deletion leaves the head {percent(kept)} of its "
        "accuracy, and "
        f"{100 * worst['others_kept']:.1f} % where *{names[int(worst['class'])]}* is deleted."
    )


def destination(table: pd.DataFrame, means: pd.DataFrame, names: Sequence[str]) -> str:
    """Where do the predictions go?"""
    core = table[(table["intervention"] == "core") & (table["to"] >= 0)]
    favourite = core["to"].value_counts()
    top = [names[int(c)] for c in favourite.index[:2]]
    share = favourite.iloc[:2].sum()
    return (
        f"Predictions change for {percent(pick(means, 'core', 'changed'))} of the images. Of these, "
        f"{percent(pick(means, 'core', 'runner_up'))} go to what the head had put second; the most frequent new "
        "class is "
        f"*{'* or *'.join(top)}* for {share} of {len(core)} deleted classes."
    )


def default(table: pd.DataFrame, empty: Sequence[int], names: Sequence[str]) -> str:
    """Classes that keep much of their accuracy without their core, beside what the head says of an empty code.

    ``empty``: classes (N,) that the head says with the whole code taken out.
    """
    core = table[table["intervention"] == "core"].set_index("class")["kept"]
    high = core[core > DEFAULT].sort_values(ascending=False)
    told = " and ".join(f"*{names[int(c)]}* {100 * share:.1f} %" for c, share in high.items())
    hidden = f"but {told}" if len(high) else f"and none more than {100 * DEFAULT:.0f} %"
    shares = pd.Series(np.asarray(empty)).value_counts(normalize=True)
    top = shares.iloc[: max(len(high), 1)]
    same = len(high) > 0 and set(top.index) == set(high.index)
    why = "They are the head's default" if same else "The default does not single out classes that keep their accuracy"
    return (
        f"The median class keeps {100 * core.median():.1f} %, {hidden}. {why}: with the whole code taken out, so "
        "that pre-bias, the SAE's error and the head's bias are left, "
        f"{100 * top.sum():.1f} % of all images are taken for "
        f"*{'* or *'.join(names[int(c)] for c in top.index)}*."
    )


def _than(row: Mapping, what: str) -> str:
    if row["hi"] < 0:
        more = {key: -row[end] for key, end in (("value", "value"), ("lo", "hi"), ("hi", "lo"))}
        return f"lowers the class's logit by {_range(more)} more than {what}"
    if row["lo"] > 0:
        return f"lowers the class's logit by {_range(row)} less than {what}"
    return f"shows no significant difference ({_range(row)}) from {what}"


def fair(against: pd.DataFrame, means: pd.DataFrame) -> str:
    """Without any stretching: all outside the core deleted, beside as much of the core.

    ``against``: two rows, ``of`` "part_first" and "part_random", control "outside_plain".
    """
    rows = against.set_index("of")
    told = [
        f"{what} {_than(rows.loc[of], 'this')}, significantly so in {rows.loc[of, 'larger']} of "
        f"{rows.loc[of, 'classes']} classes, and leaves {percent(pick(means, of, 'kept'))}"
        for of, what in (
            ("part_random", "in random order"),
            ("part_first", "with the profile's first latents first, it"),
        )
    ]
    return (
        "*Plain deletions of equal energy.* Deleting all active latents outside the core changes the class's logit by "
        f"{_range(pick(means, 'outside_plain', 'logit'), digits=2)} and leaves "
        f"{percent(pick(means, 'outside_plain', 'kept'))} of the accuracy on the class. Deleting as much of the core "
        f"{told[0]}; {told[1]}. No value is stretched here, and no latent is in both sets; the energy is that of all "
        "outside (of the whole core, where that holds less), "
        f"{pick(means, 'outside_plain', 'energy')['value']:.0f} against "
        f"{pick(means, 'core', 'energy')['value']:.0f} of the whole core."
    )


def controls(drawn: pd.DataFrame, means: pd.DataFrame) -> list[str]:
    """One sentence a stretched control of which there are many: :func:`~.causal_effects.over_draws`."""
    told = []
    for row in drawn.to_dict("records"):
        name, n = row["control"], row["classes"]
        wins = f"in {100 * row['wins']:.1f} % of the {row['pairs']} pairs of class and draw the control lowers it more"
        specific = ": there, the core is not the specific one" if row["wins"] >= 0.05 else ""
        told.append(
            f"*{_SHORT[name].capitalize()}*, stretched to the core's energy: the core {_than(row, 'they do')}. "
            f"Significantly more in {row['larger']} of {n} classes, less in {row['smaller']} (t test over the draws, "
            f"Holm); {wins}{specific}. {percent(pick(means, name, 'shared'))} of the latents that the control touches "
            "are of the core itself."
        )
    return told


def stretched(against: pd.DataFrame, means: pd.DataFrame) -> str:
    """The active latents outside the core, stretched to the core's energy: no deletion."""
    row, factor = against.set_index("control").loc["outside"], pick(means, "outside", "stretch")["value"]
    what = (
        f"this is no deletion: in the median row values are turned to {1 - factor:.1f} times themselves"
        if factor > 1
        else "values are only damped"
    )
    return (
        f"*All outside the core, stretched to the core's energy* (factor {factor:.1f}): {what}. "
        f"The core {_than(row, 'it does')}."
    )


def bound(means: pd.DataFrame) -> str:
    """The core beside the head's own direction."""
    return (
        "Of what an equally long change of the CLS vector could take from the logit at most (along the head's own "
        f"direction), deleting the core takes {percent(pick(means, 'core', 'efficiency'))}. Projecting the "
        "class's head "
        f"direction out changes the logit by {_range(pick(means, 'head_projection', 'logit'))} with a squared "
        "length of "
        f"{pick(means, 'head_projection', 'energy')['value']:.0f} against "
        f"{pick(means, 'core', 'energy')['value']:.0f}, and "
        f"leaves {percent(pick(means, 'head_projection', 'others_kept'))} of the other classes' accuracy: what a cut "
        "that knows the head can do."
    )


def error_term(means: pd.DataFrame) -> str:
    """The variant without the SAE's error."""
    with_, without = (pick(means, name, "logit") for name in ("core", "core_no_error"))
    return (
        f"With the SAE's error left out, the logit changes by {_range(without)} in place of {_range(with_)}: the "
        "difference is not the deletion's doing, but the error's."
    )


def sufficiency(curves: pd.DataFrame) -> str:
    """How many latents keep 90 % of the head's accuracy."""

    def number(order, test="sufficiency"):
        found, largest = enough(curves, order, test), int(curves["n"].max())
        return f"{found['n']} ({inside(found)})" if found else f"more than {largest}"

    def inside(cell):
        return percent(cell).replace(" (", ", ").rstrip(")")

    least, union = curves[(curves["n"] == 0) & (curves["test"] == "sufficiency")], enough(curves, "union")
    together = f"{union['n']} a class ({inside(union)}), {union['latents']:.0f} in all" if union else "more than tried"
    empty = least[(least["measure"] == "accuracy") & (least["order"] == "cap")].iloc[0]
    claimed = curves[(curves["measure"] == "claimed") & (curves["n"] > 0)]
    most = claimed.loc[claimed["value"].idxmax()]
    return (
        "Latents needed to keep 90 % of the head's accuracy, with the whole 95 % interval above it: by the predicted "
        f"class's profile {number('cap')}; without the SAE's error {number('cap', 'sufficiency, no error')}; by direct "
        f"logit attribution {number('attribution')}; at random {number('random')}; by another class's profile "
        f"{number('other')}. One set for all images, whatever the head says of them: {together}. With no latent at "
        f"all: {percent(empty)} of the accuracy. Keeping another class's latents makes the head claim that class in at "
        f"most {percent(most)} of the images (n = {int(most['n'])}): kept latents do not make the prediction alone."
    )


def necessity(curves: pd.DataFrame) -> str:
    """How many latents must go until 10 % of the accuracy are left, and what one costs."""
    accuracy = curves[(curves["test"] == "necessity") & (curves["measure"] == "accuracy")]
    one = accuracy[(accuracy["order"] == "cap") & (accuracy["n"] == 1)].iloc[0]
    largest = int(curves["n"].max())
    told = []
    for order, name in (("cap", "profile"), ("attribution", "direct logit attribution"), ("random", "random order")):
        found = enough(curves, order, "necessity")
        told.append(f"{found['n'] if found else f'more than {largest}'} by {name}")
    return (
        f"Deleting the first latent alone leaves {percent(one)} of the accuracy. Until no more than a tenth is "
        "left (upper end of the interval), it "
        f"takes {', '.join(told)}."
    )


def harm(frontier: pd.DataFrame) -> str:
    """What the first few latents of a core do to the class and to the others, beside the whole core."""
    deleted = frontier[frontier["method"] == "deletion"]
    means, most = deleted.groupby("n")["fall"].mean(), int(deleted["n"].max())
    n = int(means.index[(means >= means[most] / 2).to_numpy().argmax()])
    few, whole = (
        {key: class_interval(part[key].to_numpy()) for key in ("fall", "others_kept")}
        for part in (deleted[deleted["n"] == n], deleted[deleted["n"] == most])
    )
    return (
        f"Deleting the first {n} of a core's {most} latents lowers the logit by {_range(few['fall'])}, deleting all "
        f"of them by {_range(whole['fall'])}. With the first {n} deleted, the other classes keep "
        f"{percent(few['others_kept'])} of their accuracy, and "
        f"{percent(whole['others_kept'])} with the whole core deleted."
    )


def transplant(pairs: pd.DataFrame) -> str:
    """Whether another class's core profile makes the head see that class, and more than what is as long."""
    found = transplant_means(pairs)
    clear = "is" if found["over deleted"]["lo"] > 0 else "is not"
    beyond = found["over shuffled"]["lo"] > 0
    latents = "The latents count, not the length alone" if beyond else "The latents do no more than the length alone"
    more = "more" if found["over reordered"]["lo"] > 0 else "not significantly more"
    return (
        f"Where a core profile is transplanted, the other class {clear} predicted more often: for "
        f"{percent(found['predicted'])} of the images over all pairs, against {percent(found['deleted'])} where both "
        f"cores are only taken out. Of changes of the same length, its top 2 latents alone do so for "
        f"{percent(found['top2'])}, its values shuffled within the core for {percent(found['reordered'])}, its values "
        f"on random latents outside the core for {percent(found['shuffled'])}. {latents}; within the core, the "
        f"profile's own proportions do {more} than shuffled ones. This is close to a tautology: a class mean of the "
        "rows the probe was "
        "fitted on is shown to that probe."
    )


def steering(data: pd.DataFrame, shares: pd.DataFrame) -> str:
    """What amplifying a class's core does, in its own images and in others (:func:`~.causal_effects.core_shares`)."""
    top = data["alpha"].max()

    def at(rows, measure, alpha, series="core"):
        chosen = (data["rows"] == rows) & (data["measure"] == measure) & (data["series"] == series)
        return data[chosen & np.isclose(data["alpha"], alpha)].iloc[0]

    own, elsewhere = "of the class", "of other classes"
    gap = at(own, "margin", top, "difference")
    word = "no significant difference"
    if gap["lo"] > 0 or gap["hi"] < 0:
        word = "more" if gap["lo"] > 0 else "less"
    before, after = at(elsewhere, "predicted", 1.0), at(elsewhere, "predicted", top)
    there = at(elsewhere, "margin", 1.0), at(elsewhere, "margin", top)
    away = there[1]["hi"] < there[0]["lo"]
    steers = "steers away from the class" if away else "does not steer away from the class"
    part = shares[shares["rows"] == elsewhere]
    return (
        f"Amplified {top:g} times, the core takes the class's margin over the best other logit from "
        f"{_range(at(own, 'margin', 1.0))} to {_range(at(own, 'margin', top))} in the class's own images, random "
        f"active latents of equal energy to {_range(at(own, 'margin', top, 'random'))}; paired by class, {word}: "
        f"{_range(gap)}. In images of other classes, "
        f"{100 * part['latents'].mean():.1f} % of the active latents (up to {100 * part['latents'].max():.1f} %) and "
        f"{100 * part['squares'].mean():.1f} % of the squared code values (up to {100 * part['squares'].max():.1f} %, "
        "by class) lie in the core. Amplifying them there "
        f"{steers}: the margin goes from {_range(there[0])} to {_range(there[1])}, and {percent(before)} of these "
        f"images are taken for it before, {percent(after)} after."
    )


def app(frontier: pd.DataFrame, means: pd.DataFrame) -> list[str]:
    """Attenuation via posterior probabilities beside deletion at the same fall of the logit, then beside the whole."""
    told = []
    for method in ("app_core", "app_all"):
        gap = at_equal_suppression(frontier, method)
        word = "spares the other classes more than" if gap["lo"] > 0 else "spares the other classes less than"
        word = word if gap["lo"] > 0 or gap["hi"] < 0 else "shows no significant difference in the other classes from"
        told.append(
            f"At the same fall of the class's logit, {TITLES[method]} {word} deleting the first few latents of the "
            f"profile: {_range(gap, 100, 2)} points of their accuracy. It changes the logit by "
            f"{_range(pick(means, method, 'logit'))} and keeps {percent(pick(means, method, 'others_kept'))} of the "
            f"others' accuracy; the whole core's deletion ({_range(pick(means, 'core', 'logit'))}, "
            f"{percent(pick(means, 'core', 'others_kept'))}) is a different suppression, not to be compared with it."
        )
    return told


def noticed(after: pd.DataFrame) -> str:
    """What EPD notices: the missing core beside every control, and by whether the prediction changed."""
    cells = after.set_index("intervention")
    rest = cells.drop(index="core")
    strong = rest["auroc"].idxmax()
    gap = rest.loc[strong]
    if gap["gap_lo"] > 0 or gap["gap_hi"] < 0:
        word = "more" if gap["gap_lo"] > 0 else "less"
        word = f"{word} than the strongest control, {TITLES[strong]}"
    else:
        word = f"with no significant difference from the strongest control, {TITLES[strong]}"
    listed = ", ".join(f"{TITLES[name]} {row['auroc']:.3f}" for name, row in rest.iterrows())
    flips = [
        f"{TITLES[n]} {r['auroc_same']:.3f} ({r['rows_same']:.0f} rows)"
        for n, r in cells.iterrows()
        if r["changed"] >= 0.5
    ]
    known = rest[rest["changed"] >= 0.5]["auroc_changed"]
    changed = (
        f"these controls {known.min():.3f} to {known.max():.3f}" if len(known) else "and no control changes as many"
    )
    most = int((rest["auroc"] >= 0.9).sum())
    return (
        "Encoded and classified anew, images without their core are told from untouched ones by EPD with an AUROC of "
        f"{cells.loc['core', 'auroc']:.3f} ({cells.loc['core', 'lo']:.3f} to {cells.loc['core', 'hi']:.3f}), {word}: "
        f"paired difference {gap['gap']:.3f} ({gap['gap_lo']:.3f} to {gap['gap_hi']:.3f}). The others: {listed}. "
        f"So EPD notices {'much' if most else 'little'} besides the core: {most} of {len(rest)} controls reach 0.9. "
        "Among interventions that change at least half of the predictions, where the prediction stayed: "
        f"{', '.join(flips)}. Where it changed, the core {cells.loc['core', 'auroc_changed']:.3f}, {changed}."
    )


def answer(means: pd.DataFrame, against: pd.DataFrame, drawn: pd.DataFrame, curves: pd.DataFrame) -> str:
    """Do they matter? Three sentences for the top of the page; ``against`` as in :func:`fair`."""
    row = against.set_index("of").loc["part_random"]
    yes = pick(means, "core", "logit")["hi"] < 0 and row["hi"] < 0
    other = drawn.set_index("control").loc["other_core"]
    spared = pick(means, "core", "others_kept")
    alone = "And it is theirs alone" if spared["lo"] >= SPARED and other["wins"] < 0.05 else "But not for it alone"
    few = enough(curves, "cap")
    return (
        f"{'Yes, the core matters for its class' if yes else 'That the core matters is not shown'}: its deletion "
        f"changes the class's logit by {_range(pick(means, 'core', 'logit'))}, and of plain deletions of equal energy, "
        f"one in the core {_than(row, 'one outside it')}. "
        f"{alone}: the other classes keep {percent(spared)} of their accuracy, and at equal energy the core of "
        f"another class lowers the logit more in {100 * other['wins']:.1f} % of the pairs. "
        + (
            f"Few latents carry a prediction: the first {few['n']} of the profile keep {percent(few)} of the head's "
            "accuracy."
            if few
            else "No number of latents that was tried keeps 90 % of the head's accuracy for sure."
        )
    )
