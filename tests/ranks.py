"""Run a piece of Python in several processes that form one torch.distributed group (Gloo), as torchrun would."""

from __future__ import annotations

import os
import socket
import subprocess
import sys


def run(code: str, *arguments: object, ranks: int = 2, timeout: float = 120) -> list[str]:
    """Standard output of each rank; AssertionError with its standard error if one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            env=os.environ | environment(rank, ranks, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    failed = [error for process, (_, error) in zip(started, outputs, strict=True) if process.returncode]
    assert not failed, "\n".join(failed)
    return [output for output, _ in outputs]


def environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun would set; and no GPU, so that all ranks use Gloo."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    words = {"MASTER_ADDR": "127.0.0.1", "CUDA_VISIBLE_DEVICES": ""}
    return {name: str(value) for name, value in numbers.items()} | words
