"""Memory for the vectors of cpu_simd.py: by address (int64), sixteen elements at a time, in any dtype of a tensor.

The conversions are written in integers: LLVM's own call a library on machines that lack the instruction.
"""

# mypy: disallow-untyped-defs=False

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import extending, njit, types
from numba.core import cgutils

from mambagen.kernels.cpu_simd import F32, FLOATS, I32, INTS, LANES, f32x16, floats, intrinsic, ints, splat, spread
from mambagen.kernels.cpu_simd import vector as as_vector

BYTES = 4 * LANES  # of one vector
FLOAT32, BFLOAT16, FLOAT16 = range(3)  # kinds of elements in memory; arithmetic is always float32

I8, I16, I64 = (ir.IntType(bits) for bits in (8, 16, 64))
WORDS, BOOLS = ir.VectorType(I16, LANES), ir.VectorType(ir.IntType(1), LANES)
DOUBLES = ir.VectorType(ir.DoubleType(), LANES)


def pointer(builder: ir.IRBuilder, address: ir.Value, element: ir.Type) -> ir.Value:
    return builder.inttoptr(address, element.as_pointer())


# ---- memory: sixteen elements in a row at an address, of which only the first `count` exist


@njit(forceinline=True)
def load_row(address, kind, count):
    """Sixteen elements of the kind as float32; those from `count` on are zero and are not touched."""
    if count <= 0:  # a masked load of nothing from nowhere is right, but takes the processor hundreds of cycles
        return splat(0.0)
    if kind == FLOAT32:
        if count >= LANES:
            return load(address)
        return _load_first(address, count)
    if count >= LANES:
        words = _load_words(address)
    else:
        words = _load_first_words(address, count)
    if kind == BFLOAT16:
        return _bfloat16_to_float(words)
    return _float16_to_float(words)


@njit(forceinline=True)
def store_row(address, kind, count, value):
    """Rounds to the kind (to nearest, ties to even) and writes the first `count`."""
    if count <= 0:
        return
    if kind == FLOAT32:
        if count >= LANES:
            store(address, value)
        else:
            _store_first(address, count, value)
    else:
        if kind == BFLOAT16:
            words = _float_to_bfloat16(value)
        else:
            words = _float_to_float16(value)
        if count >= LANES:
            _store_words(address, words)
        else:
            _store_first_words(address, count, words)


@intrinsic
def load(typing: Any, address: Any) -> Any:
    """Sixteen float32 at an address of any alignment."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.load(pointer(builder, args[0], FLOATS), align=4)

    return f32x16(types.int64), generate


@intrinsic
def store(typing: Any, address: Any, value: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        builder.store(as_vector(context, builder, args[1], sig.args[1]), pointer(builder, args[0], FLOATS), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, value), generate


@intrinsic
def broadcast(typing: Any, address: Any) -> Any:
    """One float32 in memory on every lane."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return spread(builder, builder.load(pointer(builder, args[0], F32), align=4))

    return f32x16(types.int64), generate


@intrinsic
def load_int(typing: Any, address: Any) -> Any:
    """One int64."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.load(pointer(builder, args[0], I64), align=8)

    return types.int64(types.int64), generate


@intrinsic
def store_int(typing: Any, address: Any, value: Any) -> Any:
    """One int64."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        builder.store(args[1], pointer(builder, args[0], I64), align=8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def load_flag(typing: Any, address: Any) -> Any:
    """One byte, as a bool."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        byte = builder.load(pointer(builder, args[0], I8), align=1)
        return builder.icmp_unsigned("!=", byte, I8(0))

    return types.boolean(types.int64), generate


@intrinsic
def store_float(typing: Any, address: Any, value: Any) -> Any:
    """One float32."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        number = context.cast(builder, args[1], sig.args[1], types.float32)
        builder.store(number, pointer(builder, args[0], F32), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, value), generate


@intrinsic
def claim(typing: Any, address: Any) -> Any:
    """The int64 at the address, which grows by one; no two threads are given the same."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.atomic_rmw("add", pointer(builder, args[0], I64), I64(1), "monotonic")

    return types.int64(types.int64), generate


@intrinsic
def add_to_doubles(typing: Any, address: Any, value: Any) -> Any:
    """Adds the lanes to sixteen float64 in memory: long sums are kept there."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        where = pointer(builder, args[0], DOUBLES)
        total = builder.fadd(builder.load(where, align=8), builder.fpext(args[1], DOUBLES))
        builder.store(total, where, align=8)
        return context.get_dummy_value()

    return types.void(types.int64, f32x16), generate


@intrinsic
def prefetch(typing: Any, address: Any) -> Any:
    """Asks for the cache line at an address, which need not exist."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        byte = I8.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [builder.inttoptr(args[0], byte), I32(0), I32(2), I32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def sum_each_of_16(typing: Any, address: Any) -> Any:
    """Sixteen vectors at the address become one: lane i holds the sum over the lanes of vector i, in a fixed order."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        vectors = [_load_nth(builder, args[0], I64(BYTES), i) for i in range(LANES)]
        for step in (8, 4, 2, 1):
            vectors = [builder.fadd(*_exchange(builder, vectors[i], vectors[i + step], step)) for i in range(step)]
        return vectors[0]

    return f32x16(types.int64), generate


@intrinsic
def transpose_16(typing: Any, source: Any, source_row: Any, target: Any, target_row: Any) -> Any:
    """Sixteen rows of sixteen float32 at `source` (rows that many bytes apart) into columns at `target`."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        v = [_load_nth(builder, args[0], args[1], i) for i in range(LANES)]
        for step in (8, 4, 2, 1):
            for i in range(LANES):
                if not i & step:
                    v[i], v[i + step] = _exchange(builder, v[i], v[i + step], step)
        for i in range(LANES):
            address = builder.add(args[2], builder.mul(args[3], I64(i)))
            builder.store(v[i], pointer(builder, address, FLOATS), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate


def _load_nth(builder: ir.IRBuilder, address: ir.Value, row: ir.Value, n: int) -> ir.Value:
    return builder.load(pointer(builder, builder.add(address, builder.mul(row, I64(n))), FLOATS), align=4)


def _exchange(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, step: int) -> tuple[ir.Value, ir.Value]:
    """The 2 x 2 blocks of `step` lanes of (a, b), transposed."""
    upper = [bool(lane & step) for lane in range(LANES)]
    first = [LANES + lane - step if up else lane for lane, up in enumerate(upper)]
    second = [LANES + lane if up else lane + step for lane, up in enumerate(upper)]
    return tuple(builder.shuffle_vector(a, b, ir.Constant(INTS, lanes)) for lanes in (first, second))


def _mask(builder: ir.IRBuilder, count: ir.Value) -> ir.Value:
    """Which lanes are below an int64 count."""
    lanes = ir.Constant(ir.VectorType(I64, LANES), list(range(LANES)))
    undefined = ir.Constant(lanes.type, ir.Undefined)
    limit = builder.shuffle_vector(builder.insert_element(undefined, count, I32(0)), undefined, ints(0))
    return builder.icmp_signed("<", lanes, limit)


def _masked_load(element: ir.Type, name: str) -> Callable[..., Any]:
    row = ir.VectorType(element, LANES)

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        kind = ir.FunctionType(row, [row.as_pointer(), I32, BOOLS, row])
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.load.{name}.p0")
        mask = _mask(builder, args[1])
        zeros = ir.Constant(row, [0] * LANES)
        return builder.call(function, [pointer(builder, args[0], row), I32(2), mask, zeros])

    result = f32x16 if element is F32 else _words
    return intrinsic(lambda typing, address, count: (result(types.int64, types.int64), generate))


def _masked_store(element: ir.Type, name: str) -> Callable[..., Any]:
    row = ir.VectorType(element, LANES)

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        kind = ir.FunctionType(ir.VoidType(), [row, row.as_pointer(), I32, BOOLS])
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.store.{name}.p0")
        builder.call(function, [args[2], pointer(builder, args[0], row), I32(2), _mask(builder, args[1])])
        return context.get_dummy_value()

    value = f32x16 if element is F32 else _words
    return intrinsic(lambda typing, address, count, v: (types.void(types.int64, types.int64, value), generate))


# ---- sixteen 16-bit words, and the two formats they may hold


class _Words(types.Type):
    def __init__(self) -> None:
        super().__init__(name="i16x16")


_words = _Words()


@extending.register_model(_Words)
class _WordsModel(extending.models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: types.Type) -> None:
        super().__init__(manager, numba_type, WORDS)


@intrinsic
def _load_words(typing: Any, address: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.load(pointer(builder, args[0], WORDS), align=2)

    return _words(types.int64), generate


@intrinsic
def _store_words(typing: Any, address: Any, value: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        builder.store(args[1], pointer(builder, args[0], WORDS), align=2)
        return context.get_dummy_value()

    return types.void(types.int64, _words), generate


_load_first, _load_first_words = _masked_load(F32, "v16f32"), _masked_load(I16, "v16i16")
_store_first, _store_first_words = _masked_store(F32, "v16f32"), _masked_store(I16, "v16i16")


@intrinsic
def _bfloat16_to_float(typing: Any, value: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.bitcast(builder.shl(builder.zext(args[0], INTS), ints(16)), FLOATS)

    return f32x16(_words), generate


@intrinsic
def _float_to_bfloat16(typing: Any, value: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        bits = builder.bitcast(args[0], INTS)
        odd = builder.and_(builder.lshr(bits, ints(16)), ints(1))
        rounded = builder.lshr(builder.add(builder.add(bits, ints(0x7FFF)), odd), ints(16))
        is_nan = builder.fcmp_unordered("uno", args[0], args[0])
        return builder.trunc(builder.select(is_nan, ints(0x7FC0), rounded), WORDS)

    return _words(f32x16), generate


@intrinsic
def _float16_to_float(typing: Any, value: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        bits = builder.zext(args[0], INTS)
        shifted = builder.shl(builder.and_(bits, ints(0x7FFF)), ints(13))
        scaled = builder.fmul(builder.bitcast(shifted, FLOATS), floats(2.0**112))  # rebias; right for denormals too
        special = builder.icmp_unsigned(">=", shifted, ints(0x0F800000))
        found = builder.bitcast(scaled, INTS)
        found = builder.select(special, builder.or_(found, ints(0x7F800000)), found)
        sign = builder.shl(builder.and_(bits, ints(0x8000)), ints(16))
        return builder.bitcast(builder.or_(found, sign), FLOATS)

    return f32x16(_words), generate


@intrinsic
def _float_to_float16(typing: Any, value: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        signed = builder.bitcast(args[0], INTS)
        bits = builder.and_(signed, ints(0x7FFFFFFF))
        odd = builder.and_(builder.lshr(bits, ints(13)), ints(1))
        bias = ints((15 - 127 << 23) + 0xFFF)
        normal = builder.lshr(builder.add(builder.add(bits, bias), odd), ints(13))
        # adding 1/2 leaves a small number's multiple of 2^-24 in the low bits, rounded as float32 rounds
        added = builder.bitcast(builder.fadd(builder.bitcast(bits, FLOATS), floats(0.5)), INTS)
        small = builder.sub(added, ints(0x3F000000))
        is_nan = builder.icmp_unsigned(">", bits, ints(0x7F800000))
        large = builder.select(is_nan, ints(0x7E00), ints(0x7C00))
        found = builder.select(builder.icmp_unsigned("<", bits, ints(0x38800000)), small, normal)
        found = builder.select(builder.icmp_unsigned(">=", bits, ints(0x47800000)), large, found)
        sign = builder.lshr(builder.and_(signed, ints(-0x80000000)), ints(16))
        return builder.trunc(builder.or_(found, sign), WORDS)

    return _words(f32x16), generate
