"""Writing 16-bit WAV: to files that are whole or not there, and to streams as the sound is made."""

import struct
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mambagen.data.whole_file import whole_file

Samples16 = NDArray[np.int16]


def to_int16(samples: ArrayLike) -> Samples16:
    """Float samples in [-1, 1] as 16-bit integers: those of a 16-bit file come back exactly; beyond, they are cut."""
    scaled = np.rint(np.asarray(samples, dtype=np.float64) * 32768)
    return scaled.clip(-32768, 32767).astype(np.int16)


def wav_header(samples: int, rate: int) -> bytes:
    """The 44 bytes in front of `samples` mono 16-bit samples."""
    size = 2 * samples
    return b"".join(
        [
            struct.pack("<4sI4s", b"RIFF", 36 + size, b"WAVE"),
            struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16),
            struct.pack("<4sI", b"data", size),
        ]
    )


def write_wav(path: Path | str, samples: Samples16, rate: int) -> None:
    """A WAV file, whole or not there. Raises ResourceError or OSError where it cannot be written."""
    with whole_file(path) as partial, open(partial, "wb") as stream:
        stream.write(wav_header(len(samples), rate))
        stream.write(np.ascontiguousarray(samples, dtype="<i2").tobytes())
