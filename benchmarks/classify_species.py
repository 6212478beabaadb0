"""Peak memory and time of `mambagen classify-species`: one long record, and many short ones.

    python -m benchmarks.classify_species FASTA [--model species] [--megabases 1 5 10 100] [--contigs 100000]
        [--all-windows-to 10]

Each row is one run of the command in a process of its own, over one record that is the FASTA's bases joined end to end,
once with at most 256 windows and once with all of them (if it has no more than --all-windows-to megabases: their time
grows with it), or over contigs of 200 to 1,000 bases. Peak memory is what the system counted for the process; processor
seconds say the same on a machine that does other things too.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.common import print_table, write_json
from benchmarks.streaming import measured, write_record

SHORTEST, LONGEST = 200, 1000  # bases of a contig


def write_contigs(record: Path, count: int, path: Path) -> int:
    """So many contigs drawn from a FASTA of one record; returns their bases."""
    letters = b"".join(record.read_bytes().split(b"\n")[1:])
    generator = np.random.default_rng(0)
    lengths = generator.integers(SHORTEST, LONGEST + 1, count)
    starts = generator.integers(0, len(letters) - LONGEST, count)
    with open(path, "wb") as file:
        for i, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            file.write(b">contig%d\n" % i + letters[start : start + length] + b"\n")
    return int(lengths.sum())


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fasta", type=Path, help="real sequence")
    parser.add_argument("--model", default="species", help="a model's folder, or a built-in one")
    parser.add_argument("--megabases", type=float, nargs="+", default=[1, 5, 10, 100])
    parser.add_argument("--all-windows-to", type=float, default=float("inf"), help="megabases; 0: never all windows")
    parser.add_argument("--contigs", type=int, default=100_000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", help="write the rows as JSON")
    options = parser.parse_args()
    common = ["--model", options.model, "--device", options.device]
    rows = []

    def add(what: str, bases: int, fasta: Path, *more: str) -> None:
        found = measured(["classify-species", str(fasta), *common, *more, "--out", str(fasta.with_suffix(".tsv"))])
        rows.append(
            {
                "what": what,
                "Mb": round(bases / 1e6, 2),
                "seconds": found["seconds"],
                "processor s": found["cpu"],
                "peak MiB": round(found["peak"] / 2**20),
                "GPU MiB": None if not found["gpu"] else round(found["gpu"] / 2**20),
            }
        )
        print_table(rows[-1:])

    with tempfile.TemporaryDirectory() as folder:
        fasta = Path(folder, "joined.fa")
        for megabases in sorted(options.megabases):
            bases = round(megabases * 1e6)
            write_record(options.fasta, bases, fasta)
            add("one record", bases, fasta)
            if megabases <= options.all_windows_to:
                add("one record, all windows", bases, fasta, "--all-windows")
        if options.contigs:
            write_record(options.fasta, 1_000_000, fasta)
            contigs = Path(folder, "contigs.fa")
            bases = write_contigs(fasta, options.contigs, contigs)
            add(f"{options.contigs:,} contigs", bases, contigs)
    print_table(rows, f"mambagen classify-species, model {options.model}")
    write_json(options.out, "classify-species", rows)


if __name__ == "__main__":
    main()
