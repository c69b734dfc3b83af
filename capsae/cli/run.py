"""What the commands of the command line share: a run of the experiment that was asked for."""

from __future__ import annotations

import os


def run_of(options):
    """The run that a command's --experiment, --set, --seed and --device ask for."""
    _stay_offline_if_alone()
    from ..pipeline.experiments import overrides_of
    from ..pipeline.run import Run

    name = getattr(options, "name", None)
    if name and options.experiment and name != options.experiment:
        raise ValueError(f"two experiments: {name!r} and --experiment {options.experiment!r}; give one")
    seeds = {} if options.seed is None else {"seed": options.seed, "sae.seed": options.seed}
    overrides = seeds | overrides_of(options.set)
    return Run(name or options.experiment or "imagenet20", overrides, device=options.device, progress=not options.quiet)


def method_of(name: str) -> str:
    """The registry's name of a detector; "ours" is one of them."""
    from ..detectors import OURS

    return OURS if name == "ours" else name


def _stay_offline_if_alone() -> None:
    """Spare a machine without network the hub's minute of retries; must come before huggingface_hub is imported."""
    import socket

    if any(
        os.environ.get(name) for name in ("HF_ENDPOINT", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "HF_HUB_OFFLINE")
    ):
        return
    try:
        socket.getaddrinfo("huggingface.co", 443)
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
