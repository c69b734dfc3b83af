"""What the commands of the command line share: a run of the profile that was asked for."""

from __future__ import annotations

import os


def run_of(options):
    """The run that a command's --profile, --set, --seed and --device ask for."""
    _stay_offline_if_alone()
    from ..pipeline.experiments import overrides_of
    from ..pipeline.run import Run

    name = getattr(options, "name", None)
    if name and options.profile and name != options.profile:
        raise ValueError(f"two profiles: {name!r} and --profile {options.profile!r}; give one")
    seeds = {} if options.seed is None else {"seed": options.seed, "sae.seed": options.seed}
    overrides = seeds | overrides_of(options.set)
    return Run(name or options.profile or "imagenet20", overrides, device=options.device, progress=not options.quiet)


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
