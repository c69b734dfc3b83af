"""Coding with a fixed dictionary: orthogonal matching pursuit, non-negative fits on a support, k-means.

Rows are torch tensors in float32, on any device; atoms w_i are unit rows of a dictionary W (M, d). All of it is
deterministic: of equal candidates the lower index is taken.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F

from ..select import compiled

SPAN = 1e-3  # an atom whose part outside the span of those chosen is shorter adds nothing but noise


def omp(x: torch.Tensor, atoms: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Orthogonal matching pursuit (Pati et al. 1993): the atom with the largest |w . r|, then a new fit on all chosen.

    Of x (N, d), with unit atoms (M, d), k of them a row. Returns values (N, k) with signs, in the order of choice, 0
    where nothing was left to explain; indices (N, k) int64, distinct within a row; the residual (N, d).
    """
    n, d = x.shape
    k = min(k, len(atoms))
    residual, length = x.clone(), x.norm(dim=1)
    basis = x.new_zeros(n, k, d)  # orthonormal: the chosen atoms after Gram-Schmidt
    triangle = torch.eye(k, device=x.device, dtype=x.dtype).repeat(n, 1, 1)  # chosen = triangle @ basis
    along, indices = x.new_zeros(n, k), torch.zeros(n, k, dtype=torch.int64, device=x.device)
    taken = torch.zeros(n, len(atoms), dtype=torch.bool, device=x.device)
    for j in range(k):
        size, chosen = (residual @ atoms.T).abs_().masked_fill_(taken, -1).max(1)
        taken.scatter_(1, chosen[:, None], True)
        indices[:, j] = chosen
        rest = atoms[chosen]
        for _ in range(2):  # twice is enough (Kahan): the first leaves rounding that the second takes off
            part = (basis[:, :j] @ rest[:, :, None])[:, :, 0]
            triangle[:, j, :j] += part
            rest = rest - (part[:, None] @ basis[:, :j])[:, 0]
        outside = rest.norm(dim=1)
        useful = (outside > SPAN) & (size > 1e-6 * length)
        triangle[:, j, :j].masked_fill_(~useful[:, None], 0)
        triangle[:, j, j] = outside.masked_fill(~useful, 1)
        basis[:, j] = (rest / outside[:, None].clamp_min(1e-30)).masked_fill(~useful[:, None], 0)
        along[:, j] = (basis[:, j] * residual).sum(1)
        residual = residual - along[:, j, None] * basis[:, j]
    values = torch.linalg.solve_triangular(triangle.mT, along[:, :, None], upper=True)[:, :, 0]
    return values, indices, residual


def nonnegative_fit(x: torch.Tensor, atoms: torch.Tensor, indices: torch.Tensor, sweeps: int = 30) -> torch.Tensor:
    """Least squares with values >= 0 on a given support, by coordinate descent: min |x - sum_j v_j w_j|, v >= 0.

    Each of the `sweeps` lowers the error or leaves it. x (N, d), atoms (M, d) of any length, indices (N, k); (N, k).
    """
    chosen = atoms[indices]  # (N, k, d)
    gram, target = chosen @ chosen.mT, (chosen @ x[:, :, None])[:, :, 0]
    values = torch.zeros_like(target)
    for _ in range(sweeps):
        for j in range(values.shape[1]):
            others = (gram[:, j] * values).sum(1) - gram[:, j, j] * values[:, j]
            values[:, j] = ((target[:, j] - others) / gram[:, j, j].clamp_min(1e-30)).clamp_min(0)
    return values


def nearest(x: torch.Tensor, centroids: torch.Tensor, k: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared distances (N, k) to the k nearest centroids (M, d), nearest first, and their indices."""
    squared = centroids.square().sum(1) - 2 * x @ centroids.T  # without |x|^2, the same for all
    if k == 1:
        found, index = squared.min(1, keepdim=True)
    else:
        found, index = squared.topk(k, dim=1, largest=False)
    return (found + x.square().sum(1, keepdim=True)).clamp_min(0), index


def kmeans(x: torch.Tensor, n: int, steps: int = 30, seed: int = 0, block: int = 4096) -> torch.Tensor:
    """Centroids (n, d) of rows x (N, d): k-means++ seeding (Arthur and Vassilvitskii 2007), then Lloyd's steps.

    A centroid that lost all its rows moves to the row that is farthest from its own. With n = N, the rows themselves.
    """
    if n > len(x):
        raise ValueError(f"k-means of {n} centroids needs as many rows, found {len(x)}")
    rng = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(x), (1,), generator=rng))]
    distance, squares = torch.full((len(x),), torch.inf, device=x.device), x.square().sum(1)
    for _ in range(n - 1):
        new = squares + squares[chosen[-1]] - 2 * (x @ x[chosen[-1]])
        distance = torch.minimum(distance, new.clamp_min(0))
        distance[chosen[-1]] = 0
        total = distance.double().cumsum(0)
        # Where all that is left are copies of chosen rows, any row that is not chosen yet will do.
        spot = int(torch.searchsorted(total, torch.rand(1, generator=rng, dtype=torch.float64).to(total) * total[-1]))
        if total[-1] <= 0 or distance[min(spot, len(x) - 1)] <= 0:
            free = torch.ones(len(x), dtype=torch.bool)
            free[chosen] = False
            spot = int((distance.cpu().masked_fill(~free, -1)).argmax())
        chosen.append(spot)
    centroids = x[chosen].clone()
    last = None
    for _ in range(steps):
        parts = [nearest(rows, centroids) for rows in x.split(block)]
        own = torch.cat([i[:, 0] for _, i in parts])
        if last is not None and torch.equal(own, last):
            break
        last = own
        counts = torch.bincount(own, minlength=n)
        sums = torch.zeros_like(centroids, dtype=torch.float64).index_add_(0, own, x.double())
        centroids = torch.where(counts[:, None] > 0, (sums / counts[:, None].clamp_min(1)).to(x), centroids)
        empty = (counts == 0).nonzero().ravel()
        if len(empty):
            far = torch.cat([d[:, 0] for d, _ in parts]).argsort(descending=True, stable=True)
            centroids[empty] = x[far[: len(empty)]]
    return centroids


def matching_pursuit(
    x: torch.Tensor, atoms: torch.Tensor, k: int, tolerance: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Matching pursuit with values >= 0, through the Gram matrix: z <- z - c_j G[i_j], without touching the rows.

    Of x (N, d), with unit atoms (M, d), in k steps; the pursuit of a row ends where no product is over `tolerance` |x|.
    Returns values (N, k), in the order of choice, 0 after the end, and indices (N, k) int64, maybe repeated. What is
    left has |r|^2 = |x|^2 - the sum of the values' squares.
    """
    least = tolerance * x.norm(dim=1)
    indices = torch.zeros(len(x), k, dtype=torch.int64, device=x.device)
    values = torch.zeros(len(x), k, dtype=x.dtype, device=x.device)
    if (kernels := _kernels(x)) is not None:
        padded = _padded(atoms, 0, 32)
        z, gram = F.linear(x, padded), (padded @ padded.T).numpy()

        def choose(rows: slice) -> None:
            kernels.choose_rows(z[rows].numpy(), gram, *_numpy(rows, least, indices, values))

        _blocks(choose, len(x))
        return values, indices
    z, gram = x @ atoms.T, atoms @ atoms.T
    going = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for j in range(k):
        largest, chosen = z.max(1)
        going = going & (largest > least)
        values[:, j], indices[:, j] = largest * going, chosen
        z -= values[:, j, None] * gram[chosen]
    return values, indices


class Left(torch.autograd.Function):
    """What a pursuit with given choices leaves of x, squared and summed: r_{j+1} = r_j - (w_j.r_j) w_j, L = |r_k|^2.

    From the end, with g_k = 2 r_k: the gradient of w_j is -(w_j.r_j) g_{j+1} - (w_j.g_{j+1}) r_j, and
    g_j = g_{j+1} - (w_j.g_{j+1}) w_j; that of x is g_0. The residuals are found again on the way, r_j = r_{j+1} +
    (w_j.r_j) w_j, so that memory is N d and not N k d.

    ``Left.apply(x, atoms, indices, active)`` with x (N, d), atoms (M, d), indices (N, k) and active (N, k) bool gives
    the loss, and without gradient the values (N, k) and the residual (N, d).
    """

    @staticmethod
    def forward(ctx, x, atoms, indices, active):
        values, left = unroll(x, atoms, indices, active)
        ctx.save_for_backward(atoms, indices, active, values, left)
        ctx.mark_non_differentiable(values, left)
        return left.square().sum(), values, left

    @staticmethod
    def backward(ctx, scale, *_):
        atoms, indices, active, values, left = ctx.saved_tensors
        to_atoms, to_x = unroll_gradient(left, atoms, indices, active, values)
        return to_x * scale, to_atoms * scale, None, None


def unroll(x, atoms, indices, active) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (N, k) of a pursuit with given choices, and what it leaves (N, d); arguments as of `Left`."""
    values = torch.zeros_like(indices, dtype=x.dtype)
    if (kernels := _kernels(x)) is not None:
        left, rows_of = _padded(x, 1, 16, copy=True), _padded(atoms, 1, 16).numpy()

        def task(rows: slice) -> None:
            kernels.unroll_rows(left[rows].numpy(), rows_of, *_numpy(rows, indices, active, values))

        _blocks(task, len(x))
        return values, left[:, : x.shape[1]].contiguous()
    left = x
    for j in range(indices.shape[1]):
        own = atoms[indices[:, j]]
        values[:, j] = (left * own).sum(1) * active[:, j]
        left = left - values[:, j, None] * own
    return values, left


def unroll_gradient(left, atoms, indices, active, values) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of the summed |left|^2 with respect to atoms (M, d) and x (N, d); see `Left`."""
    if (kernels := _kernels(left)) is not None:
        d, rows_of, own = left.shape[1], _padded(atoms, 1, 16), _padded(left, 1, 16, copy=True)
        to_x = torch.empty_like(own)
        n_blocks = -(-len(left) // BLOCK)  # each has sums of its own, so that threads change nothing
        to_atoms = own.new_zeros(n_blocks, *rows_of.shape)

        def task(rows: slice) -> None:
            given = own[rows].numpy(), rows_of.numpy(), *_numpy(rows, indices, active, values)
            kernels.gradient_rows(*given, to_atoms[rows.start // BLOCK].numpy(), to_x[rows].numpy())

        _blocks(task, len(left))
        return to_atoms.sum(0)[:, :d] if n_blocks > 1 else to_atoms[0, :, :d], to_x[:, :d]
    g, to_atoms = 2 * left, torch.zeros_like(atoms)
    for j in range(indices.shape[1] - 1, -1, -1):
        own = atoms[indices[:, j]]
        a, b = values[:, j, None], (g * own).sum(1, keepdim=True) * active[:, j, None]
        left = left + a * own
        to_atoms.index_add_(0, indices[:, j], -a * g - b * left)
        g = g - b * own
    return to_atoms, g


BLOCK = 256  # rows that a thread takes at a time


def _kernels(x: torch.Tensor):
    """The numba kernels where they serve, float32 on a CPU; else None."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or compiled() is None:
        return None
    from ..kernels import cpu_pursuit

    return cpu_pursuit


def _numpy(rows: slice, *tensors: torch.Tensor):
    return (t[rows].numpy() for t in tensors)


def _blocks(task, n: int) -> None:
    """task(slice) for blocks of n rows, by as many threads as torch has."""
    slices = [slice(start, start + BLOCK) for start in range(0, n, BLOCK)]
    if len(slices) < 2 or torch.get_num_threads() < 2:
        for one in slices:
            task(one)
        return
    with ThreadPoolExecutor(min(len(slices), torch.get_num_threads())) as pool:
        list(pool.map(task, slices))


def _padded(x: torch.Tensor, dim: int, to: int, copy: bool = False) -> torch.Tensor:
    """x with zeros up to a multiple of `to`, contiguous; itself where nothing is missing, or a copy."""
    x = x.detach()
    if missing := -x.shape[dim] % to:
        return F.pad(x, (0, missing) if dim == 1 else (0, 0, 0, missing))
    return x.clone(memory_format=torch.contiguous_format) if copy else x.contiguous()
