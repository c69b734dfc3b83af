"""The Jupyter kernel that executes the pages of the book, one after another."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..figures.display import PAGE_DATA
from .plan import root


class SharedKernel:
    """A kernel for several pages, since its start takes longer than a short page; a context manager.

    A page finds nothing of the page before it but imported modules; a kernel that died is replaced.
    """

    def __init__(self):
        self.manager: Any = None

    def __enter__(self) -> SharedKernel:
        return self

    def __exit__(self, *_) -> None:
        if self.manager is not None:
            _now(self.manager.shutdown_kernel)(now=True)
            self.manager = None

    def prepare(self, folder: Path, data: str) -> Any:
        """Start the kernel or empty it, in a page's folder; ``data`` is where its CSVs go. Returns the manager."""
        if self.manager is None or not _now(self.manager.is_alive)():
            self._start()
        code = f"""
import os
os.chdir({str(folder)!r})  # the folder of the page before is gone
os.environ[{PAGE_DATA!r}] = {data!r}
get_ipython().reset()
"""
        client = self.manager.blocking_client()
        client.start_channels()
        try:
            client.wait_for_ready(timeout=60)
            client.execute_interactive(code, silent=True, timeout=60)
        finally:
            client.stop_channels()
        return self.manager

    def _start(self) -> None:
        from jupyter_client.manager import AsyncKernelManager  # nbclient sees a kernel's death through this one alone

        # The kernel must import the package whose digests the page will carry, installed or not.
        paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")]
        variables = {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONWARNINGS": "ignore:IProgress not found",  # bars are text here, widgets are not needed
        }
        # ipykernel warns of each kernel that others could listen: it talks to this machine alone, over loopback.
        given = {"env": os.environ | variables, "cwd": root(), "extra_arguments": ["--log-level=ERROR"]}
        self.manager = AsyncKernelManager(kernel_name="python3")
        _now(self.manager.start_kernel)(**given)


def _now(coroutine):
    from jupyter_core.utils import run_sync

    return run_sync(coroutine)
