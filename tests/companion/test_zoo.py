"""The zoo: equal terms, what is measured, the marks of its findings against tables of either outcome."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import small_experiment
from scipy import stats

from capsae.__main__ import main
from capsae.pipeline import code
from capsae.pipeline.run import Run
from capsae.sae import select
from capsae.sae.dictionaries import methods as dictionaries
from capsae.sae.variants import thresholds as variants
from companion import findings, zoo
from companion.figures import display
from companion.zoo import figures, fitting, measure, page, runner, summary, tables, tasks, verdicts

PUBLISHED = ("imagenet20", "mini80")
EPD, RPD = verdicts.SCORES


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return str(small_experiment.write(tmp_path_factory.mktemp("small")))


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("CAPSAE_HOME", str(tmp_path / "store"))
    runner._run.cache_clear()
    yield tmp_path / "store"
    runner._run.cache_clear()


# --- members and equal terms


def test_all_variants_dictionaries_and_controls_are_members():
    assert zoo.members("variant") == list(variants.REGISTRY) and len(zoo.members("variant")) >= 17
    assert set(zoo.members()) == set(variants.REGISTRY) | set(dictionaries.METHODS)
    assert zoo.members("dictionary") == ["itda", "semi_nmf"]
    assert set(zoo.members("control")) == {"random", "pca", "kmeans", "dense_relu"}
    for name in zoo.members():
        one = zoo.member(name)
        assert one.title and one.formula and one.source and one.description
    with pytest.raises(ValueError, match="no member 'nothing'; it has topk"):
        zoo.member("nothing")
    assert fitting.seeds_of("pca") == (0,) and fitting.seeds_of("random") == (0, 1, 2, 3, 4)
    assert fitting.rates("pca") == (None,) and fitting.rates("topk") == fitting.RATES


def test_a_fit_hangs_on_its_own_code_and_not_on_that_of_others(monkeypatch):
    reached = set()

    def note(*entries, without):
        sources = code._sources()
        of, shut = ([u for e in given for u in sources.units(e)] for given in (entries, without))
        reached.update(unit.name for unit in sources.reached(of, shut) if unit not in shut)
        return "digest"

    monkeypatch.setattr(fitting, "code_digest", note)
    for name, ours, others in (
        ("jumprelu", {"JumpReLU", "Variant", "train_saes"}, {"MatchingPursuit", "Gated", "ITDA"}),
        ("mp", {"MatchingPursuit", "matching_pursuit", "choose_rows", "train_saes"}, {"JumpReLU", "ITDA"}),
        ("itda", {"ITDA", "normalize"}, {"train_saes", "JumpReLU", "KMeans"}),
    ):
        reached.clear()
        assert fitting.fit_code(name) == "digest"
        assert ours <= reached and not others & reached, name


def _grid(rows):
    return pd.DataFrame(rows, columns=["member", "lr", "held_out_fvu", "held_out_l0"])


def test_the_rate_is_chosen_by_held_out_fvu_at_equal_l0():
    grid = _grid(
        [("a", 1.0, 0.2, 32), ("a", 2.0, 0.1, 32), ("b", 1.0, 0.3, 33), ("b", 2.0, 0.1, 60), ("c", 1.0, 0.3, 50),
         ("c", 2.0, 0.2, 60), ("d", 1.0, np.nan, np.nan), ("d", 2.0, 0.4, 32), ("e", np.nan, 0.5, 32)]
    )  # fmt: skip
    chosen = zoo.fitting.choose(grid, 32)
    assert chosen[["a", "b", "c", "d"]].tolist() == [2, 1, 2, 2] and np.isnan(chosen["e"])
    with pytest.raises(ValueError, match="every training of 'd' diverged"):
        zoo.fitting.choose(grid[(grid["member"] == "d") & (grid["lr"] == 1)], 32)


def test_no_fit_reads_test_or_ood_rows(experiment, home):
    read = set()

    class Watched(Run):
        def features(self, set_name):
            read.add(set_name)
            return super().features(set_name)

    for name in ("random", "topk"):
        tasks.fitted(Watched(experiment, progress=False), name, 0.01, 0)
    assert read == {"train", "val"}


def test_a_diverged_training_is_a_row_of_the_grid(experiment, home, monkeypatch):
    def fail(*_):
        raise FloatingPointError("too high")

    monkeypatch.setattr(tasks, "fit_run", fail)
    run = Run(experiment, progress=False)
    for _ in range(2):  # made, then read
        model, record = tasks.fitted(run, "topk", 1.0, 0)
        assert model is None and np.isnan(record["held_out_fvu"]) and "too high" in record["diverged"]


# --- a whole run, small


def test_a_run_measures_all_and_goes_on_where_it_stood(experiment, home, monkeypatch):
    lines, names = [], ["topk", "gsae", "abs_topk", "semi_nmf", "random", "pca"]
    given = {"names": names, "seeds": (0, 1), "grid": (0.005, 0.01), "jobs": 1, "write": lines.append}
    table, grid, about = runner.run_zoo(experiment, **given)
    assert list(table.columns) == tables.COLUMNS and list(dict.fromkeys(table["member"])) == names
    assert len(lines) == 6 + 3 + 5 + 11 + 5 and "16 of 16" in lines[-1] and "held-out FVU 0." in lines[0]
    wide = summary.fits(table.assign(title=table["member"]))
    assert len(wide) == 11 and not wide.drop(columns="lr").isna().any().any()
    assert (wide[wide["member"] != "abs_topk"]["L0"] <= 6).all()
    topk = grid[grid["member"] == "topk"]
    assert len(topk) == 3 and topk["chosen"].sum() == 2
    portable = grid.groupby("member")["portable"].unique().str[0]
    assert portable["topk"] == (select.compiled() is not None) and not portable.drop("topk").any()
    best = topk[topk["seed"] == 0].set_index("lr")["held_out_fvu"].idxmin()
    assert set(topk.loc[topk["chosen"], "lr"]) == {best}
    rows = table[(table["member"] == "random") & (table["measure"] == "stability")]
    assert rows["group"].tolist() == ["0-1"] and table[table["measure"] == "stability_chance"]["member"].nunique() == 5
    assert (table[(table["set"] == "mean") & (table["group"] == "all")].groupby("member").size() >= 6).all()
    assert 0 < about["work_s"] and about["code"]["fit"].keys() == set(names) and about["rule"] == tables.RULE

    def never(*_, **__):
        raise AssertionError("made again")

    monkeypatch.setattr(tasks, "fit_run", never)
    monkeypatch.setattr(measure, "reconstruction", never)
    again, grid_again, _ = runner.run_zoo(experiment, **given)
    pd.testing.assert_frame_equal(table, again)
    pd.testing.assert_frame_equal(grid, grid_again)


def test_measures_are_those_of_the_model(experiment, home):
    run = Run(experiment, progress=False)
    sae = zoo.fit("topk", run, seed=3, lr=0.01)
    assert sae.config.seed == 3 and sae.config.lr == 0.01
    found = measure.measure(run, sae, n_boot=20).set_index(["measure", "method", "set", "group"])["value"]
    test = run.features("test").cls
    assert found["fvu", "", "test", ""] == pytest.approx(sae.fvu(test), rel=1e-5)
    codes = sae.encode(test)
    assert found["l0", "", "test", ""] == pytest.approx((codes.values > 0).sum() / len(test))
    x_hat = sae.reconstruct(test)
    right = (x_hat @ run.head.weight.T + run.head.bias).argmax(1) == run.features("test").labels
    assert found["head_accuracy", "", "test", ""] == pytest.approx(right.mean())
    means = [found["auroc", "epd", where, where.split("/")[0]] for where in run.experiment.ood_sets]
    assert found["auroc", "epd", "mean", "all"] == pytest.approx(np.mean(means))


def test_stability_of_a_dictionary_with_itself_and_by_chance(experiment, home):
    run = Run(experiment, progress=False)
    one, two = (tasks.fitted(run, "random", None, seed)[0] for seed in (0, 1))
    found = measure.stability([one, one, two]).set_index(["measure", "group"])["value"]
    assert found["stability", "0-1"] == pytest.approx(1) and found["stability", "0-2"] < 0.9
    assert found["stability", "0-2"] == pytest.approx(found["stability_chance", ""], abs=0.05)
    pca = tasks.fitted(run, "pca", None, 0)[0]
    rows, signed = measure.atoms(pca)
    assert not signed and len(rows) == 16 and measure.atoms(one)[1]
    assert measure.by_chance(48, 16, signed=False) > measure.by_chance(48, 16, signed=True)


def test_itda_between_backbones_needs_the_same_images(experiment, home, tmp_path):
    run = Run(experiment, progress=False)
    found = measure.backbones(run, run, 24, 6).set_index(["measure", "group"])["value"]
    assert found["jaccard", "backbones"] == 1 and found["jaccard", "seeds"] < 1
    n = len(run.features("train"))
    size = found["atoms", "first"]
    assert found["jaccard", "chance"] == pytest.approx((size**2 / n) / (2 * size - size**2 / n))
    features = {name: small_experiment.features(name, 10) for name in small_experiment.SETS}
    other = Run(small_experiment.write(tmp_path, features), progress=False)
    with pytest.raises(ValueError, match="other training images"):
        measure.backbones(run, other, 24, 6)


def test_the_command_hands_on_its_options_and_keeps_committed_tables(tmp_path, monkeypatch, capsys):
    called = []

    def run_zoo(*given):
        called.append(given)
        return pd.DataFrame({"a": [1]}), pd.DataFrame({"a": [1]}), {"experiment": given[0]}

    monkeypatch.setattr(runner, "run_zoo", run_zoo)
    monkeypatch.setattr(runner, "run_backbones", lambda: pd.DataFrame({"b": [2]}))
    monkeypatch.setattr("companion.publish.plan.root", lambda: tmp_path)
    assert main(["zoo", "--experiment", "mini80", "--members", "topk,random", "--seeds", "0", "1", "--jobs", "3"]) == 0
    assert called == [("mini80", ["topk", "random"], (0, 1), 3)]
    assert (tmp_path / "build/zoo/mini80.csv").is_file() and not (tmp_path / "book").exists()
    assert main(["zoo"]) == 0
    assert [given[0] for given in called[1:]] == list(runner.EXPERIMENTS)
    written = {path.name for path in (tmp_path / "book/zoo").iterdir()}
    assert {"imagenet20.csv", "mini80.csv", "mini80.grid.csv", "mini80.json", "backbones.csv"} <= written
    assert "backbones.csv" in capsys.readouterr().out


# --- numbers and marks, of made-up tables


def _table(level=None, noise=0.0003, l0=None, seeds=5, opposed=False):
    """A tidy table in which member i has the level i (or that of `level`) in every measure, plus noise of its seeds."""
    names, rng, rows = (
        ["topk", "relu", "gated", "gba", "mp", "vsae", "itda", "random", "pca"],
        np.random.default_rng(0),
        [],
    )
    for i, name in enumerate(names):
        at = (level or {}).get(name, i / 10)
        one = zoo.member(name)
        about = (name, one.kind)
        for seed in range(seeds if one.seeded else 1):

            def add(measure, where, value, method="", group="", seed=seed, about=about):
                value = value + noise * rng.standard_normal()
                rows.append((*about, seed, 0.01, measure, method, where, group, value, np.nan, np.nan))

            rows.append((*about, seed, 0.01, "n_latents", "", "", "", 1920 - i, np.nan, np.nan))
            rows.append((*about, seed, 0.01, "l0", "", "test", "", (l0 or {}).get(name, 32.0), np.nan, np.nan))
            add("fvu", "test", 0.1 + at)
            sign = 1 if opposed else -1
            for which in summary.INTERPRETABLE:
                add(which, summary.SINGLE[which][0], 0.5 + sign * at / 2)
            for which in ("dead_fraction", "train_cpu_s", "cap_stability", "core_overlap"):
                add(which, "train", 0.5)
            for which in ("head_kept", "probing_5", "probing_20"):
                add(which, "test", 0.5)
            for method, metric in summary.OOD:
                add(metric, "mean", (0.9 - at / 3) if metric == "auroc" else 0.1 + at / 3, method, "all")
        if one.seeded:
            rows.append((*about, -1, 0.01, "stability", "", "", "0-1", 0.3 + at / 10, np.nan, np.nan))
            rows.append((*about, -1, 0.01, "stability_chance", "", "", "", 0.2, np.nan, np.nan))
    table = pd.DataFrame(rows, columns=tables.COLUMNS)
    return table.assign(title=table["member"].map(lambda name: zoo.member(name).title))


def _both(**options):
    table = _table(**options)
    wide = summary.fits(table)
    return wide, summary.by_member(wide, table)


def test_differences_hold_seeds_and_images():
    wide, _ = _both()
    found = verdicts.against(wide, EPD).set_index("member")
    a, b = (wide.loc[wide["member"] == name, EPD] for name in ("mp", "topk"))
    theirs = stats.ttest_ind(a, b, equal_var=False)
    reach = theirs.confidence_interval()
    assert found.loc["mp", ["p", "lo", "hi"]].tolist() == pytest.approx([theirs.pvalue, reach.low, reach.high])
    exact = wide.loc[wide["member"] == "pca", EPD].item()  # without seeds
    assert found.loc["pca", "p"] == pytest.approx(stats.ttest_1samp(b, exact).pvalue)
    errors = pd.DataFrame({EPD: 0.2}, index=wide["member"].unique())
    wider = verdicts.against(wide, EPD, errors=errors).set_index("member")
    assert (wider["hi"] - wider["lo"] > 4 * 0.2).all() and (wider["verdict"] == "undecided").all()
    assert (verdicts.against(wide, "FVU", errors=errors)["p"] < 0.01).all(), "no error over images is known for it"
    alone = verdicts.against(wide[wide["seed"] == 0], EPD)
    assert alone["p"].isna().all() and (alone["verdict"] == "undecided").all()


def test_errors_over_images_are_those_of_the_intervals():
    table = _table(noise=0)
    table["lo"], table["hi"] = table["value"] - 0.0196, table["value"] + 0.0196
    errors = summary.image_errors(table)
    assert errors.shape == (9, len(summary.OOD)) and errors.to_numpy() == pytest.approx(0.01)
    compared = verdicts.both(summary.fits(table), errors)
    assert compared["score"].unique().tolist() == ["EPD", "RPD"]
    row = compared.set_index(["member", "score"]).loc["topk", "EPD"]
    assert row["hi"] - row["value"] == pytest.approx(1.96 * 0.01 * 2**0.5, rel=1e-3)
    shown = verdicts.shown(compared, ["pca", "topk"])
    assert shown["member"].tolist() == ["PCA", "TopK"] and shown.loc["topk", "EPD, verdict"] == "better"


def test_better_worse_and_another_number_of_active_latents():
    wide, members = _both(level={"mp": -0.1, "vsae": 0.0}, noise=0.001)
    assert verdicts.counts(verdicts.against(wide, EPD), members) == {"better": 1, "worse": 4, "undecided": 1}
    wide, members = _both(level={"mp": -0.1}, l0={"mp": 60.0})  # what has another L0 is not counted
    assert verdicts.counts(verdicts.against(wide, EPD), members) == {"better": 0, "worse": 5, "undecided": 0}


@pytest.mark.parametrize("opposed, value", [(False, 1), (True, -1)])
def test_rankings_agree_or_oppose(opposed, value):
    found = verdicts.agreement(_both(opposed=opposed, noise=1e-4)[1], EPD, summary.INTERPRETABILITY)
    assert found["value"] == pytest.approx(value) and found["p"] < 0.01 and found["n"] == 7


def test_rankings_that_have_nothing_to_do_with_each_other():
    _, members = _both()
    members["FVU"] = [0.3, 0.1, 0.6, 0.5, 0.2, 0.7, 0.35, 0.5, 0.5]
    assert np.isnan(verdicts.agreement(members.head(3), "FVU", EPD)["value"])
    found = verdicts.agreement(members, "FVU", EPD)
    own = members[members["kind"] != "control"]
    assert found["value"] == pytest.approx(stats.spearmanr(own["FVU"], own[EPD]).statistic) and found["p"] > 0.05


def test_more_than_seeds_or_not():
    wide, members = _both()
    found = verdicts.between(wide, members, EPD)
    own = [part[EPD] for name, part in wide.groupby("member") if zoo.member(name).kind != "control"]
    theirs = stats.f_oneway(*own)
    assert [found["F"], found["p"]] == pytest.approx([theirs.statistic, theirs.pvalue])
    assert 0.9 < found["lo"] < found["value"] < found["hi"] <= 1
    flat = dict.fromkeys(wide["member"], 0.0)
    wide, members = _both(level=flat, noise=0.05)
    assert verdicts.between(wide, members, EPD)["p"] > 0.05
    with pytest.raises(ValueError, match="seeds"):
        verdicts.between(wide.drop(index=1), members, EPD)


def _recorded(table):
    """The page's numbers where both experiments have the same table."""
    wide = summary.fits(table)
    members = summary.by_member(wide, table)
    grid = pd.DataFrame([("topk", r, 0, 8.0, r == 2) for r in (1.0, 2, 3)], columns=[
        "member", "lr", "seed", "best_epoch", "chosen"])  # fmt: skip
    jaccard = pd.DataFrame({"measure": "jaccard", "group": ["backbones", "seeds", "chance"], "value": [0.2, 0.4, 0.1]})
    known = members.assign(rows=0.25, covariance=0.335)
    one = SimpleNamespace(fits=wide, members=members, errors=summary.image_errors(table), known=known, grid=grid)
    return verdicts.numbers(dict.fromkeys(PUBLISHED, one), jaccard, {"dead": 0.01, "epd": 0.12})


@pytest.mark.parametrize("random, mark", [(-0.3, findings.HOLDS), (0.9, findings.FAILS)])
def test_findings_are_marked_by_the_numbers(random, mark):
    table = _table(level={"random": random, "pca": 0.95}, noise=0.001)
    table["lo"], table["hi"] = table["value"] - 0.001, table["value"] + 0.001
    numbers = _recorded(table)
    marks = {row["key"]: row["mark"] for row in findings.judge(findings.of_notebook("08_zoo"), numbers)}
    assert marks["no-better-epd"] == marks["no-better-rpd"] == mark and marks["between"] == findings.HOLDS
    assert marks["worse-epd"] == (findings.HOLDS if random < 0 else findings.FAILS)
    assert marks["fvu-epd"] == findings.FAILS and marks["agree"] == findings.HOLDS
    assert marks["itda"] == findings.HOLDS and marks["dead"] == findings.HOLDS
    assert findings.MISSING not in marks.values(), "every number of the yml is recorded"
    assert numbers["imagenet20_last_epoch_best"].value == 100
    assert numbers["mini80_more_stable_than_rows"].value == 7 and numbers["mini80_stability_members"].value == 7


def test_nulls_know_the_data_and_the_sign():
    rng = np.random.default_rng(0)
    x = 5 + rng.standard_normal((400, 3)) @ rng.standard_normal((3, 12)) + 0.01 * rng.standard_normal((400, 12))
    found = summary.nulls(x, [(60, True), (60, False)]).set_index("signed")
    assert (found[["rows", "covariance"]] > 1.5 * measure.by_chance(60, 12, signed=True)).all(axis=None)
    assert (found.loc[False, ["rows", "covariance"]] >= found.loc[True, ["rows", "covariance"]] - 0.02).all()
    with pytest.raises(ValueError, match="choice of 500"):
        summary.nulls(x, [(500, True)])
    members = _both()[1].assign(latents=60)
    members.loc[members["member"] == "itda", "latents"] = 120
    members = members[members["member"].isin(["topk", "itda", "pca"])]
    joined = summary.with_nulls(members, found.reset_index()).set_index("member")
    assert joined.loc[["itda", "topk"], "rows"].tolist() == [found.loc[False, "rows"], found.loc[True, "rows"]]
    assert "pca" not in joined.index


def test_the_interpretability_rank_is_the_mean_of_three():
    wide = _both(noise=0)[0]
    first = wide[wide["seed"] == 0].set_index("member")[summary.INTERPRETABILITY]
    assert first.to_dict() == {name: i + 1 for i, name in enumerate(wide["member"].unique())}
    later = wide[wide["seed"] == 1].set_index("member")[summary.INTERPRETABILITY]
    assert "pca" not in later and later["random"] == 8 and later["topk"] == 1


def test_ranks_order_and_text():
    wide, members = _both(noise=0, l0={"topk": 50.0})
    assert summary.best_first(members, EPD)[0] == "relu" and summary.best_first(members, EPD)[-1] == "topk"
    ranks = summary.ranked(members).set_index(["measure", "title"])["rank"]
    assert (EPD, "TopK") not in ranks.index and ranks[EPD, "ReLU / L1"] == 1  # another L0: no rank
    assert ranks[summary.OOD["epd", "auroc"], "ReLU / L1"] == 1 and "training, CPU s" not in ranks.index.levels[0]
    shown = summary.spread_text(wide, {EPD: "{:.1%}"})
    assert shown.iloc[0].tolist() == ["TopK", "10.0"] and shown.iloc[-1, 1] == f"{100 * (0.1 + 0.8 / 3):.1f}"


def test_intervals_hold_seeds_and_images():
    table = _table(noise=0)
    table["lo"], table["hi"] = table["value"] - 0.0196, table["value"] + 0.0196
    order = ["pca", *[name for name in table["member"].unique() if name != "pca"]]
    text = summary.intervals_text(summary.over_seeds(table), order)
    assert text.loc[1, ["member", EPD]].tolist() == ["TopK", "10.0 (8.0–12.0)"] and text["member"][0] == "PCA"
    assert list(text.columns) == ["member", *summary.OOD.values()]
    found = summary.by_set(table, "epd", order)
    assert set(found["metric"]) == set(measure.OOD_METRICS) and found["method"][0] == "PCA"
    assert len(found) == 3 * len(order)
    apart = table.assign(value=table["value"] + 0.01 * table["seed"])
    wider = summary.by_set(apart, "epd", order).set_index(["member", "metric"])
    row, values = wider.loc["topk", "auroc"], 0.01 * np.arange(5)
    assert (row["hi"] - row["lo"]) / 2 > stats.norm.ppf(0.975) * np.hypot(0.01, values.std(ddof=1) / 5**0.5)


def test_figures_are_drawn():
    wide, members = _both()
    for function, data, options in (
        (figures.over_seeds, summary.panels(wide, [EPD, RPD], summary.best_first(members, EPD)), {}),
        (figures.scatter, summary.pairs(wide, "FVU", EPD), {"x": "a", "y": "b"}),
        (figures.rank_heatmap, summary.ranked(members), {}),
    ):
        with display.style():
            assert len(display.render_svg(function(data, **options), "figure")) > 1000


# --- what is committed


@pytest.mark.parametrize("experiment", PUBLISHED)
def test_a_committed_table_is_of_todays_code(experiment):
    if not (tables.root() / tables.FOLDER / f"{experiment}.csv").is_file():
        pytest.skip("not made yet: make zoo")
    about = zoo.provenance(experiment)
    now = tasks.code_digests(zoo.members())
    stale = [name for name, digest in now["fit"].items() if about["code"]["fit"].get(name) != digest]
    stale += [name for name in ("measures", "stability") if about["code"][name] != now[name]]
    if stale:  # half an hour of both cores makes them anew; the page names their code and their date
        pytest.xfail(f"{stale} changed since the table was made: run capsae zoo --experiment {experiment}")
    assert about["seeds"] == list(fitting.SEEDS) and about["rates"] == list(fitting.RATES)
    assert about["settings"]["epochs"] == fitting.EPOCHS[experiment]


@pytest.mark.parametrize("experiment", PUBLISHED)
def test_a_committed_table_is_whole_and_its_rates_follow_from_its_grid(experiment):
    if not (tables.root() / tables.FOLDER / f"{experiment}.csv").is_file():
        pytest.skip("not made yet: make zoo")
    table, grid = zoo.load(experiment), zoo.load_grid(experiment)
    wide = summary.fits(table)
    for name in zoo.members():
        assert set(wide.loc[wide["member"] == name, "seed"]) == set(fitting.seeds_of(name))
    assert not wide.drop(columns="lr").isna().any().any()
    first = grid[grid["seed"] == fitting.SEEDS[0]]
    chosen = fitting.choose(first, zoo.provenance(experiment)["settings"]["k"]).dropna()
    assert chosen.to_dict() == tables.chosen_rates(experiment)
    used = wide.dropna(subset="lr").groupby("member")["lr"].unique()
    assert all(used[name].tolist() == [rate] for name, rate in chosen.items())


def test_a_cheap_member_fitted_again_has_its_committed_numbers():
    if not (tables.root() / tables.FOLDER / "imagenet20.csv").is_file():
        pytest.skip("not made yet: make zoo")
    if zoo.provenance("imagenet20")["code"]["measures"] != tasks.code_digests(["random"])["measures"]:
        pytest.xfail("the measures changed since the table was made: run capsae zoo --experiment imagenet20")
    run = Run("imagenet20", device="cpu", progress=False)
    found = measure.measure(run, zoo.fit("random", run, seed=0), n_boot=10)
    table = zoo.load("imagenet20")
    keys = ["measure", "method", "set", "group"]
    committed = table[(table["member"] == "random") & (table["seed"] == 0)].set_index(keys)["value"]
    for row in found.itertuples():
        tolerance = {"fvu": 1e-4, "auroc": 1e-3}.get(row.measure, 0.01)  # other processors round otherwise
        assert row.value == pytest.approx(committed[row.measure, row.method, row.set, row.group], abs=tolerance)


def test_the_page_of_dictionaries_is_in_step_and_cites_what_is_in_the_references():
    from companion.publish import pages

    book = tables.root() / "book"
    text = page.dictionaries_page(book / "references.bib", pages._HEADING.format(source=pages.DICTIONARIES))
    assert (book / "dictionaries.md").read_text(encoding="utf-8") == text, "run python -m companion.build pages"
    for name in zoo.members():
        assert f"(`{name}`)" in text
    assert "FAST" in text and "arXiv 2" not in text.split("## Not in the zoo")[0].replace("as arXiv 2604.26409", "")
    references = (book / "references.bib").read_text(encoding="utf-8")
    for key in page.NAMED.values():
        assert f"{{{key}," in references


def test_citations_follow_the_numbers(tmp_path):
    path = Path(tmp_path / "a.bib")
    path.write_text("@misc{one2024x,\n  url = {https://arxiv.org/abs/2401.00001}\n}\n@misc{two,\n title = {b}\n}\n")
    keys = page.citations(path)
    assert page.cited("arXiv 2401.00001 [s]; start [r]", keys) == "{cite:p}`one2024x` [s]; start [r]"
    assert page.cited("our control", keys) == "our control"
