"""Sixteen float32 at a time, for numba: what the kernels of a training step are written with.

numba leaves it to the compiler to find vectors in loops, and the compiler gives up on loops over many arrays, which
might overlap. Here a kernel says what it wants: `low`, `high` and `load` read sixteen numbers, `+`-like functions work
on them, `put` and `store` write them. LLVM turns that into whatever the machine has (AVX-512, AVX2, NEON), and each
element's operations are the same everywhere: no flag here or in a kernel lets it reorder or merge them.

Rows that are gathered are kept in one of two forms, and `low`, `high` and `put` read and write both:

- float32 (n, 2 h): a row as it is;
- int32 (n, h) "packed": item j holds elements j (lower 16 bits) and j + h (upper 16 bits), both bfloat16. Half the
  memory, and two instructions make floats of them. Seen as bfloat16 (n, 2 h), a row's columns are shuffled, always in
  the same way: a product of two such matrices is what it was.

h is a multiple of 16; columns beyond the data are 0.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

WIDTH = 16
KEYS = 32  # 16-bit keys that `reached` looks at together

_i1, _i16, _i32, _f32 = ir.IntType(1), ir.IntType(16), ir.IntType(32), ir.FloatType()
_floats, _integers = ir.VectorType(_f32, WIDTH), ir.VectorType(_i32, WIDTH)


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__("float32x16")


_vector = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type) -> None:
        super().__init__(manager, fe_type, _floats)


def padded(d: int) -> int:
    """Columns of a gathered row for d of data: a multiple of 32."""
    return -(-d // (2 * WIDTH)) * 2 * WIDTH


def _splat(builder, value, width: int = WIDTH):
    vector = ir.VectorType(value.type, width)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(_i32, 0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(_i32, width), [0] * width))


def _address(context, builder, kind, array, start, vector):
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [start]), vector.as_pointer())


def _read(context, builder, kind, array, start, vector, align: int = 4):
    value = builder.load(_address(context, builder, kind, array, start, vector))
    value.align = align
    return value


def _write(context, builder, kind, array, start, value) -> None:
    done = builder.store(value, _address(context, builder, kind, array, start, value.type))
    done.align = 4


def _constant(value: int):
    return ir.Constant(_integers, [value] * WIDTH)


@intrinsic
def load(typing, row, start):
    """row[start : start + 16] of a float32 array (1-d, contiguous)."""

    def code(context, builder, signature, args):
        return _read(context, builder, row, args[0], args[1], _floats)

    return _vector(row, types.intp), code


@intrinsic
def store(typing, row, start, vector):
    """row[start : start + 16] = vector, in a float32 array."""

    def code(context, builder, signature, args):
        _write(context, builder, row, *args)
        return context.get_dummy_value()

    return types.void(row, types.intp, _vector), code


@intrinsic
def store_upper(typing, row, start, vector):
    """row[start : start + 16] = the upper 16 bits of the vector, in an int16 array."""

    def code(context, builder, signature, args):
        bits = builder.lshr(builder.bitcast(args[2], _integers), _constant(16))
        done = builder.trunc(bits, ir.VectorType(_i16, WIDTH))
        kept = builder.store(done, _address(context, builder, row, args[0], args[1], done.type))
        kept.align = 2
        return context.get_dummy_value()

    return types.void(row, types.intp, _vector), code


@intrinsic
def low(typing, row, start, h):
    """Elements start ... start + 15 of a gathered row, for start < h."""

    def code(context, builder, signature, args):
        if row.dtype == types.float32:
            return _read(context, builder, row, args[0], args[1], _floats)
        packed = _read(context, builder, row, args[0], args[1], _integers)
        return builder.bitcast(builder.shl(packed, _constant(16)), _floats)

    return _vector(row, types.intp, types.intp), code


@intrinsic
def high(typing, row, start, h):
    """Elements h + start ... h + start + 15 of a gathered row, for start < h."""

    def code(context, builder, signature, args):
        if row.dtype == types.float32:
            return _read(context, builder, row, args[0], builder.add(args[1], args[2]), _floats)
        packed = _read(context, builder, row, args[0], args[1], _integers)
        return builder.bitcast(builder.and_(packed, _constant(0xFFFF0000)), _floats)

    return _vector(row, types.intp, types.intp), code


def _rounded(builder, vector):
    """To bfloat16, nearest and ties to even, in the upper 16 bits."""
    bits = builder.bitcast(vector, _integers)
    even = builder.and_(builder.lshr(bits, _constant(16)), _constant(1))
    return builder.add(bits, builder.add(even, _constant(0x7FFF)))


@intrinsic
def put(typing, row, start, h, lower, upper):
    """Write what `low` and `high` read; packed ones are rounded to the nearest."""

    def code(context, builder, signature, args):
        array, begin, half, lower, upper = args
        if row.dtype == types.float32:
            _write(context, builder, row, array, begin, lower)
            _write(context, builder, row, array, builder.add(begin, half), upper)
        else:
            lower = builder.lshr(_rounded(builder, lower), _constant(16))
            upper = builder.and_(_rounded(builder, upper), _constant(0xFFFF0000))
            _write(context, builder, row, array, begin, builder.or_(lower, upper))
        return context.get_dummy_value()

    return types.void(row, types.intp, types.intp, _vector, _vector), code


@intrinsic
def prefetch(typing, row, start):
    """Ask for the cache line of row[start], which will be read soon. `start` may lie behind the end."""

    def code(context, builder, signature, args):
        data = context.make_array(row)(context, builder, args[0]).data
        pointer = builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _i32, _i32, _i32])
        call = builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], kind)
        builder.call(call, [pointer, *(ir.Constant(_i32, n) for n in (0, 3, 1))])  # read, keep, data
        return context.get_dummy_value()

    return types.void(row, types.intp), code


@intrinsic
def splat(typing, value):
    """The float32 in all elements."""

    def code(context, builder, signature, args):
        return _splat(builder, args[0])

    return _vector(types.float32), code


@intrinsic
def add_product(typing, a, b, c):
    """a + b c, rounded once: the same instruction on every CPU that has it, so the same bits."""

    def code(context, builder, signature, args):
        kind = ir.FunctionType(_floats, [_floats] * 3)
        fma = cgutils.get_or_insert_function(builder.module, kind, "llvm.fma.v16f32")
        return builder.call(fma, [args[1], args[2], args[0]])

    return _vector(_vector, _vector, _vector), code


@intrinsic
def where_larger(typing, a, b, c, d):
    """c where a > b, else d"""

    def code(context, builder, signature, args):
        return builder.select(builder.fcmp_ordered(">", args[0], args[1]), args[2], args[3])

    return _vector(_vector, _vector, _vector, _vector), code


@intrinsic
def total(typing, vector):
    """The sum of the vector, by halves: one order."""

    def code(context, builder, signature, args):
        value, width = args[0], WIDTH
        while width > 1:
            width //= 2
            pick = [ir.Constant(ir.VectorType(_i32, width), list(range(s, s + width))) for s in (0, width)]
            lower, upper = (builder.shuffle_vector(value, value, p) for p in pick)
            value = builder.fadd(lower, upper)
        return builder.extract_element(value, ir.Constant(_i32, 0))

    return types.float32(_vector), code


@intrinsic
def reached(typing, keys, start, least):
    """Which of keys[start : start + 32] (int16) are at least `least`, as the bits of a uint32."""

    def code(context, builder, signature, args):
        vector = ir.VectorType(_i16, KEYS)
        some = _read(context, builder, keys, args[0], args[1], vector, align=2)
        return builder.bitcast(builder.icmp_signed(">=", some, _splat(builder, args[2], KEYS)), _i32)

    return types.uint32(keys, types.intp, types.int16), code


@intrinsic
def lowest_bit(typing, mask):
    """The place of the lowest set bit of a uint32 that is not 0."""

    def code(context, builder, signature, args):
        return builder.zext(builder.cttz(args[0], ir.Constant(_i1, 1)), ir.IntType(64))

    return types.int64(types.uint32), code


def widened(rows: np.ndarray, d: int) -> np.ndarray:
    """Gathered rows as plain float32 (n, d)."""
    if rows.dtype == np.float32:
        return rows[:, :d]
    both = np.concatenate([rows << 16, rows & np.int32(-65536)], axis=1)
    return both.view(np.float32)[:, :d]
