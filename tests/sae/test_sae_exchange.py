"""Folders of SAELens, sparsify and dictionary_learning: the library's codes, both ways, and what is refused.

tests/sae/exchange holds folders that the libraries wrote and the codes they gave (make.py there). Where a library is
installed, it also reads what we write.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import capsae
from capsae.sae import SAEConfig, TopKSAE, train_sae
from capsae.sae.exchange import folders as exchange

DATA = Path(__file__).parent / "exchange"
D, M, K = 6, 20, 3
NORMALIZE = ("none", "sample", "l2", "dataset")
# Folder of a library -> codes are so many times the library's.
WRITTEN_BY_THEM = {
    "saelens-rescale": 1.0,
    "saelens-layer-norm": (D / (D - 1)) ** 0.5,  # unit rows of inputs with the std of n - 1
    "saelens-constant-norm-bfloat16": 0.1 / D**0.5,  # rows of length 0.1 but for rounding, inputs of length sqrt(d)
    "sparsify/layers.0": 1.0,
    "dictionary_learning": 1.0,
}


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(DATA / "expected.safetensors")


@pytest.fixture(scope="module")
def trained() -> dict[str, TopKSAE]:
    """An SAE of each normalisation, trained a little, so that no weight is a symmetric start."""
    x = rows()
    return {
        each: train_sae(x, SAEConfig(latents=M, k=K, epochs=3, lr=1e-2, normalize=each, aux_k=4), progress=False)[0]
        for each in NORMALIZE
    }


def rows(n: int = 200) -> np.ndarray:
    return np.random.default_rng(0).normal(2, 3, size=(n, D)).astype(np.float32)


def copied(name: str, to: Path) -> Path:
    return Path(shutil.copytree(DATA / name, to / "copy"))


def edit(folder: Path, name: str = "cfg.json", **changes) -> Path:
    cfg = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(cfg | changes))
    return folder


def reader(name: str):
    return getattr(exchange, f"load_{name.partition('-')[0].partition('/')[0]}")


# --- what they wrote


@pytest.mark.parametrize("name", WRITTEN_BY_THEM)
def test_their_folders_give_their_codes(name, expected):
    sae, factor = reader(name)(DATA / name), WRITTEN_BY_THEM[name]
    assert (sae.config.latents, sae.config.k) == (M, K)
    if "bfloat16" in name:
        lengths = load_file(DATA / name / "sae_weights.safetensors")["W_dec"].float().norm(dim=1)
        assert factor == pytest.approx(float(lengths.mean()) / D**0.5, rel=1e-2)
        factor = lengths.mean() / D**0.5
    # layer_norm adds 1e-5 to a std of about 3
    close = {"rtol": 2e-5, "atol": 2e-5} if "layer-norm" in name else {"rtol": 1e-6, "atol": 1e-5}
    torch.testing.assert_close(sae.encode(expected["rows"]).dense(), factor * expected[f"{name}.codes"], **close)
    assert (expected[f"{name}.codes"] > 0).sum() > 60, "a test of codes needs codes"
    torch.testing.assert_close(sae.reconstruct(expected["rows"]), expected[f"{name}.out"], rtol=1e-4, atol=1e-4)
    lengths = sae.decoder.norm(dim=1)
    assert (lengths - 1).abs().max() < (5e-3 if "bfloat16" in name else 1e-3 if "sparsify" in name else 1e-6)
    again = TopKSAE.load(DATA / name)  # which recognises the layout
    assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), again.parameters(), strict=True))
    assert all(each.dtype == torch.float32 for each in sae.state_dict().values())


def test_what_they_wrote_can_be_kept_as_ours(tmp_path, expected):
    sae = exchange.load_sparsify(DATA / "sparsify/layers.0")
    again = TopKSAE.load(sae.save(tmp_path / "ours"))
    assert torch.equal(again.encode(expected["rows"]).values, sae.encode(expected["rows"]).values)


def test_rows_of_several_lengths_are_refused_or_kept(expected):
    name = "sparsify/layers.1"
    with pytest.raises(ValueError, match=r"decoder rows have lengths from 0\.\d+ to \d.*unit_rows=False"):
        exchange.load_sparsify(DATA / name)
    with pytest.raises(ValueError, match="decoder rows have lengths"):
        TopKSAE.load(DATA / name)
    sae = exchange.load_sparsify(DATA / name, unit_rows=False)
    torch.testing.assert_close(sae.encode(expected["rows"]).dense(), expected[f"{name}.codes"], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(sae.reconstruct(expected["rows"]), expected[f"{name}.out"], rtol=1e-5, atol=1e-4)


def test_settings_of_saelens_before_6(tmp_path, expected):
    """Top-k was an activation function then; the tensors are those of today."""
    folder = copied("saelens-rescale", tmp_path)
    weights = load_file(folder / "sae_weights.safetensors")
    lengths = weights["W_dec"].norm(dim=1)  # no rescaling then: the same SAE with its rows folded
    weights |= {"W_enc": weights["W_enc"] * lengths, "b_enc": weights["b_enc"] * lengths}
    weights |= {"W_dec": weights["W_dec"] / lengths[:, None], "scaling_factor": torch.ones(M)}
    save_file({name: each.contiguous() for name, each in weights.items()}, folder / "sae_weights.safetensors")
    old = {"architecture": "standard", "d_in": D, "d_sae": M, "hook_name": "blocks.0.hook_resid_post"}
    old |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "normalize_activations": False}
    (folder / "cfg.json").write_text(json.dumps(old))
    codes = exchange.load_saelens(folder).encode(expected["rows"]).dense()
    torch.testing.assert_close(codes, expected["saelens-rescale.codes"], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="normalize_activations is 'expected_average_only_in'"):
        exchange.load_saelens(edit(folder, normalize_activations=True))
    with pytest.raises(ValueError, match="reshape_activations is 'hook_z'"):
        exchange.load_saelens(edit(folder, normalize_activations=False, hook_name="blocks.0.attn.hook_z"))
    with pytest.raises(ValueError, match="architecture is 'standard'"):
        exchange.load_saelens(edit(folder, activation_fn_str="relu"))


# --- what we write


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("whose", ["saelens", "sparsify"])
@pytest.mark.filterwarnings("ignore:.*it normalises none")
def test_our_round_trip(whose, normalize, trained, tmp_path):
    sae, x = trained[normalize], rows()
    folder = getattr(exchange, f"save_{whose}")(sae, tmp_path / whose)
    again = TopKSAE.load(folder)
    assert again.config == sae.config
    for (name, one), two in zip(sae.state_dict().items(), again.state_dict().values(), strict=True):
        if normalize == "none" or name in ("mean", "std") or (whose == "sparsify" and normalize != "dataset"):
            assert torch.equal(one, two), name
        else:
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(again.encode(x).dense(), sae.encode(x).dense(), rtol=1e-5, atol=1e-5)
    assert sorted(os.listdir(folder)) == sorted(
        ["cfg.json", f"{'sae_weights' if whose == 'saelens' else 'sae'}.safetensors"]
    )


def by_hand(whose: str, folder: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and reconstruction as the library's source computes them, of a folder that we wrote."""
    cfg = json.loads((folder / "cfg.json").read_text())
    if whose == "sparsify":
        w = load_file(folder / "sae.safetensors")
        encoder, bias, decoder, b = w["encoder.weight"], w["encoder.bias"], w["W_dec"], w["b_dec"]
    else:
        w = load_file(folder / "sae_weights.safetensors")
        encoder, bias, decoder, b = w["W_enc"].T, w["b_enc"], w["W_dec"], w["b_dec"]
        assert (cfg["d_in"], cfg["d_sae"], cfg["apply_b_dec_to_input"]) == (D, M, True)
        assert not cfg["rescale_acts_by_decoder_norm"]
    shift, scale = torch.zeros(len(x), 1), torch.ones(len(x), 1)
    kind = cfg.get("normalize_activations", "none")
    if kind == "layer_norm":
        shift, scale = x.mean(1, keepdim=True), x.std(1, keepdim=True)
    elif kind == "constant_norm_rescale":
        scale = x.norm(dim=1, keepdim=True) / D**0.5
    z = ((x - shift) / (scale + (1e-5 if kind == "layer_norm" else 0)) - b) @ encoder.T + bias
    values, indices = z.topk(cfg["k"], dim=1)
    codes = torch.zeros_like(z).scatter(1, indices, values.relu())
    return codes, (codes @ decoder + b) * scale + shift


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("whose", ["saelens", "sparsify"])
@pytest.mark.filterwarnings("ignore:.*it normalises none")
def test_our_folders_follow_their_formulas(whose, normalize, trained, tmp_path):
    sae, x = trained[normalize], torch.from_numpy(rows())
    folder = getattr(exchange, f"save_{whose}")(sae, tmp_path)
    prepared = sae.normalize(x) if whose == "sparsify" and normalize in ("sample", "l2") else x
    codes, out = by_hand(whose, folder, prepared)
    torch.testing.assert_close(codes, sae.encode(x).dense(), rtol=2e-5, atol=3e-5)
    theirs = sae.decode(sae.encode(x)) if prepared is not x else sae.reconstruct(x)
    torch.testing.assert_close(out, theirs, rtol=1e-4, atol=1e-4)


def test_sparsify_is_told_what_it_lacks(trained, tmp_path):
    with pytest.warns(UserWarning, match="its input is sae.normalize"):
        exchange.save_sparsify(trained["sample"], tmp_path / "a")
    assert "normalize = 'sample'" in json.loads((tmp_path / "a" / "cfg.json").read_text())["capsae"]["note"]
    cfg = json.loads((exchange.save_sparsify(trained["dataset"], tmp_path / "b") / "cfg.json").read_text())
    assert cfg["normalize_decoder"] is False, "std W has rows of several lengths"


def test_a_column_without_variance_stays_out(tmp_path):
    x = rows()
    x[:, 2] = 5
    sae, _ = train_sae(x, SAEConfig(latents=M, k=K, epochs=2, lr=1e-2, normalize="dataset"), progress=False)
    with torch.no_grad():
        sae.pre_bias[2], sae.std[2] = 0.7, 0.0
    folder = exchange.save_saelens(sae, tmp_path)
    x[:, 2] = rows()[:, 2]  # the encoder must not see it in either
    codes, out = by_hand("saelens", folder, torch.from_numpy(x))
    np.testing.assert_allclose(codes, sae.encode(x).dense(), rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(out, sae.reconstruct(x), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(TopKSAE.load(folder).encode(x).dense(), sae.encode(x).dense(), rtol=1e-5, atol=2e-5)


# --- what is refused


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("saelens-rescale", {"architecture": "standard"}, "architecture is 'standard', which no TopKSAE is"),
        ("saelens-rescale", {"architecture": "jumprelu"}, "no tensor 'threshold'"),
        ("saelens-rescale", {"architecture": "batchtopk"}, "no tensor 'threshold'"),
        ("saelens-rescale", {"architecture": "gated"}, "no tensor 'b_"),
        ("saelens-rescale", {"reshape_activations": "hook_z"}, "reshape_activations is 'hook_z'"),
        ("saelens-rescale", {"normalize_activations": "covariance_whitening"}, "fold_activation_whitening"),
        ("saelens-rescale", {"d_sae": 21}, r"W_enc has shape \(6, 20\); \(6, 21\)"),
        ("saelens-rescale", {"d_in": M, "d_sae": D}, r"W_enc has shape \(6, 20\) \(transposed\?\)"),
        ("saelens-rescale", {"k": None}, "k is None"),
        ("saelens-rescale", {"k": 21}, "k is 21, latents 20"),
        ("saelens-rescale", {"metadata": {"sae_lens_version": "6", "capsae": {"schema": 9}}}, "of another version"),
        ("sparsify/layers.0", {"activation": "groupmax"}, "activation is 'groupmax'"),
        ("sparsify/layers.0", {"transcode": True}, "transcode is True"),
        ("sparsify/layers.0", {"skip_connection": True}, "skip_connection is True"),
        ("sparsify/layers.0", {"signed": True}, "signed is True"),
        (
            "sparsify/layers.0",
            {"num_latents": 0, "expansion_factor": 3},
            r"encoder.weight has shape \(20, 6\); \(18, 6\)",
        ),
        ("dictionary_learning", {"trainer": {"dict_class": "BatchTopKSAE"}}, "dict_class is 'BatchTopKSAE'"),
        ("dictionary_learning", {"trainer": None}, "has no 'trainer'"),
    ],
)
def test_what_no_topk_sae_is(name, changes, says, tmp_path):
    file = "config.json" if name == "dictionary_learning" else "cfg.json"
    folder = edit(copied(name, tmp_path), file, **changes)
    with pytest.raises(ValueError, match=says):
        reader(name)(folder)


def test_k_of_weights_and_settings_must_agree(tmp_path):
    folder = copied("dictionary_learning", tmp_path)
    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    edit(folder, "config.json", trainer=trainer | {"k": 4})
    with pytest.raises(ValueError, match="k is 3 in the weights, 4 in config.json"):
        exchange.load_dictionary_learning(folder)


def test_foreign_and_missing_tensors_and_nan(tmp_path):
    folder = copied("sparsify/layers.0", tmp_path)
    whole = load_file(folder / "sae.safetensors")
    for change, says in [
        ({"W_skip": torch.zeros(D, D)}, "a tensor 'W_skip' that a TopKSAE has no place for"),
        ({"b_dec": torch.full((D,), torch.nan)}, "b_dec .* no finite"),
        ({"b_dec": torch.zeros(D, dtype=torch.int32)}, "b_dec .* no finite floating number"),
    ]:
        save_file(whole | change, folder / "sae.safetensors")
        with pytest.raises(ValueError, match=says):
            exchange.load_sparsify(folder)
    del whole["W_dec"]
    save_file(whole, folder / "sae.safetensors")
    with pytest.raises(ValueError, match="no tensor 'W_dec'"):
        exchange.load_sparsify(folder)
    (folder / "sae.safetensors").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="no whole safetensors file"):
        exchange.load_sparsify(folder)
    (folder / "cfg.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds a list"):
        exchange.load_sparsify(folder)


def test_a_folder_of_layers_names_them():
    for load in (exchange.load_sparsify, TopKSAE.load):
        with pytest.raises(FileNotFoundError, match=r"folders of single SAEs, load one: layers\.0, layers\.1"):
            load(DATA / "sparsify")


@pytest.mark.parametrize("load", [exchange.load_dictionary_learning, TopKSAE.load])
def test_the_pickle_is_refused_unread_and_the_remedy_works(load, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    folder = copied("dictionary_learning", tmp_path)
    weights = load_file(folder / "ae.safetensors")
    (folder / "ae.safetensors").unlink()
    (folder / "ae.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"ae\.pt is a pickle.*runs the code in it.*convert it once") as refused:
        load(folder)
    assert not (tmp_path / "exploded").exists()
    torch.save(weights | {"encoder.weight": weights["encoder.weight"].T.contiguous().T}, folder / "ae.pt")
    code = str(refused.value).partition("where you trust the file: ")[2].replace("'ae.", f"'{folder}/ae.")
    exec(code, {"torch": torch})
    assert torch.equal(load(folder).encoder, TopKSAE.load(DATA / "dictionary_learning").encoder)
    with pytest.raises(ValueError, match="is a pickle.*sae_weights.safetensors"):
        exchange.load_saelens(folder / "sae.pt")


def test_no_sae_is_overwritten_by_another_layout(trained, tmp_path):
    trained["none"].save(tmp_path)
    with pytest.raises(ValueError, match="in another layout than sparsify's"):
        exchange.save_sparsify(trained["none"], tmp_path)
    assert TopKSAE.load(tmp_path).config == trained["none"].config
    exchange.save_saelens(trained["none"], tmp_path / "theirs")
    exchange.save_saelens(trained["none"], tmp_path / "theirs")  # one's own kind may be replaced


def test_only_a_top_k_sae_is_written(trained, tmp_path):
    class Variant(TopKSAE):
        """Whatever else a subclass does."""

    for save in (exchange.save_saelens, exchange.save_sparsify):
        with pytest.raises(TypeError, match="a Variant was given"):
            save(Variant(D, trained["none"].config), tmp_path / "variant")
    assert not (tmp_path / "variant").exists()


def test_the_books_page_runs(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "book" / "exchange.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(capsae, "train_sae", lambda x, config: (TopKSAE.untrained(x.shape[1], config), None))  # quick
    names = {}
    with pytest.warns(UserWarning, match="its input is sae.normalize"):
        exec(page.partition("```python\n")[2].partition("```")[0], names)
    assert names["sae"].config == names["experiment"].sae


# --- what fires over a level: JumpReLU, BatchTopK, gated

LEVELLED = ("jumprelu", "batch_topk", "gated")


@pytest.fixture(scope="module")
def levelled() -> dict[tuple[str, str], TopKSAE]:
    x, found = rows(), {}
    for variant in LEVELLED:
        for normalize in NORMALIZE:
            config = SAEConfig(M, K, epochs=3, lr=1e-2, aux_k=4, normalize=normalize, variant=variant)
            sae = found[variant, normalize] = train_sae(x[:150], config, held_out=x[150:], progress=False)[0]
            sae.shift += 2e-3  # the calibration ends on the very value of one row, where rounding would decide
    return found


def levelled_by_hand(folder: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and reconstruction as SAELens' source computes them (saes/jumprelu_sae.py, saes/gated_sae.py)."""
    cfg, w = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    shift, scale = torch.zeros(len(x), 1), torch.ones(len(x), 1)
    kind = cfg["normalize_activations"]
    if kind == "layer_norm":
        shift, scale = x.mean(1, keepdim=True), x.std(1, keepdim=True) + 1e-5
    elif kind == "constant_norm_rescale":
        scale = x.norm(dim=1, keepdim=True) / D**0.5
    z = (x - shift) / scale - w["b_dec"] * cfg["apply_b_dec_to_input"]
    if cfg["architecture"] == "gated":
        value = (z @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]).relu()
        codes = value * (z @ w["W_enc"] + w["b_gate"] > 0)
    else:
        pre = z @ w["W_enc"] + w["b_enc"]
        codes = pre.relu() * (pre > w["threshold"])
    return codes, (codes @ w["W_dec"] + w["b_dec"]) * scale + shift


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("variant", LEVELLED)
def test_levelled_saes_follow_saelens_formulas_and_come_back(variant, normalize, levelled, tmp_path):
    sae, x = levelled[variant, normalize], torch.from_numpy(rows())
    assert sae.shift.abs() > 0, "the calibration has to be exchanged, too"
    folder = exchange.save_saelens(sae, tmp_path)
    codes, out = levelled_by_hand(folder, x)
    torch.testing.assert_close(codes, sae.encode(x).dense(), rtol=2e-5, atol=5e-5)
    torch.testing.assert_close(out, sae.reconstruct(x), rtol=1e-4, atol=2e-4)
    again = TopKSAE.load(folder)
    assert type(again) is type(sae) and again.config == sae.config
    torch.testing.assert_close(again.encode(x).dense(), sae.encode(x).dense(), rtol=2e-5, atol=2e-5)
    with pytest.raises(TypeError, match=f"a {type(sae).__name__} was given"):
        exchange.save_sparsify(sae, tmp_path / "no")


@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize("variant", LEVELLED)
def test_foreign_levelled_saes_of_any_row_lengths(variant, apply_b_dec, levelled, tmp_path):
    """No key of ours, decoder rows of several lengths and one of zero: the same codes but for those lengths."""
    x, folder = torch.from_numpy(rows()), exchange.save_saelens(levelled[variant, "none"], tmp_path)
    w = {name: each.clone() for name, each in load_file(folder / "sae_weights.safetensors").items()}
    w["W_dec"] *= torch.linspace(0.5, 2, M)[:, None]
    w["W_dec"][4] = 0
    save_file(w, folder / "sae_weights.safetensors")
    edit(folder, metadata={"sae_lens_version": "6.0.0"}, apply_b_dec_to_input=apply_b_dec)
    codes, out = levelled_by_hand(folder, x)
    sae, lengths = exchange.load_saelens(folder), w["W_dec"].norm(dim=1)
    assert sae.config.variant == ("gated" if variant == "gated" else "jumprelu")
    lengths[4] = 1
    torch.testing.assert_close(sae.encode(x).dense(), codes * lengths, rtol=2e-5, atol=5e-5)
    torch.testing.assert_close(sae.reconstruct(x), out, rtol=1e-4, atol=2e-4)
    assert torch.isfinite(sae.decoder).all() and not sae.decoder[4].any()


def test_a_batch_topk_of_training_is_read_with_its_threshold(levelled, tmp_path):
    x, folder = torch.from_numpy(rows()), exchange.save_saelens(levelled["batch_topk", "none"], tmp_path)
    codes, _ = levelled_by_hand(folder, x)
    w = load_file(folder / "sae_weights.safetensors")
    lengths = torch.linspace(0.5, 2, M)  # rescale_acts_by_decoder_norm: the threshold is of rescaled values
    w |= {"W_enc": w["W_enc"] / lengths, "b_enc": w["b_enc"] / lengths, "W_dec": w["W_dec"] * lengths[:, None]}
    w["topk_threshold"] = w.pop("threshold")[0]
    save_file({name: each.contiguous() for name, each in w.items()}, folder / "sae_weights.safetensors")
    edit(folder, architecture="batchtopk", k=K, rescale_acts_by_decoder_norm=True, metadata={"sae_lens_version": "6"})
    sae = exchange.load_saelens(folder)
    assert sae.config.variant == "batch_topk" and sae.config.k == K
    torch.testing.assert_close(sae.encode(x).dense(), codes, rtol=2e-5, atol=5e-5)


@pytest.mark.parametrize("name", ["saelens-rescale", "saelens-constant-norm-bfloat16", "sparsify/layers.0"])
def test_a_zero_decoder_row_is_a_latent_that_says_nothing(name, tmp_path, expected):
    folder = copied(name, tmp_path)
    file = next(folder.glob("*.safetensors"))
    w = {key: each.clone() for key, each in load_file(file).items()}
    w["W_dec"][7] = 0
    save_file(w, file)
    sae = reader(name)(folder)
    assert torch.isfinite(sae.decoder).all() and not sae.decoder[7].any()
    codes = sae.encode(expected["rows"])
    assert torch.isfinite(codes.dense()).all() and torch.isfinite(sae.reconstruct(expected["rows"])).all()
    if name == "sparsify/layers.0":  # its codes do not depend on the decoder
        torch.testing.assert_close(codes.dense(), expected[f"{name}.codes"], rtol=1e-5, atol=1e-5)


# --- the libraries themselves


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_saelens_reads_ours(normalize, trained, tmp_path):
    sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed")
    sae, x = trained[normalize], torch.from_numpy(rows())
    theirs = sae_lens.SAE.load_from_disk(exchange.save_saelens(sae, tmp_path / "ours"))
    torch.testing.assert_close(theirs.encode(x), sae.encode(x).dense(), rtol=2e-5, atol=3e-5)
    torch.testing.assert_close(theirs(x), sae.reconstruct(x), rtol=1e-4, atol=1e-4)
    theirs.save_model(tmp_path / "theirs")  # our settings live in its metadata
    again = TopKSAE.load(tmp_path / "theirs")
    assert again.config == sae.config
    np.testing.assert_allclose(again.encode(x).dense(), sae.encode(x).dense(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.filterwarnings("ignore:.*it normalises none")
def test_sparsify_reads_ours(normalize, trained, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")
    sparsify = pytest.importorskip("sparsify", reason="eai-sparsify is not installed")
    sae, x = trained[normalize], torch.from_numpy(rows())
    theirs = sparsify.SparseCoder.load_from_disk(exchange.save_sparsify(sae, tmp_path / "ours"))
    prepared = sae.normalize(x) if normalize in ("sample", "l2") else x
    acts, indices, _ = theirs.encode(prepared)
    codes = torch.zeros(len(x), M).scatter(1, indices, acts)
    torch.testing.assert_close(codes, sae.encode(x).dense(), rtol=1e-5, atol=2e-5)
    out = sae.decode(sae.encode(x)) if prepared is not x else sae.reconstruct(x)
    torch.testing.assert_close(theirs.decode(acts, indices), out, rtol=1e-5, atol=1e-4)
    theirs.save_to_disk(tmp_path / "theirs")
    if normalize != "dataset":  # sparsify drops our key: what it normalised is then unknown, the weights are the same
        assert torch.equal(TopKSAE.load(tmp_path / "theirs").encoder, sae.encoder)


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("variant", LEVELLED)
def test_saelens_reads_our_levelled_saes(variant, normalize, levelled, tmp_path):
    sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed")
    sae, x = levelled[variant, normalize], torch.from_numpy(rows())
    theirs = sae_lens.SAE.load_from_disk(exchange.save_saelens(sae, tmp_path))
    torch.testing.assert_close(theirs.encode(x), sae.encode(x).dense(), rtol=2e-5, atol=5e-5)


def test_dictionary_learning_agrees(expected):
    """The committed codes are those of the installed version, too."""
    top_k = pytest.importorskip("dictionary_learning.trainers.top_k", reason="dictionary-learning is not installed")
    theirs = top_k.AutoEncoderTopK(D, M, K)
    theirs.load_state_dict(load_file(DATA / "dictionary_learning" / "ae.safetensors"))
    codes = theirs.encode(expected["rows"])
    torch.testing.assert_close(codes, expected["dictionary_learning.codes"])
    ours = exchange.load_dictionary_learning(DATA / "dictionary_learning").encode(expected["rows"]).dense()
    torch.testing.assert_close(ours, codes, rtol=1e-6, atol=1e-5)
