"""Without a GPU, tests with "triton" in their name run Triton's interpreter; no other test may notice it.

Triton decides between compiling and interpreting where a function is decorated, its own library included, so the
variable has to be set when triton is first imported. It is set while tests are collected and while one of those tests
runs, and only then: it is inherited by the programs that other tests start, and would slow them down a thousandfold.
"""

import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

HAS_TRITON = importlib.util.find_spec("triton") is not None
HAS_GPU = Path("/dev/kfd").exists() or any(Path("/dev").glob("nvidia[0-9]*"))
VARIABLE = "TRITON_INTERPRET"


def interpret(on: bool) -> None:
    if on and HAS_TRITON and not HAS_GPU:
        os.environ[VARIABLE] = "1"
    else:
        os.environ.pop(VARIABLE, None)


def pytest_configure() -> None:
    interpret(True)
    if HAS_TRITON:
        import triton  # noqa: F401


def pytest_collection_finish() -> None:
    interpret(False)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    interpret("triton" in item.nodeid)
    if os.environ.get(VARIABLE) and "compiles" not in item.nodeid and not interpreter_works():
        pytest.skip("the interpreter of Triton below 3.7 fails with NumPy 2.4 and newer")


@functools.cache
def interpreter_works() -> bool:
    def version(package: str) -> tuple[int, ...]:
        return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])

    return version("triton") >= (3, 7) or version("numpy") < (2, 4)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    interpret(False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For cases so small that threads would mostly wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
