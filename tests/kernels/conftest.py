"""What tests of kernels ask for: poisoned memory, a number of threads."""

from collections.abc import Callable, Iterator

import pytest
import torch


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN, outputs and scratch memory alike, so that what a kernel leaves unwritten is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's threads; the number before comes back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
