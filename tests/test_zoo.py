"""The zoo: equal terms, what is measured, the sentences on its page against tables of either outcome."""

from __future__ import annotations

import itertools
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import small_profile
from scipy import stats

from capsae import code, commands, display, publish, zoo
from capsae.__main__ import main
from capsae.pipeline import Run
from capsae.sae import dictionaries, variants
from capsae.sealed import SealedError
from capsae.zoo import figures, fitting, measure, page, runner, summary, tables, tasks, verdicts

PUBLISHED = ("imagenet20", "mini80")
EPD, RPD = verdicts.SCORES


class Inline:
    """An executor that works at once, in this process."""

    def submit(self, function, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)
        return future


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    return str(small_profile.write(tmp_path_factory.mktemp("small")))


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


def test_no_fit_reaches_test_or_ood_rows(profile, home, monkeypatch):
    run = Run(profile, progress=False)
    for where in ("test", "near/shifted"):
        monkeypatch.setattr(tasks, "fit_rows", lambda *_, where=where: run.features(where))
        with pytest.raises(SealedError, match="out of reach"):
            tasks.fitted(run, "random", None, 0)


def test_a_diverged_training_is_a_row_of_the_grid(profile, home, monkeypatch):
    def fail(*_):
        raise FloatingPointError("too high")

    monkeypatch.setattr(tasks, "fit_rows", fail)
    run = Run(profile, progress=False)
    for _ in range(2):  # made, then read
        model, record = tasks.fitted(run, "topk", 1.0, 0)
        assert model is None and np.isnan(record["held_out_fvu"]) and "too high" in record["diverged"]


# --- a whole run, small


def test_a_run_measures_all_and_goes_on_where_it_stood(profile, home, monkeypatch):
    lines, names = [], ["topk", "gsae", "abs_topk", "semi_nmf", "random", "pca"]
    given = {"names": names, "seeds": (0, 1), "grid": (0.005, 0.01), "executor": Inline(), "write": lines.append}
    table, grid, about = runner.run_zoo(profile, **given)
    assert list(table.columns) == tables.COLUMNS and list(dict.fromkeys(table["member"])) == names
    assert len(lines) == 6 + 3 + 5 + 11 + 5 and "100%" in lines[-1] and "left" in lines[0]
    wide = summary.fits(table.assign(title=table["member"]))
    assert len(wide) == 11 and not wide.drop(columns="lr").isna().any().any()
    assert (wide[wide["member"] != "abs_topk"]["L0"] <= 6).all()
    topk = grid[grid["member"] == "topk"]
    assert len(topk) == 3 and topk["chosen"].sum() == 2
    best = topk[topk["seed"] == 0].set_index("lr")["held_out_fvu"].idxmin()
    assert set(topk.loc[topk["chosen"], "lr"]) == {best}
    rows = table[(table["member"] == "random") & (table["measure"] == "stability")]
    assert rows["group"].tolist() == ["0-1"] and table[table["measure"] == "stability_chance"]["member"].nunique() == 5
    assert (table[(table["set"] == "mean") & (table["group"] == "all")].groupby("member").size() >= 6).all()
    assert 0 < about["work_s"] and about["code"]["fit"].keys() == set(names) and about["rule"] == tables.RULE

    def never(*_, **__):
        raise AssertionError("made again")

    for name in ("fit_rows", "normalised_head"):
        monkeypatch.setattr(tasks, name, never)
    monkeypatch.setattr(measure, "measure", never)
    again, grid_again, _ = runner.run_zoo(profile, **given)
    pd.testing.assert_frame_equal(table, again)
    pd.testing.assert_frame_equal(grid, grid_again)


def test_measures_are_those_of_the_model(profile, home):
    run = Run(profile, progress=False)
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
    means = [found["auroc", "epd", where, where.split("/")[0]] for where in run.profile.ood_sets]
    assert found["auroc", "epd", "mean", "all"] == pytest.approx(np.mean(means))


def test_stability_of_a_dictionary_with_itself_and_by_chance(profile, home):
    run = Run(profile, progress=False)
    one, two = (tasks.fitted(run, "random", None, seed)[0] for seed in (0, 1))
    found = measure.stability([one, one, two]).set_index(["measure", "group"])["value"]
    assert found["stability", "0-1"] == pytest.approx(1) and found["stability", "0-2"] < 0.9
    assert found["stability", "0-2"] == pytest.approx(found["stability_chance", ""], abs=0.05)
    pca = tasks.fitted(run, "pca", None, 0)[0]
    rows, signed = measure.atoms(pca)
    assert not signed and len(rows) == 16 and measure.atoms(one)[1]
    assert measure.by_chance(48, 16, signed=False) > measure.by_chance(48, 16, signed=True)


def test_itda_between_backbones_needs_the_same_images(profile, home, tmp_path):
    run = Run(profile, progress=False)
    found = measure.backbones(run, run, 24, 6).set_index(["measure", "group"])["value"]
    assert found["jaccard", "backbones"] == 1 and found["jaccard", "seeds"] < 1
    n = len(run.features("train"))
    size = found["atoms", "first"]
    assert found["jaccard", "chance"] == pytest.approx((size**2 / n) / (2 * size - size**2 / n))
    features = {name: small_profile.features(name, 10) for name in small_profile.SETS}
    other = Run(small_profile.write(tmp_path, features), progress=False)
    with pytest.raises(ValueError, match="other training images"):
        measure.backbones(run, other, 24, 6)


def test_the_command_hands_on_its_options_and_keeps_committed_tables(tmp_path, monkeypatch, capsys):
    called = []

    def run_zoo(*given):
        called.append(given)
        return pd.DataFrame({"a": [1]}), pd.DataFrame({"a": [1]}), {"profile": given[0]}

    monkeypatch.setattr(runner, "run_zoo", run_zoo)
    monkeypatch.setattr(runner, "run_backbones", lambda: pd.DataFrame({"b": [2]}))
    monkeypatch.setattr("capsae.plan.root", lambda: tmp_path)
    assert main(["zoo", "--profile", "mini80", "--members", "topk,random", "--seeds", "0", "1", "--jobs", "3"]) == 0
    assert called == [("mini80", ["topk", "random"], (0, 1), 3)]
    assert (tmp_path / "build/zoo/mini80.csv").is_file() and not (tmp_path / "book").exists()
    assert main(["zoo"]) == 0
    assert [given[0] for given in called[1:]] == list(runner.PROFILES)
    written = {path.name for path in (tmp_path / "book/zoo").iterdir()}
    assert {"imagenet20.csv", "mini80.csv", "mini80.grid.csv", "mini80.json", "backbones.csv"} <= written
    assert commands.zoo and "backbones.csv" in capsys.readouterr().out


# --- sentences, of made-up tables


def _table(level=None, noise=0.0003, l0=None, seeds=5, opposed=False):
    """A tidy table in which member i has the level i (or that of `level`) in every measure, plus noise of its seeds."""
    names, dice, rows = (
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
                value = value + noise * dice.standard_normal()
                rows.append((*about, seed, 0.01, measure, method, where, group, value, np.nan, np.nan))

            rows.append((*about, seed, 0.01, "n_latents", "", "", "", 1920, np.nan, np.nan))
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


def test_welch_is_scipys_and_one_value_is_exact():
    a, b = np.array([1.0, 2, 4, 3]), np.array([5.0, 5.5, 4.5])
    found, theirs = verdicts.welch(a, b), stats.ttest_ind(a, b, equal_var=False)
    reach = theirs.confidence_interval()
    assert [found["p"], found["lo"], found["hi"]] == pytest.approx([theirs.pvalue, reach.low, reach.high])
    assert verdicts.welch(a, [3.0])["p"] == pytest.approx(stats.ttest_1samp(a, 3.0).pvalue)
    assert np.isnan(verdicts.welch([1.0], [2.0])["p"])


def test_the_best_is_named_with_whether_it_beats_topk():
    wide, members = _both()
    told = verdicts.best_text(wide, members, EPD, "here")
    assert told.startswith(f"On here, by {EPD}, the best of the autoencoders and dictionaries is TopK (10.0 %)")
    assert told.endswith("6 of the 6 others are clearly worse.")
    wide, members = _both(level={"mp": -0.1})
    told = verdicts.best_text(wide, members, EPD, "here")
    assert (
        "is MP-SAE (6.7 %, seeds " in told and "against 10.0 % of TopK: clearly better than seeds explain (-3" in told
    )
    wide, members = _both(level={"mp": -0.001}, noise=0.01)
    told = verdicts.best_text(wide, members, EPD, "here")
    assert "no clear difference over seeds" in told or "is TopK" in told
    wide, members = _both(level={"mp": -0.1}, l0={"mp": 60.0})
    assert "is TopK" in verdicts.best_text(wide, members, EPD, "here")  # what has another L0 is not named best


def test_the_best_control_and_the_tally():
    wide, members = _both(level={"random": 0.3, "pca": -0.2})
    told = verdicts.control_text(wide, members, EPD, "here")
    assert (
        told.startswith(f"The best control on here, by {EPD}, is PCA (3.3 %, without seeds)")
        and "clearly better" in told
    )
    wide, members = _both(level={"random": 0.3, "pca": 0.4})
    told = verdicts.control_text(wide, members, EPD, "here")
    assert "is Random dictionary (20.0 %, seeds" in told and "clearly worse than seeds explain" in told
    told = verdicts.tally_text(*_both(level={"mp": -0.1, "vsae": 0.0}, noise=0.001), EPD, "here")
    assert "1 of the 6 others are clearly better (MP-SAE)" in told and "undecided" in told


@pytest.mark.parametrize(
    "opposed, word", [(False, "agree: Spearman +1.00"), (True, "oppose each other: Spearman -1.00")]
)
def test_rankings_agree_or_oppose(opposed, word):
    members = _both(opposed=opposed, noise=1e-4)[1]
    told = verdicts.agreement_text(members, EPD, summary.INTERPRETABILITY, "here")
    assert word in told and "over 7 members" in told


def test_rankings_that_have_nothing_to_do_with_each_other():
    _, members = _both()
    members["FVU"] = [0.3, 0.1, 0.6, 0.5, 0.2, 0.7, 0.35, 0.5, 0.5]
    assert "neither agree nor oppose clearly" in verdicts.agreement_text(members, "FVU", EPD, "here")
    assert "too few members" in verdicts.agreement_text(members.head(3), "FVU", EPD, "here")
    found = verdicts.agreement(members, "FVU", EPD)
    own = members[members["kind"] != "control"]
    assert found["value"] == pytest.approx(stats.spearmanr(own["FVU"], own[EPD]).statistic)


def test_more_than_seeds_or_not():
    wide, members = _both()
    assert "are more than seeds make" in verdicts.between_text(wide, members, EPD, "here")
    found = verdicts.between(wide, members, EPD)
    own = [part[EPD] for name, part in wide.groupby("member") if zoo.member(name).kind != "control"]
    theirs = stats.f_oneway(*own)
    assert [found["F"], found["p"]] == pytest.approx([theirs.statistic, theirs.pvalue])
    assert found["lo"] < found["value"] < found["hi"] <= 1
    flat = dict.fromkeys(wide["member"], 0.0)
    wide, members = _both(level=flat, noise=0.05)
    assert "are not told from what seeds make" in verdicts.between_text(wide, members, EPD, "here")
    with pytest.raises(ValueError, match="seeds"):
        verdicts.between(wide.drop(index=1), members, EPD)


def test_who_missed_the_target_is_named():
    assert "every member is within a tenth of 32" in verdicts.l0_text(_both()[1], "here")
    told = verdicts.l0_text(_both(l0={"gba": 40.0})[1], "here")
    assert "1 of 9 members miss L0 = 32" in told and "GBA (40)" in told


def test_ends_of_the_grid_and_dead_latents_are_named():
    rows = [("topk", 1.0, 0, False), ("topk", 2.0, 0, True), ("topk", 3.0, 0, False), ("topk", 2.0, 1, True)]
    rows += [("pca", np.nan, 0, True)]
    grid = pd.DataFrame(rows, columns=["member", "lr", "seed", "chosen"])
    told = verdicts.rates_text(grid, "here")
    assert told == "Of the learning rates tried on here (1, 2, 3), no member took one at an end."
    grid["chosen"] = [False, False, True, True, True]
    assert verdicts.rates_text(grid, "here").endswith("better ones may lie: 1 the largest, 3 (TopK).")
    _, members = _both()
    assert "5 of" not in verdicts.dead_text(members, "here") and "9 of 9 members" in verdicts.dead_text(members, "here")
    members["dead"] = 0.05
    assert "no member has more than a tenth" in verdicts.dead_text(members, "here")
    members.loc[0, "dead"] = 0.4
    assert "1 of 9 members" in verdicts.dead_text(members, "here") and "TopK (40.0 %)" in verdicts.dead_text(
        members, "here"
    )


def test_stability_and_backbones_in_words():
    members = _both()[1]
    for rows, covariance, words in (
        (0.25, 0.1, ("in 7 of 7 members", "in 0 they are less")),
        (0.8, 0.335, ("in 0 of 7 members;", "in 4 they are less alike")),
    ):
        known = members.dropna(subset=summary.STABILITY).assign(rows=rows, covariance=covariance)
        told = verdicts.stability_text(known, "here")
        assert all(word in told for word in words)
        assert told.endswith(f"TopK has 0.30, rows {rows:.2f}, such directions {covariance:.2f}.")
    for share, word in ((0.5, "share training images more than chance"), (0.1, "no more than chance")):
        rows = pd.DataFrame(
            {"measure": "jaccard", "group": ["backbones", "seeds", "chance"], "value": [share, 0.4, 0.2]}
        )
        assert word in verdicts.backbones_text(rows, "digits")


def test_nulls_know_the_data_and_the_sign():
    dice = np.random.default_rng(0)
    x = 5 + dice.standard_normal((400, 3)) @ dice.standard_normal((3, 12)) + 0.01 * dice.standard_normal((400, 12))
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


def test_a_random_dictionary_must_be_beaten():
    table = _table(level={"random": 0.9, "pca": 0.95}, noise=0.001)
    wide = summary.fits(table)
    members = summary.by_member(wide, table)
    told = verdicts.beaten_text(wide, members, EPD, "here")
    assert "7 of the 7 autoencoders" in told and told.endswith(
        "0 undecided; the random dictionary is the best control."
    )
    first = verdicts.answer({"here": table})
    assert "pays more often" in first[0] and "of 14 comparisons" in first[0] and "14 are clearly better" in first[0]
    table = _table(level={"random": -0.3, "pca": -0.4, "mp": -0.5}, noise=0.001)
    wide = summary.fits(table)
    told = verdicts.beaten_text(wide, summary.by_member(wide, table), EPD, "here")
    assert "1 of the 7" in told and "is clearly better than a random dictionary (MP-SAE), 6 clearly worse" in told
    assert "than the best control, PCA, 1 is clearly better (MP-SAE), 6 clearly worse" in told
    first = verdicts.answer({"here": table, "there": table})
    assert "seldom pays" in first[0] and len(first) == 3 and "1 (MP-SAE) / 6 / 0 against PCA" in first[2]


def test_early_training_and_the_books_own_sae_are_named():
    rows = [("topk", 1.0, 0, 8.0, True), ("relu", 1.0, 0, 8.0, True), ("relu", 2.0, 0, 3.0, False)]
    grid = pd.DataFrame(rows, columns=["member", "lr", "seed", "best_epoch", "chosen"])
    assert "last of 8 epochs was the best in 2 of 2" in verdicts.epochs_text(grid, "imagenet20")
    assert "of early training" in verdicts.epochs_text(grid, "imagenet20")
    grid["best_epoch"] = [3.0, 5.0, 8.0]
    told = verdicts.epochs_text(grid, "imagenet20")
    assert "in 0 of 2 chosen" in told and "most had their best before the end" in told
    members = _both(noise=0)[1].assign(dead=0.43)
    own = {"lr": 0.008, "epochs": 25, "dead": 0.001, "epd": 0.12, "rpd": 0.1}
    told = verdicts.recipe_text(members, own, "here")
    assert "25 epochs with a rate of 0.008" in told and "(0.1 % here)" in told and "EPD of 12.0 %" in told
    assert "a rate of 0.01, chosen by FVU alone, 43.0 % dead and 10.0 %." in told


def test_density_core_and_halves_are_named():
    members = _both(noise=0)[1].assign(latents=1920)
    members["latents"] = [1920, 1800, 1700, 1600, 1500, 1400, 1300, 1200, 192]
    name = summary.SINGLE["separability"][1]
    assert "does not clearly go with" in verdicts.density_text(members, "here")
    members[name] = np.linspace(0.1, 0.5, 9)
    told = verdicts.density_text(members, "here")
    assert " goes with how often" in told and "that of PCA (0.500), where a latent fires on 16.7 %" in told
    assert "288 of them, but for 29 (PCA)" in verdicts.core_text(members.iloc[[0, 0, 8]], 0.15, "here")
    assert "288 of them in every member." in verdicts.core_text(members.iloc[[0]], 0.15, "here")
    members["dead"] = [0.5, 0, 0, 0, 0, 0, 0, 0, 0]
    assert "half-latents" not in verdicts.dead_text(members, "here")
    members.loc[6, "dead"] = 0.5
    assert "Of ITDA it is half-latents that are counted" in verdicts.dead_text(members, "here")


def test_agreements_are_corrected():
    members = _both()[1]
    pairs = [(EPD, RPD), (EPD, "FVU"), ("FVU", RPD)]
    raw = [verdicts.agreement(members, *pair)["p"] for pair in pairs]
    told = verdicts.agreements(members, pairs, "here")
    for text, p in zip(told, verdicts.holm(raw), strict=True):
        assert text.endswith(f"{verdicts.p_text(p)} by permutation and Holm.")
    assert "neither agree" in verdicts.agreement_text(members, EPD, RPD, "here", 0.2)
    assert "agree: Spearman" in verdicts.agreement_text(members, EPD, RPD, "here")


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


def test_intervals_are_those_of_one_seed():
    table = _table(noise=0)
    table["lo"], table["hi"] = table["value"] - 0.01, table["value"] + 0.02
    order = ["pca", *[name for name in table["member"].unique() if name != "pca"]]
    text = summary.intervals_text(table, order)
    assert text.loc[1, ["member", EPD]].tolist() == ["TopK", "10.0 (9.0–12.0)"] and text["member"][0] == "PCA"
    assert list(text.columns) == ["member", *summary.OOD.values()]
    found = summary.by_set(table, "epd", order)
    assert set(found["metric"]) == set(measure.OOD_METRICS) and found["method"][0] == "PCA"
    assert len(found) == 3 * len(order)


def test_figures_are_drawn_in_both_themes():
    wide, members = _both()
    for theme, (function, data, options) in itertools.product(
        ("light", "dark"),
        [
            (figures.over_seeds, summary.panels(wide, [EPD, RPD], summary.best_first(members, EPD)), {}),
            (figures.scatter, summary.pairs(wide, "FVU", EPD), {"x": "a", "y": "b"}),
            (figures.rank_heatmap, summary.ranked(members), {}),
        ],
    ):
        with display.style(theme):
            figure = function(data, **options)
            assert figure.get_size_inches()[0] <= display.WIDE and len(display.render_png(figure)) > 1000


# --- what is committed


@pytest.mark.parametrize("profile", PUBLISHED)
def test_a_committed_table_is_of_todays_code(profile):
    if not (tables.root() / tables.FOLDER / f"{profile}.csv").is_file():
        pytest.skip("not made yet: make zoo")
    about = zoo.provenance(profile)
    now = tasks.code_digests(zoo.members())
    stale = [name for name, digest in now["fit"].items() if about["code"]["fit"].get(name) != digest]
    stale += [name for name in ("measures", "stability") if about["code"][name] != now[name]]
    assert not stale, f"{stale} changed since the table was made: run capsae zoo --profile {profile}"
    assert about["seeds"] == list(fitting.SEEDS) and about["rates"] == list(fitting.RATES)
    assert about["settings"]["epochs"] == fitting.EPOCHS[profile]


@pytest.mark.parametrize("profile", PUBLISHED)
def test_a_committed_table_is_whole_and_its_rates_follow_from_its_grid(profile):
    if not (tables.root() / tables.FOLDER / f"{profile}.csv").is_file():
        pytest.skip("not made yet: make zoo")
    table, grid = zoo.load(profile), zoo.load_grid(profile)
    wide = summary.fits(table)
    for name in zoo.members():
        assert set(wide.loc[wide["member"] == name, "seed"]) == set(fitting.seeds_of(name))
    assert not wide.drop(columns="lr").isna().any().any()
    first = grid[grid["seed"] == fitting.SEEDS[0]]
    chosen = fitting.choose(first, zoo.provenance(profile)["settings"]["k"]).dropna()
    assert chosen.to_dict() == tables.chosen_rates(profile)
    used = wide.dropna(subset="lr").groupby("member")["lr"].unique()
    assert all(used[name].tolist() == [rate] for name, rate in chosen.items())


def test_a_cheap_member_fitted_again_has_its_committed_numbers():
    if not (tables.root() / tables.FOLDER / "imagenet20.csv").is_file():
        pytest.skip("not made yet: make zoo")
    run = Run("imagenet20", device="cpu", progress=False)
    found = measure.measure(run, zoo.fit("random", run, seed=0), n_boot=10)
    table = zoo.load("imagenet20")
    keys = ["measure", "method", "set", "group"]
    committed = table[(table["member"] == "random") & (table["seed"] == 0)].set_index(keys)["value"]
    for row in found.itertuples():
        tolerance = {"fvu": 1e-4, "auroc": 1e-3}.get(row.measure, 0.01)  # other processors round otherwise
        assert row.value == pytest.approx(committed[row.measure, row.method, row.set, row.group], abs=tolerance)


def test_the_page_says_what_the_committed_tables_say():
    name = "imagenet20/08_zoo"
    if not publish.path_of(name).is_file():
        pytest.skip("this page is not executed yet")
    found, text = publish.results(name), publish.path_of(name).read_text(encoding="utf-8")
    for profile in PUBLISHED:
        assert found["sentences"][profile] == verdicts.sentences(zoo.load(profile), zoo.load_grid(profile), profile)
        assert all(one in text for part in found["sentences"][profile].values() for one in part)
    assert found["answer"] == verdicts.answer({profile: zoo.load(profile) for profile in PUBLISHED})
    assert all(one in text for one in [*found["answer"], *found["across"], found["core"], found["recipe"]["sentence"]])
    for profile, told in zip(PUBLISHED, found["across"], strict=False):
        assert told == verdicts.stability_text(pd.DataFrame(found["known"][profile]), profile)
    table = zoo.load("imagenet20")
    members = summary.by_member(summary.fits(table), table)
    assert found["recipe"]["sentence"] == verdicts.recipe_text(members, found["recipe"], "imagenet20")
    assert found["core"] == verdicts.core_text(members, 0.15, "imagenet20")
    assert found["across"][-1] == verdicts.backbones_text(tables.backbones(), "digits")
    means = pd.DataFrame(found["members"])
    own = means[(means["profile"] == "imagenet20") & means["comparable"] & ~means["member"].isin(fitting.CONTROLS)]
    title = zoo.member(own.loc[own[EPD].idxmin(), "member"]).title
    assert f"dictionaries is {title} " in found["sentences"]["imagenet20"]["ood"][1]


def test_the_page_of_dictionaries_is_in_step_and_cites_what_is_in_the_references():
    from capsae import pages

    book = tables.root() / "book"
    text = page.dictionaries_page(book / "references.bib", pages._HEADING.format(source=pages.DICTIONARIES))
    assert (book / "dictionaries.md").read_text(encoding="utf-8") == text, "run python -m capsae.build pages"
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
