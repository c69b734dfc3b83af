"""What every score owes any input: no dependence on batch, order, precision or framework, no surprise at odd rows."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capsae import Observations, detectors
from capsae.data.images import PIXEL_STATISTICS
from capsae.detectors import observations as module
from capsae.sae import SAEConfig, TopKSAE

NAMES = detectors.available()
BIB = (Path(__file__).resolve().parents[2] / "book" / "references.bib").read_text()
few = settings(max_examples=2, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
worlds = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 999), "d": st.integers(8, 16), "classes": st.integers(2, 5),
        "scale": st.sampled_from([0.1, 1.0, 10.0]), "shift": st.sampled_from([-1.0, 0.0, 1.0]),
    }
)  # fmt: skip


def make(seed=0, d=12, classes=3, scale=1.0, shift=0.0, n_train=80, n_test=24):
    """(train, test) as keyword arguments of Observations, features float32."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, d))
    head = SimpleNamespace(
        weight=rng.normal(size=(classes, d)).astype(np.float32) / scale, bias=rng.normal(size=classes)
    )
    sae = TopKSAE.untrained(d, SAEConfig(latents=4 * d, k=4))

    def rows(n):
        labels = np.arange(n) % classes
        cls = scale * (centres[labels] + 0.5 * rng.normal(size=(n, d)) + shift)
        pixels = np.exp(rng.normal(size=(n, len(PIXEL_STATISTICS))))
        return {"cls": cls.astype(np.float32), "labels": labels, "head": head, "sae": sae, "pixels": pixels}

    return rows(n_train), rows(n_test)


def fitted(name, train):
    rows = Observations(**train)
    return detectors.create(name).fit(rows, rows.take(slice(0, len(rows) // 2)))


def close(scores, expected, tolerance=1e-5):
    rounding = 2e-7 * np.abs(expected).max() if tolerance else 0  # of float32, where a score hardly varies
    assert np.abs(scores - expected).max() <= tolerance * expected.std() + rounding


@pytest.mark.parametrize("name", NAMES)
@given(given_world=worlds)
@few
def test_batch_order_and_blocks_do_not_matter(name, given_world):
    train, test = make(**given_world)
    detector, obs = fitted(name, train), Observations(**test)
    whole = detector.score(obs)
    assert whole.shape == (len(obs),) and whole.dtype == np.float64 and np.isfinite(whole).all()
    order = np.random.default_rng(given_world["seed"]).permutation(len(obs))
    close(detector.score(obs.take(order)), whole[order])
    fresh = Observations(**test)
    close(np.concatenate([detector.score(fresh.take([row])) for row in range(0, len(fresh), 6)]), whole[::6])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CELLS", 7 * given_world["d"])
        assert len(list(Observations(**train).blocks())) > 5
        close(fitted(name, train).score(Observations(**test)), whole)


@pytest.mark.parametrize("name", NAMES)
@given(given_world=worlds)
@few
def test_precision_framework_and_labels_do_not_matter(name, given_world):
    train, test = make(**given_world)
    train["cls"], test["cls"] = (rows["cls"].astype(np.float16) for rows in (train, test))  # exact in all three
    detector = fitted(name, train)
    reference = detector.score(Observations(**test))
    for convert in (np.float64, lambda cls: torch.from_numpy(cls).float()):
        one, other = ({**rows, "cls": convert(rows["cls"])} for rows in (train, test))
        close(fitted(name, one).score(Observations(**other)), reference)
    wrong = {**test, "labels": (test["labels"] + 1) % given_world["classes"]}
    for rows in ({**test, "labels": None}, wrong):
        close(detector.score(Observations(**rows)), reference, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", NAMES)
def test_device_does_not_matter(name):
    train, test = make()
    on_gpu = {**test, "cls": torch.from_numpy(test["cls"]).cuda()}
    close(fitted(name, train).score(Observations(**on_gpu)), fitted(name, train).score(Observations(**test)), 0)


@pytest.mark.parametrize("name", NAMES)
@given(given_world=worlds)
@few
def test_odd_rows_get_finite_scores(name, given_world):
    train, test = make(**given_world)
    detector, d = fitted(name, train), given_world["d"]
    odd = np.stack([np.zeros(d), np.ones(d), -np.ones(d), np.full(d, 1e4), np.eye(d)[0] * 1e4, np.full(d, 1e-20)])
    mean, near = train["cls"].mean(axis=0), train["cls"][:1]
    for cls in (odd, mean[None], near, 1e4 * test["cls"], np.repeat(test["cls"][:1], 5, axis=0)):
        rows = {**test, "cls": cls.astype(np.float32), "labels": None, "pixels": test["pixels"][: len(cls)]}
        assert np.isfinite(detector.score(Observations(**rows))).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", ["one training row in a class", "one class predicted", "sure of everything"])
def test_odd_training_rows_give_finite_scores(name, case):
    train, test = make(seed=3)
    if case == "one training row in a class":
        rows = np.flatnonzero(train["labels"] != 2).tolist() + [2]
        train = {k: v[rows] if isinstance(v, np.ndarray) else v for k, v in train.items()}
    elif case == "one class predicted":
        train["head"].bias = np.array([1e3, 0, 0])
    else:
        train["head"].weight = train["head"].weight * 1e4
    assert np.isfinite(fitted(name, train).score(Observations(**test))).all()


@pytest.mark.parametrize("array", ["cls", "logits", "pixels"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@given(row=st.integers(0, 23), dtype=st.sampled_from([np.float16, np.float32, np.float64]))
@few
def test_what_is_not_finite_is_refused_by_row(array, bad, row, dtype):
    _, test = make()
    test["logits"] = np.zeros((24, 3))
    test[array] = test[array].astype(dtype)
    test[array][row, 1] = bad
    with pytest.raises(ValueError, match=f"{array} holds NaN or infinity in 1 rows, the first is row {row}$"):
        Observations(**test)


def test_one_pass_gives_what_each_gives_alone(monkeypatch):
    train, test = make()
    found = {name: fitted(name, train) for name in NAMES}
    alone = {name: detector.score(Observations(**test)) for name, detector in found.items()}
    monkeypatch.setattr(module, "CELLS", 60)
    together = detectors.score_all(found, Observations(**test))
    for name in NAMES:
        close(together[name], alone[name])


@pytest.mark.parametrize("name", NAMES)
def test_metadata(name):
    about = detectors.info(name)
    assert about["group"] in ("paper", "ours", "control", "baseline")
    assert about["fitted_on"] in ("train", "validation", "nothing")
    assert set(about["needs"]) <= {"logits", "features", "labels", "head", "codes", "pixels"} and about["needs"]
    assert (
        about["title"] and len(about["description"]) > 10 and about["formula"].count("{") == about["formula"].count("}")
    )
    if re.fullmatch(r"[a-z]+\d{4}[a-z]+", about["source"]):
        assert f"{{{about['source']}," in BIB
    else:
        assert about["group"] != "baseline" and about["source"]


def test_faiss_finds_the_same_neighbours():
    pytest.importorskip("faiss", reason="faiss-cpu is not installed (optional)")
    train, test = make()
    obs = Observations(**train)
    blocks, faiss = (detectors.create("knn", k=5, backend=b).fit(obs) for b in ("blocks", "faiss"))
    np.testing.assert_array_equal(faiss.score(Observations(**test)), blocks.score(Observations(**test)))


@pytest.mark.slow
def test_the_page_on_a_score_of_your_own_runs_as_it_stands():
    text = (Path(__file__).resolve().parents[2] / "book" / "own_score.md").read_text()
    block = re.search(r"```python\n(.*?)```", text, re.S).group(1)
    names: dict = {}
    exec(compile(block, "own_score.md", "exec"), names)
    assert set(names["table"].method) == {"mine", "mds++", "energy", "head"}
    assert len([line for line in block.split("class MyScore")[1].splitlines() if line.strip()]) <= 13
