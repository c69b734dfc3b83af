"""A small ViT for the built-in digits. Its weights are embedded, since torch trains other bits on another kind of
processor; training it from pixels takes about a minute on two cores."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from tqdm.auto import tqdm

from ..data import builtin
from ..data.open import open_source
from ..data.sources import ImageSource
from ..device import machine, pick_device, versions
from ..files import file_record
from .featureset import read_tensors, write_tensors

CONFIG = dict(img_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=4, mlp_ratio=2.0, num_classes=10)
HALF = (0.5, 0.5, 0.5)
PREPROCESSING = dict(input_size=(3, 32, 32), mean=HALF, std=HALF, interpolation="bicubic", crop_pct=1.0)
EPOCHS = 60
WEIGHTS = Path(__file__).parents[1] / "packs" / "digits" / "vit.safetensors"
"""The embedded weights: seed 0, trained on ``digits/train``. ``vit.json`` beside them tells how they were made."""


@dataclass(frozen=True)
class DigitsViT:
    """A trained network (on the CPU, in evaluation mode) and how its training went: epoch, loss, accuracy (on the
    augmented training images), seconds."""

    net: torch.nn.Module
    history: pd.DataFrame

    def save(self, path: str | os.PathLike) -> Path:
        """Write the weights as safetensors; ``load_backbone({"model": "capsae/digits_vit", "checkpoint": path})``
        takes them."""
        tensors = {key: value.detach().cpu().numpy() for key, value in self.net.state_dict().items()}
        return write_tensors(path, tensors, {"schema": 1, "kind": "digits_vit", "config": CONFIG})

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Classes (N,) of images (N, 32, 32, 3) uint8."""
        with torch.inference_mode():
            return self.net(_normalised(torch.as_tensor(np.asarray(images)))).argmax(dim=1).numpy()


def train_digits_vit(
    source=None,
    seed: int = 0,
    device: str = "auto",
    *,
    epochs: int = EPOCHS,
    batch_size: int = 64,
    lr: float = 2e-3,
    progress: bool = True,
) -> DigitsViT:
    """Train the small ViT on labelled 32 x 32 images.

    AdamW with warm-up and cosine decay, label smoothing, and shifts, rotations and scalings drawn anew for every
    batch. Deterministic for a seed on one device and number of threads.

    Parameters
    ----------
    source : ImageSource, or what :func:`capsae.data.open.open_source` takes; None = the built-in ``digits/train``
        Labels from 0 to 9.
    seed : int
        Of initial weights, order and augmentation.
    lr : float
        Peak learning rate.
    """
    source = {"kind": "builtin", "name": "digits/train"} if source is None else source
    source = source if isinstance(source, ImageSource) else open_source(source)
    if source.labels.min() < 0 or source.labels.max() >= CONFIG["num_classes"]:
        lowest, highest = source.labels.min(), source.labels.max()
        raise ValueError(f"{source.name}: labels lie in [{lowest}, {highest}], expected [0, 9]")
    device = pick_device(device)
    images = torch.as_tensor(np.stack([np.asarray(source.image(i)) for i in range(len(source))])).to(device)
    labels = torch.as_tensor(source.labels).to(device)

    started = time.perf_counter()
    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = _build().to(device).train()
    parameters = list(net.parameters())
    groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05}]
    groups.append({"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0})
    optimiser = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    steps = epochs * -(-len(images) // batch_size)
    warmup = min(steps // 2, max(1, steps // 20))
    rise = LinearLR(optimiser, 0.01, total_iters=warmup)
    fall = CosineAnnealingLR(optimiser, max(1, steps - warmup), eta_min=lr * 0.01)
    schedule = SequentialLR(optimiser, [rise, fall], milestones=[warmup])
    rows = []
    # Products this small gain little from a second thread, and wait long for it where another program has the core.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for epoch in tqdm(range(epochs), desc="digits ViT", unit="epochs", disable=not progress):
        loss_sum, hits = torch.zeros((), device=device), torch.zeros((), device=device)
        for batch in torch.randperm(len(images), generator=rng).split(batch_size):
            batch = batch.to(device)
            scores = net(_augmented(_normalised(images[batch]), rng))
            loss = F.cross_entropy(scores, labels[batch], label_smoothing=0.1)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            loss_sum += loss.detach() * len(batch)
            hits += (scores.argmax(dim=1) == labels[batch]).sum()
        mean, accuracy = float(loss_sum) / len(images), float(hits) / len(images)
        rows.append({"epoch": epoch, "loss": mean, "accuracy": accuracy, "seconds": time.perf_counter() - started})
    torch.set_num_threads(threads)
    return DigitsViT(net.cpu().eval(), pd.DataFrame(rows))


def save_with_provenance(vit: DigitsViT, folder: str | os.PathLike, seed: int, source) -> Path:
    """Write ``vit.safetensors`` and, in ``vit.json``, how it was made: seed, training images, versions, machine,
    accuracies on the built-in digits. Returns the path of the weights."""
    path = vit.save(Path(folder) / WEIGHTS.name)
    accuracy = {}
    for part in ("train", "val", "test"):
        images, labels, _, _ = builtin.load(f"digits/{part}")
        accuracy[part] = round(float((vit.predict(images) == labels).mean()), 4)
    record = {
        "model": "capsae/digits_vit",
        "config": CONFIG,
        "seed": seed,
        "epochs": len(vit.history),
        "train": {"name": source.name, "images": len(source), "digest": source.digest()},
        "accuracy": accuracy,
        "weights": file_record(path),
        "versions": versions(),
        "machine": machine(),
    }
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def is_embedded(seed: int, source) -> bool:
    """Whether the embedded weights are those that training on ``source`` with ``seed`` stands for."""
    made = json.loads(WEIGHTS.with_suffix(".json").read_text(encoding="utf-8"))
    return seed == made["seed"] and source.digest() == made["train"]["digest"]


def load_digits_vit(path: str | os.PathLike = WEIGHTS) -> torch.nn.Module:
    """The network that :meth:`DigitsViT.save` wrote (default: the embedded one), with its preprocessing as timm keeps
    it; ValueError if it is another file."""
    tensors, info = read_tensors(path)
    if info.get("kind") != "digits_vit":
        raise ValueError(f"{os.fspath(path)!r} holds no digits ViT (kind {info.get('kind')!r})")
    net = _build()
    net.load_state_dict({key: torch.from_numpy(value.copy()) for key, value in tensors.items()})
    return net.eval()


def _build() -> torch.nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    net = VisionTransformer(**CONFIG)
    net.pretrained_cfg = net.default_cfg = dict(PREPROCESSING)
    return net


def _normalised(images: torch.Tensor) -> torch.Tensor:
    """(B, 32, 32, 3) uint8 -> (B, 3, 32, 32) float32 in [-1, 1], as PREPROCESSING says."""
    return images.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1.0


def _augmented(x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Shift by up to 3 pixels, rotate by up to 15 degrees, scale by up to 12 %; what comes in from outside is black."""
    n = len(x)
    shift_x, shift_y, turn, size = (torch.rand(4, n, generator=rng) * 2 - 1).unbind()
    angle, scale = turn * (15 * torch.pi / 180), 1 + 0.12 * size
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    reach = 2 * 3 / x.shape[-1]  # in grid_sample's units the image is 2 wide
    theta = torch.stack([torch.stack([cos, -sin, shift_x * reach], 1), torch.stack([sin, cos, shift_y * reach], 1)], 1)
    grid = F.affine_grid(theta.to(x.device), list(x.shape), align_corners=False)
    return F.grid_sample(x + 1.0, grid, mode="bilinear", padding_mode="zeros", align_corners=False) - 1.0
