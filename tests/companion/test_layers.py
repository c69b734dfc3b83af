"""Where profiles form and OOD separates along the depth: tables, numbers of the findings, figures."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from capsae.evaluation.evaluate import evaluate
from capsae.features.featureset import FeatureSet
from capsae.metrics import auroc, fpr95_ood_pos
from capsae.sae import SAEConfig
from companion import findings
from companion.chapters.layers import against_final
from companion.chapters.layers import figures as layers_figures
from companion.chapters.layers import maths as layers
from companion.chapters.layers import study as layers_study
from companion.chapters.layers.sites import FINAL
from companion.figures import display
from companion.publish import plan

CONFIG = SAEConfig(latents=48, k=6, epochs=12, batch_size=64, lr=0.01)
PUBLISHED = [
    experiment for experiment in plan.ANALYSES.get("14_layers", ()) if layers.files(experiment)["table"].is_file()
]


def _sets(clear: float):
    """Four classes whose centres lie `clear` apart, an OOD set of other centres and one of none."""
    rng = np.random.default_rng(0)
    centres, found = rng.normal(size=(8, 16)), {}
    for name, n in {"train": 50, "val": 20, "test": 30, "near/others": 30, "far/none": 30}.items():
        labels = np.repeat(np.arange(4), n)
        at = {"near/others": centres[4:], "far/none": 0 * centres[:4]}.get(name, centres[:4])
        x = (clear * at[labels] + rng.normal(size=(len(labels), 16))).astype(np.float32)
        logits = -((x[:, None] - clear * centres[None, :4]) ** 2).sum(2)
        found[name] = FeatureSet(x, labels, np.arange(len(labels)), logits=logits, name=name)
    return found


@pytest.fixture(scope="module")
def measured():
    clear = {"block01/cls": 0.3, "block01/attn": 0.1, "block02/cls": 2.0, "block02/attn": 1.0, FINAL: 2.0}
    return {site: layers.measure_site(_sets(c), 4, CONFIG, 0.15) for site, c in clear.items()}


@pytest.fixture(scope="module")
def tables(measured):
    return against_final.table_of(measured, n_boot=200)


def test_a_site_is_measured(measured):
    found, scores = measured[FINAL]
    assert {*layers_study.MEASURE_TITLES, "cap_accuracy_val", "top1_1", "top1_20"} == set(found["metric"])
    on_codes = set(layers_study.METHOD_TITLES) - set(layers.ON_FEATURES)
    assert {(m, s) for m in on_codes for s in (0, 1)} | {(m, 0) for m in layers.ON_FEATURES} == set(scores)
    assert all(list(of) == ["test", "near/others", "far/none"] and len(of["test"]) == 120 for of in scores.values())
    value = found.groupby("metric")["value"].mean()
    early = measured["block01/attn"][0].groupby("metric")["value"].mean()
    for metric in ("probe_accuracy", "cap_accuracy", "top1_5", "gap"):
        assert value[metric] > early[metric] + 0.2, metric
    assert value["gap"] == pytest.approx(value["stability"] - value["between"])
    # two seeds are two SAEs; what reads features alone has none
    assert (scores["epd", 0]["test"] != scores["epd", 1]["test"]).any()
    # the class of the site's own probe is another score where the two heads differ
    early = measured["block01/attn"][1]
    assert (early["epd", 0]["test"] != early["epd_site", 0]["test"]).any()


def test_the_table_holds_what_the_metrics_say(measured, tables):
    table, _ = tables
    scores = measured["block02/attn"][1]["rpd", 1]
    rows = table[(table["site"] == "block02/attn") & (table["method"] == "rpd") & (table["seed"] == 1)]
    cell = rows.set_index(["set", "group", "metric"])
    for where in ("near/others", "far/none"):
        for metric, of in (("auroc", auroc), ("fpr95_ood_pos", fpr95_ood_pos)):
            row = cell.loc[where, where.split("/")[0], metric]
            assert row["value"] == pytest.approx(of(scores["test"], scores[where]))
            assert row["lo"] <= row["value"] + 1e-6 and row["value"] <= row["hi"] + 1e-6
    both = [cell.loc[w, w.split("/")[0], "auroc"]["value"] for w in ("near/others", "far/none")]
    assert cell.loc["mean", "all", "auroc"]["value"] == pytest.approx(np.mean(both))
    accuracy = table[(table["metric"] == "probe_accuracy") & (table["site"] == FINAL)].iloc[0]
    assert accuracy["lo"] < accuracy["value"] < accuracy["hi"] or accuracy["value"] == 1


def test_the_table_is_that_of_evaluate():
    """The same intervals as the book's other tables, where the same draws are made."""
    from capsae import Observations, detectors

    sets = _sets(1.0)
    found = layers.measure_site(sets, 4, CONFIG, 0.15, seeds=(0,))
    table, _ = against_final.table_of({FINAL: found, "block01/cls": found}, n_boot=100)
    seen = {name: Observations(f.cls, logits=f.logits, labels=f.labels if name in ("train", "test") else None)
            for name, f in sets.items()}  # fmt: skip
    expected = evaluate({"knn": detectors.create("knn").fit(seen["train"])}, seen["test"],
                        {name: seen[name] for name in ("near/others", "far/none")}, n_boot=100)  # fmt: skip
    ours = table[(table["method"] == "knn") & (table["site"] == FINAL)].set_index(["set", "group", "metric"])
    for row in expected[expected["metric"].isin(against_final.METRICS)].itertuples():
        mine = ours.loc[row.set, row.group, row.metric]
        assert mine["value"] == pytest.approx(row.value)
        if row.metric != "auroc" and row.set == "mean":
            assert [mine["lo"], mine["hi"]] == pytest.approx([row.lo, row.hi], abs=1e-6)


def test_every_site_is_tested_against_the_end(measured, tables):
    table, against = tables
    assert set(against["site"]) == set(measured) - {FINAL}
    same = against_final.table_of({"block01/cls": measured[FINAL], FINAL: measured[FINAL]}, n_boot=50)[1]
    assert (same["value"] == 0).all() and (same["verdict"] == "undecided").all() and (same["p"] == 1).all()
    rows = against[(against["site"] == "block01/attn") & (against["method"] == "mds++") & (against["group"] == "near")]
    assert (rows["verdict"] == "worse").all() and len(rows) == 3
    for _, family in against.groupby(["seed", "method", "group", "metric"]):
        assert len(family) == 4 and (family["p_holm"] >= family["p"] - 1e-12).all()
        assert family["p_holm"].min() == pytest.approx(min(1, 4 * family["p"].min()))
    with pytest.raises(ValueError, match="final/cls is needed"):
        against_final.table_of({"block01/cls": measured[FINAL]})


# --- sentences


def _measures(values: dict[str, dict[str, float]]) -> pd.DataFrame:
    rows = [
        (site, seed, "site", "", "id", metric, value, np.nan, np.nan)
        for site, of in values.items()
        for metric, value in of.items()
        for seed in (0, 1)
    ]
    return pd.DataFrame(rows, columns=["site", "seed", "method", "set", "group", "metric", "value", "lo", "hi"])


def _along(accuracies, stabilities, betweens=(0.9, 0.5, 0.2, 0.1)):
    sites = ["block01/cls", "block02/cls", "block03/cls", FINAL]
    keys = ("probe_accuracy", "cap_accuracy", "top1_5")
    values = {}
    for site, a, s, b in zip(sites, accuracies, stabilities, betweens, strict=True):
        more = {"stability": s, "between": b, "gap": s - b, "cap_accuracy_val": a, "dead": b}
        values[site] = dict.fromkeys(keys, a) | more
    return _measures(values)


def test_the_first_depth_is_that_from_which_a_share_of_the_end_is_reached():
    values = layers_study.over_seeds(_along((0.2, 0.75, 0.8, 0.8), (0.99, 0.98, 0.99, 1.0)), "cap_accuracy")
    assert layers_study.first_depth(values, "cls") == 2
    assert layers_study.first_depth(pd.Series({"block01/cls": 0.1, FINAL: 1.0}), "cls") is None


def _against(**cells):
    row = {"site": "block01/cls", "seed": 0, "method": "epd", "group": "near", "metric": "auroc", "value": 0.02}
    row |= {"lo": 0.01, "hi": 0.03, "p": 0.001, "p_holm": 0.01, "p_at_most": False, "verdict": "better"}
    return row | cells


def _scored(site, value, seed=0, method="epd", group="near"):
    at = {"site": site, "seed": seed, "method": method, "set": "mean", "group": group, "metric": "auroc"}
    return at | dict.fromkeys(("value", "lo", "hi"), value)


def test_the_best_site_counts_where_every_seed_agrees():
    table = pd.DataFrame([_scored(site, value, seed) for seed in (0, 1) for site, value in (("block01/cls", 0.9), (FINAL, 0.8))])  # fmt: skip  # noqa: E501
    both = pd.DataFrame([_against(), _against(seed=1, value=0.01, p_holm=0.02)])
    row = layers_study.best_sites(table, both).iloc[0]
    assert (row["site"], row["verdict"], row["difference"], row["p_holm"]) == ("block01/cls", "better", 0.01, 0.02)
    one = pd.DataFrame([_against(), _against(seed=1, p_holm=0.3, verdict="undecided")])
    row = layers_study.best_sites(table, one).iloc[0]
    assert row["verdict"] == "undecided" and row["p_holm"] == 0.3
    table["value"] = table["value"].replace(0.9, 0.8)
    assert layers_study.best_sites(table, both).iloc[0]["verdict"] == "end"
    falling = pd.DataFrame([_against(metric="fpr95_ood_pos")])
    table = pd.DataFrame([_scored("block01/cls", 0.3) | {"metric": "fpr95_ood_pos"}, _scored(FINAL, 0.2) | {"metric": "fpr95_ood_pos"}])  # fmt: skip  # noqa: E501
    assert layers_study.best_sites(table, falling, "fpr95_ood_pos").iloc[0]["site"] == FINAL, "lower is better"


def test_the_choice_on_id_rows():
    scored = [_scored(site, 0.8, method=m, group="all") for m in ("epd", "rpd") for site in ("block02/cls", FINAL)]
    at = {"site": "block02/cls", "group": "all"}
    against = pd.DataFrame([_against(**at), _against(**at, method="rpd", verdict="worse", value=-0.02)])
    table = pd.concat([_along((0.2, 0.9, 0.8, 0.8), (1, 1, 1, 1)), pd.DataFrame(scored)], ignore_index=True)
    assert layers_study.id_choice(table) == "block02/cls"
    assert layers_study.chosen_rows(table, against)["verdict"].tolist() == ["better", "worse"]
    end = pd.concat([_along((0.2, 0.8, 0.8, 0.8), (1, 1, 1, 1)), pd.DataFrame(scored)], ignore_index=True)
    assert layers_study.id_choice(end) == FINAL, "the latest of equals"


def _curve(values: dict, method="epd", group="far", half=0.01):
    rows = [_scored(site, value, seed, method, group) for site, of in values.items() for seed, value in enumerate(of)]
    return [row | {"lo": row["value"] - half, "hi": row["value"] + half} for row in rows]


def test_the_spread_of_seeds():
    rows = pd.DataFrame(_curve({"block01/cls": (0.70, 0.80), "block02/cls": (0.81, 0.81), FINAL: (0.90, 0.92)}))
    found = layers_study.spread(rows).set_index("site")
    assert found.loc["block01/cls", "seed_half"] == pytest.approx(1.96 * 10 / 2**0.5)
    assert found["outside"].tolist() == [1, 0, 1] and found["image_half"].tolist() == pytest.approx([1, 1, 1])
    with pytest.raises(ValueError, match="has one seed"):
        layers_study.spread(rows[rows["seed"] == 0])


def test_a_fall_along_the_depth():
    dip = {"block01/cls": (0.8, 0.7), "block02/cls": (0.6, 0.4), "block03/cls": (0.9, 0.9), FINAL: (0.5, 0.5)}
    fall = layers_study.falls(pd.DataFrame(_curve(dip)), "epd")
    assert (fall["of"], fall["to"]) == ("block01/cls", "block02/cls")
    assert [fall[key] for key in ("points", "low", "high")] == pytest.approx([25, 20, 30])
    rising = {"block01/cls": (0.5, 0.6), "block02/cls": (0.6, 0.7), "block01/attn": (0.9, 0.9), FINAL: (0.5, 0.5)}
    assert layers_study.falls(pd.DataFrame(_curve(rising)), "epd")["points"] == 0
    over = layers_study.over_end(pd.DataFrame([_against(value=0.01), _against(seed=1, value=0.03)])).iloc[0]
    assert [over["value"], over["lo"], over["hi"]] == pytest.approx([0.02, 0.01, 0.03])


def test_numbers_of_the_findings_are_those_of_the_tables(tables):
    table, against = tables
    found = SimpleNamespace(table=table, against=against, chosen=layers_study.chosen_rows(table, against))
    numbers = layers_study.numbers(found)
    assert numbers["sites"].value == 5 and numbers["blocks"].value == 2
    assert numbers["tests"].value == len(against)
    assert numbers["tests_better"].value == (against["verdict"] == "better").sum()
    epd = table[(table["method"] == "epd") & (table["metric"] == "auroc") & (table["set"] == "mean")]
    low = epd[epd["group"] == "far"].groupby("site")["value"].mean() < 0.5
    assert numbers["below_chance_epd_far"].value == low.sum()
    accuracy = layers_study.over_seeds(table, "cap_accuracy")
    share = accuracy[["block01/cls", "block02/cls"]].max() / accuracy[FINAL]
    assert numbers["share_cap_accuracy_cls"].value == pytest.approx(100 * share, abs=0.06)
    assert ("block_cap_accuracy_cls" in numbers) == (share >= 0.9)


@pytest.mark.parametrize("experiment", PUBLISHED)
def test_the_findings_of_the_committed_tables_are_measured(experiment):
    table, against, _ = layers.read(experiment)
    found = SimpleNamespace(table=table, against=against, chosen=layers_study.chosen_rows(table, against))
    rows = findings.judge(findings.of_notebook("14_layers"), layers_study.numbers(found))
    assert findings.MISSING not in {row["mark"] for row in rows}
    assert sum(row["mark"] == findings.HOLDS for row in rows) >= len(rows) / 2


def test_the_end_must_be_the_experiments():
    x = np.ones((3, 4), np.float32)
    assert layers.end_against_experiment({"test": x}, lambda name: x) == {"test": 0}
    assert layers.end_against_experiment({"test": x}, lambda name: x.astype(np.float16) * 1.001)["test"] < 0.01
    for other in (1.02 * x, x[:, ::-1] * np.arange(4), np.nan * x):
        with pytest.raises(ValueError, match="test: final/cls as read here lies up to"):
            layers.end_against_experiment({"test": x}, lambda name, other=other: other)


def test_other_vectors_at_the_end_stop_the_table(monkeypatch):
    """The right images under another network's weights have the right ids: the vectors tell."""
    from companion.chapters.layers import sites

    sets = {name: {FINAL: features} for name, features in _sets(2.0).items()}
    monkeypatch.setattr(sites, "run_sites", lambda run, name, *rest, **options: sets[name])

    class Run:
        experiment = type("Experiment", (), {"sets": tuple(sets)})

        def features(self, name):
            return _sets(2.0 if name != "test" else 1.9)[name]

    with pytest.raises(ValueError, match="test: final/cls as read here lies up to"):
        layers.layers(Run())


# --- figures, files, pages


def test_figures_are_drawn_in_both_themes(tables):
    table, against = tables
    rows = layers_study.over_end(against)
    for function, data in [
        (layers_figures.forming, layers_study.measured(table)),
        (layers_figures.separation, layers_study.means(table, "auroc")),
        (layers_figures.against_end, rows[rows["group"] != "all"]),
    ]:
        with display.style():
            figure = function(data)
            assert len(display.render_svg(figure, "figure")) > 1000
            assert figure.legends and all(ax.get_title() for ax in figure.axes)
    shown = layers_study.sites_shown(table)
    assert shown["site"].tolist() == list(dict.fromkeys(table["site"])) and "–" in shown.iloc[0, 2]
    best = [layers_study.best_sites(table, against, metric) for metric in against_final.METRICS]
    assert len(layers_study.best_shown(best)) == 18


def test_tables_are_written_and_read_back(tables, tmp_path, monkeypatch):
    import small_experiment

    from capsae.pipeline.run import Run

    monkeypatch.setattr(plan, "root", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match="python -m companion.chapters.layers.maths --experiment small"):
        layers.read("small")
    run = Run(small_experiment.write(tmp_path / "experiment"), store=tmp_path / "store", device="cpu", progress=False)
    sources = type("Source", (), {"digest": lambda self: "0" * 40})()
    monkeypatch.setattr(run.inputs, "source", lambda name: sources)
    seen = {"end_against_experiment": {"test": 0.0, "train": 0.00027}, "vectors": {"test": "1" * 20}}
    layers.write(run, *tables, seen, cpu_s=1.0, weights="abc" + 61 * "0")
    table, against, made = layers.read("small")
    pd.testing.assert_frame_equal(table, tables[0].reset_index(drop=True), rtol=1e-4, check_dtype=False)
    assert against["verdict"].tolist() == tables[1]["verdict"].tolist()
    assert {key: made[key] for key in seen} == seen and set(made["code"]) == {"layers"}
    line, digest = layers_study.source_line(made), layers_study._sha256("small", "table")
    assert "weights abc000000000" in line and digest[:12] in line and "pack" not in line
    shown = layers_study.made_rows(made).set_index("item")["value"]
    assert shown["sha256, small.csv"] == digest and shown["SAE, seeds"] == "0, 1"
    assert shown["vectors of all sites, test"] == "1" * 20


@pytest.mark.parametrize("experiment", PUBLISHED)
def test_the_committed_tables_belong_together(experiment):
    table, against, made = layers.read(experiment)
    assert set(table["site"]) == set(made["sites"]) and FINAL in made["sites"]
    assert set(against["site"]) == set(made["sites"]) - {FINAL}
    assert set(table["method"]) == {"site", *layers_study.METHOD_TITLES}
    ends = made["end_against_experiment"]
    assert set(ends) == set(made["vectors"]) >= {"train", "val", "test"} and max(ends.values()) <= layers.END_TOLERANCE
    assert "/work" not in json.dumps(made) and "/home" not in json.dumps(made)


def test_the_published_end_is_near_the_pages_of_the_whole_recipe():
    """Fewer epochs must not make another story of the end: EPD there is within the seeds and intervals of page 04."""
    if "imagenet20" not in PUBLISHED:
        pytest.skip("the table is not made yet")
    recorded = findings.of_page("imagenet20/04_score_ood")
    if "epd_auroc" not in recorded:
        pytest.skip("page 04 was executed before it recorded numbers")
    table, _, _ = layers.read("imagenet20")
    ours = layers_study.over_seeds(table, "auroc", "epd", "all")[FINAL]
    assert abs(ours - recorded["epd_auroc"].value / 100) < 0.03
