"""The page on dark matter: what is planted is found, parts sum to the input, findings rest on the tables."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import small_experiment

from capsae import Observations, SAEConfig, detectors
from capsae.evaluation.evaluate import compare, evaluate
from capsae.pipeline.run import Run
from capsae.sae import TopKSAE
from capsae.sae.dictionaries import methods as dictionaries
from capsae.stats import holm
from companion import findings
from companion.chapters.dark_matter import figures as dark_matter_figures
from companion.chapters.dark_matter import maths as dark_matter
from companion.chapters.dark_matter import scores as dark_matter_scores
from companion.chapters.dark_matter import study as dark_matter_study
from companion.chapters.dark_matter.maths import CrossFit, Ridge, r2, r2_intervals, rescaled
from companion.figures import display
from companion.figures.comparisons import HEADLINE
from companion.publish import plan, publish


def _rows(n, d=12, seed=0):
    rng = np.random.default_rng([seed, n])
    return rng.normal(size=(n, d)) * np.linspace(1, 3, d) + 1


class Planted:
    """A coder whose error is what `error` makes of its normalised input, here the row itself."""

    def __init__(self, error):
        self.error = error

    def normalize(self, x):
        return x

    def encode(self, x):
        return x

    def decode(self, codes):
        return codes - self.error(codes)


def _matrix(d=12):
    return np.random.default_rng(3).normal(size=(d, d))


def _noise(x):
    """Noise of the row: the same for the same row, unlike in all others, and no function that is linear in it."""
    seeds = np.abs(x[:, :2] * 1e6).astype(np.int64)
    return np.stack([np.random.default_rng(pair).normal(size=x.shape[1]) for pair in seeds])


# --- predictability


def test_a_linear_error_is_wholly_predictable_and_noise_is_not():
    coders = {"SAE, k = 4": Planted(lambda x: x @ _matrix() - 2), "noise": Planted(_noise)}
    found = dark_matter.predictability(coders, _rows(600), _rows(200), _rows(150), n_boot=200)
    exact = found[(found["coder"] == "SAE, k = 4") & (found["target"] == "vector")].set_index("fit")
    assert exact.loc[["train", "rescaled", "unseen"], "value"].to_numpy() == pytest.approx(1, abs=1e-6)
    assert exact.loc["one number", "value"] < 0.5
    for name in ("noise", "shuffled rows"):
        rows = found[(found["coder"] == name) & ~found["fit"].isin(["train", "constant"])]
        assert set(rows["target"]) == {"vector", "norm2"}
        assert (rows["value"] < 0.02).all() and (rows["lo"] < 0).all(), rows
    assert (found["lo"] <= found["value"] + 1e-3).all() and (found["value"] <= found["hi"] + 1e-3).all()


def test_half_of_the_variance_gives_half_and_a_shrunk_input_is_one_number():
    def half(x):
        linear = (x - 1) @ _matrix()
        return linear + np.sqrt((linear**2).mean()) * _noise(x)

    found = dark_matter.predictability(
        {"a": Planted(half), "b": Planted(lambda x: 0.2 * x)}, *map(_rows, (2000, 300, 400))
    )
    value = found[found["target"] == "vector"].set_index(["coder", "fit"])["value"]
    fixed = found[found["fit"] == "constant"]
    assert set(fixed["target"]) == {"norm2"} and (fixed["value"] <= 0).all() and (fixed["value"] > -0.1).all()
    assert found.set_index("fit")["rows"].groupby("fit").first().to_dict() == {
        "train": 2000,
        "rescaled": 2000,
        "constant": 2000,
        "one number": 300,
        "unseen": 660,
    }
    assert value["a", "train"] == pytest.approx(0.5, abs=0.05) and value["a", "unseen"] == pytest.approx(0.5, abs=0.06)
    assert value["b", "one number"] == pytest.approx(1, abs=1e-9)


def test_errors_of_other_rows_that_are_larger_are_rescaled():
    """What is fitted on small errors predicts too little; one factor from validation rows mends it."""
    u, v, t = _rows(500), _rows(300), _rows(200)
    plain = Ridge(u).choose(0.4 * u @ _matrix(), v, v @ _matrix())
    mended = rescaled(plain, v, v @ _matrix() + 5)
    assert r2(t @ _matrix() + 5, mended(t)) == pytest.approx(1, abs=1e-6) and mended.scale == pytest.approx(
        2.5, rel=1e-4
    )
    assert r2(t @ _matrix(), plain(t)) < 0.8


def test_ridge_is_ridge_and_its_penalty_is_chosen_on_validation_rows():
    from sklearn.linear_model import Ridge as Reference

    u, y = _rows(60), _rows(60, 3, seed=5)
    ours = Ridge(u)
    for one in ours.path(y, [1e-2, 1.0]):
        alpha = one.penalty * ours.values.mean()
        assert one(u) == pytest.approx(Reference(alpha=alpha).fit(u, y).predict(u), abs=1e-8)
    v = _rows(400)
    assert ours.choose(y, v, np.tile(y.mean(0), (400, 1)) + 0.01 * _noise(v)[:, :3]).penalty == max(
        dark_matter.PENALTIES
    )
    assert ours.choose(u[:, :3], v, v[:, :3]).penalty == min(dark_matter.PENALTIES)


def test_a_cross_fitted_row_takes_no_part_in_its_own_prediction():
    v, t = _rows(100), _rows(90, seed=2)
    crossed, y_v, y_t = CrossFit(v, t), v @ _matrix(), t @ _matrix()
    before = crossed.predict(y_v, y_t, [1e-3])
    y_t[7] += 1000
    after = crossed.predict(y_v, y_t, [1e-3])
    assert np.array_equal(before[7], after[7])
    assert not np.allclose(np.delete(before, np.flatnonzero(crossed.of_test == crossed.of_test[7]), 0),
                           np.delete(after, np.flatnonzero(crossed.of_test == crossed.of_test[7]), 0))  # fmt: skip


def test_the_interval_of_r2_covers_as_it_should():
    rng, covered, truth = np.random.default_rng(0), 0, 0.5
    for trial in range(120):
        guess = rng.normal(size=(150, 1))
        cell = r2_intervals(guess + rng.normal(size=(150, 1)), {"": guess}, n_boot=200, seed=trial)[""]
        covered += cell["lo"] <= truth <= cell["hi"]
    assert 104 <= covered <= 120


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(ValueError, match="all equal"):
        Ridge(np.ones((5, 3)))
    with pytest.raises(ValueError, match="too few for 10 folds"):
        CrossFit(_rows(15), _rows(100))
    with pytest.raises(ValueError, match="do not vary"):
        r2(np.ones((4, 2)), np.zeros((4, 2)))
    other = dictionaries.create("pca", 4, 4, normalize="none").fit(_rows(40))
    with pytest.raises(ValueError, match="b normalises its input in another way than a"):
        same = dictionaries.create("pca", 4, 4, normalize="l2").fit(_rows(40))
        dark_matter.predictability({"a": other, "b": same}, _rows(40), _rows(30), _rows(30))


def test_pca_of_equal_size_leaves_at_most_the_error_and_one_component_less_leaves_more():
    x, v = _rows(300), _rows(100)
    sae = dictionaries.create("random", 48, 6, normalize="sample").fit(x)
    rank = dark_matter.equal_rank(sae, x, v)
    left = [(dark_matter.errors(c, v)[1] ** 2).sum() for c in
            (sae, *(dictionaries.create("pca", r, r).fit(x) for r in (rank, rank - 1)))]  # fmt: skip
    assert 1 < rank < 12 and left[1] <= left[0] < left[2]


# --- parts


def test_parts_sum_to_the_input_and_shares_to_one():
    sae = TopKSAE.untrained(12, SAEConfig(latents=32, k=4))
    x = {"train": _rows(300), "val": _rows(100), "test": _rows(80), "near/a": _rows(60) ** 3}
    x = {name: rows.astype(np.float32) for name, rows in x.items()}
    linear = dark_matter.linear_part(sae, x["train"], x["val"])
    split = {name: dark_matter.parts(sae, linear, rows) for name, rows in x.items()}
    for name, of in split.items():
        assert of["input"] == pytest.approx(of["reconstruction"] + of["linear"] + of["rest"], abs=1e-12)
        assert of["error"] == pytest.approx(of["linear"] + of["rest"], abs=1e-12)
        assert of["reconstruction"] == pytest.approx(sae.decode(sae.encode(x[name])), abs=1e-5)
    assert abs(r2(split["val"]["rest"], 0 * split["val"]["rest"] + split["val"]["rest"].mean(0))) < 1e-12
    found = dark_matter.structure(split, n_boot=50)
    shares = found.set_index(["set", "what"])["value"]
    for name in ("test", "near/a"):
        assert sum(shares[name, part] for part in (*dark_matter.THREE, "cross")) == pytest.approx(1)
    assert set(found["set"]) == {"test", "near/a"} and found["value"].between(-3, 3).all()


# --- scores


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dark")
    sets = {
        name: small_experiment.features(name, n)
        for name, n in (small_experiment.SETS | {"train": 80, "test": 30}).items()
    }
    run = Run(small_experiment.write(folder, sets), {"sae.epochs": 10}, store=folder / "store", progress=False)
    train, val = (run.features(name).cls for name in ("train", "val"))
    linear = dark_matter.linear_part(run.sae, train, val)
    seen = dark_matter_scores.observe(run, linear, ("train", "val", "test", *run.experiment.ood_sets))
    return run, seen, dark_matter_scores.fitted(run, seen["train"], seen["val"])


@pytest.fixture(scope="module")
def tables(page):
    run, seen, scorers = page
    ood = {name: seen[name] for name in run.experiment.ood_sets}
    table = dark_matter_scores.part_table(scorers, seen["test"], ood, n_boot=50)
    return table, dark_matter_scores.compared(scorers, seen["test"], ood, n_boot=200)


def test_mahalanobis_cannot_tell_the_linear_part_from_the_input(page):
    _, seen, scorers = page
    for name in dark_matter_scores.INVARIANT:
        a, b = (scorers[f"{name} | {part} | train"].score(seen["near/shifted"]) for part in ("linear", "input"))
        assert a == pytest.approx(b, rel=1e-4, abs=1e-4)
    a, b = (scorers[f"mds++ | {part} | train"].score(seen["near/shifted"]) for part in ("linear", "input"))
    assert not np.allclose(a, b, rtol=1e-2)


def test_scores_stand_where_they_apply(page):
    run, seen, scorers = page
    cells = {tuple(name.split(" | ")) for name in scorers}
    for name in dark_matter_scores.ON_PARTS:
        fits = {"train", "val"} if name in dark_matter_scores.JUDGED else {"train"}
        assert {(p, fit) for method, p, fit in cells if method == name} == {
            (part, fit) for part in dark_matter_scores.PARTS for fit in fits
        }
    for name in dark_matter_scores.through_head():
        assert {"logits", "head"} & set(detectors.info(name)["needs"])
        assert {part for method, part, _ in cells if method == name} == {"features", "reconstruction"}
    baselines = {n for n in detectors.available() if detectors.info(n)["group"] == "baseline"}
    assert baselines - set(dark_matter_scores.SLOW) <= {method for method, *_ in cells}
    again = dark_matter_scores.Distance().fit(seen["val"].parts["rest"]).score(seen["test"].parts["rest"])
    assert np.array_equal(scorers["distance | rest | val"].score(seen["test"]), again)
    own = run.detectors(["energy", "epd"])
    assert scorers["energy | features | train"].score(seen["test"]) == pytest.approx(
        own["energy"].score(run.observations("test"))
    )
    assert np.array_equal(
        scorers["epd | reconstruction | train"].score(seen["test"]), own["epd"].score(run.observations("test"))
    )
    logits = run.head.logits(run.sae.reconstruct(run.features("test").cls))
    energy = detectors.create("energy").score(Observations(run.features("test").cls, logits=logits))
    assert scorers["energy | reconstruction | train"].score(seen["test"]) == pytest.approx(energy, rel=1e-5)


def test_the_table_is_evaluates(page, tables):
    run, seen, scorers = page
    some = {name: scorers[name] for name in ("mds++ | rest | val", "epd | reconstruction | train")}
    ood = {name: seen[name] for name in run.experiment.ood_sets}
    keys = ["method", "set", "group", "metric"]
    ours = (
        tables[0].assign(method=tables[0][["method", "part", "fit"]].agg(" | ".join, axis=1)).set_index(keys)["value"]
    )
    theirs = evaluate(some, seen["test"], ood, n_boot=0).set_index(keys)["value"]
    rows = [key for key in theirs.index if key[3] in (HEADLINE, "fpr95_id_pos", "auroc")]
    assert len(rows) == 2 * 3 * 5 and ours[rows].to_numpy() == pytest.approx(theirs[rows].to_numpy())
    cells = tables[0]
    assert (cells["lo"] <= cells["value"] + 0.1).all() and (cells["value"] <= cells["hi"] + 0.1).all()


def test_comparisons_are_those_of_the_pairs(page, tables):
    run, seen, scorers = page
    ood = {name: seen[name] for name in run.experiment.ood_sets}
    metrics = (HEADLINE, "auroc")
    again = compare(scorers, seen["test"], ood, dark_matter_scores.pairs(), metrics=metrics, n_boot=200)
    assert again["p_holm"].tolist() == tables[1]["p_holm"].tolist()
    assert len(tables[1]) == len(dark_matter_scores.pairs()) * 3 * 2
    names = again["method"] == tables[1][["method", "part", "fit"]].agg(" | ".join, axis=1)
    assert names.all() and again["other"].str.startswith("vim | features").sum() == 3 * 2
    assert not any("linear" in "".join(p) and p[0].startswith("mds |") for p in dark_matter_scores.pairs())
    # the least corrected p that the page's replicates can give is well under 0.05: see compare
    assert 2 * len(dark_matter_scores.pairs()) / (dark_matter_scores.PAIRED + 1) < 0.05 / 3
    assert {fit for pair in dark_matter_scores.pairs() for fit in [pair[0].split(" | ")[2]]} == {"train", "val"}


def test_epd_with_the_errors_length_is_compared_set_by_set(page):
    run, seen, scorers = page
    ood = {name: seen[name] for name in run.experiment.ood_sets}
    found = dark_matter_scores.beside_epd(scorers, seen["test"], ood, n_boot=200)
    assert found["set"].tolist() == list(ood)
    assert found["p_holm"].to_numpy() == pytest.approx(holm(found["p"]))
    for row in found.itertuples():
        clear = "better" if row.value < 0 else "worse"
        assert row.verdict == (clear if row.p_holm < 0.05 else "undecided")


def test_lengths_tell_which_way_a_part_deviates():
    rows = _rows(200)
    centre = rows.mean(0)

    def at(x, factor):
        near, far = (Observations(centre + f * (x - centre)) for f in (1 / factor, factor))
        return dark_matter_scores.PartObservations({"reconstruction": near, "error": far})

    seen = {"train": at(rows, 1), "test": at(_rows(150), 1), "near/a": at(_rows(90), 3), "far/b": at(_rows(80), 3)}
    found = dark_matter_scores.lengths(seen, ["near/a", "far/b"]).set_index(["part", "set"])
    assert (found.loc["reconstruction", "hi"] < 0.1).all() and (found.loc["error", "lo"] > 0.9).all()
    assert set(found.loc["error"].index) == {"near/a", "far/b", "mean"}


def test_length_and_sum():
    rows = Observations(_rows(50))
    one = dark_matter_scores.Length().fit(rows)
    far = Observations(_rows(50) + 40)
    assert (one.score(far) > one.score(rows).max()).all()
    two = dark_matter_scores.Distance().fit(rows)
    centre, size = rows.cls64.mean(0), np.median(one.score(rows))
    ends = Observations(centre + np.outer([size, 0, 2 * size], np.eye(12)[0]))
    assert two.score(ends)[0] == pytest.approx(0, abs=1e-9)  # neither shorter nor longer
    assert two.score(ends)[1] == pytest.approx(two.score(ends)[2]) and two.score(ends)[1] > 2
    both = dark_matter_scores.Summed((one, one)).fit(rows, rows)
    assert both.score(rows).mean() == pytest.approx(0, abs=1e-9) and both.score(rows).std() == pytest.approx(2)


# --- the numbers of the findings


def _found(vector, norm2=(0.5, 0.4, 0.6), fvu=(0.1, 0.2), train=-1.0, one=0.2, coder="SAE, k = 32", unseen=None):
    cells = {("vector", "unseen"): unseen or vector, ("norm2", "unseen"): norm2, ("vector", "rescaled"): vector,
             ("norm2", "rescaled"): norm2, ("vector", "one number"): (one, one, one),
             ("norm2", "train"): (train, train, train), ("norm2", "constant"): (-1.5, -1.6, -1.4)}  # fmt: skip
    rows = [(coder, *key, *cell, *fvu, {"unseen": 180}.get(key[1], 900)) for key, cell in cells.items()]
    return pd.DataFrame(rows, columns=["coder", "target", "fit", "value", "lo", "hi", "fvu_train", "fvu_test", "rows"])


def test_numbers_of_the_findings_are_those_of_the_tables(page, tables):
    run, seen, scorers = page
    ood = {name: seen[name] for name in run.experiment.ood_sets}
    controls = ["shuffled rows", "random dictionary", "PCA, largest 16 of 24", "SAE, k = 8", "SAE, k = 96"]
    r2 = [_found((0.3, 0.2, 0.4), one=0.1), *(_found((0.1, 0.0, 0.2), coder=name) for name in controls)]
    found = SimpleNamespace(
        r2=pd.concat(r2, ignore_index=True), table=tables[0], compared=tables[1],
        structure=dark_matter.structure(dark_matter_scores.arrays(seen), n_boot=50),
        lengths=dark_matter_scores.lengths(seen, ood),
        beside=dark_matter_scores.beside_epd(scorers, seen["test"], ood, n_boot=50),
    )  # fmt: skip
    numbers = dark_matter_study.numbers(found)
    assert (numbers["vector_rescaled"].value, numbers["vector_one_number"].value) == (30, 10)
    assert (numbers["unexplained_train"].value, numbers["unexplained_test"].value) == (10, 20)
    assert numbers["sets"].value == len(ood)
    row = tables[1].query("set == 'mean' and metric == @HEADLINE and method == 'mds' and fit == 'val'")
    row = row[(row["part"] == "reconstruction") & (row["other_part"] == "input")].iloc[0]
    made = numbers["mds_reconstruction_less_input_val"]
    assert made.value == pytest.approx(100 * row["value"], abs=0.06) and made.p == pytest.approx(
        row["p_holm"], rel=0.05
    )
    assert numbers["sets_helped"].value + numbers["sets_hurt"].value <= len(ood)
    names = {name for one in findings.of_notebook("09_dark_matter") for name in one.names}
    assert names <= set(numbers)
    assert len(dark_matter_study.differences(found)) and len(dark_matter_study.through_head(found)) > 5
    assert len(dark_matter_study.r2_wide(found)) == 2 * 6


def test_what_a_part_keeps_is_the_least_of_both_fits():
    rows = [("mds", part, fit, "mean", "all", HEADLINE, value, 0, 1) for part, fit, value in (
        ("input", "train", 0.15), ("error", "train", 0.55), ("input", "val", 0.45), ("error", "val", 0.9))]  # fmt: skip
    table = pd.DataFrame(rows, columns=["method", "part", "fit", "set", "group", "metric", "value", "lo", "hi"])
    assert dark_matter_study.kept(table, "error") == pytest.approx(0.1)


def test_growth_counts_sets_beyond_the_interval_on_id():
    rows = [(s, g, w, v, v - 0.05, v + 0.05) for w in ("linear", "rest")
            for s, g, v in (("test", "id", 0.1), ("near/a", "near", 0.3), ("far/b", "far", 0.18))]  # fmt: skip
    table = pd.DataFrame(rows, columns=["set", "group", "what", "value", "lo", "hi"])
    assert dark_matter_study._grown(table) == {"linear": 1, "rest": 1}


# --- the page


def test_figures_are_drawn_in_both_themes(tables):
    cells = [(s, "id", w, 0.5, 0.4, 0.6) for s in ("test", "near/a") for w in (*dark_matter.THREE, "cross")]
    shares = pd.DataFrame(cells, columns=["set", "group", "what", "value", "lo", "hi"])
    alone = dark_matter_study.means(SimpleNamespace(table=tables[0]), ["mds", "distance"])
    assert alone["method"].nunique() == 4  # two scores, each by two fits
    for function, data, options in [
        (dark_matter_figures.predictability, _found((0.3, 0.2, 0.4)), {}),
        (dark_matter_figures.shares, shares, {}),
        (dark_matter_figures.heatmap, alone, {"metric": HEADLINE}),
    ]:
        with display.style():
            figure = function(data, **options)
            assert len(display.render_svg(figure, "figure")) > 1000


@pytest.mark.parametrize("experiment", plan.ANALYSES["09_dark_matter"])
def test_the_tables_of_a_published_page_agree_with_each_other(experiment):
    path = publish.path_of(f"{experiment}/09_dark_matter")
    data = path.parent / "data" / path.stem
    table, cells = pd.read_csv(data / "r2.csv"), pd.read_csv(data / "all_cells.csv")
    compared = pd.read_csv(data / "differences.csv")
    at = cells[(cells["set"] == "mean") & (cells["group"] == "all") & (cells["metric"] == HEADLINE)]
    at = at.set_index(["method", "part", "fit"])["value"]
    for row in compared[(compared["set"] == "mean") & (compared["metric"] == HEADLINE)].to_dict("records"):
        clear = row["p_holm"] < 0.05
        assert row["verdict"] == (("better" if row["value"] < 0 else "worse") if clear else "undecided")
        means = [at[row["method"], row[part], row["fit"]] for part in ("part", "other_part")]
        assert row["value"] == pytest.approx(means[0] - means[1], abs=1e-5)
    vector = table[table["target"] == "vector"].set_index(["coder", "fit"])["value"]
    (exact,) = vector[[name for name in vector.index if name[0].startswith("PCA, first") and name[1] == "unseen"]]
    assert exact == pytest.approx(1, abs=1e-3)
    assert abs(vector["shuffled rows", "unseen"]) < 0.02
    assert at["mds", "input", "train"] == pytest.approx(at["mds", "linear", "train"], abs=0.005)
