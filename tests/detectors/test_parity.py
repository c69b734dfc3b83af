"""Our scores against pytorch-ood and against their formulas; the page of it against what was measured."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import ood_scores, parity
from benchmarks.closed_forms import CLOSED_FORMS
from capsae import detectors
from companion.publish import pages
from companion.publish.speed_page import read_results

ROOT = Path(__file__).resolve().parents[2]
BASELINES = [name for name in detectors.available() if detectors.info(name)["group"] == "baseline"]
without_peer = importlib.util.find_spec("pytorch_ood") is None


@pytest.fixture(scope="module")
def sets():
    return parity.world(d=96, n_train=600, n_test=120)


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_is_its_formula(sets, name):
    train, val, test = sets
    ours = detectors.create(name).fit(train, val).score(test)
    assert parity.difference(ours, CLOSED_FORMS[name](train, val, test)) < parity.BAR


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("energy", {"temperature": 3.0}), ("gen", {"gamma": 0.5, "top": 5}), ("knn", {"k": 3}), ("vim", {"dim": 32}),
        ("residual", {"dim": 60}), ("neco", {"dim": 7, "max_logit": False}), ("react", {"percentile": 60.0}),
        ("ash_b", {"percentile": 40.0}), ("ash_p", {"percentile": 40.0}), ("ash_s", {"percentile": 40.0}),
        ("scale", {"percentile": 40.0}), ("dice", {"percentile": 40.0}), ("nnguide", {"k": 4}), ("nci", {"alpha": 0.1}),
        ("fdbd", {"average": False, "centre": False}), ("gradnorm", {"average": False}),
        ("tempscale", {"temperature": 2.0}),
    ],
)  # fmt: skip
def test_every_option_is_that_of_the_formula(sets, name, options):
    train, val, test = sets
    ours = detectors.create(name, **options).fit(train, val).score(test)
    assert parity.difference(ours, CLOSED_FORMS[name](train, val, test, **options)) < parity.BAR


@pytest.mark.skipif(without_peer, reason="pytorch-ood is not installed (extra: test)")
@pytest.mark.parametrize("name", parity.PYTORCH_OOD)
def test_pytorch_ood_gives_the_same(sets, name):
    for row in parity.measure([name], sets):
        assert row["difference"] < parity.BAR, row


@pytest.mark.skipif(without_peer, reason="pytorch-ood is not installed (extra: test)")
def test_a_wrong_score_would_be_seen(sets, monkeypatch):
    warmer = detectors.create("energy", temperature=1.01)
    monkeypatch.setitem(parity.PYTORCH_OOD, "energy", lambda *sets: parity._tensor(warmer.score(sets[-1])))
    assert parity.measure(["energy"], sets)[0]["difference"] > parity.BAR


def test_what_is_published_covers_every_baseline_and_keeps_the_bar():
    found = json.loads((ROOT / pages.PARITY).read_text())
    assert found["bar"] == parity.BAR == 1e-5 and found["not_the_same"] == parity.NOT_THE_SAME
    assert all(row["difference"] < found["bar"] for row in found["rows"])
    for reference, names in (("pytorch-ood", parity.PYTORCH_OOD), (parity.FORMULA, BASELINES)):
        assert sorted(row["method"] for row in found["rows"] if row["reference"] == reference) == sorted(names)
    assert set(BASELINES) - set(parity.PYTORCH_OOD) == {"mds++", "rmds++", "residual", "neco", *parity.NOT_THE_SAME}


def test_the_page_is_in_step_with_what_was_measured():
    text = pages.parity_page(ROOT / pages.PARITY)
    assert (ROOT / "book" / "parity.md").read_text() == text, "run python -m companion.build pages"
    assert text.count("pytorch-ood | 0.4.0") == len(parity.PYTORCH_OOD)


def test_the_published_benchmark_compares_every_score_on_the_stated_shape():
    (found,) = read_results(ROOT / pages.RESULTS)["ood-scores"]
    assert (found["train"], found["test"], found["d"], found["classes"]) == (50_000, 50_000, 768, 1000)
    ratios = {row["method"]: row["ratio"] for row in found["results"]}
    assert set(ratios) == set(ood_scores.PEERS)
    assert all(ratios[name] > 20 for name in ("mds", "rmds", "fdbd")) and min(ratios.values()) >= 1
    assert all(row["capsae"]["peak_mb"] < 1024 for row in found["results"])  # never C x C x d


# --- presets

# OpenOOD v1.5, configs/postprocessors/*.yml, in our names.
OPENOOD = {
    "msp": {}, "maxlogit": {}, "energy": {"temperature": 1.0}, "gen": {"gamma": 0.1, "top": 100}, "klm": {},
    "knn": {"k": 50}, "mds": {}, "rmds": {}, "react": {"percentile": 90.0}, "ash_b": {"percentile": 90.0},
    "scale": {"percentile": 85.0}, "dice": {"percentile": 90.0}, "vim": {"dim": 256}, "residual": {"dim": 512},
    "she": {}, "nnguide": {"k": 100, "bank": 0.01}, "fdbd": {"average": False, "centre": True},
    "nci": {"alpha": 1e-4}, "gradnorm": {"average": False}, "tempscale": {"temperature": None},
}  # fmt: skip


@pytest.mark.parametrize("name", detectors.available())
def test_presets_are_valid_reported_and_openoods(name):
    about = detectors.info(name)
    assert about["presets"]["ours"] == about["defaults"] == detectors.create(name).options
    assert detectors.create(name, preset="ours").options == about["defaults"]
    if name in OPENOOD:
        options = detectors.create(name, preset="openood").options
        assert options == about["presets"]["openood"]
        assert {key: options[key] for key in OPENOOD[name]} == OPENOOD[name]
    else:
        with pytest.raises(ValueError, match="has no preset 'openood'; it has ours"):
            detectors.create(name, preset="openood")


def test_options_go_before_presets_and_an_unknown_preset_is_refused():
    assert detectors.create("vim", preset="openood", dim=7).options["dim"] == 7
    with pytest.raises(ValueError, match="'vim' has no preset 'openmax'; it has ours, openood"):
        detectors.create("vim", preset="openmax")


def test_openoods_constants(sets):
    """The presets that differ by a constant alone differ by that constant."""
    train, val, test = sets
    classes = train.logits.shape[1]
    for name, constant in (("fdbd", classes - 1), ("gradnorm", classes)):
        ours, theirs = (detectors.create(name, preset=p).fit(train).score(test) for p in ("ours", "openood"))
        np.testing.assert_allclose(theirs, constant * ours, rtol=1e-6)
