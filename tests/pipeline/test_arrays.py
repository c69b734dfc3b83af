"""Arrays of one's own: read from any of three layouts, refused with a reason, and the table made of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from capsae import detectors, metrics
from capsae.__main__ import main
from capsae.cli.report_arrays import report
from capsae.data.images import PIXEL_STATISTICS
from capsae.pipeline.arrays import default_sae, discriminant_head, evaluate_arrays
from capsae.pipeline.arrays_io import LAYOUT, arrays_from, load_arrays

C, D = 4, 12


def raw_arrays(head=True, logits=False, pixels=False, shifted=False, val=False, mine=False, dtype=np.float32) -> dict:
    """Four Gaussian classes; near OOD between them, far OOD elsewhere."""
    rng = np.random.default_rng(0)
    centres, away = rng.normal(size=(C, D)) * 2, rng.normal(size=(C, D)) * 2
    sizes = {"train": 160, "test": 60, "near/between": 40, "far/away": 40}
    sizes |= ({"shifted/noisy": 40} if shifted else {}) | ({"val": 40} if val else {})
    raw = {}
    for name, n in sizes.items():
        labels = np.arange(n) % C
        where = {"near/between": (centres + centres[::-1]) / 2, "far/away": away}.get(name, centres)
        noise = 1.2 if name.startswith("shifted/") else 0.8
        raw[f"{name}/features"] = (where[labels] + noise * rng.normal(size=(n, D))).astype(dtype)
        if "/" not in name or name.startswith("shifted/"):
            raw[f"{name}/labels"] = labels
        if pixels:
            raw[f"{name}/pixels"] = rng.lognormal(size=(n, len(PIXEL_STATISTICS))).astype(np.float32)
        if mine and name != "train":
            raw[f"{name}/scores/mine"] = np.linalg.norm(raw[f"{name}/features"], axis=1)
    if head or logits:
        weight, bias = centres.astype(np.float32), (-(centres**2).sum(1) / 2).astype(np.float32)
        raw |= {"head/weight": weight, "head/bias": bias} if head else {}
        if logits:
            raw |= {f"{n}/logits": raw[f"{n}/features"].astype(np.float32) @ weight.T + bias for n in sizes}
    return raw


def write(raw: dict, folder, kind: str):
    if kind == "safetensors":
        save_file({key: np.ascontiguousarray(value) for key, value in raw.items()}, folder / "a.safetensors")
        return folder / "a.safetensors"
    if kind == "npz":
        np.savez(folder / "a.npz", **raw)
        return folder / "a.npz"
    for key, value in raw.items():
        (folder / "a" / key).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / "a" / f"{key}.npy", value)
    return folder / "a"


# --- reading


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("kind", ["safetensors", "npz", "folder"])
def test_three_layouts_give_the_same_arrays(tmp_path, kind, dtype):
    raw = raw_arrays(logits=True, pixels=True, shifted=True, val=True, mine=True, dtype=dtype)
    found = load_arrays(write(raw, tmp_path, kind))
    assert found.ood_sets == ["near/between", "far/away"] and found.shifted == ["shifted/noisy"]
    assert found.n_classes == C and set(found.sets) >= {"train", "val", "test"}
    for name, one in found.sets.items():
        np.testing.assert_array_equal(one.cls, raw[f"{name}/features"].astype(np.float32))
        np.testing.assert_array_equal(one.pixels, raw[f"{name}/pixels"])
    np.testing.assert_array_equal(found.scores["mine"]["far/away"], raw["far/away/scores/mine"].astype(np.float64))


def test_bfloat16_is_read(tmp_path):
    import torch
    from safetensors.torch import save_file as save_torch

    raw = {key: torch.from_numpy(value) for key, value in raw_arrays().items()}
    raw["train/features"] = raw["train/features"].bfloat16()
    save_torch(raw, tmp_path / "a.safetensors")
    found = load_arrays(tmp_path / "a.safetensors").sets["train"].cls
    np.testing.assert_array_equal(found, raw["train/features"].float().numpy())


def changed(**changes):
    """Arrays with some of them replaced (None: left out), by key with __ for /."""
    raw = raw_arrays(logits="train__logits" in changes)
    for key, value in changes.items():
        key = key.replace("__", "/")
        if value is None:
            raw.pop(key)
        else:
            raw[key] = value(raw[key]) if callable(value) else value
    return raw


def put(at, value):
    def change(array):
        array = array.copy()
        array[at] = value
        return array

    return change


WRONG = {
    "missing": (changed(train__labels=None), "'train/labels' is missing. The layout is"),
    "no test": (changed(test__features=None), "'test/labels' is there, but test/features is not"),
    "no ood": (changed(near__between__features=None, far__away__features=None), "no OOD set; give near/<set>"),
    "typo": (changed(train__feature=np.ones((2, 2))), "unknown array 'train/feature'; did you mean 'train/features'"),
    "no group": (changed(places__features=np.ones((2, 2))), "unknown array 'places/features'"),
    "transposed": (changed(test__features=lambda x: x.T), "test/labels has shape (60,), expected (12,)"),
    "other width": (changed(near__between__features=np.ones((5, 7))), "near/between/features has 7 columns, train"),
    "one axis": (changed(far__away__features=np.ones(5)), "far/away/features has shape (5,), expected (N, columns)"),
    "three axes": (changed(far__away__features=np.ones((5, 4, 3))), "far/away/features has shape (5, 4, 3)"),
    "empty": (changed(near__between__features=np.ones((0, D))), "near/between/features is empty, its shape is (0, 12)"),
    "NaN": (changed(test__features=put((7, 3), np.nan)), "NaN or infinity in 1 rows, the first is row 7"),
    "infinite": (changed(train__features=put((0, 0), np.inf)), "train/features holds NaN or infinity"),
    "too large": (changed(train__features=lambda x: x * np.float64(1e300)), "NaN or infinity in 160 rows"),
    "text": (changed(train__features=np.full((160, D), "a")), "train/features holds <U1, expected floating"),
    "few labels": (changed(train__labels=lambda y: y[:-1]), "train/labels has shape (159,), expected (160,)"),
    "float labels": (changed(train__labels=lambda y: y * 1.0), "train/labels holds float64, expected whole numbers"),
    "label 4": (changed(train__labels=put(5, 4)), "train/labels is 4 in row 5, expected 0..3"),
    "label -2": (changed(test__labels=put(1, -2)), "test/labels holds -2, expected whole numbers"),
    "no class 2": (changed(train__labels=lambda y: np.where(y == 2, 1, y)), "classes have no row in train/labels: 2"),
    "ids for labels": (
        changed(head__weight=None, head__bias=None, train__labels=lambda y: y + 3_000_000_000),
        "3000000000 of 3000000004 classes have no row in train/labels: 0, 1, 2, 3, 4, ...",
    ),
    "one class": (
        changed(head__weight=None, head__bias=None, train__labels=lambda y: y * 0, test__labels=None),
        "1 class; detectors need at least 2",
    ),
    "head the other way": (changed(head__weight=lambda w: w.T), "other way round, give its transpose"),
    "head of others": (changed(head__weight=np.ones((C, 7))), "head/weight has shape (4, 7), expected (classes, 12)"),
    "bias": (changed(head__bias=np.ones(3)), "head/bias has 3 values, head/weight 4 rows"),
    "bias alone": (changed(head__weight=None), "head/bias is there, but head/weight is not"),
    "another head": (changed(train__logits=lambda x: x[:, ::-1]), "features + head/bias is not train/logits"),
    "some logits": (changed(train__logits=lambda x: x, near__between__logits=None), "near/between/logits is not"),
    "short logits": (changed(train__logits=lambda x: x[:9]), "train/logits has 9 rows, the features 160"),
    "wide logits": (changed(train__logits=lambda x: np.hstack([x, x])), "logits have different numbers of classes"),
    "pixels": (changed(test__pixels=np.ones((60, 3))), "test/pixels has 3 columns, expected 8: file_size"),
    "val": (changed(val__features=np.ones((5, D))), "val/labels is missing: val is ID"),
    "shifted": (changed(shifted__a__features=np.ones((5, D))), "shifted/a/labels is missing"),
    "scores": (changed(test__scores__mine=np.ones(60)), "near/between/scores/mine is missing; give it for every set"),
    "scores NaN": (changed(test__scores__mine=np.full(60, np.nan)), "test/scores/mine holds NaN"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_named(what):
    raw, expected = WRONG[what]
    with pytest.raises(ValueError) as caught:
        arrays_from(raw, "file")
    assert expected in str(caught.value) and str(caught.value).startswith("file: ")


def test_files_that_cannot_be_read_end_with_status_2(tmp_path, capsys):
    whole = write(raw_arrays(), tmp_path, "safetensors")
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-100])
    npz = write(raw_arrays(), tmp_path, "npz")
    (tmp_path / "cut.npz").write_bytes(npz.read_bytes()[:-100])
    np.savez(tmp_path / "pickled.npz", **(raw_arrays() | {"train/labels": np.array([{}] * 160)}))
    write(raw_arrays(), tmp_path, "folder")
    np.save(tmp_path / "a" / "train" / "labels.npy", np.array([{}] * 160))
    (tmp_path / "model.pt").write_bytes(b"PK")
    (tmp_path / "nothing").mkdir()
    for file, expected in {
        "cut.safetensors": "is not a whole safetensors file",
        "cut.npz": "is not a whole .npz file",
        "pickled.npz": "train/labels is a pickled object array, and loading it would run code",
        "a": "labels.npy is a pickled object array",
        "model.pt": "is a pickle, and loading a pickle runs the code in it",
        "nothing": "holds no .npy file",
        "gone.npz": "no file or folder",
    }.items():
        assert main(["evaluate", str(tmp_path / file), "-q"]) == 2
        out, err = capsys.readouterr()
        assert expected in err and err.startswith("capsae: ") and out == "" and "Traceback" not in err


# --- the table


def test_the_table_is_what_the_parts_give():
    arrays = arrays_from(raw_arrays(logits=True, val=True, shifted=True, mine=True))
    found = evaluate_arrays(arrays, ["msp", "mds", "mine"], sae=False, n_boot=30, against="msp")
    values = found.table.set_index(["method", "set", "group", "metric"])["value"]
    sets = arrays.sets
    from capsae import Observations

    mds = detectors.create("mds").fit(Observations(sets["train"].cls, labels=sets["train"].labels))
    score = {name: mds.score(Observations(sets[name].cls)) for name in ("test", "near/between")}
    expected = metrics.auroc(score["test"], score["near/between"])
    assert values["mds", "near/between", "near", "auroc"] == pytest.approx(expected, abs=1e-9)
    mine = arrays.scores["mine"]
    assert values["mine", "far/away", "far", "auroc"] == metrics.auroc(mine["test"], mine["far/away"])
    assert values["head", "test", "id", "accuracy"] > 0.9
    assert ("msp", "mean", "full-spectrum all", "auroc") in values.index
    assert {"fpr95_ood_pos", "fpr95_id_pos"} <= set(found.table["metric"])
    assert set(found.comparison["method"]) == {"mds", "mine"} and (found.comparison["p_holm"] >= 0).all()
    assert found.settings["detectors"]["mds"] == {} and found.settings["against"] == "msp"


def test_what_the_arrays_do_not_allow_is_listed_with_the_reason():
    found = evaluate_arrays(arrays_from(raw_arrays(head=False, logits=True)), sae=False, n_boot=0)
    assert "logits alone are given" in found.left_out["vim"] and "needs an SAE" in found.left_out["epd"]
    assert "test/pixels" in found.left_out["sharpness"] or "/pixels is not given" in found.left_out["sharpness"]
    known = set(found.table["method"]) | set(found.left_out)
    assert known == {*detectors.available(), "head"} and "msp" in set(found.table["method"])
    assert any("held out of train" in note for note in found.notes)
    with pytest.raises(ValueError, match="detector 'vim': needs head/weight"):
        evaluate_arrays(arrays_from(raw_arrays(head=False, logits=True)), ["vim"], sae=False)


def test_an_option_that_is_impossible_leaves_a_detector_out_or_stops_if_it_was_asked_for():
    arrays, options = arrays_from(raw_arrays()), {"knn": {"k": 10_000}}
    found = evaluate_arrays(arrays, sae=False, n_boot=0, options=options)
    assert "k is 10000" in found.left_out["knn"]
    with pytest.raises(ValueError, match="detector 'knn': k is 10000"):
        evaluate_arrays(arrays, ["knn"], sae=False, n_boot=0, options=options)


def test_a_probe_is_fitted_loudly():
    found = evaluate_arrays(arrays_from(raw_arrays(head=False)), ["msp", "vim"], sae=False, n_boot=0)
    assert any(note.startswith("NO HEAD AND NO LOGITS ARE GIVEN: a logistic regression") for note in found.notes)


def test_a_head_that_knows_nothing_is_refused():
    raw = raw_arrays()
    raw["head/weight"] = raw["head/weight"] * 0
    with pytest.raises(ValueError, match="the logits are right on 25.0% of the training rows"):
        evaluate_arrays(arrays_from(raw), ["msp"], sae=False)


def test_the_discriminant_is_sklearns():
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    train, test = (arrays_from(raw_arrays()).sets[name] for name in ("train", "test"))
    ours = discriminant_head(train.cls, train.labels, C, shrink=0).logits(test.cls)
    theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(train.cls, train.labels).decision_function(test.cls)
    difference = ours - theirs
    np.testing.assert_allclose(difference, np.repeat(difference[:, :1], C, 1), atol=2e-3)  # up to a constant a row


def test_an_sae_is_trained_or_loaded(tmp_path):
    arrays, settings = arrays_from(raw_arrays()), {"epochs": 2, "latents": 32, "k": 4}
    trained = evaluate_arrays(arrays, ["epd"], sae_settings=settings, n_boot=0, device="cpu", progress=False)
    assert trained.settings["sae"]["latents"] == 32 and any("SAE trained: M = 32, k = 4" in n for n in trained.notes)
    from capsae.sae import SAEConfig, TopKSAE

    TopKSAE.untrained(D, SAEConfig(latents=24, k=3)).save(tmp_path / "sae")
    loaded = evaluate_arrays(arrays, ["epd"], sae=tmp_path / "sae", n_boot=0)
    assert loaded.settings["sae"]["latents"] == 24
    with pytest.raises(ValueError, match="sae.k is set, but the SAE is loaded"):
        evaluate_arrays(arrays, ["epd"], sae=tmp_path / "sae", sae_settings={"k": 4})
    TopKSAE.untrained(D + 1, SAEConfig(latents=24, k=3)).save(tmp_path / "wide")
    with pytest.raises(ValueError, match="the SAE reads 13 columns, the features have 12"):
        evaluate_arrays(arrays, ["epd"], sae=tmp_path / "wide")


def test_default_settings_follow_the_recipe_of_the_grid():
    """imagenet20's, found on held-out ID rows, and the large-run rate in the limit."""
    small = default_sae(8100, 192)
    assert (small.latents, small.k, small.batch_size, small.epochs, small.lr) == (1920, 32, 256, 25, 8e-3)
    large = default_sae(50_000_000, 768)
    assert large.k == 128 and large.epochs == 8 and large.lr == pytest.approx(2e-4 / (7680 / 2**14) ** 0.5, rel=0.04)
    assert large.lr < default_sae(1_200_000, 768).lr < 8e-3
    assert default_sae(10, 2).k >= 1


def test_too_few_replicates_for_a_verdict_are_named():
    arrays = arrays_from(raw_arrays(logits=True, val=True))
    for n_boot in (2, 200):
        found = evaluate_arrays(arrays, ["msp", "mds", "energy"], sae=False, n_boot=n_boot, against="msp")
        hidden = found.comparison["p_at_most"] & (found.comparison["p_holm"] >= 0.05)
        assert hidden.any() == (n_boot == 2)
        assert ("give a larger --n-boot" in report(found)) == hidden.any()


def test_a_pixel_control_that_wins_is_reported(tmp_path, capsys):
    raw = raw_arrays(pixels=True)
    raw["far/away/pixels"][:, PIXEL_STATISTICS.index("sharpness")] *= 1e6
    file = write(raw, tmp_path, "npz")
    assert main(["evaluate", str(file), "--method", "msp", "--method", "sharpness", "--n-boot", "0", "--no-sae"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("far/away "))
    assert line.split()[2] == "sharpness" and line.split()[-1] == "yes"


# --- the command


def test_the_command_prints_an_aligned_table_and_writes_three_files(tmp_path, capsys):
    file = write(raw_arrays(mine=True), tmp_path, "safetensors")
    methods = [word for name in ("msp", "mds", "mine", "knn") for word in ("--method", name)]
    more = ["--no-sae", "--n-boot", "20", "--against", "mds", "--set", "detectors.knn.k=7", "-q"]
    assert main(["evaluate", str(file), *methods, *more, "--out", str(tmp_path / "table.csv")]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("method"))
    assert {line.split()[0] for line in lines[header + 1 : header + 5]} == {"msp", "mds", "mine", "knn"}
    starts = {line.index("[") for line in lines[header + 1 : header + 5]}
    assert len(starts) <= 2, "columns are aligned; a number may be one digit longer"
    assert "p vs mds" in lines[header] and "FPR95 OOD+" in lines[header] and "FPR95 ID+" in lines[header]
    assert "accuracy on test:" in out and "FPR95 OOD+: ID rejected" in out and err.count("wrote") == 3
    table = pd.read_csv(tmp_path / "table.csv")
    assert json.loads(table[table["method"] == "knn"]["options"].iloc[0])["k"] == 7
    assert {"auroc", "fpr95_ood_pos", "fpr95_id_pos"} <= set(table["metric"])
    assert {"p_holm", "verdict"} <= set(pd.read_csv(tmp_path / "table.compared.csv").columns)
    record = json.loads((tmp_path / "table.json").read_text())
    assert record["settings"]["detectors"]["knn"]["k"] == 7 and record["settings"]["sets"]["test"]["rows"] == 60


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--method", "msq"], "no detector is named 'msq'"),
        (["--against", "nobody"], "no detector is named 'nobody'"),
        (["--set", "caps.core_fraction=1"], "sae.KEY and detectors.NAME.KEY can be set here"),
        (["--set", "sae.kk=1"], "unknown SAE setting 'kk'"),
        (["--set", "detectors.knn.kk=1", "--method", "knn", "--no-sae"], "detector 'knn' has no option 'kk'"),
        (["--sae", "x", "--no-sae"], "give one of the two"),
        (["--sae", "no/such/folder"], "no/such/folder"),
        (["--n-boot", "-1"], "--n-boot -1"),
        (["--out", "no/such/folder/table.csv"], "no folder"),
    ],
)
def test_wrong_options_end_with_status_2(tmp_path, capsys, more, expected):
    file = write(raw_arrays(), tmp_path, "npz")
    assert main(["evaluate", str(file), "-q", *more]) == 2
    out, err = capsys.readouterr()
    assert expected in err and out == "" and "Traceback" not in err


def test_the_layout_is_printed(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--layout"])
    assert stop.value.code == 0 and capsys.readouterr().out == LAYOUT + "\n"


# --- the page


PAGE = (Path(__file__).resolve().parents[2] / "book" / "evaluate.md").read_text(encoding="utf-8")


def test_the_page_holds_the_layout_and_an_example_that_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    assert LAYOUT in PAGE
    monkeypatch.chdir(tmp_path)
    example = PAGE.split("```python\n")[1].split("```")[0]
    exec(compile(example, "book/evaluate.md", "exec"), {})
    assert main(["evaluate", "features.safetensors", "--no-sae", "--n-boot", "0", "-q"]) == 0
    shown = PAGE.split("What it prints")[1].split("```text\n")[1].split("```")[0]
    printed, rows = capsys.readouterr().out, [line.split()[0] for line in shown.splitlines() if "[" in line]
    sizes = next(line for line in printed.splitlines() if line.startswith("  rows:"))
    assert sizes in shown, "the page shows another run"
    assert set(detectors.available()) == (
        {name for name in detectors.available() if name in rows}
        | set(shown.split("Left out:\n")[1].split(": needs pixels")[0].strip().split(", "))
    ), "run the page's example again: detectors have come or gone"


def test_the_pages_python_call_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(raw_arrays(), tmp_path, "safetensors").rename("features.safetensors")
    call = PAGE.split("From Python:")[1].split("```python\n")[1].split("```")[0]
    call = call.replace('"k": 16', '"k": 4, "latents": 16, "epochs": 1')
    call = call.replace('against="msp"', '["msp", "epd"], n_boot=0')
    exec(compile(call, "book/evaluate.md", "exec"), {})


def test_a_detector_that_cannot_score_is_left_out_and_named(tmp_path):
    rng, labels = np.random.default_rng(0), np.arange(300) % 3
    x = (3 * labels[:, None] + rng.normal(size=(300, 1))).astype(np.float32)  # one column: nothing is left to prune
    sets = {"train": (x[:200], labels[:200]), "test": (x[200:], labels[200:]), "far/x": (9 * x[:80], None)}
    arrays = {f"{name}/features": of for name, (of, _) in sets.items()}
    arrays |= {f"{name}/labels": of for name, (_, of) in sets.items() if of is not None}
    np.savez(tmp_path / "one.npz", **arrays)
    found = evaluate_arrays(load_arrays(tmp_path / "one.npz"), sae=False, n_boot=0)
    assert "leaves none of 1 activations" in found.left_out["scale"] and "mds" in set(found.table["method"])
