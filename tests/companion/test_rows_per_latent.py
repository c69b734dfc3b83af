"""Training samples per latent: every cell is measured, the committed tables are whole."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from capsae.features.featureset import FeatureSet
from capsae.sae import SAEConfig
from companion.chapters import rows_per_latent as rows
from companion.publish import plan

CONFIG = SAEConfig(latents=24, k=4, epochs=2, batch_size=32, lr=0.01)
PUBLISHED = [name for name in ("imagenet20", "imagenet20-augreg") if rows.file(name).is_file()]


@pytest.fixture(scope="module")
def features():
    """Four classes, an OOD set of other centres and one of none."""
    rng = np.random.default_rng(0)
    centres, found = rng.normal(size=(8, 16)), {}
    for name, n in {"train": 20, "val": 8, "test": 15, "near/others": 15, "far/none": 15}.items():
        labels = np.repeat(np.arange(4), n)
        at = {"near/others": centres[4:], "far/none": 0 * centres[:4]}.get(name, centres[:4])
        x = (3 * at[labels] + rng.normal(size=(len(labels), 16))).astype(np.float32)
        logits = -((x[:, None] - 3 * centres[None, :4]) ** 2).sum(2)
        found[name] = FeatureSet(x, labels, np.arange(len(labels)), logits=logits, name=name)
    return found


@pytest.fixture(scope="module")
def table(features):
    units = [(seed, size) for seed in (0, 1) for size in (None, 24, 48)]
    return pd.concat([rows.measure(features, CONFIG, *unit, {}) for unit in units], ignore_index=True)


def whole(table):
    """Every cell of the seeds that a size has, once."""
    keys = ["fraction", "D", "dictionary", "score", "seed", "group", "metric"]
    cells = len(rows.FRACTIONS) * len(rows.SCORES) * len(rows.GROUPS) * len(rows.METRICS)
    sizes = table.groupby("D").agg(of=("dictionary", "nunique"), n=("seed", "nunique"), last=("seed", "max"))
    return (
        not table.duplicated(keys).any()
        and not table.isna().any().any()
        and len(table) == cells * (sizes["of"] * sizes["n"]).sum()
        and sorted(sizes["of"]) == [1] + [3] * (len(sizes) - 1)
        and (sizes["n"] == sizes["last"] + 1).all()
        and table["value"].between(0, 1).all()
        and np.allclose(table["samples_per_latent"], table["N"] / table["D"], rtol=1e-5)
    )


def test_every_cell_is_measured(table):
    assert list(table.columns) == rows.COLUMNS and whole(table)
    assert set(table["N"]) == {8, 20, 40, 80}
    assert set(table.loc[table["dictionary"] == "dense", "D"]) == {16}
    both = table.pivot_table(index=rows.COLUMNS[:3] + rows.COLUMNS[4:6] + rows.COLUMNS[7:9], columns="seed")["value"]
    assert (both[0] != both[1]).any(), "the seed changes nothing"


def test_a_mean_over_sets_and_the_dense_code_are_what_they_claim(table, features):
    from capsae.detectors import Observations, create
    from capsae.metrics import auroc

    seen = {name: Observations(f.cls, f.logits, f.labels if name == "train" else None) for name, f in features.items()}
    epd = create("epd_dense").fit(seen["train"])  # the library's own control
    scores = {name: epd.score(obs) for name, obs in seen.items()}
    expected = [auroc(scores["test"], scores[name]) for name in ("near/others", "far/none")]
    cell = "fraction == 1 and dictionary == 'dense' and score == 'epd' and seed == 0 and metric == 'auroc'"
    found = table.query(cell).set_index("group")["value"]
    np.testing.assert_allclose(found[["near", "far", "all"]], [*expected, np.mean(expected)], atol=2e-3)


def test_steps_are_kept_where_samples_shrink(features, monkeypatch):
    epochs = []

    def train(x, config, *given, **options):
        epochs.append((len(x), config.epochs))
        return rows_train(x, config, *given, **options)

    rows_train = rows.train_sae
    monkeypatch.setattr(rows, "train_sae", train)
    rows.measure(features, CONFIG, 0, 24, {})
    assert epochs == [(8, 20), (20, 8), (40, 4), (80, 2)]


def test_differences_are_paired_by_seed(table):
    wide = table.query("group == 'all' and metric == 'fpr95_ood_pos' and score == 'rpd' and D == 48 and fraction == 1")
    wide = wide.pivot_table(index="seed", columns="dictionary", values="value")
    found = rows.numbers(table)["rpd_48_100_less_untrained"]
    assert found.value == pytest.approx(100 * (wide["trained"] - wide["untrained"]).mean(), abs=0.06)
    assert found.lo <= found.value <= found.hi
    alone = rows.numbers(table[table["seed"] == 0])["rpd_48_100_less_untrained"]
    assert alone.lo is None and alone.hi is None, "one seed has an interval over seeds"
    assert len(rows.figure(rows.curves(table)).axes) == 2


@pytest.mark.parametrize("experiment", PUBLISHED)
def test_a_committed_table_is_whole(experiment):
    found = rows.read(experiment)
    assert list(found.columns) == rows.COLUMNS and whole(found)
    assert {384, 1920} <= set(found["D"]) and found.groupby("D")["seed"].nunique().min() > 1


def test_the_page_names_its_table():
    for experiment in plan.ANALYSES["15_rows_per_latent"]:
        reads = plan.pages()[f"{experiment}/15_rows_per_latent"].reads
        assert rows.file(experiment).relative_to(plan.root()).as_posix() in reads
