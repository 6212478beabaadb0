"""The CUDA C++ kernels compile for every generation of chips that they are said to run on; that needs no GPU."""

from pathlib import Path

import pytest

from mambagen.kernels import nvrtc
from mambagen.kernels.causal_conv1d import cuda as convolution
from mambagen.kernels.selective_scan import cuda as scan

pytestmark = pytest.mark.skipif(nvrtc.why_unavailable() is not None, reason=str(nvrtc.why_unavailable()))
SCAN = {
    "forward": ("cuda_forward.cu", scan.FORWARD | {"BC_VECTOR": 16, "SAVE_EVERY": scan.SAVE_EVERY}),
    "backward": ("cuda_backward.cu", scan.BACKWARD | {"TILE": scan.SAVE_EVERY}),
    "boundary": ("cuda_boundary.cu", scan.BOUNDARY | {"ADJOINT": 1, "BC_VECTOR": 16}),
}
MOST_SHARED = 99 << 10  # bytes a block may have on the chips that have the least (8.6, 8.9, 12.0)


def cubin(source: str, defines: dict[str, int], architecture: str) -> bytes:
    try:
        return nvrtc.compile_cubin(source, defines, architecture)
    except RuntimeError as error:
        if "could not compile" in str(error):
            raise
        pytest.skip(f"NVRTC does not load here: {error}")


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize("sweep", SCAN)
def test_the_scan_compiles(sweep: str, architecture: str) -> None:
    file, options = SCAN[sweep]
    given = {"HAS_Z": 1, "HAS_D": 1, "HAS_BIAS": 1, "SOFTPLUS": 1, "HAS_RESETS": 1, "REVERSE": 0}
    defines = {"DTYPE": 1, **given, **options}
    assert cubin(scan._source(file), defines, architecture)
    name = "scan_" + sweep
    assert scan._shared_bytes(name, {**defines, "DTYPE": 0}, 4) <= MOST_SHARED


@pytest.mark.parametrize("architecture", ["sm_80", "sm_120"])
def test_the_convolution_compiles(architecture: str) -> None:
    folder = Path(convolution.__file__).parent
    source = (folder.parent / "prelude.cuh").read_text() + (folder / "cuda.cu").read_text()
    defines = {
        "DTYPE": 1, "WIDTH": 4, "SILU": 1, "HAS_RESETS": 1, "REVERSE": 0,
        "ROWS": convolution.ROWS, "STEPS": convolution.STEPS, "THREADS": convolution.THREADS,
    }  # fmt: skip
    assert cubin(source, defines, architecture)
