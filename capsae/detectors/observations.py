"""What detectors see of N samples, with the parts that many scores share computed once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from ..caps import check_labels
from ..data.asarray import as_numpy

CELLS = 2**19  # rows x classes (or x dimensions) held at a time


class Observations:
    """What a detector may ask of N samples; costly parts are computed once, when first asked for.

    Parameters
    ----------
    cls : (N, d) array
        Features, the input of the classification head. NaN and infinity are refused. float64 stays so, all else is
        computed with as float32.
    logits : (N, C) array, optional
        Default: ``head`` applied to ``cls``.
    labels : (N,) int array, optional
        True classes; needed by ``fit`` of most detectors, never by ``score``.
    head : object with ``weight`` (C, d) and ``bias`` (C,), optional
        Linear classification head.
    sae : TopKSAE, optional
        Makes ``codes`` from ``cls``.
    codes : SparseCodes, optional
    predicted : (N,) int array, optional
        Default: argmax of the logits.
    pixels : (N, P) array, optional
        Statistics of the images themselves (:data:`capsae.data.images.PIXEL_STATISTICS`), for the controls that read
        them.

    Raises
    ------
    ValueError
        Where numbers of rows differ, or an array holds a value that is not finite (the row is named).
    """

    def __init__(self, cls, logits=None, labels=None, head=None, sae=None, codes=None, predicted=None, pixels=None):
        self.cls = _finite("cls", as_numpy(cls), 2)
        self.head, self.sae = head, sae
        self.labels = None if labels is None else as_numpy(labels)
        if head is not None and as_numpy(head.weight).shape[1] != self.cls.shape[1]:
            raise ValueError(
                f"head.weight has {as_numpy(head.weight).shape[1]} columns, cls {self.cls.shape[1]}: "
                "give the head that reads these features"
            )
        rows = {"logits": logits, "codes": codes, "predicted": predicted, "labels": labels, "pixels": pixels}
        for name, given in rows.items():
            if given is not None and len(given) != len(self.cls):
                raise ValueError(f"{name} has {len(given)} rows, cls {len(self.cls)}")
        if logits is not None:
            self.logits = _finite("logits", as_numpy(logits), 2)
        if codes is not None:
            self.codes = codes.numpy()
        if predicted is not None:
            self.predicted = as_numpy(predicted).astype(np.int64)
        self.pixels = None if pixels is None else _finite("pixels", as_numpy(pixels), 2)

    def __len__(self) -> int:
        return len(self.cls)

    @cached_property
    def logits(self) -> np.ndarray:
        """(N, C)"""
        if self.head is None:
            raise ValueError("these observations have neither logits nor a head: give one to Observations(...)")
        return self.head_logits(self.cls)

    @cached_property
    def predicted(self) -> np.ndarray:
        """(N,) int64"""
        return self.logits.argmax(axis=1)

    @cached_property
    def codes(self):
        """SparseCodes of N rows, in numpy arrays."""
        if self.sae is None:
            raise ValueError("these observations have neither codes nor a sae: give one to Observations(...)")
        return self.sae.encode(self.cls).numpy()

    @cached_property
    def exponentials(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Largest logit m (N,) float64, exp(l - m) (N, C) in the logits' precision, its sums (N,) float64.

        Sums are float64, so that a probability of 1 - 1e-12 is distinct from 1 even where logits are float32.
        """
        largest = self.logits.max(axis=1, keepdims=True)
        exp = self.logits - largest
        np.exp(exp, out=exp)
        return largest[:, 0].astype(np.float64), exp, exp.sum(axis=1, dtype=np.float64)

    @cached_property
    def softmax(self) -> np.ndarray:
        """Probabilities (N, C), in the logits' precision."""
        _, exp, total = self.exponentials
        return exp / total[:, None].astype(exp.dtype)

    @cached_property
    def free_energy(self) -> np.ndarray:
        """-logsumexp of the logits, (N,) float64."""
        largest, _, total = self.exponentials
        return -(largest + np.log(total))

    @cached_property
    def cls64(self) -> np.ndarray:
        """Features (N, d) float64."""
        return self.cls.astype(np.float64)

    @cached_property
    def norms(self) -> np.ndarray:
        """Euclidean norms (N,) of the features, float64."""
        return np.sqrt(np.einsum("nd,nd->n", self.cls64, self.cls64))

    @cached_property
    def unit(self) -> np.ndarray:
        """Features (N, d) divided by their norms, float64; a zero row stays zero."""
        return unit_rows(self.cls64)

    def require_labels(self, n_classes: int) -> np.ndarray:
        """Labels (N,) int64 in 0..n_classes-1, or a ValueError that says what is wrong."""
        if self.labels is None:
            raise ValueError("fit needs the true classes: give labels to Observations(...)")
        return check_labels(self.labels, len(self), n_classes)

    def require_head(self, dtype: Any = np.float64) -> tuple[np.ndarray, np.ndarray]:
        """``(weight (C, d), bias (C,))``, or a ValueError."""
        if self.head is None:
            raise ValueError("this detector needs the classification head: give head to Observations(...)")
        return as_numpy(self.head.weight).astype(dtype), as_numpy(self.head.bias).astype(dtype)

    def head_logits(self, z: np.ndarray) -> np.ndarray:
        """The head applied to (edited) features z (N, d), in the precision of z."""
        weight, bias = self.require_head(z.dtype)
        return z @ weight.T + bias

    def take(self, rows) -> Observations:
        """The rows given by indices, a slice or a mask; what was computed already is not computed again."""
        part = object.__new__(Observations)  # the rows were checked when the whole was made
        for name, value in self.__dict__.items():
            if name in ("head", "sae") or value is None:
                part.__dict__[name] = value
            elif isinstance(value, tuple):
                part.__dict__[name] = tuple(array[rows] for array in value)
            else:
                part.__dict__[name] = value[rows]
        return part

    def blocks(self) -> Iterator[Observations]:
        """Consecutive parts small enough for temporaries of rows x classes; a small whole is its only part.

        A detector that goes through them needs memory for one part at a time. Detectors that are given the same part
        share what it has computed: :func:`capsae.detectors.score_all` is one pass over the features for all scores.
        """
        n_classes = self.logits.shape[1] if "logits" in self.__dict__ else len(self.head.weight) if self.head else 0
        rows = max(1, CELLS // max(self.cls.shape[1], n_classes, 1))
        if len(self) <= rows:
            yield self
        else:
            yield from (self.take(slice(start, start + rows)) for start in range(0, len(self), rows))


def unit_rows(x: np.ndarray) -> np.ndarray:
    """Rows of x (N, d) divided by their Euclidean norm, float64; a zero row stays zero."""
    x = x.astype(np.float64, copy=False)
    norm = np.sqrt(np.einsum("nd,nd->n", x, x))
    return x / np.where(norm > 0, norm, 1)[:, None]


def _finite(name: str, array: np.ndarray, ndim: int) -> np.ndarray:
    if array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, found shape {array.shape}")
    if array.dtype != np.float64:
        array = array.astype(np.float32, copy=False)
    bad = ~np.isfinite(array).all(axis=tuple(range(1, ndim)))
    if bad.any():
        raise ValueError(f"{name} holds NaN or infinity in {bad.sum()} rows, the first is row {int(bad.argmax())}")
    return array
