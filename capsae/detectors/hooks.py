"""Any ``torch.nn.Module`` with a linear head: what the head reads and says, by one forward hook, for every detector."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from ..features.featureset import LinearHead
from . import Observations


def observe_module(
    net: torch.nn.Module, batches: Iterable, head: str | torch.nn.Linear = "head", sae=None, device: str | None = None
) -> Observations:
    """Run a network over batches and return what detectors see.

    Parameters
    ----------
    net : module
        Set to evaluation mode for the pass.
    batches : iterable
        Inputs (B, ...), or pairs of inputs and labels (B,), as a DataLoader gives them.
    head : str or torch.nn.Linear
        The classifier, or its name in ``net`` ("fc", "heads.head"): its input (B, d) is the feature, its output the
        logits. An input (B, T, d) of tokens is refused.
    sae : optional
        For the scores that read codes.
    device : str, optional
        Where inputs go; default: where the head's weights are.

    Returns
    -------
    Observations
        With cls (N, d), logits (N, C), the head, and labels (N,) where batches have them.

    Raises
    ------
    ValueError
        No such head, one that is no linear layer, one that a forward pass does not reach once, or no batch.
    """
    linear = dict(net.named_modules()).get(head) if isinstance(head, str) else head
    if not isinstance(linear, torch.nn.Linear):
        linears = [name for name, each in net.named_modules() if isinstance(each, torch.nn.Linear)][-5:]
        raise ValueError(f"head is {head!r}, which is no Linear of this network; its last are {', '.join(linears)}")
    seen: list[tuple[torch.Tensor, ...]] = []
    labels, n = [], 0
    hook = linear.register_forward_hook(lambda module, given, out: seen.append((given[0].detach(), out.detach())))
    training, where = net.training, device or linear.weight.device
    try:
        net.eval()
        with torch.inference_mode():
            for batch in batches:
                x, y = batch if isinstance(batch, tuple | list) else (batch, None)
                net(x.to(where))
                n += 1
                if len(seen) != n or seen[-1][0].ndim != 2:
                    shapes = [tuple(each.shape) for each, _ in seen[n - 1 :]]
                    raise ValueError(f"head {head!r} read {shapes or 'nothing'} in one pass; one (B, d) would do")
                seen[-1] = tuple(each.float().cpu() for each in seen[-1])
                labels += [] if y is None else [np.asarray(y)]
    finally:
        hook.remove()
        net.train(training)
    if not n:
        raise ValueError("batches is empty; at least one would do")
    cls, logits = (torch.cat(parts).numpy() for parts in zip(*seen, strict=True))
    weight = linear.weight.detach().float().cpu().numpy()
    bias = np.zeros(len(weight), np.float32) if linear.bias is None else linear.bias.detach().float().cpu().numpy()
    given = {"labels": np.concatenate(labels) if labels else None, "head": LinearHead(weight, bias), "sae": sae}
    return Observations(cls, logits=logits, **given)
