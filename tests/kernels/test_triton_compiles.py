"""The Triton kernels compile for GPUs that are not there, within the registers those have."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

KERNELS = {
    "scan_kernel",
    "segment_ends_kernel",
    "pass_on_kernel",
    "adjoint_ends_kernel",
    "backward_kernel",
    "sum_tiles_kernel",
    "conv_kernel",
    "conv_backward_kernel",
    "pack_kernel",
    "unpack_kernel",
    "filter_kernel",
    "adjoint_kernel",
    "coefficients_kernel",
    "coefficient_gradients_kernel",
    "product_kernel",
    "moments_kernel",
    "sums_kernel",
    "add_norm_kernel",
    "norm_backward_kernel",
    "gate_kernel",
    "gate_gradients_kernel",
    "gate_sums_kernel",
    "masked_gelu_kernel",
    "masked_gelu_sums_kernel",
    "chunk_tables_kernel",
    "chunked_conv_kernel",
    "segment_states_kernel",
    "segment_carry_kernel",
    "chunked_gradients_kernel",
    "diagonals_kernel",
    "chunked_sums_kernel",
}
# Bytes spilled a thread and of shared memory; Hopper has 232,448 of the latter for a block, and two of 116 kB fit.
LIMITS = {
    "chunked_conv_kernel": (80, 115_712),
    "segment_states_kernel": (80, 115_712),
    "chunked_gradients_kernel": (1024, 180_000),
}


@pytest.mark.slow
@pytest.mark.skipif(platform.system() != "Linux", reason="Triton compiles on Linux")
def test_triton_kernels_compile_for_hopper_with_hardly_a_spill(tmp_path: Path) -> None:
    """In a process of its own, because this one may interpret them, and without what an earlier run compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_triton", "--target", "cuda:90", "--json"]
    done = subprocess.run(
        command,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout)
    assert {row["kernel"] for row in rows} == KERNELS
    for row in rows:
        assert 0 < row["registers"] <= 255
        spilled, shared = LIMITS.get(row["kernel"], (64, 48 << 10))  # a tile too large shows as hundreds of bytes
        assert row["spilled"] <= spilled, row
        assert row["shared"] <= shared, row
        assert row["end"], row
    assert {row["kernel"] for row in rows if row["products"]} == LIMITS.keys()
