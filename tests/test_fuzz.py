"""Seeded fuzz: arrays and experiments that nobody would write give a clear refusal or right numbers, nothing else."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import save_file
from sklearn.metrics import roc_auc_score

import capsae
from capsae.__main__ import main
from capsae.data.asarray import as_labels
from capsae.pipeline.arrays import evaluate_arrays
from capsae.pipeline.arrays_io import arrays_from

CLASSES, WIDTH, METHODS, OPTIONS = 3, 5, ("msp", "energy", "mds", "knn"), {"knn": {"k": 3}}
LAYOUTS = (
    *(lambda x: x, np.asfortranarray, lambda x: x[::-1].copy()[::-1], lambda x: np.repeat(x, 2, axis=0)[::2]),
    lambda x: x.astype(x.dtype.newbyteorder(">")),
    lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
    *(lambda x: torch.tensor(x.tolist()), lambda x: x.tolist(), lambda x: x[..., None]),
    *(lambda x: x[:0], lambda x: x[:1], lambda x: x.astype(object)),
    lambda x: np.ma.masked_array(x, mask=np.arange(x.size).reshape(x.shape) == 2),
)  # fmt: skip
DTYPES = ("f2", "f4", "f8", "f4", "f8", "i1", "i8", "u1", "c8", "?", "U8", "O", "M8[D]", [("x", "f4")])
POISON = (np.nan, np.inf, -np.inf, 1e300, -1, 2.7, 2**40, 0)


def _arrays(rng) -> dict:
    """Three Gaussian classes, and one to three arrays of them spoilt."""
    centres, raw = rng.normal(size=(CLASSES, WIDTH)) * 4, {}
    for name, n in {"train": 30, "test": 12, "near/a": int(rng.integers(1, 9)), "far/b": 7}.items():
        labels = np.arange(n) % CLASSES
        shift = 0 if name in ("train", "test") else rng.normal(size=WIDTH) * 3
        raw[f"{name}/features"] = centres[labels] + shift + rng.normal(size=(n, WIDTH))
        if "/" not in name:
            raw[f"{name}/labels"] = labels
        if name != "train":
            raw[f"{name}/scores/mine"] = rng.integers(0, 5, n) / 4  # ties
    for key in rng.choice(list(raw), int(rng.integers(0, 4)), replace=False):
        kind, array = rng.integers(4), raw[key]
        dtype, poison = (of[rng.integers(len(of))] for of in (DTYPES, POISON))
        if kind == 0:
            del raw[key]
        elif kind == 1:
            raw[key] = LAYOUTS[rng.integers(len(LAYOUTS))](array)
        elif kind == 2:
            raw[key] = np.zeros(array.shape, dtype) if np.dtype(dtype).kind in "VM" else array.astype(dtype)
        else:
            raw[key] = array = array.astype(float) if rng.integers(2) else array.copy()
            if array.dtype.kind == "f" or abs(poison) < 2**62:
                array.flat[rng.integers(array.size)] = poison
    return raw


def _check_table(raw, table):
    """Every number is finite or undefined by its definition, and the AUROC is scikit-learn's."""
    shares = table[~table["metric"].isin(("errors_flagged", "auroc_correct"))]  # undefined without an error, a hit
    assert np.isfinite(shares["value"]).all(), shares[~np.isfinite(shares["value"])]
    found = table[(table["method"] == "mine") & (table["metric"] == "auroc")].set_index("set")["value"]
    for where in {"near/a", "far/b"} & set(found.index):
        known, other = (np.asarray(raw[f"{name}/scores/mine"], float) for name in ("test", where))
        expected = roc_auc_score(np.r_[np.zeros(len(known)), np.ones(len(other))], np.r_[known, other])
        np.testing.assert_allclose(found[where], expected, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_evaluate_refuses_by_name_or_is_right(tmp_path):
    done = commands = 0
    for seed in range(120):
        rng = np.random.default_rng(seed)
        raw = _arrays(rng)
        try:
            arrays = arrays_from(raw, "mine.npz")
            found = evaluate_arrays(arrays, METHODS, sae=False, options=OPTIONS, n_boot=0, progress=False)
        except ValueError as error:
            named = ("mine.npz", "detector ", "held out", *(key.rpartition("/")[0] for key in raw))
            assert any(name in str(error) for name in named), f"seed {seed}: {error}"
        else:
            done += 1
            _check_table(raw, found.table)
            plain = all(isinstance(a, np.ndarray) and a.dtype.kind in "fiu" and a.dtype.isnative for a in raw.values())
            if plain and commands < 3:  # the command gives the same table
                commands += 1
                file, out = tmp_path / f"{seed}.safetensors", tmp_path / f"{seed}.csv"
                save_file({key: np.ascontiguousarray(value) for key, value in raw.items()}, file)
                options = ["--no-sae", "--quiet", "--n-boot", "0", "--set", "detectors.knn.k=3", "--out", str(out)]
                assert main(["evaluate", str(file), *(f"--method={name}" for name in METHODS), *options]) in (0, None)
                np.testing.assert_allclose(pd.read_csv(out)["value"], found.table["value"], rtol=1e-6, atol=1e-9)
    assert 30 <= done <= 110 and commands == 3, "both sides are tried"


def test_labels_are_whole_numbers_or_refused():
    values = [0, 1, 2, -1, None, 2.0, True, np.int8(1), "1", 2.5, float("nan"), float("inf"), -2, 2**70, 1j, [0], b"1"]
    for seed in range(300):
        rng = np.random.default_rng(seed)
        chosen = [values[i] for i in rng.integers(0, len(values) if seed % 2 else 8, rng.integers(0, 6))]
        whole = all(any(value is good for good in values[:8]) for value in chosen)
        try:
            assert as_labels(chosen).tolist() == [-1 if value is None else int(value) for value in chosen]
            assert whole
        except ValueError as error:
            assert not whole and "labels holds" in str(error), (chosen, error)


KEYS = (
    "n_classes",
    "seed",
    "sae_seeds",
    "n_boot",
    "train_fraction",
    "head",
    "pack",
    "title",
    "name",
    "sae.k",
    "sae.lr",
)
KEYS += (
    "sae.latents",
    "sae.epochs",
    "sae.batch_size",
    "sae.decay",
    "sae.variant",
    "caps.core_fraction",
    "val.fraction",
)
KEYS += ("backbone.model", "backbone.crop", "train.kind", "train.limit", "test.name", "ood.far/noise.limit", "oood.x")
KEYS += ("detectors.knn.k", "detectors.nobody.k", "sae", "ood", "show_images", "description", "data_root", "", "a.b.c")
VALUES = (0, 1, -1, 2, 16, 10**30, 0.5, 1.0, -0.1, float("nan"), float("inf"), "", "none", "x", "../x", "<b>", True)
VALUES += ([], [1], {}, {"x": 1}, "digits", "probe", "builtin", "3", "ü\u202e")


def test_an_experiment_is_refused_by_key_or_is_a_plan():
    accepted = 0
    for seed in range(1500):
        rng = np.random.default_rng(seed)
        changes = {KEYS[rng.integers(len(KEYS))]: VALUES[rng.integers(len(VALUES))] for _ in range(rng.integers(1, 3))}
        try:
            found = capsae.load_experiment("digits", overrides=changes)
        except ValueError as error:
            parts = [part for key in changes for part in (key, *key.split("."))]
            assert any(part in str(error) for part in parts), (changes, str(error))
        else:
            accepted += 1
            assert found.sae.k <= found.sae.latents and 0 < found.caps.core_fraction <= 1 and found.n_classes >= 1
            assert found.sae.lr is None or np.isfinite(found.sae.lr), changes
            assert all(found.source_spec(name)["kind"] for name in ("train", "test", *found.ood_sets))
    assert 50 <= accepted <= 1200, accepted
