"""Sentences of the chapter on what latents mean: both outcomes of each, and the published pages against their CSVs."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from capsae import display, plan, publish
from capsae.analyses import meaning, meaning_figures, meaning_tables, neighbours
from capsae.analyses import meaning_verdicts as verdicts

PAGES = [f"{profile}/13_meaning" for profile in plan.ANALYSES["13_meaning"]]


def _shares(gap, lo, hi, named=0.2, synset=0.1):
    values = {"class": named - synset, "synset": synset, "none": 1 - named, "rare": 0.0, "dead": 0.0, "named": named}
    rows = [("SAE codes", kind, v, v - 0.01, v + 0.01, np.nan, np.nan, np.nan) for kind, v in values.items()]
    rows += [("random dictionary", kind, 0.1, 0.09, 0.11, gap, lo, hi) for kind in values]
    gaps = ["difference", "difference_lo", "difference_hi"]
    return pd.DataFrame(rows, columns=["dictionary", "kind", "value", "lo", "hi", *gaps])


def test_naming_and_its_control():
    told = verdicts.naming(_shares(0.1, 0.05, 0.15), "x")
    assert told.startswith("Most latents do not have a name on x: the classes that hold 80 %")
    assert (
        "10.0 % (9.0 to 11.0) of the latents the name of one class, 10.0 % (9.0 to 11.0) that of a synset; 80.0 %"
        in told
    )
    many = verdicts.naming(_shares(0.1, 0.05, 0.15, named=0.7, synset=0.0), "x")
    assert many.startswith("Most latents have a name on x") and "synset" not in many
    for gap, word in (((0.1, 0.05, 0.15), "More latents"), ((-0.1, -0.2, -0.05), "Fewer latents")):
        assert verdicts.against(_shares(*gap), "random dictionary").startswith(
            f"{word} have a name among the SAE codes"
        )
    assert verdicts.against(_shares(0.0, -0.1, 0.1), "random dictionary").startswith("Neither clearly more nor fewer")


def test_thresholds_selectivity_and_the_check():
    def table(values):
        rows = [("SAE", h, "named", v) for h, v in zip((0.5, 0.9), values, strict=True)]
        rows += [("random", h, "named", 0.2) for h in (0.5, 0.9)]
        return pd.DataFrame(rows, columns=["dictionary", "hold", "kind", "value"])

    assert "at every threshold" in verdicts.holds(table([0.3, 0.3]), "random")
    assert verdicts.holds(table([0.1, 0.2]), "random").startswith("At no threshold")
    assert "at 90 % of the energy, not at 50 %" in verdicts.holds(table([0.1, 0.3]), "random")
    assert verdicts.selective([0.01, 0.02, 0.5], 3).startswith(
        "2 of 3 latents"
    ) and "so having no name" in verdicts.selective([0], 1)
    assert "most latents are not shown" in verdicts.selective([0.01, np.nan, 0.5], 3)

    def summary(lift_lo, recall, n=9):
        cells = {
            "precision": (0.8, 0.7, 0.9),
            "base": (0.3, 0.2, 0.4),
            "lift": (0.5, lift_lo, 0.6),
            "recall": (recall,) * 3,
        }
        rows = [("named", key, *v, n) for key, v in cells.items()]
        return pd.DataFrame(rows, columns=["kind", "measure", "value", "lo", "hi", "latents"])

    told = verdicts.checked(summary(0.4, 0.1), "x")
    assert told.startswith("The names hold") and "80.0 % (70.0 to 90.0), 30.0 % being chance; but a name" in told
    assert verdicts.checked(summary(-0.1, 0.9), "x").startswith("The names are not shown to hold")
    assert "; and it fires on 90.0 %" in verdicts.checked(summary(-0.1, 0.9), "x")
    assert verdicts.checked(summary(0.1, 0.1, 0), "x").startswith("No latent with a name fires")


def test_two_sets_in_words():
    row = {"set": "far/b", "n_b": 9, "alive": 50, "differs": 7, "more_a": 3, "more_b": 4, "largest": 0.314}
    assert verdicts.differs(row, "test").startswith("7 of 50 latents fire more or less often in far/b than in test")
    assert "4 more, 3 less often; the largest difference is 31 points" in verdicts.differs(row, "test")
    assert verdicts.differs(row | {"differs": 0}, "test").startswith("No latent is found to fire")
    fine = pd.DataFrame({"found": [0] * 39 + [2], "below": 0.02})
    assert "in 1 of 40 splits, as the rate promises" in verdicts.calibrated(fine, "test")
    assert "so the correction fails here" in verdicts.calibrated(fine.assign(found=[1] * 20 + [0] * 20), "test")

    def table(more):
        return pd.DataFrame({"latent": range(len(more)), "more": list(more)})

    named = np.array([True] * 30 + [False] * 30)
    assert "have a name less often" in verdicts.newcomers(table("A" * 30 + "B" * 30), named, "a", "b")
    assert "have a name more often" in verdicts.newcomers(table("B" * 30 + "A" * 30), named, "a", "b")
    assert "neither clearly more nor less often" in verdicts.newcomers(table("AB" * 30), named, "a", "b")
    assert verdicts.newcomers(table("A" * 60), named, "a", "b").startswith("Not both")


def test_together_and_beside_in_words():
    alone, within = {"latents": 9, "pairs": 36, "found": 20, "share": 20 / 36}, {"found": 4}
    told = verdicts.together(alone, within, {"found": 0})
    assert "20 of 36 pairs of latents (55.56 %)" in told and "Classes explain most of it: 4 pairs" in told
    assert "explain less than half of it: 15 pairs" in verdicts.together(alone, {"found": 15}, {"found": 0})
    assert verdicts.together(alone | {"found": 0}, within, within).startswith("No two of 9 latents")
    for (lo, ari, hi), word in (
        ((0.7, 0.8, 0.9), "together follow the"),
        ((0.0, 0.1, 0.15), "hardly follow"),
        ((0.4, 0.5, 0.7), "follow in part"),
    ):
        assert word in verdicts.followed({"ari": ari, "lo": lo, "hi": hi}, 3)
    row = {"representation": "CLS", "measure": "map", "difference": 0.01, "difference_lo": 0.005, "difference_hi": 0.02}
    better = verdicts.beside(row, "SAE codes")
    assert better == "Retrieval is better on SAE codes than on CLS: mean average precision +1.0 points (+0.5 to +2.0)."
    assert "worse on" in verdicts.beside(row | {"difference_lo": -0.1, "difference_hi": -0.01}, "SAE codes")
    open_ = verdicts.beside(row | {"measure": "nmi", "difference_lo": -0.1}, "SAE codes")
    assert open_.startswith("k-means finds the classes neither clearly better nor worse on")


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
    shown = meaning_tables.shares(_shares(0.1, 0.05, 0.15))
    assert shown.shape == (6, 3) and shown.iloc[0, 1] == "10.0 (9.0 to 11.0)"


# --- what is published


@pytest.fixture(params=PAGES)
def page(request):
    path = publish.path_of(request.param)
    if not path.is_file():
        pytest.fail(f"{request.param} is not published")
    data = path.parent / "data" / path.stem
    tables = {file.stem: pd.read_csv(file, keep_default_na=True) for file in data.glob("*.csv")}
    return publish.results(request.param), tables, path, request.param.split("/")[0]


def test_published_sentences_say_what_the_published_tables_say(page):
    found, tables, _, profile = page
    told, shares = found["verdicts"], tables["shares"]
    assert told["naming"] == verdicts.naming(shares, profile)
    assert told["random"] == verdicts.against(shares, neighbours.RANDOM)
    assert told["holds"] == verdicts.holds(tables["names_by_hold"], neighbours.RANDOM)
    assert told["checked"] == verdicts.checked(tables["names_checked"], profile)
    assert told["selective"] == verdicts.selective(tables["selectivity"]["q"], found["latents"])
    for sentence, row in zip(told["differs"], tables["by_set"].to_dict("records"), strict=True):
        start, largest = sentence.split("; the largest difference is ")  # 42.5 points may round either way
        assert verdicts.differs(row, "test").startswith(start)
        assert float(largest.split()[0]) == pytest.approx(100 * row["largest"], abs=0.51)
    contrast = tables["contrast"].fillna({"more": "", "name": ""})
    named = np.zeros(found["latents"], bool)
    named[contrast["latent"]] = contrast["name"] != ""
    assert told["newcomers"] == verdicts.newcomers(contrast, named, "test", found["compared"])
    row = tables["by_set"].set_index("set").loc[found["compared"]]
    assert (contrast["more"] == "B").sum() == row["more_b"] and (contrast["more"] == "A").sum() == row["more_a"]
    assert told["together"] == verdicts.together(**found["pairs"])
    assert told["followed"] == verdicts.followed(found["followed"], int(tables["groups"]["class"].nunique()))
    both = pd.concat([tables["retrieval"], tables["clusters"][tables["clusters"]["measure"] == "nmi"]])
    rows = both[both["representation"] != neighbours.SAE].to_dict("records")
    assert told["beside"] == [verdicts.beside(row, neighbours.SAE) for row in rows]


def test_published_names_are_those_of_their_rows(page):
    _, tables, _, _ = page
    names, latents = tables["names"], tables["selectivity"].fillna({"name": ""})
    assert set(names["latent"]) <= set(latents.loc[latents["name"] != "", "latent"])
    assert latents["kind"].isin(meaning.KINDS).all()
    share = tables["shares"].set_index(["dictionary", "kind"]).loc[(neighbours.SAE, "named"), "value"]
    assert (latents["name"] != "").mean() == pytest.approx(share, abs=1e-5)


def test_images_stand_only_where_they_may_be_shown(page):
    _, _, path, profile = page
    shown = plan._profile(profile).show_images
    assert ("fig-top_images" in json.dumps(plan.read_notebook(path))) == shown
