"""torchvision's vision transformers as timm models: the same numbers, so that the paper's ViT_B_16 runs through our
extractor."""

from __future__ import annotations

import os

import torch

TIMM_NAMES = {
    "vit_b_16": "vit_base_patch16_224",
    "vit_b_32": "vit_base_patch32_224",
    "vit_l_16": "vit_large_patch16_224",
    "vit_l_32": "vit_large_patch32_224",
    "vit_h_14": "vit_huge_patch14_224",
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_RENAMED = {
    "class_token": "cls_token",
    "conv_proj.": "patch_embed.proj.",
    "encoder.pos_embedding": "pos_embed",
    "encoder.ln.": "norm.",
    "heads.head.": "head.",
    "encoder.layers.encoder_layer_": "blocks.",
    ".ln_": ".norm",
    ".self_attention.in_proj_": ".attn.qkv.",
    ".self_attention.out_proj.": ".attn.proj.",
    ".mlp.0.": ".mlp.fc1.",
    ".mlp.3.": ".mlp.fc2.",
    ".mlp.linear_": ".mlp.fc",
}


def convert_torchvision_vit(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State dict of torchvision's ``VisionTransformer`` -> state dict of timm's; the tensors are the same, only named
    otherwise.

    Raises ValueError for a key that torchvision's vision transformers lack, and for two that become one.
    """
    out: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        new = key
        for theirs, ours in _RENAMED.items():
            new = new.replace(theirs, ours)
        if new == key:
            raise ValueError(f"{key!r} is no parameter of torchvision's VisionTransformer: is this its state dict?")
        if new in out:
            raise ValueError(f"{key!r} and another key both become {new!r}")
        out[new] = value
    return out


def load_torchvision_vit(
    model_name: str = "vit_b_16", weights: str | os.PathLike | None = "IMAGENET1K_V1"
) -> torch.nn.Module:
    """A timm model with torchvision's weights and torchvision's preprocessing.

    Parameters
    ----------
    model_name : str
        torchvision's name, e.g. ``vit_b_16``.
    weights : str, path or None
        Name of torchvision's weights (downloaded), ``DEFAULT``, a file of a torchvision state dict (``.pth`` or
        safetensors), or None for random weights. A file is taken to be prepared like IMAGENET1K_V1: shorter side to
        256, bilinear, central 224.

    Returns
    -------
    timm.models.VisionTransformer
        In evaluation mode; ``pretrained_cfg`` holds the preprocessing.

    Raises
    ------
    ValueError
        Unknown model or weights; a file that does not fit.
    """
    import timm

    if model_name not in TIMM_NAMES:
        raise ValueError(f"torchvision model {model_name!r} cannot be converted; these can: {', '.join(TIMM_NAMES)}")
    state, size, resize, interpolation, mean, std = None, 224, 256, "bilinear", IMAGENET_MEAN, IMAGENET_STD
    if weights is not None and os.path.isfile(weights):
        state = _read_state(weights)
    elif weights is not None:
        chosen = _named_weights(model_name, os.fspath(weights))
        state = chosen.get_state_dict(progress=True, check_hash=True)
        prepared = chosen.transforms()
        size, resize, interpolation = prepared.crop_size[0], prepared.resize_size[0], prepared.interpolation.value
        mean, std = tuple(prepared.mean), tuple(prepared.std)
    net = timm.create_model(TIMM_NAMES[model_name], img_size=size)
    if state is not None:
        converted = convert_torchvision_vit(state)
        try:
            net.load_state_dict(converted)
        except RuntimeError as error:
            why = " ".join(str(error).split()[:40])
            raise ValueError(f"{os.fspath(weights)!r} does not fit {model_name}: {why}") from None
    net.pretrained_cfg = net.default_cfg = {
        "input_size": (3, size, size),
        "mean": mean,
        "std": std,
        "interpolation": interpolation,
        "crop_pct": size / resize,
    }
    return net.eval()


def _named_weights(model_name: str, name: str):
    from torchvision.models import get_model_weights

    known = get_model_weights(model_name).__members__
    if name not in known:
        there = ", ".join(known)
        raise ValueError(f"no weights {name!r} for {model_name}, and no such file; torchvision has {there}")
    return known[name]


def _read_state(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    if os.fspath(path).endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    return state.get("state_dict", state) if isinstance(state, dict) else state
