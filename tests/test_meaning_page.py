"""Sentences of the chapter on what latents mean: both outcomes of each; the published tables against each other."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from capsae import display, plan, publish
from capsae.analyses import meaning, meaning_figures, meaning_tables, neighbours
from capsae.analyses import meaning_verdicts as verdicts

PAGES = [f"{profile}/13_meaning" for profile in plan.ANALYSES["13_meaning"]]


def _shares(named=0.2, synset=0.1, narrow=0.05):
    values = {"class": named - synset, "synset": synset, "none": 1 - named, "rare": 0.0, "dead": 0.0}
    values |= {"named": named, "narrow": narrow}
    rows = [("SAE codes", kind, v, v - 0.01, v + 0.01) for kind, v in values.items()]
    rows += [("random dictionary", kind, 0.1 * (synset > 0), 0.09, 0.11) for kind in values]
    return pd.DataFrame(rows, columns=["dictionary", "kind", "value", "lo", "hi"])


def test_naming_and_how_broad_names_are():
    told = verdicts.naming(_shares(), "x")
    assert told.startswith("Most latents do not have a name on x: the classes that hold 80 % of a latent's summed")
    assert "10.0 % (9.0 to 11.0) of the latents the name of one class and 10.0 % (9.0 to 11.0) that of a" in told
    assert told.endswith("5.0 % (4.0 to 6.0) have a name of classes with at most 25 % of the images.")
    many = verdicts.naming(_shares(named=0.7, synset=0.0), "x")
    assert many.startswith("Most latents have a name on x") and "synset" not in many and many.endswith("one class.")
    counts = pd.DataFrame({"name": ["animal", "dog"], "latents": [3, 1], "base": [0.6, 0.1]})
    broad = verdicts.synsets(counts, top=1)
    assert broad.startswith("Most names of synsets tell little: 3 of 4 are of classes with more than 25 %")
    assert broad.endswith("the most frequent, animal (3), are 75 % of all.")
    assert verdicts.synsets(counts.assign(base=[0.2, 0.6])).startswith("Not most names of synsets tell little: 1 of 4")
    assert verdicts.synsets(counts[:0]) == "No latent has the name of a synset."


def test_thresholds_selectivity_and_the_check():
    def table(*gaps):
        rows = [("SAE", h, "named", np.nan, np.nan, np.nan) for h in (0.5, 0.9)]
        rows += [("random", h, "named", g, g - 0.05, g + 0.05) for h, g in zip((0.5, 0.9), gaps, strict=True)]
        gap = ["difference", "difference_lo", "difference_hi"]
        return pd.DataFrame(rows, columns=["dictionary", "hold", "kind", *gap])

    more = verdicts.holds(table(0.1, 0.2), "random")
    assert more.startswith("More latents have a name among the SAE than in the random: more at 50 % (+10.0 points")
    assert verdicts.holds(table(-0.1, -0.2), "random").startswith("Fewer latents have a name among the SAE")
    same = verdicts.holds(table(0.01, 0.04), "random")
    assert same.startswith("No significant difference between the SAE and the random in how many latents have a name")
    # Points of one sign with intervals that hold 0 are no order.
    mixed = verdicts.holds(table(0.01, 0.2), "random")
    assert "depends on the threshold: no significant difference at 50 %" in mixed and "more at 90 %" in mixed
    classes = table(-0.1, 0.2).assign(kind="class")
    assert "have the name of one class among" in verdicts.holds(classes, "random", "class")
    few = verdicts.selective([0], 1)
    assert few.startswith("1 of 1 latents") and "may still depend on the classes" in few
    assert "most latents are not shown" in verdicts.selective([0.01, np.nan, 0.5], 3)

    def summary(lift_lo, n=9, narrow=4):
        cells = {"precision": (0.8, 0.7, 0.9), "base": (0.3, 0.2, 0.4), "lift": (0.5, lift_lo, 0.6)}
        cells["recall"] = (0.1,) * 3
        rows = [(kind, key, *v, k) for kind, k in (("named", n), ("narrow", narrow)) for key, v in cells.items()]
        return pd.DataFrame(rows, columns=["kind", "measure", "value", "lo", "hi", "latents"])

    told = verdicts.checked(summary(0.4), "x")
    assert told.startswith("The names hold")
    assert "80.0 % (70.0 to 90.0), chance being 30.0 % (lift +50.0 points, +40.0 to +60.0); for the 4 names of" in told
    assert "for the" not in verdicts.checked(summary(0.4, narrow=9), "x")
    assert verdicts.checked(summary(-0.1), "x").startswith("The names are not shown to hold")
    assert verdicts.checked(summary(0.1, 0), "x").startswith("No latent with a name fires")


def test_two_sets_in_words():
    row = {"set": "far/b", "alive": 60, "tested": 50, "differs": 7, "more_a": 3, "more_b": 4, "largest": 0.314}
    assert verdicts.differs(row, "test").startswith("7 of 50 latents tested fire more or less often in far/b than in")
    assert "4 more, 3 less often; the largest difference is 31 points" in verdicts.differs(row, "test")
    assert verdicts.differs(row | {"differs": 0}, "test").startswith("No latent is found to fire")
    fine = pd.DataFrame({"found": [0] * 40, "below": 0.02})
    told = verdicts.calibrated(fine, "test")
    assert "0 of 40 splits, 0.0 % (0.0 to 8.8 if splits were independent), compatible with the 5 %" in told
    wrong = verdicts.calibrated(fine.assign(found=[1] * 20 + [0] * 20), "test")
    assert "more often than the 5 % that the rate allows, so the correction fails here" in wrong
    named = {"set": ["p", "q"], "more_a": [10, 10], "more_b": [10, 5], "named_a": [5, 1], "named_b": [1, 1]}
    told = verdicts.newcomers(pd.DataFrame(named), "test")
    assert "in 1 of 2 sets (10.0 to 20.0 % against 10.0 to 50.0 %)" in told and "it does not test" in told
    assert verdicts.newcomers(pd.DataFrame(named).assign(more_b=0), "test").startswith("No set has both")
    shown = meaning_tables.by_set(pd.DataFrame(named), "test")
    assert shown.iloc[0].tolist() == ["p", "5 of 10 (50.0 %)", "1 of 10 (10.0 %)"]


def test_together_and_beside_in_words():
    alone, within = {"latents": 9, "pairs": 36, "found": 20, "share": 20 / 36}, {"found": 4}
    told = verdicts.together(alone, within, {"found": 0}, 0.6)
    assert "20 of 36 pairs of latents (55.56 %)" in told and "; 4 pairs remain detectable within classes (0 " in told
    assert "classes account for 60 %" in told and "explain" not in told
    assert "; No pair" not in verdicts.together(alone, {"found": 0}, {"found": 0}, 1.0)
    assert "no pair is detectable within classes" in verdicts.together(alone, {"found": 0}, {"found": 0}, 1.0)
    assert verdicts.together(alone | {"found": 0}, within, within, 0.5).startswith("No two of 9 latents")
    for (lo, ari, hi), word in (
        ((0.7, 0.8, 0.9), "together follow the"),
        ((0.0, 0.1, 0.15), "hardly follow"),
        ((0.4, 0.5, 0.7), "follow in part"),
    ):
        assert word in verdicts.followed({"ari": ari, "lo": lo, "hi": hi}, 3)
    rows = pd.DataFrame(
        {
            "representation": "CLS",
            "measure": ["map", "ari", "nmi", "purity"],
            "difference": [0.01, -0.05, 0.0, 0.01],
            "difference_lo": [0.005, -0.1, -0.1, -0.1],
            "difference_hi": [0.02, -0.01, 0.1, 0.1],
        }
    )
    assert verdicts.beside(rows, "SAE codes") == (
        "SAE codes against CLS: better by mean average precision (+1.0 points, +0.5 to +2.0); worse by adjusted Rand "
        "index (-5.0 points, -10.0 to -1.0); no significant difference in normalised mutual information (+0.0 points, "
        "-10.0 to +10.0), purity (+1.0 points, -10.0 to +10.0)."
    )


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_figures_and_tables_are_drawn(theme):
    contrast = pd.DataFrame({"difference": [0.1, -0.2, 0.0], "q": [1e-9, 1e-3, np.nan], "more": ["B", "A", ""]})
    with display.style(theme):
        figure = meaning_figures.volcano(contrast, "test", "far/textures")
        assert [text.get_text() for text in figure.legends[0].get_texts()][1:] == [
            "more often in test (1)",
            "more often in textures (1)",
        ]
        assert display.render_png(figure)[:4] == b"\x89PNG"
    shown = meaning_tables.shares(_shares())
    assert len(meaning_tables.shares(_shares(synset=0.0))) == 4
    assert shown.shape == (7, 3) and shown.iloc[0, 1] == "10.0 (9.0 to 11.0)"


# --- what is published


@pytest.fixture(params=PAGES)
def page(request):
    path = publish.path_of(request.param)
    if not path.is_file():
        pytest.fail(f"{request.param} is not published")
    data = path.parent / "data" / path.stem
    tables = {file.stem: pd.read_csv(file, keep_default_na=True) for file in data.glob("*.csv")}
    return publish.results(request.param), tables, path, request.param.split("/")[0]


def test_published_tables_agree_with_each_other_and_with_what_was_recorded(page):
    """Numbers against numbers; sentences are made before the CSVs are rounded, and so are not compared with them."""
    found, tables, _, _ = page
    contrast = tables["contrast"]
    row = tables["by_set"].set_index("set").loc[found["compared"]]
    assert (contrast["more"] == "B").sum() == row["more_b"] and (contrast["more"] == "A").sum() == row["more_a"]
    assert (tables["by_set"]["more_a"] + tables["by_set"]["more_b"] == tables["by_set"]["differs"]).all()
    pairs = tables["pairs"]
    assert pairs["z"].is_monotonic_decreasing and (pairs["q"] <= meaning.FDR).all()
    # The csv rounds both.
    assert pairs["z"].to_numpy() == pytest.approx(((pairs["together"] - pairs["expected"]) / pairs["sd"]), rel=1e-3)


def test_published_names_are_those_of_their_rows(page):
    _, tables, _, _ = page
    names, latents = tables["names"], tables["selectivity"].astype({"name": object}).fillna({"name": ""})
    assert set(names["latent"]) <= set(latents.loc[latents["name"] != "", "latent"])
    assert latents["kind"].isin(meaning.KINDS).all()
    share = tables["shares"].set_index(["dictionary", "kind"]).loc[(neighbours.SAE, "named"), "value"]
    assert (latents["name"] != "").mean() == pytest.approx(share, abs=1e-5)
    narrow = tables["shares"].set_index(["dictionary", "kind"]).loc[(neighbours.SAE, "narrow"), "value"]
    found = (latents["name"] != "") & (latents["base"] <= meaning.BROAD)
    assert found.mean() == pytest.approx(narrow, abs=1e-5)


def test_images_stand_only_where_they_may_be_shown(page):
    _, _, path, profile = page
    shown = plan._profile(profile).show_images
    assert ("fig-top_images" in json.dumps(plan.read_notebook(path))) == shown
