"""A sequence as it stands in a file."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Record:
    """One sequence as it stands in a file: ``sequence`` is the (length,) uint8 array of its letters, in their case."""

    id: str
    description: str  # the header's text after the id
    sequence: NDArray[np.uint8]
    path: str  # as it was given; "stdin" for -
    line: int  # of its header, from 1; in a binary file its number among the records

    def __len__(self) -> int:
        return len(self.sequence)
