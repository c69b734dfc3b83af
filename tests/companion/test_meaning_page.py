"""The page on what latents mean: the numbers of its findings, its tables and figures, and the published CSVs."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from capsae.latents import naming as meaning
from companion import findings
from companion.chapters.meaning import figures as meaning_figures
from companion.chapters.meaning import neighbours
from companion.chapters.meaning import study as meaning_study
from companion.chapters.meaning import tables as meaning_tables
from companion.figures import display
from companion.publish import plan, publish

PAGES = [f"{experiment}/13_meaning" for experiment in plan.ANALYSES["13_meaning"]]


def _shares(named=0.2, synset=0.1, narrow=0.05):
    values = {"class": named - synset, "synset": synset, "none": 1 - named, "rare": 0.0, "dead": 0.0}
    values |= {"named": named, "narrow": narrow}
    rows = [("SAE codes", kind, v, v - 0.01, v + 0.01) for kind, v in values.items()]
    rows += [("random dictionary", kind, 0.1 * (synset > 0), 0.09, 0.11) for kind in values]
    return pd.DataFrame(rows, columns=["dictionary", "kind", "value", "lo", "hi"])


def _tables(lift=0.5, recall=0.1, hits=0):
    """All tables that the numbers are taken from, made up."""
    gap = {"difference": 0.1, "difference_lo": 0.05, "difference_hi": 0.15, "value": 0.5, "lo": 0.4, "hi": 0.6}
    holds = [{"dictionary": name, "hold": hold, "kind": kind} | gap for name in (neighbours.SAE, neighbours.RANDOM)
             for hold in (0.5, 0.8) for kind in ("named", "class")]  # fmt: skip
    checked = [("named", "lift", lift, lift - 0.1, lift + 0.1), ("named", "precision", 0.8, 0.7, 0.9),
               ("named", "recall", recall, recall, recall)]  # fmt: skip
    by_set = {"set": ["p", "q"], "differs": [20, 0], "more_a": [10, 10], "more_b": [10, 5], "named_a": [5, 1]}
    names = (neighbours.SAE, "CLS", neighbours.RANDOM)
    measures = [{"representation": name, "measure": measure} | gap for name in names
                for measure in ("map", "precision")]  # fmt: skip
    clusters = [{"representation": "CLS", "measure": "ari"} | gap]
    return SimpleNamespace(
        shares=_shares().replace("SAE codes", neighbours.SAE), holds=pd.DataFrame(holds),
        common=pd.DataFrame({"name": ["animal", "dog"], "latents": [3, 1], "base": [0.6, 0.1]}),
        q=np.array([0.01, np.nan, 0.5]),
        checked=pd.DataFrame(checked, columns=["kind", "measure", "value", "lo", "hi"]),
        by_set=pd.DataFrame(by_set | {"named_b": [1, 1]}),
        splits=pd.DataFrame({"found": [1] * hits + [0] * (40 - hits)}),
        alone=20, within=4, null=0, excess=0.6, followed={"value": 0.5, "lo": 0.4, "hi": 0.7},
        retrieved=pd.DataFrame(measures), clusters=pd.DataFrame(clusters),
    )  # fmt: skip


def _marks(found):
    rows = findings.judge(findings.of_notebook("13_meaning"), meaning_study.numbers(found))
    return {row["key"]: row["mark"] for row in rows}


def test_numbers_of_the_findings_are_those_of_the_tables():
    found = _tables()
    numbers = meaning_study.numbers(found)
    assert {name for one in findings.of_notebook("13_meaning") for name in one.names} <= set(numbers)
    assert (numbers["share_named"].value, numbers["share_narrow"].value) == (20, 5)
    assert (numbers["broad_synset_names"].value, numbers["synset_names"].value) == (3, 4)
    assert (numbers["selective_latents"].value, numbers["latents"].value) == (1, 3)
    assert (numbers["sets_with_fewer_names"].value, numbers["sets_with_both"].value) == (1, 2)
    assert (numbers["named_at_50"].value, numbers["named_at_50"].lo) == (10, 5)
    marks = _marks(found)
    assert marks["names-hold"] == marks["unnamed"] == marks["halves"] == findings.HOLDS
    assert marks["sets-differ"] == marks["threshold"] == findings.FAILS
    other = _marks(_tables(lift=0.05, recall=0.7, hits=20))
    assert other["names-hold"] == findings.UNDECIDED and other["recall"] == other["halves"] == findings.FAILS


def test_named_latents_of_a_set_are_counted_beside_all_that_differ():
    shown = meaning_tables.by_set(_tables().by_set, "test")
    assert shown.iloc[0].tolist() == ["p", "5 of 10 (50.0 %)", "1 of 10 (10.0 %)"]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_figures_and_tables_are_drawn(theme):
    contrast = pd.DataFrame({"difference": [0.1, -0.2, 0.0], "q": [1e-9, 1e-3, np.nan], "more": ["B", "A", ""]})
    with display.style():
        figure = meaning_figures.volcano(contrast, "test", "far/textures")
        assert [text.get_text() for text in figure.legends[0].get_texts()][1:] == [
            "more often in test (1)",
            "more often in textures (1)",
        ]
        assert display.render_svg(figure, "figure").startswith("<svg")
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
    return tables, path, request.param.split("/")[0]


def test_published_tables_agree_with_each_other(page):
    tables, _, _ = page
    pairs, contrast = tables["pairs"], tables["contrast"]
    assert (tables["by_set"]["more_a"] + tables["by_set"]["more_b"] == tables["by_set"]["differs"]).all()
    assert ((contrast["more"] == "B").sum(), (contrast["more"] == "A").sum()) in set(
        zip(tables["by_set"]["more_b"], tables["by_set"]["more_a"], strict=True)
    )
    assert pairs["z"].is_monotonic_decreasing and (pairs["q"] <= meaning.FDR).all()
    # The csv rounds both.
    assert pairs["z"].to_numpy() == pytest.approx(((pairs["together"] - pairs["expected"]) / pairs["sd"]), rel=1e-3)


def test_published_names_are_those_of_their_rows(page):
    tables, _, _ = page
    names, latents = tables["names"], tables["selectivity"].astype({"name": object}).fillna({"name": ""})
    assert set(names["latent"]) <= set(latents.loc[latents["name"] != "", "latent"])
    assert latents["kind"].isin(meaning.KINDS).all()
    share = tables["shares"].set_index(["dictionary", "kind"]).loc[(neighbours.SAE, "named"), "value"]
    assert (latents["name"] != "").mean() == pytest.approx(share, abs=1e-5)
    narrow = tables["shares"].set_index(["dictionary", "kind"]).loc[(neighbours.SAE, "narrow"), "value"]
    found = (latents["name"] != "") & (latents["base"] <= meaning.BROAD)
    assert found.mean() == pytest.approx(narrow, abs=1e-5)


def test_images_stand_only_where_they_may_be_shown(page):
    _, path, experiment = page
    shown = plan._experiment(experiment).show_images
    assert ("fig-top_images" in json.dumps(plan.read_notebook(path))) == shown
