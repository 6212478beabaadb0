"""Drawing a token on a CPU, as sampling.cuh does it on a GPU (reference.py defines it)."""

# mypy: disallow-untyped-defs=False

import numpy as np
from numba import njit

from mambagen.kernels.cpu_memory import BYTES, load, store, store_float
from mambagen.kernels.cpu_simd import exp2, maximum, splat
from mambagen.kernels.mamba_decode.cpu_steps import float_bits, largest_of_lanes, load_float, sum_of_lanes

LOG2E = np.float32(1.4426950408889634)
WORD = np.uint64(0xFFFFFFFF)
SHIFT = np.uint64(32)


@njit
def uniform(seed, position, stream):
    """A number in [0, 1) with 24 random bits: Philox4x32-10 of int64 (seed, position, stream)."""
    place, key = np.uint64(position), np.uint64(seed)
    c0, c1, c2, c3 = place & WORD, place >> SHIFT, np.uint64(stream) & WORD, np.uint64(0)
    k0, k1 = key & WORD, key >> SHIFT
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (b >> SHIFT) ^ c1 ^ k0, b & WORD, (a >> SHIFT) ^ c3 ^ k1, a & WORD
        k0 = (k0 + np.uint64(0x9E3779B9)) & WORD
        k1 = (k1 + np.uint64(0xBB67AE85)) & WORD
    return np.float32(c0 >> np.uint64(8)) * np.float32(5.9604644775390625e-8)


@njit
def draw_token(logits, bias, vectors, inverse_temperature, top_k, top_p, seed, position, stream, values, weights):
    """The id drawn from `vectors` x 16 logits; `values` and `weights` are scratch memory of the same size.

    `bias` is 0, or -inf for ids that may not be drawn. The order of ids is by logit, then the lower id first.
    """
    count = vectors * 16
    largest = splat(-np.inf)
    for i in range(vectors):
        value = load(logits + i * BYTES) + load(bias + i * BYTES)
        store(values + i * BYTES, value)
        largest = maximum(largest, value)
    best = largest_of_lanes(largest)
    if inverse_temperature == 0:
        for i in range(count):
            if load_float(values + 4 * i) == best:
                return i
        return 0  # not reached while the logits are numbers
    for i in range(vectors):
        away = load(values + i * BYTES) - best
        store(weights + i * BYTES, exp2(maximum(away * (inverse_temperature * LOG2E), -200.0)))
    if top_k < count:
        _keep_likeliest(values, weights, count, top_k)
    if top_p < 1:
        _keep_nucleus(values, weights, count, top_p)
    total = splat(0.0)
    for i in range(vectors):
        total = total + load(weights + i * BYTES)
    target = uniform(seed, position, stream) * sum_of_lanes(total)
    passed, last = np.float32(0), 0
    for i in range(count):
        weight = load_float(weights + 4 * i)
        passed += weight
        if weight > 0:
            last = i
            if passed > target:
                return i
    return last  # rounding left the target above the sum


@njit
def _keep_likeliest(values, weights, count, top_k):
    """Sets the weights of all but the k likeliest to 0, and takes them out of the order."""
    threshold = 0  # the largest key that leaves k ids, bit by bit
    for shift in range(31, -1, -1):
        trial, left = threshold | (1 << shift), 0
        for i in range(count):
            left += _key(values, i) >= trial
        if left >= top_k:
            threshold = trial
    room = top_k
    for i in range(count):
        room -= _key(values, i) > threshold
    for i in range(count):
        key = _key(values, i)
        if key == threshold and room > 0:
            room -= 1
        elif key <= threshold:
            store_float(weights + 4 * i, np.float32(0))
            store_float(values + 4 * i, np.float32(-np.inf))


@njit
def _keep_nucleus(values, weights, count, top_p):
    """Keeps an id while those that are likelier have less than top_p together."""
    total = np.float32(0)
    for i in range(count):
        total += load_float(weights + 4 * i)
    wanted, threshold = top_p * total, 0
    for shift in range(31, -1, -1):
        trial, left = threshold | (1 << shift), np.float32(0)
        for i in range(count):
            if _key(values, i) >= trial:
                left += load_float(weights + 4 * i)
        if left >= wanted:
            threshold = trial
    above = np.float32(0)
    for i in range(count):
        if _key(values, i) > threshold:
            above += load_float(weights + 4 * i)
    for i in range(count):
        key = _key(values, i)
        if key == threshold:
            if above >= wanted:
                store_float(weights + 4 * i, np.float32(0))
            else:
                above += load_float(weights + 4 * i)
        elif key < threshold:
            store_float(weights + 4 * i, np.float32(0))


@njit(forceinline=True)
def _key(values, i):
    """The i-th value as an integer of 32 bits in the same order."""
    bits = float_bits(load_float(values + 4 * i))
    return (~bits if bits < 0 else bits | 0x80000000) & 0xFFFFFFFF
