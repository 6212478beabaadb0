"""Vectors of sixteen float32 inside numba functions: what the CPU kernels are written in.

numba's loop vectoriser does not survive gathered strides, many arrays and an exponential, so the kernels say what they
mean: a value of type `f32x16` is one LLVM vector, which becomes one AVX-512 register, two AVX ones or four NEON or SSE
ones. Arithmetic is by operators and the functions below, where a number may stand for a vector; cpu_memory.py loads and
stores. Nothing here calls a mathematics library.
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
I32, F32 = ir.IntType(32), ir.FloatType()
FLOATS, INTS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)


class F32x16(types.Type):
    def __init__(self) -> None:
        super().__init__(name="f32x16")


f32x16 = F32x16()


@extending.register_model(F32x16)
class _F32x16Model(extending.models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: types.Type) -> None:
        super().__init__(manager, numba_type, FLOATS)


# ---- making vectors of what the operands are


def floats(value: float) -> ir.Constant:
    return ir.Constant(FLOATS, [value] * LANES)


def ints(value: int) -> ir.Constant:
    return ir.Constant(INTS, [value] * LANES)


def spread(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    undefined = ir.Constant(FLOATS, ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(undefined, value, I32(0)), undefined, ints(0))


def vector(context: Any, builder: ir.IRBuilder, value: ir.Value, numba_type: types.Type) -> ir.Value:
    """The operand as a vector: numbers are rounded to float32 and spread."""
    if isinstance(numba_type, F32x16):
        return value
    return spread(builder, context.cast(builder, value, numba_type, types.float32))


def _is_operand(numba_type: types.Type) -> bool:
    return isinstance(numba_type, F32x16 | types.Float | types.Integer)


def _vector_function(emit: Callable[..., ir.Value]) -> Callable[..., Any]:
    """An intrinsic of up to three vectors, any of which may be given as a number."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return emit(builder, *(vector(context, builder, v, t) for v, t in zip(args, sig.args, strict=True)))

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
        a, b = (vector(context, builder, v, t) for v, t in zip(args, sig.args, strict=True))
        return getattr(builder, emit)(a, b)

    for left, right in ((F32x16, F32x16), (F32x16, types.Number), (types.Number, F32x16)):
        extending.lower_builtin(function, left, right)(lower)


for _name, _emit in (("add", "fadd"), ("sub", "fsub"), ("mul", "fmul"), ("truediv", "fdiv")):
    _define_operator(getattr(operator, _name), _emit)
    _define_operator(getattr(operator, "i" + _name), _emit)


# ---- arithmetic


def _emit_fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    # fmuladd, not fma: where a machine has no fused instruction it multiplies and adds instead of calling a library
    kind = ir.FunctionType(FLOATS, [FLOATS, FLOATS, FLOATS])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.fmuladd.v16f32"), [a, b, c])


def _emit_maximum(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered("<", a, b), b, a)


def _emit_minimum(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered(">", a, b), b, a)


def _emit_magnitude(builder: ir.IRBuilder, a: ir.Value) -> ir.Value:
    return builder.bitcast(builder.and_(builder.bitcast(a, INTS), ints(0x7FFFFFFF)), FLOATS)


def _emit_select_positive(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered(">=", a, floats(0.0)), b, c)


def _emit_zero_below(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered("<", a, b), floats(0.0), c)


def _emit_add_exponent(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    power = builder.shl(builder.bitcast(b, INTS), ints(23))
    return builder.bitcast(builder.add(builder.bitcast(a, INTS), power), FLOATS)


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
        return vector(context, builder, args[0], sig.args[0])

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


@intrinsic
def keep_apart(typing: Any) -> Any:
    """Keeps the function in which it stands out of line: its loops then have all registers for themselves."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), generate
