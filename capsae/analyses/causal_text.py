"""Causal check in words: every sentence is made from the tables, so that a test can hold it against them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from ..stats import holm
from .causal import TITLES
from .causal_curves import at_equal_suppression, enough, transplant_means
from .causal_effects import LEVEL, class_interval

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


def controls(against: pd.DataFrame, means: pd.DataFrame) -> list[str]:
    """One sentence a control of equal energy: whether the core's effect on the class's logit is the larger one."""
    told = []
    for row in against.to_dict("records"):
        name, n = TITLES[row["control"]], row["classes"]
        shared = pick(means, row["control"], "shared")
        own = percent(shared) if shared["value"] else "none"
        if row["hi"] < 0:
            word = f"lowers the class's logit by {-row['value']:.1f} ({-row['hi']:.1f} to {-row['lo']:.1f}) more than"
        elif row["lo"] > 0:
            word = f"lowers the class's logit by {row['value']:.1f} ({row['lo']:.1f} to {row['hi']:.1f}) less than"
        else:
            word = f"is not told apart ({_range(row)}) from"
        told.append(
            f"At equal energy, deleting the core {word} *{name}*: clearly more in {row['larger']} of {n} classes, "
            f"clearly less in {row['smaller']}. Of the latents that the control touches, {own} are of the core itself. "
            f"It leaves {percent(pick(means, row['control'], 'kept'))} of the accuracy on the class and "
            f"{percent(pick(means, row['control'], 'others_kept'))} on the others."
        )
    return told


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
        return f"{found['n']}" if found else f"more than {largest}"

    least, union = curves[(curves["n"] == 0) & (curves["test"] == "sufficiency")], enough(curves, "union")
    together = f"{union['n']} a class, {union['latents']:.0f} in all" if union else "more than were tried"
    empty = least[(least["measure"] == "accuracy") & (least["order"] == "cap")].iloc[0]
    return (
        f"To keep 90 % of the head's accuracy, the first {number('cap')} latents of the predicted class's "
        "profile suffice "
        f"({number('cap', 'sufficiency, no error')} without the SAE's error); ordered by profile x head "
        f"{number('attribution')}, at random {number('random')}, by another class's profile {number('other')}. "
        "With one "
        f"set of latents for all images, whatever the head says of them: {together}. With no latent at all: "
        f"{percent(empty)} of the accuracy."
    )


def necessity(curves: pd.DataFrame) -> str:
    """How many latents must go until 10 % of the accuracy are left, and what one costs."""
    accuracy = curves[(curves["test"] == "necessity") & (curves["measure"] == "accuracy")]
    one = accuracy[(accuracy["order"] == "cap") & (accuracy["n"] == 1)].iloc[0]
    largest = int(curves["n"].max())
    told = []
    for order, name in (("cap", "profile"), ("attribution", "profile x head"), ("random", "random order")):
        found = enough(curves, order, "necessity")
        told.append(f"{found['n'] if found else f'more than {largest}'} by {name}")
    return (
        f"Deleting the first latent alone leaves {percent(one)} of the accuracy. Until no more than a tenth is "
        "left, it "
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
        f"Half of the whole core's fall of {_range(whole['fall'])} takes the first {n} of its {most} latents: "
        f"{_range(few['fall'])}. The other classes then keep {percent(few['others_kept'])} of their accuracy, and "
        f"{percent(whole['others_kept'])} with the whole core deleted."
    )


def transplant(pairs: pd.DataFrame) -> str:
    """Whether another class's core profile makes the head see that class."""
    found = transplant_means(pairs)
    clear = "does" if found["gain"]["lo"] > 0 else "does not"
    return (
        f"A transplanted core profile {clear} make the head see the other class: over all pairs, "
        f"{percent(found['predicted'])} of the images are then taken for it, against {percent(found['deleted'])} where "
        f"both cores are only taken out and {percent(found['before'])} untouched."
    )


def steering(data: pd.DataFrame) -> str:
    """What amplifying a class's core does, in its own images and in others."""
    top = data["alpha"].max()

    def at(rows, measure, alpha, series="core"):
        chosen = (data["rows"] == rows) & (data["measure"] == measure) & (data["series"] == series)
        return data[chosen & np.isclose(data["alpha"], alpha)].iloc[0]

    own, elsewhere = "of the class", "of other classes"
    before, after = at(elsewhere, "predicted", 1.0), at(elsewhere, "predicted", top)
    more = after["lo"] > before["hi"]
    seen = "more images are then taken for the class" if more else "hardly more images are then taken for the class"
    return (
        f"Amplified {top:g} times, the core takes the class's margin over the best other logit from "
        f"{_range(at(own, 'margin', 1.0))} to {_range(at(own, 'margin', top))} in the class's own images, random "
        f"active latents of equal energy to {_range(at(own, 'margin', top, 'random'))}. Of the images of other "
        f"classes, where little of the core is active, {seen}: {percent(before)} before, {percent(after)} after."
    )


def app(frontier: pd.DataFrame, means: pd.DataFrame) -> list[str]:
    """Attenuation via posterior probabilities beside full deletion, and at the same fall of the class's logit."""
    told = []
    for method in ("app_core", "app_all"):
        gap = at_equal_suppression(frontier, method)
        word = "spares the other classes more than" if gap["lo"] > 0 else "spares the other classes less than"
        word = word if gap["lo"] > 0 or gap["hi"] < 0 else "is not told apart, in what it costs the other classes, from"
        told.append(
            f"{TITLES[method]} changes the logit by {_range(pick(means, method, 'logit'))}, full deletion by "
            f"{_range(pick(means, 'core', 'logit'))}; the other classes keep "
            f"{percent(pick(means, method, 'others_kept'))} against {percent(pick(means, 'core', 'others_kept'))}. At "
            f"the same fall of the logit, it {word} deleting the first few latents of the profile: "
            f"{_range(gap, 100, 2)} points of their accuracy."
        )
    return told


def noticed(after: pd.DataFrame) -> str:
    """Whether EPD tells images without core from untouched ones."""
    cells = after.set_index("intervention")
    core, outside = cells.loc["core"], cells.loc["outside"]
    apart = core["lo"] > outside["hi"]
    return (
        "Encoded and classified anew, images without their core are told from untouched ones by EPD with an AUROC of "
        f"{percent(core.rename({'auroc': 'value'}))}; with as much energy taken from outside the core "
        f"{percent(outside.rename({'auroc': 'value'}))}. EPD {'does' if apart else 'does not'} notice the core more."
    )
