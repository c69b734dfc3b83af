"""SAEs of other libraries: read and write SAELens and sparsify folders, read those of dictionary_learning.

All three compute, of a row v of d numbers, what `TopKSAE` computes of a normalised row u:

    z = E (v - b) + c;   code = the k largest of relu(z);   v_hat = code W + b

They differ in names, in transposition, in what they do to the input first, and in the length of the rows of W.

============================  =======================  ==========================  ===========================
here                          SAELens                  sparsify                    dictionary_learning
============================  =======================  ==========================  ===========================
files                         sae_weights.safetensors  sae.safetensors             ae.safetensors (see below)
settings                      cfg.json                 cfg.json                    config.json
encoder E (M, d)              W_enc (d, M)             encoder.weight (M, d)       encoder.weight (M, d)
encoder_bias c (M,)           b_enc                    encoder.bias                encoder.bias
decoder W (M, d)              W_dec (M, d)             W_dec (M, d)                decoder.weight (d, M)
pre_bias b (d,)               b_dec                    b_dec                       b_dec
normalize "none"              none                     always                      always
normalize "sample"            layer_norm               not there                   not there
normalize "l2"                constant_norm_rescale    not there                   not there
normalize "dataset"           folded into the weights  folded into the weights     not there
============================  =======================  ==========================  ===========================

Written folders give the library the same codes as `TopKSAE.encode`, to float32 rounding. Where its input is s times
ours, that takes E / s, s b and s W: s = sqrt(d) for constant_norm_rescale, which gives rows that length, and
s = sqrt(1 - 1/d) for layer_norm, which divides by the sample's std (n - 1) where we divide by the population's; it also
adds 1e-5 to the std. "dataset" is affine, u = (x - mean) / std, and folds exactly: E / std, mean + std b, std W. A key
"capsae" in cfg.json (SAELens: in its metadata) keeps our settings; with it the folder comes back as it was.

Read folders keep the library's codes, but where rows of W have one length g other than 1: they become unit rows, and
the codes g times as large. SAELens' rescale_acts_by_decoder_norm and apply_b_dec_to_input = false are folded. What else
the formula above does not say is refused. JumpReLU (theta, a = z H(z - theta)), BatchTopK (a JumpReLU of one theta) and
gated SAEs (b_gate, r_mag, b_mag) of SAELens are variants here, the shift of their calibration folded in.

Sources: sae-lens 6.54.12, eai-sparsify 1.3.3, dictionary-learning 0.1.0 as installed.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch

from .. import io
from ..model import TopKSAE
from . import files
from .weights import OWN_KEY, _build, _exported, _lengths, _own, _scaled, _Weights

__all__ = ["load_dictionary_learning", "load_saelens", "load_sparsify", "save_saelens", "save_sparsify"]

_SAELENS_NORMALIZE = {"none": "none", "layer_norm": "sample", "constant_norm_rescale": "l2"}
_SAELENS_VARIANTS = {"topk": "topk", "batch_topk": "jumprelu", "jumprelu": "jumprelu", "gated": "gated"}


def load_saelens(folder: str | Path, device: str | torch.device = "cpu", unit_rows: bool = True) -> TopKSAE:
    """Read a top-k, JumpReLU, BatchTopK or gated SAE that SAELens has saved (``save_model``, ``save_inference_model``),
    of version 6 or before. ``unit_rows=False`` keeps decoder rows of several lengths, in place of refusing them.

    ValueError: a pickle, a damaged file, weights that do not fit the settings, or an SAE that no TopKSAE is.
    FileNotFoundError: one of the two files is missing.
    """
    folder, cfg, tensors = files.read("saelens", folder)
    metadata = cfg.get("metadata") or {}
    if not (cfg.get("sae_lens_version") or metadata.get("sae_lens_version")):
        cfg = _saelens_before_6(cfg)
    files.need(folder, cfg, "architecture", ("topk", "batchtopk", "jumprelu", "gated"))
    architecture = cfg["architecture"]
    files.need(folder, cfg, "reshape_activations", ("none",), default="none")
    theirs = cfg.get("normalize_activations", "none")
    if theirs not in _SAELENS_NORMALIZE:
        raise ValueError(
            f"{folder}: normalize_activations is {theirs!r}, which scales the input outside of the SAE by numbers that "
            "are not in this folder; fold it in (SAELens: fold_activation_norm_scaling_factor or "
            "fold_activation_whitening) and save again"
        )
    d, latents = files.whole(folder, cfg, "d_in"), files.whole(folder, cfg, "d_sae")
    if "scaling_factor" in tensors and bool((tensors["scaling_factor"] == 1).all()):
        del tensors["scaling_factor"]  # some versions wrote it always
    bias, level = {"gated": ("b_mag", "b_gate"), "topk": ("b_enc", None)}.get(architecture, ("b_enc", "threshold"))
    if architecture == "batchtopk" and "topk_threshold" in tensors:  # of training; for inference, it is a JumpReLU
        tensors["threshold"] = tensors.pop("topk_threshold").reshape(1).expand(latents)
    shapes = {"W_enc": (d, latents), bias: (latents,), "W_dec": (latents, d), "b_dec": (d,)}
    shapes |= {} if level is None else {level: (latents,)}
    shapes |= {"r_mag": (latents,)} if architecture == "gated" else {}
    w_enc, c, w_dec, b_dec, *rest = files.take(folder, tensors, shapes)
    weights = _Weights(w_enc.T, c, w_dec, b_dec, *rest)
    if not cfg.get("apply_b_dec_to_input", True):
        weights = weights.moved(weights.encoder @ b_dec)
    if cfg.get("rescale_acts_by_decoder_norm", False) and architecture in ("topk", "batchtopk"):
        weights = weights.louder(_lengths(w_dec))._replace(level=weights.level)  # the rule compares rescaled values
    own = _own(folder, metadata)
    normalize = _SAELENS_NORMALIZE[theirs]
    if normalize == "none" and own.get("config", {}).get("normalize") == "dataset":
        normalize = "dataset"
    scale = {"sample": math.sqrt(1 - 1 / d), "l2": math.sqrt(d)}.get(normalize, 1.0)
    weights = _scaled(weights, 1 / scale)
    variant = {"batchtopk": "batch_topk"}.get(architecture, architecture)
    return _build(folder, weights, cfg, normalize, own, unit_rows, variant).to(device)


def save_saelens(sae: TopKSAE, folder: str | Path) -> Path:
    """Write an SAE (top-k, JumpReLU, BatchTopK, gated) so that ``sae_lens.SAE.load_from_disk(folder)`` reads it, with
    the same codes. A BatchTopK becomes a JumpReLU with one threshold, as in SAELens itself."""
    weights, normalize, own = _exported(sae, _SAELENS_VARIANTS)
    architecture = _SAELENS_VARIANTS[sae.config.variant]
    latents, d = weights.encoder.shape
    weights = _scaled(weights, {"sample": math.sqrt(1 - 1 / d), "l2": math.sqrt(d)}.get(normalize, 1.0))
    tensors = {"W_enc": weights.encoder.T, "W_dec": weights.decoder, "b_dec": weights.pre_bias}
    if architecture == "gated":
        tensors |= {"b_mag": weights.encoder_bias, "b_gate": weights.level, "r_mag": weights.log_gain}
    else:
        tensors |= {"b_enc": weights.encoder_bias} | ({} if weights.level is None else {"threshold": weights.level})
    theirs = {ours: theirs for theirs, ours in _SAELENS_NORMALIZE.items()}
    cfg: dict[str, Any] = {"d_in": d, "d_sae": latents, "dtype": "float32", "device": "cpu"}
    cfg |= {"apply_b_dec_to_input": True, "normalize_activations": theirs[normalize], "reshape_activations": "none"}
    cfg |= {"k": sae.config.k, "rescale_acts_by_decoder_norm": False} if architecture == "topk" else {}
    metadata = {"sae_lens_version": "6.0.0", "sae_lens_training_version": None, OWN_KEY: own}
    cfg |= {"architecture": architecture, "metadata": metadata}
    return files.write("saelens", folder, tensors, cfg)


def _saelens_before_6(cfg: dict[str, Any]) -> dict[str, Any]:
    """Settings of a version before 6, where top-k was an activation function of the standard architecture."""
    activation = cfg.get("activation_fn", cfg.get("activation_fn_str", "relu"))
    if activation == "topk" and cfg.get("architecture", "standard") in ("standard", "topk"):
        arguments = cfg.get("activation_fn_kwargs") or {}
        cfg = {**cfg, "architecture": "topk", "k": arguments.get("k", cfg.get("k"))}
    flag = cfg.get("normalize_activations")
    if flag is None or isinstance(flag, bool):
        cfg = {**cfg, "normalize_activations": "expected_average_only_in" if flag else "none"}
    hook = str(cfg.get("hook_name", cfg.get("hook_point", "")))
    return {"architecture": "standard", "reshape_activations": "hook_z" if "hook_z" in hook else "none", **cfg}


def load_sparsify(folder: str | Path, device: str | torch.device = "cpu", unit_rows: bool = True) -> TopKSAE:
    """Read a top-k SAE that sparsify has saved (``SparseCoder.save_to_disk``): the folder of one layer. Parameters and
    errors are those of `load_saelens`."""
    folder, cfg, tensors = files.read("sparsify", folder)
    files.need(folder, cfg, "activation", ("topk",), default="topk")
    for key in ("skip_connection", "transcode", "signed"):
        files.need(folder, cfg, key, (False,), default=False)
    d = files.whole(folder, cfg, "d_in")
    latents = cfg.get("num_latents") or d * files.whole(folder, cfg, "expansion_factor")
    shapes = {"encoder.weight": (latents, d), "encoder.bias": (latents,), "W_dec": (latents, d), "b_dec": (d,)}
    weights = _Weights(*files.take(folder, tensors, shapes))
    own = _own(folder, cfg)
    normalize = own.get("config", {}).get("normalize", "none")
    return _build(folder, weights, cfg, normalize, own, unit_rows).to(device)


def save_sparsify(sae: TopKSAE, folder: str | Path) -> Path:
    """Write an SAE so that ``sparsify.SparseCoder.load_from_disk(folder)`` reads it, with the same codes.

    sparsify normalises no row: with normalize = "sample" or "l2" it must be given ``sae.normalize(x)`` (a warning).
    """
    weights, normalize, own = _exported(sae, ("topk",))
    if normalize != "none":
        own["note"] = f"give sparsify rows normalised as by normalize = {normalize!r} of capsae: it normalises none"
        warnings.warn(f"{folder}: {own['note']}, so its input is sae.normalize(x)", stacklevel=2)
    latents, d = weights.encoder.shape
    tensors = {"encoder.weight": weights.encoder, "encoder.bias": weights.encoder_bias}
    tensors |= {"W_dec": weights.decoder, "b_dec": weights.pre_bias}
    cfg = {"activation": "topk", "expansion_factor": max(1, latents // d)}  # not used where num_latents is given
    cfg |= {"normalize_decoder": sae.config.normalize != "dataset", "num_latents": latents, "k": sae.config.k}
    cfg |= {"multi_topk": False, "skip_connection": False, "transcode": False, "d_in": d, OWN_KEY: own}
    return files.write("sparsify", folder, tensors, cfg)


def load_dictionary_learning(folder: str | Path, device: str | torch.device = "cpu", unit_rows: bool = True) -> TopKSAE:
    """Read an AutoEncoderTopK of dictionary_learning, whose ``ae.pt`` was converted to ``ae.safetensors``.

    The library writes its weights as a pickle alone, which is refused; the error says how to convert it.
    ``config.json`` must lie beside them: a BatchTopKSAE has weights of the same names, and only that file tells them
    apart. The threshold, which the library can use in place of top-k, is not: `TopKSAE` keeps k latents a row.
    Parameters and errors are those of `load_saelens`.
    """
    folder, cfg, tensors = files.read("dictionary_learning", folder)
    trainer = cfg.get("trainer")
    if not isinstance(trainer, dict):
        raise ValueError(f"{folder / 'config.json'} has no 'trainer', an object with dict_class and k")
    files.need(folder, trainer, "dict_class", ("AutoEncoderTopK",))
    tensors.pop("threshold", None)
    k = tensors.pop("k", None)
    if k is not None and int(k) != trainer.get("k"):
        raise ValueError(f"{folder}: k is {int(k)} in the weights, {trainer.get('k')!r} in config.json")
    d, latents = files.whole(folder, trainer, "activation_dim"), files.whole(folder, trainer, "dict_size")
    shapes = {"encoder.weight": (latents, d), "encoder.bias": (latents,), "decoder.weight": (d, latents), "b_dec": (d,)}
    encoder, bias, decoder, b_dec = files.take(folder, tensors, shapes)
    return _build(folder, _Weights(encoder, bias, decoder.T, b_dec), trainer, "none", {}, unit_rows).to(device)


def load(folder: str | Path, device: str | torch.device = "cpu") -> TopKSAE | None:
    """Read a folder of any of the three libraries; None if it is of none of them."""
    readers = {"saelens": load_saelens, "sparsify": load_sparsify, "dictionary_learning": load_dictionary_learning}
    whose = files.layout(folder)
    return readers[whose](folder, device) if whose else None


io.FOREIGN.append(load)  # `TopKSAE.load` asks it first
