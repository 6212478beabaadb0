"""How fast DNA is read and encoded: random sequence of a given size, plain, gzip and bgzip, beside Biopython.

    python benchmarks/encode.py [--megabases 100] [--runs 3] [--json]

Prints one row a job: megabases a second and seconds, the best of the runs, on one core.
"""

import argparse
import gzip
import io
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from Bio import SeqIO, bgzf

from mambagen.data.dna_tokens import DnaTokenizer
from mambagen.data.fasta import read_records
from mambagen.data.genome import Genome
from mambagen.data.markov import MarkovModel
from mambagen.data.prepared import prepare
from mambagen.data.windows import WindowSampler


def best(runs: int, job: Callable[[], object]) -> float:
    """Seconds of the fastest of some runs."""
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        job()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def write_files(folder: Path, megabases: int) -> dict[str, Path]:
    """One sequence of the size in four records, 60 bases a line, in three packings."""
    rng = np.random.default_rng(0)
    lines = np.empty((megabases * 1_000_000 // 240, 61), dtype=np.uint8)
    text = io.BytesIO()
    for record in range(4):
        lines[:, :60] = np.frombuffer(b"ACGTacgtACGTacgN", dtype=np.uint8)[rng.integers(0, 16, lines[:, :60].shape)]
        lines[:, 60] = ord("\n")
        text.write(b">chr%d\n" % record + lines.tobytes())
    paths = {name: folder / f"genome.fa.{name}" for name in ("plain", "gzip", "bgzip")}
    paths["plain"].write_bytes(text.getvalue())
    paths["gzip"].write_bytes(gzip.compress(text.getvalue(), compresslevel=6))
    with bgzf.BgzfWriter(str(paths["bgzip"])) as writer:
        writer.write(text.getvalue())
    return paths


def read_and_encode(path: Path) -> int:
    """What a training run does first."""
    tokenizer = DnaTokenizer()
    return sum(len(tokenizer.encode(record.sequence)) for record in read_records(path))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabases", type=int, default=100)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []

    def row(job: str, megabases: float, seconds: float) -> None:
        rows.append({"job": job, "Mb/s": round(megabases / seconds, 1), "seconds": round(seconds, 4)})

    with tempfile.TemporaryDirectory() as folder:
        paths = write_files(Path(folder), options.megabases)
        genome = Genome.from_files([paths["plain"]])
        size = genome.bases / 1e6
        letters = next(iter(read_records(paths["plain"]))).sequence
        tokenizer = DnaTokenizer()
        row("encode", len(letters) / 1e6, best(options.runs, lambda: tokenizer.encode(letters)))
        for name, path in paths.items():
            row(f"read and encode, {name}", size, best(options.runs, lambda path=path: read_and_encode(path)))  # type: ignore[misc]
        row(
            "read alone, Biopython SeqIO, plain",
            size,
            best(1, lambda: [str(record.seq) for record in SeqIO.parse(paths["plain"], "fasta")]),
        )
        train, _ = genome.hold_out(0.1)
        sampler = WindowSampler(train, 1024, 1024, seed=0, reverse_complement=True)
        steps = iter(range(1000))
        row("batch of 1024 windows x 1024", 1024 * 1024 / 1e6, best(20, lambda: sampler.batch(next(steps))))
        mapped = prepare(paths["plain"], tokenizer, Path(folder)).records
        window = np.empty(1 << 20, dtype=np.uint8)
        longest = max((record.tokens for record in mapped), key=len)
        starts = np.random.default_rng(0).integers(0, max(1, len(longest) - len(window)), 100).tolist()

        def read_windows() -> None:
            for start in starts:
                part = longest[start : start + len(window)]
                window[: len(part)] = part

        row(
            "random windows of 2^20 bases", 100 * min(len(window), len(longest)) / 1e6, best(options.runs, read_windows)
        )
        row("fit a Markov chain of order 8", train.bases / 1e6, best(1, lambda: MarkovModel(8).fit(train)))

    if options.json:
        json.dump({"machine": platform.processor() or platform.machine(), "rows": rows}, sys.stdout, indent=1)
        print()
        return
    print("job", "Mb/s", "seconds", sep="\t")
    for line in rows:
        print(*line.values(), sep="\t")


if __name__ == "__main__":
    main()
