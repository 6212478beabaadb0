"""Vectors of sixteen float32 inside numba functions: what the CPU kernels are written in.

numba's loop vectoriser does not survive gathered strides, many arrays and an exponential, so the kernels say what they
mean: a value of type `f32x16` is one LLVM vector, which becomes one AVX-512 register, two AVX ones or four NEON or SSE
ones. Arithmetic is by operators (a number on either side is spread over the lanes), memory is by address (int64),
`fma`, `maximum`, `select_positive` and the rest are below. Nothing here calls a mathematics library.
"""

# mypy: disallow-untyped-defs=False
# (numba's own types go on the functions that it compiles, and Python's would say nothing true of them)

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import extending, njit, types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature

intrinsic: Any = extending.intrinsic  # its declared type does not know what it returns

LANES = 16
BYTES = 4 * LANES  # of one vector
FLOAT32, BFLOAT16, FLOAT16 = range(3)  # kinds of elements in memory; arithmetic is always float32

_I1, _I32, _I64, _F32 = ir.IntType(1), ir.IntType(32), ir.IntType(64), ir.FloatType()
_VF, _VI, _VH = (ir.VectorType(element, LANES) for element in (_F32, _I32, ir.IntType(16)))
_VD, _VB = ir.VectorType(ir.DoubleType(), LANES), ir.VectorType(_I1, LANES)


class F32x16(types.Type):
    def __init__(self) -> None:
        super().__init__(name="f32x16")


f32x16 = F32x16()


@extending.register_model(F32x16)
class _F32x16Model(extending.models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: types.Type) -> None:
        super().__init__(manager, numba_type, _VF)


# ---- making vectors of what the operands are


def _floats(value: float) -> ir.Constant:
    return ir.Constant(_VF, [value] * LANES)


def _ints(value: int) -> ir.Constant:
    return ir.Constant(_VI, [value] * LANES)


def _spread(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    undefined = ir.Constant(_VF, ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(undefined, value, _I32(0)), undefined, _ints(0))


def _vector(context: Any, builder: ir.IRBuilder, value: ir.Value, numba_type: types.Type) -> ir.Value:
    """The operand as a vector: numbers are rounded to float32 and spread."""
    if isinstance(numba_type, F32x16):
        return value
    return _spread(builder, context.cast(builder, value, numba_type, types.float32))


def _pointer(builder: ir.IRBuilder, address: ir.Value, element: ir.Type) -> ir.Value:
    return builder.inttoptr(address, element.as_pointer())


def _is_operand(numba_type: types.Type) -> bool:
    return isinstance(numba_type, F32x16 | types.Float | types.Integer)


def _vector_function(emit: Callable[..., ir.Value]) -> Callable[..., Any]:
    """An intrinsic of up to three vectors, any of which may be given as a number."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return emit(builder, *(_vector(context, builder, v, t) for v, t in zip(args, sig.args, strict=True)))

    count = emit.__code__.co_argcount - 1
    if count == 1:
        return intrinsic(lambda typing, a: (f32x16(a), generate) if _is_operand(a) else None)
    if count == 2:
        return intrinsic(lambda typing, a, b: (f32x16(a, b), generate))
    return intrinsic(lambda typing, a, b, c: (f32x16(a, b, c), generate))


def _define_operator(function: Callable[..., Any], emit: str) -> None:
    @infer_global(function)
    class _Template(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            if len(args) == 2 and any(isinstance(v, F32x16) for v in args) and all(map(_is_operand, args)):
                return signature(f32x16, *args)
            return None

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        a, b = (_vector(context, builder, v, t) for v, t in zip(args, sig.args, strict=True))
        return getattr(builder, emit)(a, b)

    for left, right in ((F32x16, F32x16), (F32x16, types.Number), (types.Number, F32x16)):
        extending.lower_builtin(function, left, right)(lower)


for _name, _emit in (("add", "fadd"), ("sub", "fsub"), ("mul", "fmul"), ("truediv", "fdiv")):
    _define_operator(getattr(operator, _name), _emit)
    _define_operator(getattr(operator, "i" + _name), _emit)


# ---- arithmetic


def _emit_fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    # fmuladd, not fma: where a machine has no fused instruction it multiplies and adds instead of calling a library
    kind = ir.FunctionType(_VF, [_VF, _VF, _VF])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.fmuladd.v16f32"), [a, b, c])


def _emit_maximum(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered("<", a, b), b, a)


def _emit_minimum(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered(">", a, b), b, a)


def _emit_magnitude(builder: ir.IRBuilder, a: ir.Value) -> ir.Value:
    return builder.bitcast(builder.and_(builder.bitcast(a, _VI), _ints(0x7FFFFFFF)), _VF)


def _emit_select_positive(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered(">=", a, _floats(0.0)), b, c)


def _emit_zero_below(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered("<", a, b), _floats(0.0), c)


def _emit_add_exponent(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    power = builder.shl(builder.bitcast(b, _VI), _ints(23))
    return builder.bitcast(builder.add(builder.bitcast(a, _VI), power), _VF)


fma = _vector_function(_emit_fma)  # a * b + c
maximum = _vector_function(_emit_maximum)  # a NaN in a stays
minimum = _vector_function(_emit_minimum)
magnitude = _vector_function(_emit_magnitude)
select_positive = _vector_function(_emit_select_positive)  # b where a >= 0, else c
_zero_below = _vector_function(_emit_zero_below)  # 0 where a < b, else c
_add_exponent = _vector_function(_emit_add_exponent)  # a * 2^n, n in the low bits of b


@intrinsic
def splat(typing: Any, value: Any) -> Any:
    """A number on every lane."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return _vector(context, builder, args[0], sig.args[0])

    return f32x16(value), generate


@njit(forceinline=True)
def exp2(x):
    """2^x to a unit in the last place; 0 below -127 and inf above 128; NaN stays."""
    x = minimum(maximum(x, -127.0), 128.0)
    shifted = x + _ROUND
    return _add_exponent(_exp2_of_fraction(x - (shifted - _ROUND)), shifted)


@njit(forceinline=True)
def exp_of_negative(x):
    """e^x for x <= 0 to a unit or two in the last place, where 2^(x log2(e)) would round the exponent."""
    inside = maximum(x, -88.0)
    shifted = fma(inside, _LOG2E, _ROUND)
    n = shifted - _ROUND
    r = fma(n, -_LN2_LOW, fma(n, -_LN2_HIGH, inside))
    return _zero_below(x, -87.3, _add_exponent(_exp2_of_fraction(r * _LOG2E), shifted))


@njit(forceinline=True)
def _exp2_of_fraction(r):
    # on [-1/2, 1/2], with p(0) = 1 exactly so that a decay of 1 stays 1; relative error 3e-9 before rounding
    p = fma(r, 0.00015326463, 0.0013390806)
    p = fma(p, r, 0.009618506)
    p = fma(p, r, 0.0555036)
    p = fma(p, r, 0.24022648)
    p = fma(p, r, 0.6931472)
    return fma(p, r, 1.0)


@njit(forceinline=True)
def sigmoid(x):
    e = exp_of_negative(0.0 - magnitude(x))
    return select_positive(x, 1.0, e) / (1.0 + e)


@njit(forceinline=True)
def softplus_and_slope(x):
    """log(1 + e^x) and its derivative, both to full relative precision however negative x is."""
    e = exp_of_negative(0.0 - magnitude(x))
    s = e / (2.0 + e)  # log(1 + e) = 2 atanh(s), s <= 1/3
    q = s * s
    p = fma(q, 0.14003377, 0.14001514)
    p = fma(p, q, 0.20010719)
    p = fma(p, q, 0.3333321)
    log = 2.0 * fma(s * q, p, s)
    slope = select_positive(x, 1.0, e) / (1.0 + e)
    return maximum(x, 0.0) + log, slope


_ROUND = 12582912.0  # 1.5 * 2^23: once added, the nearest integer stands in the low bits
_LOG2E = 1.4426950408889634
_LN2_HIGH = 0.693145751953125  # ln 2 in two parts, the first short enough that its multiples are exact
_LN2_LOW = 1.4286068203094172e-06


# ---- memory: sixteen elements in a row at an address, of which only the first `count` exist


@njit(forceinline=True)
def load_row(address, kind, count):
    """Sixteen elements of the kind as float32; those from `count` on are zero and are not touched."""
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
        return builder.load(_pointer(builder, args[0], _VF), align=4)

    return f32x16(types.int64), generate


@intrinsic
def store(typing: Any, address: Any, value: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        builder.store(_vector(context, builder, args[1], sig.args[1]), _pointer(builder, args[0], _VF), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, value), generate


@intrinsic
def broadcast(typing: Any, address: Any) -> Any:
    """One float32 in memory on every lane."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return _spread(builder, builder.load(_pointer(builder, args[0], _F32), align=4))

    return f32x16(types.int64), generate


@intrinsic
def load_int(typing: Any, address: Any) -> Any:
    """One int64."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.load(_pointer(builder, args[0], _I64), align=8)

    return types.int64(types.int64), generate


@intrinsic
def load_flag(typing: Any, address: Any) -> Any:
    """One byte, as a bool."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        byte = builder.load(_pointer(builder, args[0], ir.IntType(8)), align=1)
        return builder.icmp_unsigned("!=", byte, ir.IntType(8)(0))

    return types.boolean(types.int64), generate


@intrinsic
def store_float(typing: Any, address: Any, value: Any) -> Any:
    """One float32."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        number = context.cast(builder, args[1], sig.args[1], types.float32)
        builder.store(number, _pointer(builder, args[0], _F32), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, value), generate


@intrinsic
def claim(typing: Any, address: Any) -> Any:
    """The int64 at the address, which grows by one; no two threads are given the same."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.atomic_rmw("add", _pointer(builder, args[0], _I64), _I64(1), "monotonic")

    return types.int64(types.int64), generate


@intrinsic
def add_to_doubles(typing: Any, address: Any, value: Any) -> Any:
    """Adds the lanes to sixteen float64 in memory: long sums are kept there."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        pointer = _pointer(builder, args[0], _VD)
        total = builder.fadd(builder.load(pointer, align=8), builder.fpext(args[1], _VD))
        builder.store(total, pointer, align=8)
        return context.get_dummy_value()

    return types.void(types.int64, f32x16), generate


@intrinsic
def sum_each_of_16(typing: Any, address: Any) -> Any:
    """Sixteen vectors at the address become one: lane i holds the sum over the lanes of vector i, in a fixed order."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        vectors = [_load_nth(builder, args[0], _I64(BYTES), i) for i in range(LANES)]
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
            address = builder.add(args[2], builder.mul(args[3], _I64(i)))
            builder.store(v[i], _pointer(builder, address, _VF), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate


def _load_nth(builder: ir.IRBuilder, address: ir.Value, row: ir.Value, n: int) -> ir.Value:
    return builder.load(_pointer(builder, builder.add(address, builder.mul(row, _I64(n))), _VF), align=4)


def _exchange(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, step: int) -> tuple[ir.Value, ir.Value]:
    """The 2 x 2 blocks of `step` lanes of (a, b), transposed."""
    upper = [bool(lane & step) for lane in range(LANES)]
    first = [LANES + lane - step if up else lane for lane, up in enumerate(upper)]
    second = [LANES + lane if up else lane + step for lane, up in enumerate(upper)]
    return tuple(builder.shuffle_vector(a, b, ir.Constant(_VI, lanes)) for lanes in (first, second))


def _mask(builder: ir.IRBuilder, count: ir.Value) -> ir.Value:
    """Which lanes are below an int64 count."""
    lanes = ir.Constant(ir.VectorType(_I64, LANES), list(range(LANES)))
    undefined = ir.Constant(lanes.type, ir.Undefined)
    limit = builder.shuffle_vector(builder.insert_element(undefined, count, _I32(0)), undefined, _ints(0))
    return builder.icmp_signed("<", lanes, limit)


def _masked_load(element: ir.Type, name: str) -> Callable[..., Any]:
    vector = ir.VectorType(element, LANES)

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        kind = ir.FunctionType(vector, [vector.as_pointer(), _I32, _VB, vector])
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.load.{name}.p0")
        mask = _mask(builder, args[1])
        zeros = ir.Constant(vector, [0] * LANES)
        return builder.call(function, [_pointer(builder, args[0], vector), _I32(2), mask, zeros])

    result = f32x16 if element is _F32 else _words
    return intrinsic(lambda typing, address, count: (result(types.int64, types.int64), generate))


def _masked_store(element: ir.Type, name: str) -> Callable[..., Any]:
    vector = ir.VectorType(element, LANES)

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        kind = ir.FunctionType(ir.VoidType(), [vector, vector.as_pointer(), _I32, _VB])
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.store.{name}.p0")
        builder.call(function, [args[2], _pointer(builder, args[0], vector), _I32(2), _mask(builder, args[1])])
        return context.get_dummy_value()

    value = f32x16 if element is _F32 else _words
    return intrinsic(lambda typing, address, count, v: (types.void(types.int64, types.int64, value), generate))


# ---- sixteen 16-bit words, and the two formats they may hold


class _Words(types.Type):
    def __init__(self) -> None:
        super().__init__(name="i16x16")


_words = _Words()


@extending.register_model(_Words)
class _WordsModel(extending.models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: types.Type) -> None:
        super().__init__(manager, numba_type, _VH)


@intrinsic
def _load_words(typing: Any, address: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.load(_pointer(builder, args[0], _VH), align=2)

    return _words(types.int64), generate


@intrinsic
def _store_words(typing: Any, address: Any, value: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        builder.store(args[1], _pointer(builder, args[0], _VH), align=2)
        return context.get_dummy_value()

    return types.void(types.int64, _words), generate


_load_first, _load_first_words = _masked_load(_F32, "v16f32"), _masked_load(ir.IntType(16), "v16i16")
_store_first, _store_first_words = _masked_store(_F32, "v16f32"), _masked_store(ir.IntType(16), "v16i16")


@intrinsic
def _bfloat16_to_float(typing: Any, value: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.bitcast(builder.shl(builder.zext(args[0], _VI), _ints(16)), _VF)

    return f32x16(_words), generate


@intrinsic
def _float_to_bfloat16(typing: Any, value: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        bits = builder.bitcast(args[0], _VI)
        odd = builder.and_(builder.lshr(bits, _ints(16)), _ints(1))
        rounded = builder.lshr(builder.add(builder.add(bits, _ints(0x7FFF)), odd), _ints(16))
        is_nan = builder.fcmp_unordered("uno", args[0], args[0])
        return builder.trunc(builder.select(is_nan, _ints(0x7FC0), rounded), _VH)

    return _words(f32x16), generate


@intrinsic
def _float16_to_float(typing: Any, value: Any) -> Any:
    # in integers: LLVM's own conversion calls a library on machines without the instruction

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        bits = builder.zext(args[0], _VI)
        shifted = builder.shl(builder.and_(bits, _ints(0x7FFF)), _ints(13))
        scaled = builder.fmul(builder.bitcast(shifted, _VF), _floats(2.0**112))  # rebias; right for denormals too
        special = builder.icmp_unsigned(">=", shifted, _ints(0x0F800000))
        found = builder.bitcast(scaled, _VI)
        found = builder.select(special, builder.or_(found, _ints(0x7F800000)), found)
        sign = builder.shl(builder.and_(bits, _ints(0x8000)), _ints(16))
        return builder.bitcast(builder.or_(found, sign), _VF)

    return f32x16(_words), generate


@intrinsic
def _float_to_float16(typing: Any, value: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        signed = builder.bitcast(args[0], _VI)
        bits = builder.and_(signed, _ints(0x7FFFFFFF))
        odd = builder.and_(builder.lshr(bits, _ints(13)), _ints(1))
        bias = _ints((15 - 127 << 23) + 0xFFF)
        normal = builder.lshr(builder.add(builder.add(bits, bias), odd), _ints(13))
        # adding 1/2 leaves a small number's multiple of 2^-24 in the low bits, rounded as float32 rounds
        added = builder.bitcast(builder.fadd(builder.bitcast(bits, _VF), _floats(0.5)), _VI)
        small = builder.sub(added, _ints(0x3F000000))
        is_nan = builder.icmp_unsigned(">", bits, _ints(0x7F800000))
        large = builder.select(is_nan, _ints(0x7E00), _ints(0x7C00))
        found = builder.select(builder.icmp_unsigned("<", bits, _ints(0x38800000)), small, normal)
        found = builder.select(builder.icmp_unsigned(">=", bits, _ints(0x47800000)), large, found)
        sign = builder.lshr(builder.and_(signed, _ints(-0x80000000)), _ints(16))
        return builder.trunc(builder.or_(found, sign), _VH)

    return _words(f32x16), generate
