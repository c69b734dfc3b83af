"""Is a fast step the plain one? Both make the same steps on copies before a training begins; the plain one decides."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace

import torch

from .memory import memory, room
from .model import TopKSAE
from .rows import Rows
from .steps import PlainStep, Step

log = logging.getLogger(__name__)
STEPS = 3  # a GPU's third step is the one that is recorded and replayed
WEIGHTS, MOMENTS, ROUNDING = 0.1, 0.03, 3.0


def proven(kind: type[Step], saes: list[TopKSAE], rows: Rows, batch: int) -> type[Step]:
    """`kind`, or `PlainStep` and one warning where it fails on these SAEs and rows, or gives other weights.

    The kinds make STEPS steps on copies of one SAE of each kind of settings, and as many with a tenth of the latents
    dead. Compared are what the weights moved by, Adam's moments, what is counted and what held-out rows would show, by
    the norm of the difference over the plain one's: up to WEIGHTS, MOMENTS for all else, or ROUNDING times what the
    plain step's own products are off float32 ones. Nothing random is drawn, and the SAEs stay as they are. Want of
    memory is no fault of a kind: it is raised.
    """
    some = list({replace(sae.config, seed=0): sae for sae in saes}.values())
    some = saes[:2] if len(some) == 1 else some  # two run side by side as ten do
    x = rows.own[:batch]
    if x.device.type == "cuda":  # what the plain step has room for
        most = max(memory(0, x.shape[1], sae.config)["per_row"] for sae in some) * len(some)
        x = x[: max(1, room(x.device) // 2 // most)]
    try:
        found = _taken(kind, some, rows.variance, x)
    except (MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # a compiler, a driver or a launch may fail in any way
        return _plain(kind, f"it failed: {type(error).__name__}: {error}")
    plain = _taken(PlainStep, some, rows.variance, x)
    exact = plain
    if any(sae.config.products in ("auto", "bf16") for sae in some):
        exact = _taken(PlainStep, some, rows.variance, x, products="float32")
    for name, wanted in plain.items():
        off, own = (((a[name] - wanted).norm() / wanted.norm().clamp_min(1e-30)).item() for a in (found, exact))
        if not off <= max(WEIGHTS if name.endswith("weights") else MOMENTS, ROUNDING * own):  # also of NaN
            return _plain(kind, f"{name} are {100 * off:.3g} % off those of the plain one")
    return kind


def _plain(kind: type[Step], reason: str) -> type[Step]:
    log.warning(
        "%s is not used, and training takes longer: of %d steps for comparison, %s. PlainStep trains instead. Please "
        "report this line, the GPU, and the versions of torch and triton, as an issue of this project",
        kind.__name__,
        2 * STEPS,
        " ".join(reason.split())[:600],
    )
    return PlainStep


def _taken(kind: type[Step], saes: list[TopKSAE], variance: float, x: torch.Tensor, products="") -> dict:
    """What the steps of a kind made of copies, by name: movement of the weights, moments, counters; on the host."""
    steps, found = [], {}
    try:
        for sae in saes:
            own = copy.deepcopy(sae)
            wish = products or sae.config.products.replace("portable", "float32")
            own.config = replace(sae.config, products=wish, aux_alpha=float(sae.config.aux_alpha > 0))  # to be seen
            steps.append(kind(own, variance, STEPS + 1))
        group = kind.together(steps)
        group.strict = True
        for part in ("", "with dead latents, "):
            if part:
                for step in steps:
                    step.idle[:: max(2, min(10, step.config.latents // 2))] = 10 * STEPS
                    step.read()
            for _ in range(STEPS):
                group([x] * len(steps), [step.config.peak_lr for step in steps])
            for i, (sae, step) in enumerate(zip(saes, steps, strict=True)):
                for name, before in sae.named_parameters():
                    title = f"SAE {i}, {part}{name}"
                    moved = dict(step.sae.named_parameters())[name].detach() - before.detach()
                    parts = moved, *step.moments[name]
                    for what, value in zip(("weights", "first moments", "second moments"), parts, strict=True):
                        found[f"{title}'s {what}"] = value.double().cpu()
                found[f"SAE {i}, {part}counters"] = step.totals.cpu().clone()
                found[f"SAE {i}, {part}held-out errors"] = torch.tensor([step.squared_error(x[: len(x) // 2 + 1])])
    finally:
        for step in steps:
            step.close()
    return found
