import numpy as np
import pytest

import capsae
from capsae import metrics
from capsae.evaluation.evaluate import compare, scores_table
from capsae.evaluation.tables import COLUMNS, COMPARED


class Column:
    """A detector that reads its score from the first feature."""

    def score(self, obs):
        return obs.cls[:, 0]


@pytest.fixture
def world():
    rng = np.random.default_rng(0)

    def observations(n, shift):
        return capsae.Observations(rng.normal(shift, 1, size=(n, 2)), logits=rng.normal(size=(n, 4)))

    id_test = observations(120, 0)
    id_test.labels = id_test.predicted.copy()
    id_test.labels[:30] = (id_test.labels[:30] + 1) % 4
    return id_test, {"near/a": observations(60, 1), "far/b": observations(50, 2), "far/c": observations(40, 3)}


def test_table_is_tidy_and_true(world):
    id_test, ood = world
    table = capsae.evaluate({"column": Column()}, id_test, ood, n_boot=200)
    assert list(table.columns) == COLUMNS
    cell = table.set_index(["set", "group", "metric"])["value"]
    for where, obs in ood.items():
        for metric in metrics.METRICS:
            expected = getattr(metrics, metric)(id_test.cls[:, 0], obs.cls[:, 0])
            assert cell[where, where.split("/")[0], metric] == pytest.approx(expected, abs=1e-12)
    far = [metrics.auroc(id_test.cls[:, 0], ood[w].cls[:, 0]) for w in ("far/b", "far/c")]
    assert cell["mean", "far", "auroc"] == pytest.approx(np.mean(far))
    assert cell["mean", "near", "auroc"] == cell["near/a", "near", "auroc"]
    assert cell["test", "id", "accuracy"] == pytest.approx(0.75)
    assert table[table.metric == "autc"][["lo", "hi"]].isna().all(axis=None)  # no bootstrap of a largest value
    table = table[table.metric != "autc"]
    assert ((table.lo <= table.value) & (table.value <= table.hi)).mean() > 0.9
    assert (table.hi - table.lo).gt(0).mean() > 0.9


def test_both_fpr95_conventions_are_named(world):
    names = set(capsae.evaluate({"column": Column()}, *world, n_boot=0).metric)
    assert {"fpr95_ood_pos", "fpr95_id_pos"} <= names and not {"fpr", "fpr95"} & names


def test_same_seed_same_table(world):
    a, b = (capsae.evaluate([Column()], *world, n_boot=50, seed=s) for s in (1, 1))
    assert a.equals(b)
    assert not a.equals(capsae.evaluate([Column()], *world, n_boot=50, seed=2))


def test_labels_bring_the_metrics_of_correctness(world):
    id_test, ood = world
    table = capsae.evaluate({"column": Column()}, id_test, ood, n_boot=50)
    cell, correct = table.set_index(["set", "group", "metric"])["value"], id_test.predicted == id_test.labels
    for metric in metrics.WITH_CORRECT:
        expected = getattr(metrics, metric)(id_test.cls[:, 0], ood["far/b"].cls[:, 0], correct)
        assert cell["far/b", "far", metric] == pytest.approx(expected)
    for metric in metrics.OF_ERRORS:
        assert cell["test", "id", metric] == pytest.approx(getattr(metrics, metric)(id_test.cls[:, 0], ~correct))
    id_test.labels = None
    without = set(capsae.evaluate({"column": Column()}, id_test, ood, n_boot=0).metric)
    assert without == set(metrics.METRICS)


def test_full_spectrum_counts_shifted_sets_as_id(world):
    id_test, ood = world
    shifted = {"shifted/fog": id_test.take(range(20, 50))}
    shifted["shifted/fog"].cls = shifted["shifted/fog"].cls + 1.5
    table = capsae.evaluate({"column": Column()}, id_test, ood, n_boot=30, shifted=shifted)
    plain = capsae.evaluate({"column": Column()}, id_test, ood, n_boot=30)
    full = table.group.str.startswith("full-spectrum")
    rest = table[~full & (table.set != "shifted/fog")].reset_index(drop=True)
    assert rest.equals(plain)
    cell = table[full].set_index(["set", "group", "metric"])["value"]
    heap = np.r_[id_test.cls[:, 0], shifted["shifted/fog"].cls[:, 0]]
    for metric in metrics.METRICS:
        expected = [getattr(metrics, metric)(heap, obs.cls[:, 0]) for obs in ood.values()]
        assert cell["near/a", "full-spectrum near", metric] == pytest.approx(expected[0])
        assert cell["mean", "full-spectrum all", metric] == pytest.approx(np.mean(expected))
    accuracy = table[(table.metric == "accuracy") & (table.set == "shifted/fog")].value.item()
    assert accuracy == pytest.approx(20 / 30)
    with pytest.raises(ValueError, match="shifted/<set>"):
        capsae.evaluate({"column": Column()}, id_test, ood, shifted={"fog": id_test})


def test_comparisons_are_corrected_column_by_column_and_judged(world):
    id_test, ood = world

    class Noisy(Column):
        def __init__(self, size):
            self.size = size

        def score(self, obs):
            return obs.cls[:, 0] + np.random.default_rng(len(obs)).normal(size=len(obs)) * self.size

    methods = {"epd": Column(), **{f"noise {size}": Noisy(size) for size in (0.01, 0.3, 30)}}
    found = compare(methods, id_test, ood, n_boot=2000)
    assert set(found.other) == {"epd"} and set(found.set) == {*ood, "mean"}
    for _, column in found.groupby(["metric", "set"]):
        assert len(column) == 3 and (column.p_holm >= column.p).all()
    verdict = found[found.set == "mean"].set_index(["method", "metric"]).verdict
    assert verdict["noise 30", "auroc"] == "worse" and verdict["noise 30", "fpr95_ood_pos"] == "worse"
    assert verdict["noise 0.01", "auroc"] == "undecided"
    back = compare(methods, id_test, ood, [("epd", "noise 30")], n_boot=2000)
    assert (back[back.set == "mean"].verdict == "better").all()
    with pytest.raises(ValueError, match="no detector 'x'"):
        compare(methods, id_test, ood, [("epd", "x")])
    with pytest.raises(ValueError, match="against='x'"):
        compare(methods, id_test, ood, against="x")


def test_paired_differences_are_those_of_shared_draws(world):
    """A method against itself plus a constant differs by nothing; the value is the difference of the table's means."""
    id_test, ood = world

    class Shifted(Column):
        def score(self, obs):
            return obs.cls[:, 0] + 7

    class Other:
        def score(self, obs):
            return obs.cls[:, 1] + obs.cls[:, 0]

    methods = {"a": Column(), "shifted": Shifted(), "b": Other()}
    found = compare(methods, id_test, ood, [("a", "shifted"), ("a", "b")], metrics.METRICS, n_boot=100)
    assert list(found.columns) == COMPARED
    same = found[found.other == "shifted"]
    assert (same[["value", "lo", "hi"]].abs().to_numpy() < 1e-12).all()
    assert (same.p == 1).all() and (same.verdict == "undecided").all()
    table = capsae.evaluate(methods, id_test, ood, n_boot=100)
    means = table[(table.set == "mean") & (table.group == "all")].set_index(["method", "metric"])
    for row in found[(found.other == "b") & (found.set == "mean")].itertuples():
        expected = means.loc[("a", row.metric), "value"] - means.loc[("b", row.metric), "value"]
        assert row.value == pytest.approx(expected) and row.lo <= row.value <= row.hi
        if row.metric == "autc":
            continue
        wide = means.loc[("a", row.metric), "hi"] - means.loc[("a", row.metric), "lo"]
        wide += means.loc[("b", row.metric), "hi"] - means.loc[("b", row.metric), "lo"]
        assert row.hi - row.lo < wide


def test_a_share_without_variation_has_an_exact_interval(world):
    id_test, ood = world

    class Perfect:
        def score(self, obs):
            return np.full(len(obs), 0.0 if obs is id_test else 1.0)

    cell = capsae.evaluate({"it": Perfect()}, id_test, ood, n_boot=50).set_index(["set", "metric"])
    n = len(ood["near/a"])
    lo, hi = cell.loc[("near/a", "fpr95_id_pos"), ["lo", "hi"]]
    assert lo == 0 and hi == pytest.approx(1 - 0.025 ** (1 / n))  # Clopper and Pearson's for 0 of n
    alone = cell[cell.index.get_level_values("metric") == "fpr95_id_pos"].droplevel("metric")
    ends = [alone.loc[name, "hi"] for name in ood]
    mean = cell.reset_index().query("set == 'mean' and metric == 'fpr95_id_pos' and group == 'all'").iloc[0]
    assert mean.lo == 0 and mean.hi == pytest.approx(np.mean(ends)) and mean.hi > 0


def test_a_pair_and_its_reverse_are_one_hypothesis(world):
    id_test, ood = world

    class Other:
        def score(self, obs):
            return obs.cls[:, 1] + obs.cls[:, 0]

    methods = {"a": Column(), "b": Other()}
    once = compare(methods, id_test, ood, [("a", "b")], n_boot=200)
    both = compare(methods, id_test, ood, [("a", "b"), ("b", "a")], n_boot=200)
    np.testing.assert_allclose(both[both.method == "a"].p_holm, once.p_holm)
    assert (once.p_at_most == ((once.metric != "auroc") & (once.p <= 2 / 201))).all()


def test_scores_table(world):
    id_test, ood = world
    table = scores_table({"column": Column()}, {"test": id_test, **ood})
    assert len(table) == 270 and set(table.group) == {"id", "near", "far"}
    assert table[table.set == "far/b"].score.tolist() == ood["far/b"].cls[:, 0].tolist()


def test_refusals(world):
    id_test, ood = world
    with pytest.raises(ValueError, match="near/<set>"):
        capsae.evaluate({"c": Column()}, id_test, {"texture": ood["far/b"]})
    with pytest.raises(ValueError, match="far/b has no rows"):
        capsae.evaluate({"c": Column()}, id_test, {"far/b": ood["far/b"].take([])})
    with pytest.raises(ValueError, match="two detectors"):
        capsae.evaluate([Column(), Column()], id_test, ood)

    class Broken:
        def score(self, obs):
            return np.full(len(obs), np.nan)

    with pytest.raises(ValueError, match="broken gave NaN"):
        capsae.evaluate({"broken": Broken()}, id_test, ood)


# --- seeds


class Off:
    """The first feature, off by what a seed makes of it; one number moves the OOD sets alone."""

    def __init__(self, shift):
        self.shift = shift

    def score(self, obs):
        return obs.cls[:, 0] + self.shift * obs.cls[:, 1]


@pytest.fixture
def seeded(world):
    """Three seeds of "off" and one "column" without any."""
    id_test, ood = world
    sets = {"test": id_test, **ood}
    first = {"off": Off(0.2), "column": Column()}
    return first, [({"off": Off(shift)}, sets) for shift in (0.5, -0.3)]


def test_a_number_with_seeds_is_their_mean_and_its_interval_holds_both(world, seeded):
    from capsae.stats import bootstrap, seeds_and_images

    (id_test, ood), (first, others) = world, seeded
    table = capsae.evaluate(first, id_test, ood, n_boot=100, seeds=iter(others)).set_index(["method", "set", "metric"])
    alone = [capsae.evaluate({"off": d["off"]}, id_test, ood, n_boot=100) for d in (first, *(d for d, _ in others))]
    alone = [one.set_index(["set", "metric"])["value"]["far/b", "auroc"] for one in alone]
    cell = table.loc[("off", "far/b", "auroc")]
    assert cell["value"] == pytest.approx(np.mean(alone)) and cell["seeds"] == 3
    thresholds = {s: metrics.Thresholds.of(Off(s).score(id_test), Off(s).score(ood["far/b"])) for s in (0.2, 0.5, -0.3)}
    draws = np.mean([of["auroc"] for of in bootstrap(thresholds, 100, 0, 1).values()], axis=0)
    expected = seeds_and_images(alone, draws.std(ddof=1))
    assert (cell["lo"], cell["hi"]) == pytest.approx((expected["lo"], min(1, expected["hi"])))
    plain = capsae.evaluate({"column": Column()}, id_test, ood, n_boot=100).set_index(["set", "metric"])
    assert plain.loc[("far/b", "auroc"), ["value", "lo", "hi", "seeds"]].tolist() == (
        table.loc[("column", "far/b", "auroc"), ["value", "lo", "hi", "seeds"]].tolist()
    )
    assert (table.loc["off"]["seeds"] == 3).all() and table.loc["off"]["hi"].le(1).loc[:, "auroc"].all()


def test_differences_are_taken_seed_by_seed(world, seeded):
    from capsae.stats import delong, placements, seeds_and_images

    (id_test, ood), (first, others) = world, seeded
    found = compare(first, id_test, ood, [("off", "column")], n_boot=100, seeds=others).set_index(["set", "metric"])
    shifts, of, base = (0.2, 0.5, -0.3), {}, {}
    for where in ood:
        base[where] = placements(Column().score(id_test), Column().score(ood[where]))
        one = [placements(Off(s).score(id_test), Off(s).score(ood[where])) for s in shifts]
        of[where] = [np.stack(side) for side in zip(*one, strict=True)]
    values = np.mean([ids.mean(1) - base[where][0].mean() for where, (ids, _) in of.items()], axis=0)
    parts = [(ids.mean(0) - base[w][0], oods.mean(0) - base[w][1]) for w, (ids, oods) in of.items()]
    expected = seeds_and_images(values, delong(parts)[1])
    for key in ("value", "lo", "hi", "p"):
        assert found.loc[("mean", "auroc"), key] == pytest.approx(expected[key], abs=1e-12), key
    assert (found["seeds"] == 3).all() and not found["p_at_most"].any()
    # A detector against itself on the same seeds: no doubt is left, where seeds of its own would leave much.
    twice = {"off": Off(0.2), "again": Off(0.2)}
    more = [({"off": Off(s), "again": Off(s)}, {"test": id_test, **ood}) for s in (0.5, -0.3)]
    same = compare(twice, id_test, ood, [("off", "again")], n_boot=50, seeds=more)
    assert (same["value"] == 0).all() and (same["lo"] == same["hi"]).all() and (same["p"] == 1).all()


def test_seeds_that_do_not_fit_are_refused(world, seeded):
    (id_test, ood), (first, _) = world, seeded
    with pytest.raises(ValueError, match="'other', which is not among"):
        capsae.evaluate(first, id_test, ood, seeds=[({"other": Off(1)}, {"test": id_test, **ood})])
    short = {"test": id_test, **ood, "far/b": ood["far/c"]}
    with pytest.raises(ValueError, match="far/b has 50 samples"):
        capsae.evaluate(first, id_test, ood, seeds=[({"off": Off(1)}, short)])


def test_single_seeds_are_shown(world, seeded):
    from capsae.evaluation.evaluate import all_scores
    from capsae.evaluation.tables import seed_values

    (id_test, ood), (first, others) = world, seeded
    values = seed_values(all_scores(first, {"test": id_test, **ood}, others), list(ood), ["auroc"])
    assert values["method"].tolist() == ["off"] * 3 + ["column"]
    expected = np.mean([metrics.auroc(Off(0.5).score(id_test), Off(0.5).score(obs)) for obs in ood.values()])
    assert values["value"][1] == pytest.approx(expected)
