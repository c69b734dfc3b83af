"""The GPU's kernels and step against plain PyTorch and float64.

Without a GPU they run in Triton's interpreter, in a process of their own: the interpreter is chosen when triton is
imported, and the other tests must not see it. On a GPU they run on it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

CUDA = torch.cuda.is_available()
INSIDE = os.environ.get("TRITON_INTERPRET") == "1" or CUDA
pytest.importorskip("triton", reason="triton is not installed")

if not INSIDE:

    @pytest.mark.slow
    @pytest.mark.timeout(900)  # 30 s of processor time
    def test_in_the_interpreter():
        """Everything below, in the process that interprets Triton."""
        environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
        assert " passed" in run.stdout

else:
    from capsae.sae import SAEConfig, TopKSAE, steps
    from capsae.sae.kernels import gpu_products, gpu_step, gpu_topk
    from capsae.sae.kernels import triton as kernels
    from capsae.sae.kernels.gpu_step import StepGroup, TritonStep
    from capsae.sae.rows import Rows
    from capsae.sae.selfcheck import proven
    from capsae.sae.steps import PlainStep
    from capsae.sae.train import _step_kind

inside = pytest.mark.skipif(not INSIDE, reason="runs in test_in_the_interpreter")
DEVICE = torch.device("cuda" if CUDA else "cpu")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def check_topk(z: torch.Tensor, k: int) -> None:
    values = torch.full((len(z), k), -7.0, device=DEVICE)
    indices = torch.full((len(z), k), -7, dtype=torch.int32, device=DEVICE)
    gpu_topk.topk(z.to(DEVICE), k, values, indices)
    expected = z.relu().float().sort(dim=1, descending=True, stable=True)  # of equal ones the lower column
    order = indices.cpu().long().sort(1)
    torch.testing.assert_close(order.values, expected.indices[:, :k].sort(1).values)
    assert torch.equal(values.cpu(), z.relu().float().gather(1, indices.cpu().long()))


@inside
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("m", "k"), [(37, 4), (64, 64), (17, 1), (1030, 33)])
def test_topk(dtype, m, k):
    z = torch.randn(4, m)
    z[0] = -z[0].abs()  # none positive
    z[1, 3:] = -0.0  # three at most
    z[2] = (2 * z[2]).round() / 2  # ties, also at the k-th place
    check_topk(z.to(dtype), k)


@inside
def test_topk_of_rows_too_long_for_one_program(monkeypatch):
    monkeypatch.setattr(gpu_topk, "SEGMENT", 64)
    check_topk((torch.randn(3, 300) * 2).round() / 2, 20)
    check_topk((torch.randn(2, 150)).bfloat16(), 49)
    check_topk(torch.randn(2, 150), 51)  # more than the last segment has


@inside
def test_topk_shows_a_nan_and_takes_infinity():
    z = torch.randn(2, 40)
    z[0, 7], z[1, 9] = torch.nan, torch.inf
    values, indices = torch.zeros(2, 3, device=DEVICE), torch.zeros(2, 3, dtype=torch.int32, device=DEVICE)
    gpu_topk.topk(z.to(DEVICE), 3, values, indices)
    assert values[0].isnan().sum() == 1 and 7 in indices[0] and values[1].max() == torch.inf and 9 in indices[1]


def made_batch(dense=False, n=23, d=19, m=29, k=5, heavy=4, dtype=torch.float32):
    """A batch with a code of its own: an unused latent (3), one in every row (4), unused slots, and its weights."""
    batch = gpu_products.Batch(n, d, m, k, 8, dtype, dense, DEVICE, heavy)
    others = torch.stack([torch.randperm(m - 5)[: k - 1] + 5 for _ in range(n)])
    indices = torch.cat([torch.full((n, 1), 4), others], 1)
    values = torch.rand(n, k) + 0.1
    values[torch.rand(n, k) < 0.2] = 0
    values[:, 0] = 1.5
    batch.centred.copy_(torch.randn(n, d))
    batch.values.copy_(values)
    batch.indices.copy_(indices)
    return batch, torch.nn.functional.normalize(torch.randn(m, d, device=DEVICE), dim=1)


def in_float64(batch, decoder, scale):
    """Residual, value gradient, gradients of encoder, decoder and biases, by dense algebra."""
    values, indices = batch.values.double().cpu(), batch.indices.long().cpu()
    code = torch.zeros(batch.n, batch.m, dtype=torch.float64).scatter(1, indices, values)
    x, rows = batch.centred.double().cpu(), decoder.double().cpu()
    residual = code @ rows - x
    code_gradient = scale * (residual @ rows.T) * (code > 0)
    return residual, code_gradient, code_gradient.T @ x, scale * code.T @ residual, code_gradient.sum(0)


@inside
@pytest.mark.parametrize("dense", [False, True])
def test_decode(dense):
    batch, decoder = made_batch(dense)
    fired = torch.zeros(batch.m, dtype=torch.int32, device=DEVICE)
    batch.decode(batch.n, decoder, fired, 0.37)
    residual, code_gradient, *_ = in_float64(batch, decoder, 0.37)
    torch.testing.assert_close(batch.residual.cpu().double(), residual, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(batch.row_error.cpu().double(), residual.square().sum(1), atol=1e-5, rtol=1e-5)
    expected = code_gradient.gather(1, batch.indices.cpu().long())
    torch.testing.assert_close(batch.value_gradient.cpu().double(), expected, atol=1e-5, rtol=1e-5)
    active = batch.values > 0
    assert torch.equal(batch.row_active, active.sum(1).int())
    assert set(fired.nonzero().ravel().tolist()) == set(batch.indices[active].tolist())


@inside
@pytest.mark.parametrize("heavy", [4, 512])
def test_pairs_are_sorted_by_latent_then_row(heavy):
    batch, _ = made_batch(heavy=heavy)
    batch.value_gradient.copy_(torch.randn(batch.n, batch.k))
    batch.sort_pairs(batch.n)
    rows, slots = (batch.values.cpu() > 0).nonzero(as_tuple=True)
    latents = batch.indices.cpu()[rows, slots]
    order = np.lexsort((rows, latents))
    total = len(order)
    counts = torch.bincount(latents, minlength=batch.m)
    assert batch.first.cpu().tolist() == [0, *counts.cumsum(0).tolist()]
    wanted = rows, batch.values.cpu()[rows, slots], batch.value_gradient.cpu()[rows, slots]
    for got, expected in zip(batch.pairs, wanted, strict=True):
        assert torch.equal(got[:total].cpu(), expected[order].to(got.dtype))
    assert counts[4] == batch.n and counts[3] == 0
    expected = [0, *torch.where(counts > heavy, (counts + heavy - 1) // heavy, 0).cumsum(0).tolist()]
    assert batch.part_first.cpu().tolist() == expected and expected[-1] <= batch.most_parts


@inside
@pytest.mark.parametrize("n_blocks", [32, 70])
def test_offsets_over_many_blocks_of_rows(n_blocks):
    counts = torch.randint(0, 9, (n_blocks, 45), dtype=torch.int32)
    counts[:, 7] = 0
    offsets, (totals, parts) = counts.clone().to(DEVICE), torch.full((2, 45), -7, dtype=torch.int32, device=DEVICE)
    kernels._offsets[(2,)](offsets, totals, parts, n_blocks, 45, SHARE=140, BLOCK=32, DEEP=32)
    until = counts.cumsum(0)
    assert torch.equal(offsets.cpu(), (until - counts).int())
    assert torch.equal(totals.cpu(), until[-1].int())
    assert torch.equal(parts.cpu(), torch.where(until[-1] > 140, (until[-1] + 139) // 140, 0).int())


def updated(batch, decoder, dead=None):
    """Parameters after `update`, those before, and the counters, as float64 on the CPU."""
    m, d = decoder.shape
    rng = torch.Generator().manual_seed(5)

    def new(*shape):
        return torch.rand(*shape, generator=rng).to(DEVICE)

    encoder, bias = new(m, d) - 0.5, new(m) - 0.5
    moments = [new(*s) * f for s in ((m, d), (m, d), (m,)) for f in (0.1, 0.01)]
    weights = [encoder, *moments[:2], decoder.clone(), *moments[2:4], bias, *moments[4:]]
    before = [t.clone().double().cpu() for t in weights]
    idle, fired = (torch.full((m,), i, dtype=torch.int32, device=DEVICE) for i in (7, 0))
    fired[batch.indices[batch.values > 0].long()] = 1
    halves = [t.clone() for t in (encoder, decoder, bias)]
    rates = torch.tensor([1e-2, 1.7], device=DEVICE)
    batch.update(batch.n, (*weights, *halves, idle, fired), dead, 0.37, rates)
    return [t.double().cpu() for t in weights], before, idle.cpu(), fired.cpu()


def adam(p, m, v, g):
    m, v = m + 0.1 * (g - m), v + 0.001 * (g * g - v)
    return p - 1e-2 * m / (v.sqrt() * 1.7 + 6.25e-10), m, v


@inside
@pytest.mark.parametrize("with_dead", [False, True])
@pytest.mark.parametrize(("dense", "heavy"), [(False, 4), (False, 512), (True, 4)])
def test_update(dense, heavy, with_dead):
    batch, decoder = made_batch(dense, heavy=heavy)
    if dense:
        batch.latents = 12  # a second and a third, smaller, block
        gpu_products.scatter(batch.values, batch.indices, batch.code)  # as `decode` leaves it
    batch.residual.copy_(in_float64(batch, decoder, 0.37)[0])
    residual, code_gradient, of_encoder, of_decoder, of_bias = in_float64(batch, decoder, 0.37)
    batch.value_gradient.copy_(code_gradient.gather(1, batch.indices.cpu().long()))
    through, dead = of_bias, None
    if with_dead:
        slot = torch.full((batch.m,), -1, dtype=torch.int32)
        slot[torch.tensor([0, 3, 28])] = torch.tensor([2, 0, 1], dtype=torch.int32)
        extra = torch.randn(3, batch.d), torch.randn(3, batch.d), torch.randn(3)
        dead = tuple(t.to(DEVICE) for t in (slot, *extra))
        has = slot >= 0
        of_encoder, of_decoder, of_bias = (t.clone() for t in (of_encoder, of_decoder, of_bias))
        for total, more in zip((of_encoder, of_decoder, of_bias), extra, strict=True):
            total[has] += more[slot[has].long()].double()
    after, before, idle, fired = updated(batch, decoder, dead)
    unit = before[3]
    of_decoder = of_decoder - (of_decoder * unit).sum(1, keepdim=True) * unit
    gradients = (0, of_encoder), (3, of_decoder), (6, of_bias)
    encoder, rows, bias = (adam(*before[i : i + 3], g) for i, g in gradients)
    rows = torch.nn.functional.normalize(rows[0], dim=1), *rows[1:]
    for got, expected in zip(after, (*encoder, *rows, *bias), strict=True):
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-4)
    torch.testing.assert_close(batch.through.sum(0).double().cpu(), through @ before[0], atol=1e-5, rtol=1e-4)
    active = torch.zeros(batch.m, dtype=torch.bool)
    active[batch.indices[batch.values > 0].long().cpu()] = True
    assert torch.equal(idle, torch.where(active, 0, 8).int()) and not fired.any()


def small_sae(n_dead: int, d: int, **options):
    """An SAE with biases, a latent that always fires, and some that never do but see much."""
    torch.manual_seed(1)
    sae = TopKSAE.untrained(d, SAEConfig(**({"latents": 26, "k": 3, "products": "float32", "aux_k": 4} | options)))
    with torch.no_grad():
        sae.pre_bias.normal_(0, 0.1)
        sae.encoder_bias.normal_(0, 0.1)
        sae.encoder[2 : 2 + n_dead] *= 12
        sae.encoder_bias[2 : 2 + n_dead] -= 30
        sae.encoder_bias[0] += 3
    return sae.to(DEVICE)


def take_steps(kind, n_dead=0, dense=False, sizes=(9, 8), d=11, lr=1e-3, **options):
    step = kind(small_sae(n_dead, d, **options), variance=2.5, window=10)
    if kind is not PlainStep:
        step.dense, step.heavy, step.chunk = dense, 4, 8
    step.idle[2 : 2 + n_dead] = 50
    step.find_dead()
    step.idle[3] = 0  # it has fired since: AuxK leaves it
    for n in sizes:
        step(torch.randn(n, d).to(DEVICE), lr)
    return step


@inside
@pytest.mark.parametrize(
    ("dense", "n_dead", "aux_rows"),
    [(False, 7, 0.3), (False, 0, 1.0), (True, 7, 1.0)],
)
def test_steps_equal_the_plain_ones(dense, n_dead, aux_rows):
    plain, quick = (take_steps(kind, n_dead, dense, aux_rows=aux_rows) for kind in (PlainStep, TritonStep))
    for (name, expected), got in zip(plain.sae.named_parameters(), quick.sae.parameters(), strict=True):
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        for a, b in zip(plain.moments[name], quick.moments[name], strict=True):
            torch.testing.assert_close(b, a, atol=1e-6, rtol=1e-4)
    assert torch.equal(plain.idle, quick.idle)
    x = torch.randn(17, 11, device=DEVICE)
    assert quick.squared_error(x) == pytest.approx(plain.squared_error(x), rel=1e-5)
    expected, got = plain.read(), quick.read()
    assert got == pytest.approx(expected, rel=1e-5)
    assert (expected["loss"] > expected["fvu"]) == (n_dead > 0)


@inside
def test_bf16_and_the_average():
    plain, quick = (take_steps(kind, 7, lr=1e-4, products="bf16", ema=0.9) for kind in (PlainStep, TritonStep))
    for (name, expected), got in zip(plain.result().named_parameters(), quick.result().parameters(), strict=True):
        assert (got - expected).abs().max() < 4.1e-4, name  # two steps of Adam move each weight by 1e-4 at most
        assert (got - expected).abs().mean() < 3e-5, name
    assert quick.read() == pytest.approx(plain.read(), rel=0.02)
    parameters = quick.sae.encoder, quick.sae.decoder, quick.sae.encoder_bias
    for copy, parameter in zip(quick.copies, parameters, strict=True):
        # The interpreter cuts off what a GPU rounds.
        torch.testing.assert_close(copy.float(), parameter.detach(), atol=0, rtol=2**-8 if CUDA else 2**-7)


@inside
def test_state_goes_on_bit_for_bit():
    first = take_steps(TritonStep, 7, sizes=(13,))
    state = {name: tensor.clone() for name, tensor in first.state().items()}
    again = TritonStep(small_sae(0, 11), variance=2.5, window=10)
    again.heavy = 4
    again.load_state(state)
    again.chunk, again.dense = first.chunk, first.dense
    x = torch.randn(12, 11, device=DEVICE)
    for step in (first, again):
        step(x, 1e-3)
    for name, tensor in first.state().items():
        assert torch.equal(tensor, again.state()[name]), name


@inside
def test_several_in_one_call_equal_each_apart():
    x = [torch.randn(9, 11, device=DEVICE) for _ in range(2 if not CUDA else 6)]
    apart, together = ([take_steps(TritonStep, n, sizes=()) for n in (0, 5)] for _ in range(2))
    group = TritonStep.together(together)
    assert isinstance(group, StepGroup)
    for batch in x:
        for step in apart:
            step(batch, 1e-3)
        group([batch, batch], [1e-3, 1e-3])
    for one, other in zip(apart, together, strict=True):
        for name, tensor in one.state().items():
            assert torch.equal(tensor, other.state()[name]), name


@inside
def test_the_dead_may_change_between_steps():
    plain, quick = (take_steps(kind, 7, sizes=(9,)) for kind in (PlainStep, TritonStep))
    x = torch.randn(9, 11, device=DEVICE)
    for dead in ([1, 5], []):
        for step in (plain, quick):
            step.idle.zero_()
            step.idle[dead] = 50
            step.read()
            step(x, 1e-3)
    assert quick.revival is None
    torch.testing.assert_close(quick.sae.encoder, plain.sae.encoder, atol=2e-6, rtol=1e-5)


class Recorded:
    """Stands in for a CUDA graph."""

    made = []

    def __init__(self, sizes):
        self.sizes, self.replays = sizes, 0
        Recorded.made.append(self)

    def replay(self):
        self.replays += 1


@inside
@pytest.mark.parametrize("several", [False, True])
def test_what_is_recorded_when(monkeypatch, several):
    """Two steps of a size run kernel by kernel, the third is recorded; other dead or other memory: again."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(gpu_step, "record", lambda steps, sizes, pool, streams: Recorded(sizes))
    monkeypatch.setattr(Recorded, "made", [])
    monkeypatch.setattr(TritonStep, "forward", lambda self, n: ran.append(n))
    monkeypatch.setattr(TritonStep, "update", lambda self, n: None)
    made = [take_steps(TritonStep, sizes=()) for _ in range(2 if several else 1)]
    for step in made:
        step.use_graphs = True
    group, ran = TritonStep.together(made), []

    def take(n):
        x = torch.randn(n, 11, device=DEVICE)
        group([x] * len(made), [1e-3] * len(made)) if several else made[0](x, 1e-3)

    for n in (9, 8, 9, 8, 9, 8, 9):
        take(n)
    assert len(ran) == 4 * len(made) and [graph.replays for graph in Recorded.made] == [2, 1]
    made[0].idle[5:8] = 50
    made[0].find_dead()
    for _ in range(3):
        take(9)
    assert len(Recorded.made) == 3 and Recorded.made[2].replays == 1
    made[0].idle[5] = 0
    made[0].find_dead()  # fewer dead, the same number of places
    take(9)
    assert len(Recorded.made) == 3 and made[0].revival.listed.sum() == 2
    take(12)  # a larger batch: other memory, and now places for two
    for _ in range(3):
        take(9)
    assert len(Recorded.made) == 4 and Recorded.made[2].replays == 2
    assert all(step.steps == 15 for step in made)


class Stream:
    """Stands in for a CUDA stream; `log` has what it waits for."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append((self.name, other.name))


@pytest.fixture
def faked(monkeypatch):
    """CUDA's recording, on the CPU: a list of what was called, and recorded steps that run nothing."""
    calls = []

    class Graph:
        def capture_begin(self, pool, capture_error_mode):
            calls.append("begin")

        def capture_end(self):
            calls.append("end")
            if calls.count("end") == 1:
                raise RuntimeError("a later error")

        def replay(self):
            calls.append("replay")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream("current", calls))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr(TritonStep, "update", lambda self, n: None)
    return calls


def steps_to_record(count, calls):
    """Steps, what takes one of each, and their streams: 0 is the outer one."""
    made = [take_steps(TritonStep, sizes=()) for _ in range(count)]
    group = TritonStep.together(made)
    group.streams = [Stream(i, calls) for i in range(1 if count == 1 else count + 1)]
    for step in made:
        step.use_graphs = True
    x = torch.randn(9, 11, device=DEVICE)
    return made, lambda: group([x] * count, [1e-3] * count)


@inside
@pytest.mark.parametrize("count", [1, 3])
def test_a_step_that_cannot_be_recorded_runs_kernel_by_kernel(monkeypatch, caplog, faked, count):
    def forward(self, n):
        recording = "begin" in faked and "end" not in faked
        ran.append(recording)
        if recording and self is made[-1]:
            raise RuntimeError("the first error")

    monkeypatch.setattr(TritonStep, "forward", forward)
    (made, take), ran = steps_to_record(count, faked), []
    for _ in range(4):
        take()
    assert ran == [False] * 2 * count + [True] * count + [False] * 2 * count
    forks, joins = ([f(i) for i in range(1, count + 1) if count > 1] for f in (lambda i: (i, 0), lambda i: (0, i)))
    assert faked == ["empty", (0, "current"), "begin", *forks, *joins, "end"]
    assert "the first error" in caplog.text and "a later error" not in caplog.text
    assert not any(step.use_graphs for step in made) and gc.isenabled()


@inside
@pytest.mark.parametrize("count", [1, 2])
def test_want_of_memory_ends_the_recordings(monkeypatch, caplog, faked, count):
    def forward(self, n):
        if faked.count("begin") > faked.count("end"):
            raise torch.cuda.OutOfMemoryError("no room")

    monkeypatch.setattr(TritonStep, "forward", forward)
    made, take = steps_to_record(count, faked)
    for _ in range(10):
        take()
    assert [step.steps for step in made] == [10] * count
    assert faked.count("begin") == faked.count("empty") == 1 and not faked.count("replay")
    assert not any(step.use_graphs for step in made) and "kernel by kernel" in caplog.text


class Broken:
    """A kernel that fails, or is right and then writes NaN (or another factor) into whatever it changed."""

    def __init__(self, kernel, error="", factor=0.0):
        self.kernel, self.error, self.factor, self.launched = kernel, error, factor, 0

    def __getitem__(self, grid):
        def launch(*arrays, **options):
            self.launched += 1
            if self.error:
                raise RuntimeError(self.error)
            floats = [a for a in arrays if torch.is_tensor(a) and a.is_floating_point()]
            before = [a.clone() for a in floats]
            self.kernel[grid](*arrays, **options)
            for array, old in zip(floats, before, strict=True):
                changed = array != old
                array[changed] = array[changed] * self.factor

        return launch


def checked(monkeypatch, caplog, name, broken):
    """Which step is taken with one kernel broken, and the warnings."""
    monkeypatch.setattr(gpu_topk if name == "_topk" else kernels, name, broken)
    monkeypatch.setattr(gpu_step, "SPARSE_FROM", 0)
    kind = proven(TritonStep, [small_sae(0, 5, latents=9, k=2)], Rows(torch.randn(6, 5).to(DEVICE), 0, 6, 5.0), 6)
    return kind, [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]


KERNELS = ["_topk", "_decode", "_rank", "_offsets", "_place", "_update", "_update_pre_bias", "_count"]
KERNELS += ["_scatter", "_collect"]  # of AuxK alone


@inside
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_that_cannot_be_launched_is_found_before_training(monkeypatch, caplog, name):
    broken = Broken(None, f"{name} was not launched")
    kind, warnings = checked(monkeypatch, caplog, name, broken)
    assert kind is PlainStep and broken.launched == 1
    assert len(warnings) == 1 and f"{name} was not launched" in warnings[0]


@inside
@pytest.mark.parametrize(
    ("name", "factor"),
    [(n, float("nan")) for n in ("_decode", "_place", "_update_pre_bias", "_count")]
    + [(n, 1.3) for n in ("_decode", "_update", "_collect")],
)
def test_a_kernel_that_is_silently_wrong_is_found_before_training(monkeypatch, caplog, name, factor):
    kind, warnings = checked(monkeypatch, caplog, name, Broken(getattr(kernels, name), factor=factor))
    assert kind is PlainStep and len(warnings) == 1 and "% off" in warnings[0]


@inside
@pytest.mark.parametrize("products", ["float32", "bf16"])
def test_sound_kernels_are_taken(caplog, products):
    sae, rows = small_sae(0, 5, latents=9, k=2, products=products), Rows(torch.randn(8, 5).to(DEVICE), 0, 8, 5.0)
    assert proven(TritonStep, [sae], rows, 8) is TritonStep and not caplog.records


@inside
def test_settings(monkeypatch):
    assert _step_kind(None, torch.device("cuda")) is _step_kind(True, torch.device("cuda")) is TritonStep
    assert _step_kind(False, torch.device("cuda")) is PlainStep
    monkeypatch.setenv("CAPSAE_TRITON", "0")
    assert not gpu_step.available.__wrapped__()
    assert (steps.BETAS, steps.EPS) == ((0.9, 0.999), 6.25e-10)  # as in kernels._adam
