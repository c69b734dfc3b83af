"""What latents mean, for a run: all tables of the chapter, and the numbers of its findings."""

from __future__ import annotations

from types import SimpleNamespace

import pandas as pd

from capsae.latents import contrast
from capsae.latents import naming as meaning
from capsae.pipeline.latents import of_run
from capsae.stats import exact_interval

from ...figures import tidy
from ...findings import Chapter, Numbers
from . import neighbours, together

COMPARED = ("far/textures", "near/letters")  # the set whose latents are shown one by one, the first that there is


def page(run) -> tuple[Chapter, SimpleNamespace, Numbers]:
    """What the notebook needs: its captions and findings, all tables, and the numbers."""
    train, test, names = run.features("train"), run.features("test"), tidy.class_names(run)
    codes, sets, n = run.codes("train"), neighbours.representations(run), len(names)
    named, taxonomy = of_run(run), meaning.taxonomy_of(train.class_names)
    dictionaries = {name: sets[name][0] for name in (neighbours.SAE, neighbours.RANDOM)}
    holds = meaning.over_holds(dictionaries, train.labels, names, taxonomy)
    each, checked = meaning.check_names(named, run.codes("test"), test.labels)
    alone, within = together.pairs(codes), together.pairs(codes, train.labels, n)
    null = together.pairs(together.shuffled(codes, train.labels, n), train.labels, n)
    groups, shares = together.communities(alone, n), meaning.posterior(run.caps)
    other = next((name for name in COMPARED if name in run.experiment.ood_sets), run.experiment.ood_sets[0])
    others = {name: run.codes(name) for name in run.experiment.ood_sets}
    table = contrast.compare(run.codes("test"), run.codes(other))
    found = SimpleNamespace(
        named=named, holds=holds, shares=holds[holds["hold"] == meaning.HOLD].dropna(subset="lo"),
        common=None if taxonomy is None else meaning.name_counts(named),
        q=meaning.false_discovery(meaning.permuted(codes, train.labels, n)), each=each, checked=checked,
        by_set=contrast.by_set(run.codes("test"), others, named=named.named), other=other,
        splits=contrast.halves(run.codes("test"), times=40),
        contrast=table.merge(named.table[["latent", "kind", "name", "classes"]], on="latent", how="left"),
        alone=together.found(alone), within=together.found(within), null=together.found(null),
        excess=together.excess(alone, within), followed=together.follow_classes(groups, shares),
        pairs=together.strongest(within, named.table), groups=together.group_classes(groups, shares, names),
        retrieved=neighbours.retrieve(sets, train.labels, test.labels),
        clusters=neighbours.judge(neighbours.cluster(sets, n), test.labels),
    )  # fmt: skip
    found.best = best(each)
    found.rows = meaning.top_rows(codes, found.best["latent"], train, names, n=8)
    found.rows["name"] = named.table["name"].to_numpy()[found.rows["latent"]]
    return Chapter("13_meaning", run), found, numbers(found)


def numbers(found: SimpleNamespace) -> Numbers:
    """What the chapter's findings rest on."""
    made, own = Numbers(), found.shares["dictionary"] == neighbours.SAE
    made.rows(found.shares[own], "share_{kind}", "%")
    for kind in ("named", "class"):
        rows = found.holds[(found.holds["dictionary"] == neighbours.RANDOM) & (found.holds["kind"] == kind)]
        made.rows(_gaps(rows).assign(at=(100 * rows["hold"]).round().astype(int)), f"{kind}_at_{{at}}", "points")
    if found.common is not None:
        made.add("synset_names", int(found.common["latents"].sum()))
        broad = found.common["base"] > meaning.BROAD
        made.add("broad_synset_names", int(found.common.loc[broad, "latents"].sum()))
    made.add("latents", len(found.q))
    made.add("selective_latents", int((found.q <= meaning.FDR).sum()))
    made.rows(found.checked[found.checked["measure"] != "lift"], "{measure}_{kind}", "%")
    made.rows(found.checked[found.checked["measure"] == "lift"], "lift_{kind}", "points")
    made.add("sets", len(found.by_set))
    made.add("sets_that_differ", int((found.by_set["differs"] > 0).sum()))
    share = (found.splits["found"] > 0).mean()
    made.add("halves_that_differ", share, *exact_interval(share, len(found.splits)), unit="%")
    of = found.by_set[(found.by_set["more_a"] > 0) & (found.by_set["more_b"] > 0)]
    made.add("sets_with_both", len(of))
    made.add("sets_with_fewer_names", int((of["named_b"] / of["more_b"] < of["named_a"] / of["more_a"]).sum()))
    for name in ("alone", "within", "null"):
        made.add(f"pairs_{name}", getattr(found, name))
    made.add("by_classes", found.excess, unit="%")
    made.add("groups_rand_index", **found.followed)
    both = pd.concat([found.retrieved, found.clusters])
    made.rows(_gaps(both[both["representation"] != neighbours.SAE]), "{measure}_less_{representation}", "points")
    return made


def _gaps(rows: pd.DataFrame) -> pd.DataFrame:
    """Differences and their intervals as value, lo, hi."""
    named = {"difference": "value", "difference_lo": "lo", "difference_hi": "hi"}
    return rows.drop(columns=["value", "lo", "hi"]).rename(columns=named)


def best(each: pd.DataFrame, top: int = 6) -> pd.DataFrame:
    """The latents of each kind whose name holds best by F1."""
    ordered = each.sort_values("f1", ascending=False, kind="stable")
    return pd.concat([part.head(top) for _, part in ordered.groupby("kind")])


def show_images(chapter: Chapter, found: SimpleNamespace) -> None:
    """The training images that drive each of the best named latents, where images may be shown."""
    from ...figures.figures import image_grid

    run, rows = chapter.run, found.rows
    if run.experiment.show_images:
        heading = rows["latent"].map("latent {}".format) + "\n" + rows["name"]
        grid = pd.DataFrame({"row": heading, "title": rows["activation"].map("{:.1f}".format)})
        chapter.show(image_grid, grid, "top_images", images=[run.image("train", row) for row in rows["row"]])
