"""A kept call gives what the call gives, is made once, and anew for another argument or another formula."""

import numpy as np
import pandas as pd
import pytest

import capsae
from capsae.caps import ClassActivationProfiles
from companion import cached as module
from companion.cached import cached, content

calls = []


def doubled(x, by=2, names=()):
    calls.append(by)
    codes = capsae.SparseCodes(np.abs(x[:, :2]), np.zeros((len(x), 2), np.int32), 5)
    frame = pd.DataFrame({"a": x[:, 0]})
    frame.attrs["best"] = 3
    return {"x": x * by, 1: [codes, ("text", None, 1.5)]}, frame


@pytest.fixture
def x():
    calls.clear()
    return np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)


def test_what_is_read_is_what_was_made(x, tmp_path):
    keep = cached(doubled, tmp_path)
    (first, frame), (again, read) = keep(x), keep(x.copy())
    assert calls == [2], "the second is read"
    np.testing.assert_array_equal(again["x"], first["x"])
    codes, plain = again[1]
    np.testing.assert_array_equal(codes.values, first[1][0].values)
    assert plain == ("text", None, 1.5) and codes.n_latents == 5
    pd.testing.assert_frame_equal(read, frame)
    assert read.attrs == {"best": 3}


def test_another_argument_is_another_call(x, tmp_path):
    keep = cached(doubled, tmp_path)
    keep(x), keep(x, 2), keep(x, by=2)
    assert calls == [2]
    keep(x, 3), keep(x + 1), keep(x, names=["a"])
    assert calls == [2, 3, 2, 2]


def test_another_formula_is_another_call(x, tmp_path, monkeypatch):
    cached(doubled, tmp_path)(x)
    monkeypatch.setattr(module, "_code", lambda function: "other code")
    cached(doubled, tmp_path)(x)
    assert calls == [2, 2]


def test_the_code_is_all_that_the_function_reaches_or_its_own_text():
    assert module._code(capsae.train_sae) == module.code_digest(capsae.train_sae)
    assert module._code(doubled) != module._code(_odd)


def test_training_by_a_kept_call_is_training(tmp_path):
    x = np.random.default_rng(1).normal(size=(80, 8)).astype(np.float32)
    config = capsae.SAEConfig(latents=16, k=4, epochs=2, batch_size=20)
    options = {"held_out": x[:20], "progress": False}
    sae, history = capsae.train_sae(x[20:], config, **options)
    for _ in range(2):
        kept, curve = cached(capsae.train_sae, tmp_path)(x[20:], config, **options)
        np.testing.assert_array_equal(kept.encode(x).values, sae.encode(x).values)
        assert curve["fvu"].tolist() == history["fvu"].tolist()
    assert content(sae) == content(kept)


def test_content_tells_apart_what_differs():
    caps = ClassActivationProfiles.empty(2, 3)
    values = [None, 0, 0.5, "0", True, [0], {"a": 0}, np.zeros(3), np.zeros(3, np.float32), np.zeros((3, 1)), caps]
    values += [capsae.SAEConfig(latents=4, k=1), capsae.SAEConfig(latents=4, k=2), pd.DataFrame({"a": [1]})]
    values += [pd.DataFrame({"b": [1]}), pd.DataFrame({"a": ["x"]}), capsae.load_experiment("digits")]
    assert len({content(value) for value in values}) == len(values)
    assert content([np.arange(3)]) == content((np.arange(3),))
    with pytest.raises(TypeError, match="type object has no content"):
        content(object())


def test_what_cannot_be_kept_is_refused(tmp_path):
    with pytest.raises(TypeError, match="result of type object"):
        cached(_odd, tmp_path)()
    assert module.__doc__


def _odd():
    return object()
