"""The training step for a GPU: torch multiplies, Triton (`triton.py`) does the rest, the whole step is one CUDA graph.

Nothing in a step waits for the device: batch sizes repeat, the dead latents are padded to a few sizes and listed anew
at each epoch's `read`, and the learning rate lies in device memory. So a step is recorded once and replayed.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable

import torch

from ..gpu_graph import capture_streams, current, record
from ..steps import BETAS, Step

log = logging.getLogger(__name__)

WARM_UP = 2  # steps that run before one is recorded: they compile the kernels
SPARSE_FROM = 120  # latents per k above which gathers beat dense products, by an estimate of both
DEAD_SIZES = 16  # the list of dead latents is padded to a multiple of latents / DEAD_SIZES


@functools.cache
def available() -> bool:
    """Whether triton is there (and ``CAPSAE_TRITON`` is not 0)."""
    if os.environ.get("CAPSAE_TRITON", "1") == "0":
        return False
    try:
        from . import triton as kernels  # noqa: F401
    except ImportError as error:
        log.warning("no Triton kernels (%s): training on the GPU takes several times longer", error)
        return False
    return True


class TritonStep(Step):
    """The same for a GPU: gradients stay in registers or cache, one launch a step.

    With bf16 products, gathers read bf16 copies as well (of the decoder, x - b and the residual); sums, parameters and
    Adam are float32. On one kind of GPU, the weights of two runs are equal bit for bit.

    Attributes
    ----------
    dense : bool
        The code's terms are dense products rather than gathers: where latents are few beside k.
    chunk : int
        Rows whose pre-activations exist at a time: as many as stay in the GPU's cache.
    """

    proven = False

    def __init__(self, sae, variance: float, window: int) -> None:
        self.batch = self.revival = None  # `find_dead` looks at them, also before the rest is there
        self.layout = 0  # grows when recorded steps lose their memory
        super().__init__(sae, variance, window)
        self.device = sae.pre_bias.device
        self.m, self.d = sae.encoder.shape
        self.half = torch.bfloat16 if self.products == "bf16" else torch.float32
        copies = (sae.encoder, sae.decoder, sae.encoder_bias)
        # Without lower precision the parameters serve as they are.
        self.copies = [p.detach().to(self.half) if self.half != p.dtype else p.detach() for p in copies]
        self.fired = torch.zeros_like(self.idle)
        self.rates = torch.zeros(2, device=self.device)  # lr and second moment, both corrected for the moments' start
        self.aux = torch.zeros(1, device=self.device)  # AuxK's loss
        self.chunk, self.heavy = rows_in_cache(self.device, self.m * self.copies[0].element_size()), None
        self.dense = self.device.type == "cuda" and self.m <= SPARSE_FROM * self.config.k
        self.use_graphs, self.alone = self.device.type == "cuda", None
        self.find_dead()

    # -- one step -------------------------------------------------------------------------------------------------

    def __call__(self, x: torch.Tensor, lr: float) -> None:
        if self.alone is None:
            self.alone = StepGroup([self])
        self.alone([x], [lr])

    def prepare(self, x: torch.Tensor, lr: float) -> None:
        """The part of a step that changes from call to call, and the memory it needs."""
        steps = self.steps + 1
        self.make_room(x)
        torch.sub(x, self.sae.pre_bias, out=self.batch.centred[: len(x)])
        self.rates[0].fill_(lr / (1 - BETAS[0] ** steps))
        self.rates[1].fill_((1 - BETAS[1] ** steps) ** -0.5)

    def make_room(self, x: torch.Tensor) -> None:
        """A Batch of at least these rows, and a Dead where AuxK has work."""
        if self.batch is None or self.batch.n < len(x):
            from .gpu_products import Batch

            self.forget()
            shape, heavy = (self.d, self.m, self.config.k), {"heavy": self.heavy} if self.heavy else {}
            self.batch = Batch(len(x), *shape, self.chunk, self.half, self.dense, self.device, **heavy)
        if self.revival is None and self.capacity():
            from .gpu_products import Dead

            k = self.config.aux_k or max(1, self.d // 2)
            chunk = min(self.chunk, len(x))
            self.revival = Dead(self.capacity(), k, self.d, self.m, chunk, self.half, self.device)
            self.revival.fill(self.dead)

    def forward(self, n: int) -> None:
        """Code, residual, gradients of values; AuxK's gradients. Changes nothing that a second call would miss."""
        batch, (encoder, decoder, bias) = self.batch, self.copies
        batch.select(n, encoder, bias)
        batch.decode(n, decoder, self.fired, self.scale(n))
        self.gradients = None
        if self.revival is None:
            self.aux.zero_()
            return
        rows = self.aux_rows(n)
        share = self.config.aux_alpha * n / rows
        self.gradients = self.revival.gradients(
            batch.centred[:rows], batch.residual[:rows], encoder, decoder, bias,
            self.idle >= self.window, share * self.scale(n), self.aux,
        )  # fmt: skip
        self.aux *= share

    def update(self, n: int) -> None:
        """Weights, moments, counters."""
        self.batch.update(n, self.weights(), self.gradients, self.scale(n), self.rates)
        self.batch.update_pre_bias(n, self.arrays("pre_bias"), self.scale(n), self.rates)
        self.batch.count(n, self.aux, self.totals)

    def finish(self) -> None:
        self.steps += 1
        self.update_average()

    def scale(self, n: int) -> float:
        return 2 / (n * self.variance)

    def arrays(self, name: str) -> tuple[torch.Tensor, ...]:
        """A parameter and its two moments."""
        return getattr(self.sae, name).detach(), *self.moments[name]

    def weights(self) -> tuple:
        encoder, decoder, bias = (self.arrays(name) for name in ("encoder", "decoder", "encoder_bias"))
        return *encoder, *decoder, *bias, *self.copies, self.idle, self.fired

    def forget(self) -> None:
        """Drop the memory of a step; what was recorded with it counts no more."""
        self.batch = self.revival = self.gradients = None
        self.layout += 1

    # -- the dead -------------------------------------------------------------------------------------------------

    def find_dead(self) -> None:
        super().find_dead()
        wanted = self.capacity()
        if self.revival is not None and wanted and 0 <= self.revival.capacity - wanted <= self.dead_size():
            self.revival.fill(self.dead)  # in place: what is recorded stays good
        elif self.revival is not None or wanted:
            self.revival = self.gradients = None
            self.layout += 1

    def capacity(self) -> int:
        """Places for dead latents: few different numbers, so that few graphs are recorded."""
        if not len(self.dead) or not self.config.aux_alpha:
            return 0
        return -(-len(self.dead) // self.dead_size()) * self.dead_size()

    def dead_size(self) -> int:
        return -(-self.config.latents // DEAD_SIZES)

    # -- the rest of a step's interface ---------------------------------------------------------------------------

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self.forget()
        super().load_state(state)
        parameters = self.sae.encoder, self.sae.decoder, self.sae.encoder_bias
        for copy, parameter in zip(self.copies, parameters, strict=True):
            copy.copy_(parameter.detach())

    def notes(self) -> dict:
        return {"dense": self.dense, "chunk": self.chunk}

    @torch.no_grad()
    def squared_error(self, x: torch.Tensor) -> float:
        """Mean of |x - x_hat|^2 over normalised rows, of `result`."""
        sae, total = self.result(), torch.zeros((), dtype=torch.float64, device=self.device)
        copies = self.copies
        if sae is not self.sae:
            copies = [p.detach().to(self.half) for p in (sae.encoder, sae.decoder, sae.encoder_bias)]
        for block in x.split(self.batch.n if self.batch else self.config.batch_size):
            with current(self.device):
                if self.batch is None:
                    self.make_room(block)
                n = len(block)
                torch.sub(block, sae.pre_bias, out=self.batch.centred[:n])
                self.batch.select(n, copies[0], copies[2])
                self.batch.decode(n, copies[1], self.fired, 1.0, gradient=False)
                total += self.batch.row_error[:n].sum(dtype=torch.float64)
        return total.item() / len(x)

    @classmethod
    def together(cls, steps: list[Step]) -> Callable[[list[torch.Tensor], list[float]], None]:
        """A step of several SAEs in one launch: see `StepGroup`."""
        return StepGroup(steps)

    def close(self) -> None:
        self.forget()


class StepGroup:
    """Steps of one or several SAEs, recorded as one CUDA graph on streams of their own, so that the GPU overlaps them.

    Each runs the kernels that it would run alone, in the same order and on memory of its own: the weights are equal
    bit for bit to those of a training apart.
    """

    strict = False  # a recording that fails is an error, not a warning

    def __init__(self, steps: list[TritonStep]) -> None:
        self.steps, self.graphs, self.seen, self.pool, self.layouts = steps, {}, {}, None, None
        self.streams = capture_streams(steps[0].device, len(steps))

    @torch.no_grad()
    def __call__(self, batches: list[torch.Tensor], lrs: list[float]) -> None:
        with current(self.steps[0].device):
            for step, x, lr in zip(self.steps, batches, lrs, strict=True):
                step.prepare(x, lr)
            if not self.replay(tuple(len(x) for x in batches)):
                for step, x in zip(self.steps, batches, strict=True):
                    step.forward(len(x))
                    step.update(len(x))
            for step in self.steps:
                step.finish()

    def replay(self, sizes: tuple[int, ...]) -> bool:
        """Replay steps of so many rows, recorded first where they have run before; False: they are still to be made."""
        if not all(step.use_graphs for step in self.steps):
            return False
        layouts = [step.layout for step in self.steps]
        if layouts != self.layouts:  # a step has other dead, or other memory
            self.graphs, self.pool, self.layouts = {}, None, layouts
        if sizes not in self.graphs:
            key = sizes, tuple(step.revival and step.revival.capacity for step in self.steps)
            self.seen[key] = self.seen.get(key, 0) + 1
            if self.seen[key] <= WARM_UP:
                return False
            pool = self.pool or torch.cuda.graph_pool_handle()
            try:
                self.graphs[sizes] = record(self.steps, sizes, pool, self.streams)
            except RuntimeError as error:
                if self.strict and not isinstance(error, torch.cuda.OutOfMemoryError):
                    raise
                for step in self.steps:
                    step.use_graphs = False
                log.warning("the step could not be recorded as a CUDA graph (%s): it runs kernel by kernel", error)
                return False
            self.pool = pool  # a pool without a graph cannot be used again
        self.graphs[sizes].replay()
        return True


def rows_in_cache(device: torch.device, bytes_per_row: int) -> int:
    """Rows of pre-activations that fill two thirds of the GPU's L2 cache; at least 1024, for the product's sake."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 2**24
    return max(1024, cache * 2 // 3 // bytes_per_row // 128 * 128)
