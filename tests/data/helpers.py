"""Small genomes for the tests of this folder."""

import numpy as np

from mambagen.data.dna_tokens import DnaTokenizer
from mambagen.data.fasta import Record
from mambagen.data.genome import Genome


def a_genome(*sequences: str | bytes, tokenizer: DnaTokenizer | None = None, paths: tuple[str, ...] = ()) -> Genome:
    """A genome of records r0, r1, ..., all in the file some.fa unless told otherwise."""
    return Genome.from_records(
        [
            Record(
                f"r{i}",
                "",
                np.frombuffer(sequence.encode() if isinstance(sequence, str) else sequence, dtype=np.uint8),
                paths[i] if paths else "some.fa",
                2 * i + 1,
            )
            for i, sequence in enumerate(sequences)
        ],
        tokenizer,
    )


def random_dna(length: int, seed: int = 0, letters: bytes = b"ACGT") -> str:
    """A random sequence."""
    rng = np.random.default_rng(seed)
    return np.frombuffer(letters, dtype=np.uint8)[rng.integers(0, len(letters), length)].tobytes().decode()
