"""Several threads on one stream: a leader publishes phases of a step, cut into units that whoever is free takes.

The leader never waits for a thread that has not taken a unit, so a helper that comes late, or never, costs nothing but
its help. One word says it all, phase << 20 | units << 10 | taken, so that a helper which was away for long cannot take
a unit of a phase that is over.
"""

# mypy: disallow-untyped-defs=False

import platform
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils

from mambagen.kernels.cpu_memory import I64, load_int, pointer, store_int
from mambagen.kernels.cpu_simd import I32, intrinsic

DONE, ALONE, PENALTY, BOARD_BYTES = 128, 256, 264, 320  # offsets on the board, whose first word says what is to be done
OVER = -1
PATIENCE = 2000  # looks at a unit that another thread has taken, some tens of microseconds
LEAST_PENALTY, MOST_PENALTY = 256, 1 << 16  # phases


@njit
def publish(board, phase, units):
    """The leader: a phase begins. All units of the one before are done."""
    _store(board + DONE, 0)
    _store(board, (phase << 20) | (units << 10))


@njit
def end(board):
    """The leader: helpers may leave."""
    _store(board, OVER)


@njit(forceinline=True)
def look(board):
    """What is to be done: OVER, or the word that `take` wants."""
    return _load(board)


@njit(forceinline=True)
def phase_of(word):
    return word >> 20


@njit(forceinline=True)
def units_left(word):
    """Units of the phase in `word` that nobody has taken."""
    return ((word >> 10) & 1023) - (word & 1023)


@njit(forceinline=True)
def take(board, word):
    """A unit of the phase in `word`, or -1 where none is left or another thread was faster."""
    if units_left(word) > 0 and _swap(board, word, word + 1):
        return word & 1023
    relax()
    return -1


@njit(forceinline=True)
def finished(board):
    """A unit that was taken is done."""
    _add(board + DONE, 1)


@njit
def wait(board, units):
    """The leader: until all units of the phase are done.

    A thread that lost its processor while it had a unit costs milliseconds. After that the leader works alone, each
    time twice as long: on a busy machine a team is no slower than one thread.
    """
    looks = 0
    while _load(board + DONE) < units:
        relax()
        looks += 1
    penalty = load_int(board + PENALTY)
    if looks > PATIENCE:
        penalty = min(2 * penalty, MOST_PENALTY)
        store_int(board + ALONE, penalty)
    else:
        penalty -= 1
    store_int(board + PENALTY, max(penalty, LEAST_PENALTY))


@njit
def is_alone(board):
    """The leader: whether the next phase is better not shared."""
    left = load_int(board + ALONE)
    store_int(board + ALONE, max(left - 1, 0))
    return left > 0


@intrinsic
def _load(typing: Any, address: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.load_atomic(pointer(builder, args[0], I64), "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def _store(typing: Any, address: Any, value: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        number = context.cast(builder, args[1], sig.args[1], types.int64)
        builder.store_atomic(number, pointer(builder, args[0], I64), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, value), generate


@intrinsic
def _add(typing: Any, address: Any, value: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        number = context.cast(builder, args[1], sig.args[1], types.int64)
        return builder.atomic_rmw("add", pointer(builder, args[0], I64), number, "acq_rel")

    return types.int64(types.int64, value), generate


@intrinsic
def _swap(typing: Any, address: Any, expected: Any, value: Any) -> Any:
    """Whether the word was as expected; it then is `value`."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        result = builder.cmpxchg(pointer(builder, args[0], I64), args[1], args[2], "acq_rel", "monotonic")
        return builder.extract_value(result, 1)

    return types.boolean(types.int64, types.int64, types.int64), generate


@intrinsic
def relax(typing: Any) -> Any:
    """Tells the processor that the thread is waiting."""
    x86, arm = platform.machine() in ("x86_64", "AMD64"), platform.machine() in ("aarch64", "arm64")

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        if x86:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        elif arm:
            kind = ir.FunctionType(ir.VoidType(), [I32])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.aarch64.hint"), [I32(1)])
        return context.get_dummy_value()

    return types.void(), generate
