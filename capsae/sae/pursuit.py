"""Coding with a fixed dictionary: orthogonal matching pursuit, non-negative fits on a support, k-means.

Rows are torch tensors in float32, on any device; atoms w_i are unit rows of a dictionary W (M, d). All of it is
deterministic: of equal candidates the lower index is taken.
"""

from __future__ import annotations

import functools

import torch

SPAN = 1e-3  # an atom whose part outside the span of those chosen is shorter adds nothing but noise


def omp(x: torch.Tensor, atoms: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Orthogonal matching pursuit (Pati et al. 1993): the atom with the largest |w . r|, then a new fit on all chosen.

    Parameters
    ----------
    x : (N, d)
    atoms : (M, d) unit rows
    k : atoms per row, at most M

    Returns
    -------
    values (N, k) with signs, in the order of choice; 0 where nothing was left to explain
    indices (N, k) int64, distinct within a row
    residual (N, d)
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
    dice = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(x), (1,), generator=dice))]
    distance, squares = torch.full((len(x),), torch.inf, device=x.device), x.square().sum(1)
    for _ in range(n - 1):
        new = squares + squares[chosen[-1]] - 2 * (x @ x[chosen[-1]])
        distance = torch.minimum(distance, new.clamp_min(0))
        distance[chosen[-1]] = 0
        total = distance.double().cumsum(0)
        # Where all that is left are copies of chosen rows, any row that is not chosen yet will do.
        spot = int(torch.searchsorted(total, torch.rand(1, generator=dice, dtype=torch.float64).to(total) * total[-1]))
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

    Parameters
    ----------
    x : (N, d)
    atoms : (M, d) unit rows
    k : steps
    tolerance : the pursuit of a row ends where no product is over this share of |x|

    Returns
    -------
    values (N, k), in the order of choice, 0 after the end; what is left has |r|^2 = |x|^2 - sum of their squares
    indices (N, k) int64, maybe repeated
    """
    kernel = _mp_kernel() if x.device.type == "cpu" else None
    z, gram, least = x @ atoms.T, atoms @ atoms.T, tolerance * x.norm(dim=1)
    indices = torch.zeros(len(x), k, dtype=torch.int64, device=x.device)
    values = torch.zeros(len(x), k, dtype=x.dtype, device=x.device)
    if kernel is not None:
        kernel(z.numpy(), gram.numpy(), least.numpy(), indices.numpy(), values.numpy())
        return values, indices
    going = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for j in range(k):
        largest, chosen = z.max(1)
        going = going & (largest > least)
        values[:, j], indices[:, j] = largest * going, chosen
        z -= values[:, j, None] * gram[chosen]
    return values, indices


@functools.cache
def _mp_kernel():
    """All steps of a row while its products lie in cache; None without numba."""
    from .select import compiled

    if compiled() is None:
        return None
    from .cpu_topk import compile_kernel

    @compile_kernel
    def run(z, gram, least, indices, values):
        for r in range(len(z)):
            row = z[r]
            for j in range(indices.shape[1]):
                best, value = 0, row[0]
                for i in range(1, len(row)):
                    if row[i] > value:
                        best, value = i, row[i]
                indices[r, j] = best
                if not value > least[r]:
                    break
                values[r, j] = value
                own = gram[best]
                for i in range(len(row)):
                    row[i] -= value * own[i]

    return run
