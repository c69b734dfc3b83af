"""Recording the steps of one or several SAEs as one CUDA graph, for `kernels.gpu_step`."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Sequence

import torch


def current(device: torch.device):
    """Triton launches on the current GPU, wherever the tensors are: make it theirs."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def capture_streams(device: torch.device, n_steps: int) -> list:
    """The stream that a recording begins and ends on, then one for each of several steps; kept, as is their memory."""
    if device.type != "cuda":
        return []
    return [torch.cuda.Stream(device) for _ in range(1 if n_steps == 1 else n_steps + 1)]


def record(steps: list, sizes: Sequence[int], pool, streams: list) -> torch.cuda.CUDAGraph:
    """The steps as one graph, side by side. Recording runs nothing: where it fails, the training is as it was."""
    graph, device, (outer, *inner) = torch.cuda.CUDAGraph(), steps[0].device, streams
    collecting = gc.isenabled()
    gc.disable()  # what it would free meanwhile could spoil the recording
    try:
        torch.cuda.empty_cache()  # a graph's pool takes nothing of what is cached outside it
        outer.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(outer):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            side_by_side(steps, sizes, outer, inner, graph.capture_end)
        torch.cuda.current_stream(device).wait_stream(outer)
    except BaseException:
        for step in steps:
            step.gradients = None  # they lie in the pool of what was not recorded
        torch.cuda.synchronize(device)
        raise
    finally:
        if collecting:
            gc.enable()
    return graph


def side_by_side(steps: list, sizes: Sequence[int], outer, inner: list, end: Callable[[], None]) -> None:
    """Each step's kernels on a stream of its own, all between what came before on `outer` and the end of recording."""

    def run() -> None:
        for stream in inner:
            stream.wait_stream(outer)
        for step, n, stream in zip(steps, sizes, inner or [outer], strict=True):
            with torch.cuda.stream(stream):
                step.forward(n)
                step.update(n)

    def join() -> None:
        for stream in inner:
            outer.wait_stream(stream)

    # All three, whatever becomes of the first: with streams unjoined, or without an end, torch's allocator would go on
    # as if it were recording. What fails later follows from what failed first.
    errors = []
    for call in (run, join, end):
        try:
            call()
        except BaseException as error:
            errors.append(error)
    if errors:
        raise errors.pop(0)  # kept in the list, it would keep its frames and their tensors
