"""The vectors that the CPU kernels are written in: their mathematics, their conversions, and the machine code."""

import importlib
import platform
import re
from collections.abc import Callable
from typing import Any

import numba.core.caching
import numpy as np
import pytest
import torch
from numba import cfunc, njit, types

from mambagen.kernels import cpu_common
from mambagen.kernels.cpu_memory import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    load,
    load_row,
    store,
    store_row,
    sum_each_of_16,
    transpose_16,
)
from mambagen.kernels.cpu_simd import exp2, exp_of_negative, sigmoid, softplus_and_slope

KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}


@njit
def _each(function, source, target, count):  # type: ignore[no-untyped-def]
    for i in range(0, count, 16):
        x = load(source + 4 * i)
        if function == 0:
            y = exp2(x)
        elif function == 1:
            y = exp_of_negative(x)
        elif function == 2:
            y = sigmoid(x)
        elif function == 3:
            y, _ = softplus_and_slope(x)
        else:
            _, y = softplus_and_slope(x)
        store(target + 4 * i, y)


EXP2, EXP, SIGMOID, SOFTPLUS, SLOPE = range(5)


def apply(function: int, values: Any) -> np.ndarray:
    x = np.ascontiguousarray(values, np.float32)
    x = np.concatenate([x, np.zeros(-len(x) % 16, np.float32)])
    y = np.full_like(x, np.nan)
    _each(function, x.ctypes.data, y.ctypes.data, len(x))
    return y[: len(values)]


@pytest.mark.parametrize(
    ("function", "low", "high", "exact"),
    [
        (EXP2, -126, 127.5, np.exp2),
        (EXP, -87, 0, np.exp),
        (SIGMOID, -87, 87, lambda x: 1 / (1 + np.exp(-x))),
        (SOFTPLUS, -87, 87, lambda x: np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))),
        (SLOPE, -87, 87, lambda x: 1 / (1 + np.exp(-x))),
    ],
)
def test_functions_are_right_to_two_units_in_the_last_place(
    function: int, low: float, high: float, exact: Callable[[np.ndarray], np.ndarray]
) -> None:
    x = np.random.default_rng(0).uniform(low, high, 1 << 18).astype(np.float32)
    error = np.abs(apply(function, x) / exact(x.astype(np.float64)) - 1)
    assert error.max() < (1 if function == EXP2 else 2) * 2**-23


def test_exp2_at_its_edges() -> None:
    x = [0.0, -0.0, 1.0, -1.0, 128.0, 1e30, np.inf, -127.0, -1e30, -np.inf, np.nan]
    expected = [1.0, 1.0, 2.0, 0.5, np.inf, np.inf, np.inf, 0.0, 0.0, 0.0, np.nan]
    np.testing.assert_array_equal(apply(EXP2, x), np.float32(expected))


def test_softplus_and_sigmoid_at_their_edges() -> None:
    x = [1e4, np.inf, -1e4, -np.inf, np.nan]
    np.testing.assert_array_equal(apply(SOFTPLUS, x), np.float32([1e4, np.inf, 0, 0, np.nan]))
    np.testing.assert_array_equal(apply(SLOPE, x), np.float32([1, 1, 0, 0, np.nan]))
    np.testing.assert_array_equal(apply(SIGMOID, x), np.float32([1, 1, 0, 0, np.nan]))


@njit
def _convert(source, kind, size, target, target_kind, target_size, count):  # type: ignore[no-untyped-def]
    for i in range(0, count, 16):
        store_row(target + target_size * i, target_kind, count - i, load_row(source + size * i, kind, count - i))


def convert(source: torch.Tensor, target: torch.Tensor, count: int) -> torch.Tensor:
    _convert(
        source.data_ptr(), KINDS[source.dtype], source.element_size(),
        target.data_ptr(), KINDS[target.dtype], target.element_size(), count,
    )  # fmt: skip
    return target


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_number_is_read_exactly(dtype: torch.dtype) -> None:
    every = torch.arange(65536).to(torch.int16).view(dtype)
    ours, exact = convert(every, torch.empty(65536), 65536), every.float()
    assert torch.equal(ours.isnan(), exact.isnan())
    assert torch.equal(ours[~exact.isnan()].view(torch.int32), exact[~exact.isnan()].view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_are_rounded_to_half_precision_as_torch_does(dtype: torch.dtype) -> None:
    every = torch.arange(65536).to(torch.int16).view(dtype).float()
    bits = torch.from_numpy(np.random.default_rng(0).integers(0, 2**32, 1 << 20, dtype=np.uint32).view(np.float32))
    middling = torch.randn(1 << 20) * torch.exp2(torch.empty(1 << 20).uniform_(-30, 20))
    halfway = (every + every.nextafter(torch.tensor(torch.inf)).nextafter(torch.tensor(torch.inf))) / 2
    x = torch.cat([every, every.nextafter(torch.tensor(torch.inf)), halfway, bits, middling])
    ours, exact = convert(x, torch.empty(len(x), dtype=dtype), len(x)), x.to(dtype)
    assert torch.equal(ours.isnan(), exact.isnan())
    assert torch.equal(ours[~exact.isnan()].view(torch.int16), exact[~exact.isnan()].view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 7, 15, 16, 17, 31])
def test_nothing_past_the_end_of_a_row_is_touched(count: int, dtype: torch.dtype) -> None:
    source = torch.randn(48).to(dtype)
    target = convert(source, torch.full((48,), 9.0).to(dtype), count)
    assert torch.equal(target[:count], source[:count])
    assert (target[count:] == 9).all()


@njit
def _turn(source, target, sums):  # type: ignore[no-untyped-def]
    transpose_16(source, 64, target, 64)
    store(sums, sum_each_of_16(source))


def test_sixteen_rows_are_transposed_and_summed() -> None:
    rows, columns, sums = torch.randn(16, 16), torch.empty(16, 16), torch.empty(16)
    _turn(rows.data_ptr(), columns.data_ptr(), sums.data_ptr())
    assert torch.equal(columns, rows.T)
    torch.testing.assert_close(sums, rows.sum(1))


# ---- the machine code


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="reads x86 assembly")
@pytest.mark.parametrize(
    ("module", "kernel"),
    [
        ("selective_scan.cpu_forward", "forward_kernel"),
        ("selective_scan.cpu_backward", "backward_kernel"),
        ("causal_conv1d.cpu_kernels", "forward_kernel"),
    ],
)
def test_the_machine_code_is_vectors_and_calls_no_mathematics_library(module: str, kernel: str) -> None:
    function = getattr(importlib.import_module(f"mambagen.kernels.{module}"), kernel).function
    assembly = cfunc(types.void(types.int64), error_model="numpy")(function)._library.get_asm_str()
    opcodes = re.findall(r"^\s+(v?[a-z0-9]+)\s+(.*)$", assembly, re.MULTILINE)
    packed = [op for op, _ in opcodes if re.fullmatch(r"v?(add|sub|mul|div|max|min|fn?m(add|sub)\d+)ps", op)]
    scalar = [op for op, _ in opcodes if re.fullmatch(r"v?(add|sub|mul|div|max|min|sqrt|fn?m(add|sub)\d+)s[sd]", op)]
    assert len(packed) > 100
    assert not scalar
    assert not re.search(r"[$ @](v?(exp|exp2|expm1|log|log2|log1p|pow|fma|ldexp)f?)\b", assembly)
    features = torch.backends.cpu.get_cpu_capability()
    if features in ("AVX2", "AVX512"):
        register = "zmm" if features == "AVX512" else "ymm"
        loops = loops_with(assembly, "vpslld", f"vf(n)?madd.*{register}")
        assert loops, f"no loop holds an exponential in {register}"
        if kernel == "forward_kernel" and module.startswith("selective_scan"):
            # the recurrence, two vectors of 16: 2 exponentials of 7 fused steps, 2 states, 2 outputs, and 2 u B
            fused = min(sum(bool(re.search(r"vfn?m(add|sub)", line)) for line in loop) for loop in loops)
            assert fused == (18 if register == "zmm" else 36)


def loops_with(assembly: str, *patterns: str) -> list[list[str]]:
    """The innermost loops (from a label to a jump back to it, without another label) in which all patterns occur."""
    found = []
    label, body = "", []
    for line in assembly.splitlines():
        named = re.match(r"^(\.?L[\w]+):", line)
        if named:
            label, body = named[1], []
            continue
        body.append(line)
        if re.search(rf"\sj\w+\s+{re.escape(label)}$", line) and label:
            if all(any(re.search(p, each) for each in body) for p in patterns):
                found.append(body)
            label, body = "", []
    return found


# ---- compiling where nothing can be kept


def test_a_folder_that_cannot_be_written_costs_only_the_time_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any) -> None:
        raise PermissionError("read-only")

    locators = numba.core.caching._CacheLocator
    monkeypatch.setattr(locators, "ensure_cache_path", refuse)
    kernel = importlib.import_module("mambagen.kernels.selective_scan.cpu_backward").add_parts_kernel
    again = cpu_common.Kernel(kernel.function)
    assert again.compile() != 0


def test_a_damaged_cache_costs_only_the_time_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(self: Any, name: str) -> Any:
        raise EOFError("Ran out of input")

    kernel = importlib.import_module("mambagen.kernels.selective_scan.cpu_backward").add_parts_kernel
    kernel.compile()
    monkeypatch.setattr(numba.core.caching.IndexDataCacheFile, "_load_data", damaged)
    assert cpu_common.Kernel(kernel.function).compile() != 0
