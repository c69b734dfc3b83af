"""Causal check of profiles: change a sample's code, decode it, run the exact head, and see which logits move.

An intervention changes values of a sparse code. Its effect on the CLS vector x (N, d) is

    x' = x + s (decode(codes') - decode(codes)),   s: what undoes the SAE's normalisation, row by row,

so the SAE's reconstruction error stays in x' as it was in x, and only the intervention moves the logits. (Without that,
``s decode(codes') + shift``, the logits also move by what the SAE leaves out.) Decoder and head are linear: effects on
logits are exact, not estimates by gradients. All in float64; nothing of size N x M is built.

Source of the idea of such checks: steering and ablation of SAE features in language models; procedure and controls here
are ours. Intervals of a class run over its rows, those of a mean over classes over the classes (bootstrap).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch
from scipy.sparse import csr_array

from capsae.caps import ClassActivationProfiles, check_labels
from capsae.data.asarray import as_numpy
from capsae.sae.model import SparseCodes

TITLES = {
    "core": "core deleted",
    "core_no_error": "core deleted, SAE's error left out",
    "random_active": "random active latents",
    "outside": "active latents outside the core, stretched",
    "outside_plain": "all outside the core deleted, not stretched",
    "part_first": "as much of the core, by profile",
    "part_random": "as much of the core, random order",
    "other_core": "core of another class",
    "random_order": "latents along a random direction",
    "head_direction": "head's direction, same energy (bound)",
    "head_projection": "head's direction, projected out",
    "app_core": "APP on the core",
    "app_all": "APP on all latents",
}


class Bench:
    """Samples with code, head and profiles: turns a changed code into changed features and logits.

    ``head`` has ``weight`` (C, d) and ``bias`` (C,) on raw features, ``x`` is (N, d) raw features, ``labels`` (N,) int.
    ValueError if shapes do not fit, or ``sae.decode`` is not the linear map that its decoder says.
    """

    def __init__(self, sae, head, caps: ClassActivationProfiles, x, labels, core_fraction: float = 0.15, codes=None):
        x = np.ascontiguousarray(as_numpy(x), dtype=np.float32)
        codes = (sae.encode(x) if codes is None else codes).numpy()
        self.sae, self.caps, self.codes, self.core_fraction = sae, caps, codes, core_fraction
        self.weight, self.bias = (as_numpy(part).astype(np.float64) for part in (head.weight, head.bias))
        if len(self.weight) != caps.n_classes or codes.n_latents != caps.n_latents:
            found = f"the head has {len(self.weight)} classes, codes {codes.n_latents} latents"
            raise ValueError(f"{found}; profiles of shape {caps.sums.shape} do not fit them")
        self.labels = check_labels(labels, len(codes), caps.n_classes)
        self.x, self.n_classes = x.astype(np.float64), caps.n_classes
        # What undoes the normalisation: shift and scale, (N, 1) or (1, d).
        parts = sae._normalized(torch.as_tensor(x))[1:]
        self.shift, scale = (np.atleast_2d(part.detach().cpu().numpy()).astype(np.float64) for part in parts)
        # One factor a row, or (normalize = "dataset") one a column, which then belongs to the decoder.
        by_row = scale.shape == (len(x), 1)
        self.row_scale = scale if by_row else np.ones((len(x), 1))
        self.decoder = as_numpy(sae.decoder).astype(np.float64) * (1.0 if by_row else scale[:1])
        self.x_hat = as_numpy(sae.decode(codes)).astype(np.float64) * scale + self.shift
        zero = np.zeros_like(codes.values[:8])
        flat = as_numpy(sae.decode(SparseCodes(zero, codes.indices[:8], codes.n_latents))) * scale[:8] + self.shift[:8]
        if not np.allclose(self.x_hat[:8], flat + self.delta(codes.values)[:8], atol=1e-3 * np.abs(self.x_hat).max()):
            raise ValueError(f"{type(sae).__name__}.decode is not linear in the code: effects on logits would be wrong")

    @classmethod
    def of(cls, run, set_name: str = "test") -> Bench:
        """The rows of a set of a run, with its SAE, head, profiles and core fraction."""
        given = run.features(set_name), run.experiment.caps.core_fraction
        return cls(run.sae, run.head, run.caps, given[0].cls, given[0].labels, given[1], run.codes(set_name))

    @cached_property
    def logits(self) -> np.ndarray:
        """Of x (N, C) float64."""
        return self.x @ self.weight.T + self.bias

    @cached_property
    def predicted(self) -> np.ndarray:
        """The class of the largest logit, (N,)."""
        return self.logits.argmax(1)

    @cached_property
    def second(self) -> np.ndarray:
        """The class that the head puts second, (N,)."""
        return np.argsort(-self.logits, axis=1, kind="stable")[:, 1]

    @cached_property
    def core(self) -> np.ndarray:
        """Mask (C, M) of the classes' cores."""
        return self.caps.core_mask(self.core_fraction)

    @cached_property
    def latent_logits(self) -> np.ndarray:
        """(M, C): what one unit of each latent adds to each logit, before the row's scale."""
        return self.decoder @ self.weight.T

    def _sparse(self, change: np.ndarray, rows=slice(None)) -> csr_array:
        change = np.asarray(change, dtype=np.float64) * self.row_scale[rows]
        used = change != 0
        parts = change[used], self.codes.indices[rows][used], np.concatenate([[0], np.cumsum(used.sum(1))])
        return csr_array(parts, shape=(len(change), self.codes.n_latents))

    def delta(self, change: np.ndarray, rows=slice(None)) -> np.ndarray:
        """s (decode(codes') - decode(codes)), (N, d), of a change of the values (N, k), of all or some rows."""
        return self._sparse(change, rows) @ self.decoder

    def logit_delta(self, change: np.ndarray) -> np.ndarray:
        """The same seen by the head, (N, C)."""
        return self._sparse(change) @ self.latent_logits

    def mean_by_class(self, values: np.ndarray) -> np.ndarray:
        """Mean of values (N,) or (N, ...) over the rows of each class; NaN rows are left out."""
        return np.array([np.nanmean(values[self.labels == c], axis=0) for c in range(self.n_classes)])


# --- controls of equal energy


def stretch(delta: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """Factors (N,) that give each row of a change (N, d) the squared length ``energy`` (N,).

    A row that is zero cannot be stretched: NaN, unless its energy is to be zero. Of a deletion, a factor f leaves
    1 - f times the value: below 1 it only damps, above 1 it turns the sign, which no deletion does.
    """
    own = (delta**2).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(energy == 0, 0.0, np.where(own > 0, np.sqrt(energy / own), np.nan))


def partial(bench: Bench, slots: np.ndarray, order: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """Delete the chosen slots (N, k) in an order until ``energy`` (N,) is gone; the last latent only in part.

    A deletion throughout: no value is stretched, none changes its sign. A row whose slots hold less is deleted whole.
    Slots with the lowest keys ``order`` (N, k) go first. Returns the change of x, (N, d).
    """
    values = np.where(slots, bench.codes.values, 0.0).astype(np.float64) * bench.row_scale
    sequence = np.where(values != 0, order, np.inf).argsort(1, kind="stable")
    gone, open_, rows = np.zeros_like(bench.x), np.ones(len(values), bool), np.arange(len(values))
    for slot in sequence.T:
        step = -values[rows, slot][:, None] * bench.decoder[bench.codes.indices[rows, slot]]
        step[~open_] = 0.0
        # |gone + t step|^2 = energy: the first t in 0..1, else the whole step.
        a, b, short = (step**2).sum(1), (gone * step).sum(1), energy - (gone**2).sum(1)
        over = open_ & (((gone + step) ** 2).sum(1) >= energy)
        with np.errstate(divide="ignore", invalid="ignore"):
            part = (np.sqrt(np.maximum(b * b + a * short, 0.0)) - b) / a
        gone += np.where(over, np.clip(np.nan_to_num(part), 0.0, 1.0), 1.0)[:, None] * step
        open_ &= ~over
    return gone


def random_active(codes: SparseCodes, count: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Slots (N, k) bool: ``count`` (N,) latents of each row, drawn from those that fire in it."""
    values = codes.numpy().values
    order = np.where(values != 0, rng.random(values.shape), 2.0).argsort(1).argsort(1)
    return (order < count[:, None]) & (values != 0)


def other_class(n_classes: int, rng: np.random.Generator) -> np.ndarray:
    """For each class (C,) another one, each class once."""
    if n_classes < 2:
        raise ValueError("another class needs two classes")
    ring, other = rng.permutation(n_classes), np.empty(n_classes, np.int64)
    other[ring] = np.roll(ring, 1)
    return other


def head_direction(bench: Bench, of_class: int) -> np.ndarray:
    """Unit vector (d,) along which a class's logit rises fastest against the mean of all logits."""
    direction = bench.weight[of_class] - bench.weight.mean(0)
    return direction / np.linalg.norm(direction)


def deletions(bench: Bench, centre: np.ndarray) -> Iterator[tuple[int, dict[str, tuple]]]:
    """For each class, what deleting its core and what the controls do to *every* row.

    Yields (class, {intervention: (delta (N, d), latents touched (N,), those of them in the core (N,), factor (N,))}).
    Controls, each stretched by a factor to the squared length of what deleting the core takes from the same row:
    equally many random active latents (the core's own among them, by chance); the active latents outside the core; the
    core of another class and the top latents along a random direction, both sets as large as the core; the head's own
    direction. Without any stretching: ``outside_plain`` deletes the active latents outside the core, ``part_first``
    and ``part_random`` as much of the core (:func:`partial`), by profile or in random order.
    ``head_projection`` takes out the part of x - centre along that direction, at its own energy; ``core_no_error``
    deletes the core and the SAE's error. ``centre`` (d,): mean of the training features.
    """
    rng = np.random.default_rng(0)
    other, fires = other_class(bench.n_classes, rng), bench.codes.values != 0
    size, orders_rng = bench.caps.core_size(bench.core_fraction), np.random.default_rng([0, 1])

    def taken(slots):
        counts = (slots & fires).sum(1), (slots & fires & inside).sum(1)
        return bench.delta(np.where(slots, -bench.codes.values, 0.0)), *counts

    for c in range(bench.n_classes):
        inside = bench.core[c][bench.codes.indices]
        core, count, _ = taken(inside)
        along = np.zeros(bench.codes.n_latents, bool)
        along[np.argsort(-bench.decoder @ rng.normal(size=bench.decoder.shape[1]))[:size]] = True
        slots = {
            "random_active": random_active(bench.codes, count, rng),
            "outside": ~inside,
            "other_core": bench.core[other[c]][bench.codes.indices],
            "random_order": along[bench.codes.indices],
        }
        energy, none, plain = (core**2).sum(1), np.zeros(len(core), int), np.ones(len(core))
        whole = core + bench.x_hat - bench.x
        found = {"core": (core, count, count, plain), "core_no_error": (whole, count, count, plain)}
        for name, chosen in slots.items():
            delta, *counts = taken(chosen)
            factor = stretch(delta, energy)
            found[name] = delta * factor[:, None], *counts, factor
        outside, *counts = taken(~inside)
        found["outside_plain"] = outside, *counts, plain
        orders = {"first": -bench.caps.mean[c][bench.codes.indices], "random": orders_rng.random(fires.shape)}
        for name, order in orders.items():
            delta = partial(bench, inside, order, (outside**2).sum(1))
            found[f"part_{name}"] = delta, count, count, plain
        w = head_direction(bench, c)
        found["head_direction"] = -np.sqrt(energy)[:, None] * w, none, none, plain
        found["head_projection"] = -((bench.x - centre) @ w)[:, None] * w, none, none, plain
        yield c, found
