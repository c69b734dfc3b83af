"""Arrays and labels as they enter: any framework's, in plain numpy, C order, the machine's byte order."""

from __future__ import annotations

from numbers import Real

import numpy as np


def as_numpy(array, read_only: bool = False) -> np.ndarray:
    """A numpy array that every kernel and every writer takes: C order, native bytes, writeable.

    Parameters
    ----------
    array : numpy array, torch tensor (any device, bfloat16 too) or sequence
        What is plain already is returned as it is; negative strides, Fortran order, foreign byte order and read-only
        memory are copied. Masked values become NaN.
    read_only : bool
        Read-only memory is left where it is, for a caller that writes nothing: it may be a large file.
    """
    if hasattr(array, "detach"):
        array = array.detach().cpu().to_dense().resolve_conj().resolve_neg()
        if array.is_floating_point() and (array.element_size() == 1 or str(array.dtype) == "torch.bfloat16"):
            array = array.float()  # numpy knows neither bfloat16 nor float8
        array = array.numpy()
    if isinstance(array, np.ma.MaskedArray):
        array = array.astype(np.result_type(array.dtype, np.float32)).filled(np.nan)
    array = np.asarray(array, order="C")
    if array.dtype.kind == "V" and "float" in array.dtype.name:  # bfloat16 of ml_dtypes, as jax has it
        array = array.astype(np.float32)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return array if read_only or array.flags.writeable else array.copy()


def as_real(array, what: str, dtype=np.float64) -> np.ndarray:
    """Real numbers of any type as ``dtype``; ValueError, which names ``what``, for complex numbers, text, dates."""
    array = as_numpy(array)
    if array.dtype.kind not in "biufO":
        raise ValueError(f"{what} holds {array.dtype}, expected real numbers")
    try:
        return array.astype(dtype, copy=False)
    except (TypeError, ValueError) as error:  # objects that are no numbers
        raise ValueError(f"{what} holds something else than real numbers: {error}") from None


def as_labels(values, what: str = "labels") -> np.ndarray:
    """Labels (N,) as int64 of whole numbers of any numeric type; None and -1 mean "none".

    Raises ValueError, which names ``what``, for text, fractions, NaN and numbers under -1, with the first row of them.
    """
    listed = isinstance(values, list | tuple)
    given = np.fromiter(values, object, len(values)) if listed else as_numpy(values)
    if given.ndim != 1:
        raise ValueError(f"{what}: shape {given.shape}, expected (N,)")
    if given.dtype.kind in "iubf":
        with np.errstate(invalid="ignore"):
            numbers = given.astype(np.int64)
        wrong = (numbers < -1) | (given != numbers)
    else:
        numbers = np.array([_whole(value) for value in given], dtype=np.int64)
        wrong = numbers < -1
    if wrong.any():
        row = int(wrong.argmax())
        found = getattr(given[row], "item", lambda: given[row])()
        raise ValueError(f"{what} holds {found!r}, expected whole numbers from 0, or -1 for none (row {row})")
    return numbers


def _whole(value) -> int:
    """A whole number of any type, -1 for None, -2 for all else."""
    value = value.item() if isinstance(value, np.generic) or hasattr(value, "detach") and value.ndim == 0 else value
    whole = isinstance(value, Real) and -1 <= value < 2**63 and value == value // 1
    return -1 if value is None else int(value) if whole else -2
