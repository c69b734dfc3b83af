"""Tuning chooses by ID rows alone; what tries to reach a test set fails."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from capsae import Observations, SAEConfig
from capsae.detectors import Detector, available, base, create, info
from companion.chapters.tuning import criterion as tuning
from companion.chapters.tuning.criterion import HeldOutClasses, leave_one_set_out, tune

CLASSES = 8


def _observations(n, seed, labelled=True, shift=0.0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % CLASSES
    centres = np.random.default_rng(7).normal(size=(CLASSES, 12)) * 3
    head = type("Head", (), {"weight": centres, "bias": -(centres**2).sum(1) / 2})
    return Observations(
        centres[labels] + rng.normal(size=(n, 12)) + shift, labels=labels if labelled else None, head=head
    )


@pytest.fixture
def world():
    return _observations(160, 0), _observations(80, 1)


@pytest.fixture
def dial(monkeypatch):
    """A registered detector that is good where ``turn`` is 3: the nearest class mean, spoilt by noise elsewhere."""
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))

    @base.register("dial")
    @dataclass
    class Dial(Detector):
        """A dial."""

        title: ClassVar[str] = "Dial"
        group: ClassVar[str] = "control"
        formula: ClassVar[str] = "d"
        source: ClassVar[str] = "test"
        needs: ClassVar[tuple[str, ...]] = ("features", "labels")
        turn: int = 1
        other: float = 0.5

        def fit(self, obs, validation=None):
            if self.turn > 8:
                raise ValueError(f"turn is {self.turn}: use at most 8")
            self.means = np.stack([obs.cls[obs.labels == c].mean(0) for c in range(obs.labels.max() + 1)])
            return self

        def score(self, obs):
            near = np.square(obs.cls[:, None] - self.means).sum(2).min(1)
            return near + np.random.default_rng(len(obs)).normal(size=len(obs)) * 100 * (self.turn - 3) ** 2

    return Dial


def test_the_grid_is_whole_the_best_is_chosen_and_refusals_are_listed(world, dial):
    tuned = tune("dial", {"turn": (2, 3, 5, 9)}, *world, HeldOutClasses(folds=2))
    assert tuned.default == {"turn": 1, "other": 0.5} and tuned.chosen == {"turn": 3, "other": 0.5}
    table = tuned.table.set_index("setting")
    assert list(table.index) == ["turn=1", "turn=2", "turn=3", "turn=5", "turn=9"]
    assert table["default"].tolist() == [True, False, False, False, False]
    assert table["chosen"].tolist() == [False, False, True, False, False]
    assert np.isnan(table.loc["turn=9", "criterion"]) and "at most 8" in table.loc["turn=9", "refused"]
    assert table["criterion"].drop("turn=9").between(0, 1).all()
    named = tune("dial", {"turn": (2, 3)}, *world, HeldOutClasses(folds=2), default={"turn": 2})
    assert named.default["turn"] == 2 and len(named.table) == 2


def test_the_default_stays_where_nothing_is_better(world, dial):
    tuned = tune("dial", {"turn": (4, 1, 2)}, *world, criterion=lambda make, train, validation: 0.5)
    assert tuned.chosen == tuned.default


def test_a_criterion_is_given_id_training_and_validation_rows_and_nothing_else(world, dial):
    given = []
    tune("dial", {"turn": (2, 3)}, *world, criterion=lambda make, *sets: given.append(sets) or 0.5)
    assert len(given) == 3 and all(sets == tuple(world) for sets in given)


def test_rows_without_labels_and_unknown_options_are_refused(world, dial):
    with pytest.raises(ValueError, match="validation has no labels"):
        tune("dial", {"turn": (1,)}, world[0], _observations(40, 2, labelled=False))
    with pytest.raises(ValueError, match="no option 'turns'"):
        tune("dial", {"turns": (1,)}, *world)
    with pytest.raises(ValueError, match="use fewer folds"):
        HeldOutClasses(folds=5).folds(*world)


def test_folds_hold_out_every_class_once_and_keep_their_rows_apart(world):
    train, validation = world
    folds = HeldOutClasses(SAEConfig(latents=24, k=4, epochs=2, batch_size=32), folds=4).folds(train, validation)
    held = [np.setdiff1d(np.arange(CLASSES), fold.kept) for fold in folds]
    assert sorted(np.concatenate(held)) == list(range(CLASSES))
    for fold, out in zip(folds, held, strict=True):
        assert np.isin(train.labels[fold.rows], out).all()
        assert len(fold.train) == (~np.isin(train.labels, out)).sum() and fold.unknown.labels is None
        assert set(fold.known.labels) == set(range(len(fold.kept))) and fold.known.logits.shape[1] == len(fold.kept)
        assert fold.unknown.codes.n_latents == 24
    criterion = HeldOutClasses(folds=2)
    assert criterion.folds(train, validation) is criterion.folds(train, validation)


def test_a_criterion_that_needs_codes_is_the_mean_over_the_seeds_of_the_sae(world):
    sae = SAEConfig(latents=24, k=4, epochs=2, batch_size=32)
    over, seen = HeldOutClasses(sae, folds=2, saes=3), []
    for draw in range(3):
        folds = over.folds(*world, draw)
        assert [fold.train.cls is first.train.cls for fold, first in zip(folds, over.folds(*world), strict=True)] == [
            True
        ] * 2
        alone = HeldOutClasses(sae, folds=2, saes=1)
        alone.folds(*world)
        alone._folds[0] = folds
        seen.append(alone(lambda: create("rpd"), *world))
    assert len(set(seen)) > 1 and over(lambda: create("rpd"), *world) == pytest.approx(np.mean(seen))
    knn = over(lambda: create("knn", k=1), *world)
    assert knn == HeldOutClasses(folds=2)(lambda: create("knn", k=1), *world), "what needs no codes has no seed"


def test_leave_one_set_out_does_not_look_at_the_set(world, dial):
    """The dial's best turn is 3 on any set; the value is that of the set left out, peeking is never worse."""
    id_test = _observations(80, 3)
    ood = {f"far/{i}": _observations(60, 10 + i, labelled=False, shift=i + 1) for i in range(3)}
    found = leave_one_set_out("dial", {"turn": (2, 3, 9)}, world[0], id_test, ood)
    assert list(found["set"]) == list(ood) and (found["setting"] == "turn=3").all()
    assert (found["peeking"] <= found["value"]).all() and (found["value"] < found["default"]).all()
    high = leave_one_set_out("dial", {"turn": (2, 3)}, world[0], id_test, ood, metric="auroc")
    assert (high["peeking"] >= high["value"]).all()
    changed = ood | {"far/2": _observations(60, 99, labelled=False, shift=-9)}
    again = leave_one_set_out("dial", {"turn": (2, 3, 9)}, world[0], id_test, changed)
    assert found.loc[2, "setting"] == again.loc[2, "setting"]
    with pytest.raises(ValueError, match="1 OOD set"):
        leave_one_set_out("dial", {"turn": (2,)}, world[0], id_test, {"far/0": ood["far/0"]})
    with pytest.raises(ValueError, match="'fpr95' is not known"):
        leave_one_set_out("dial", {"turn": (2,)}, world[0], id_test, ood, metric="fpr95")


def test_the_grids_vary_options_that_their_detectors_have():
    known = tuning.grids()
    assert {"epd", "rpd", "knn", "vim", "react", "gen"} <= set(known) <= set(available())
    for name, grid in known.items():
        assert set(grid) <= set(info(name)["defaults"]), name
        assert all(len(set(values)) == len(values) > 1 for values in grid.values()), name
