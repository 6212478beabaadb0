"""Peak memory and time of `mambagen score` over sequences of growing length: flat memory, linear time.

    python -m benchmarks.streaming FASTA [--model dna] [--megabases 1 10 100] [--format summary] [--out streaming.json]

Each length is one run of the command in a process of its own, over one record that is the FASTA's bases joined end to
end (and begun again where they are fewer). Its peak memory on the host is what the system counted for it; that of a GPU
what torch counted. The line through time and length is fitted by least squares: seconds before the first base, and
bases a second after; processor seconds say the same on a machine that does other things too. With `--check` two passes
over the shortest, in chunks of two sizes, are held against each other.

Without `--format` it is a bigWig, or a bedGraph where pybigtools, which writes the other, is not installed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import print_table, write_json
from mambagen.errors import UsageError
from mambagen.pipelines.score_tracks import check_bigwig

_PROGRAM = """
import json, resource, sys, time
from mambagen.cli import run
began = time.perf_counter()
code = run(sys.argv[1:])
seconds = time.perf_counter() - began
used = resource.getrusage(resource.RUSAGE_SELF)
import torch
gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
cpu = used.ru_utime + used.ru_stime
print(json.dumps({"code": code, "seconds": seconds, "cpu": cpu, "peak": peak, "gpu": gpu}), file=sys.stderr)
"""


def write_record(source: Path, bases: int, path: Path) -> None:
    """One record of so many bases out of a FASTA, begun again where it ends."""
    from mambagen.data.fasta_stream import stream_pieces

    left = bases
    with open(path, "wb") as file:
        file.write(b">joined\n")
        while left:
            for piece in stream_pieces(source):
                letters = piece.letters[:left].tobytes()
                for at in range(0, len(letters), 1 << 16):
                    file.write(letters[at : at + (1 << 16)] + b"\n")
                left -= len(letters)
                if not left:
                    break


def measured(arguments: list[str]) -> dict[str, Any]:
    """A run of the command line in a process of its own."""
    done = subprocess.run([sys.executable, "-c", _PROGRAM, *arguments], stderr=subprocess.PIPE, text=True)
    *said, last = done.stderr.strip().splitlines() or [""]
    try:
        found: dict[str, Any] = json.loads(last)
    except ValueError:
        raise SystemExit(done.stderr) from None
    if found["code"]:
        raise SystemExit("\n".join(said))
    return found


def largest_difference(a: Path, b: Path) -> float:
    """Between two bedGraph files of the same bases."""
    worst = 0.0
    with open(a) as first, open(b) as second:
        for one, other in zip(first, second, strict=True):
            if not one.startswith("#"):
                (*place, x), (*same, y) = one.split("\t"), other.split("\t")
                assert place == same, (one, other)
                worst = max(worst, abs(float(x) - float(y)))
    return worst


def usable(form: str | None) -> str:
    """The format that was asked for, or bigWig where it can be written; SystemExit where it cannot, before the work."""
    if form not in (None, "bigwig"):
        return form
    try:
        check_bigwig()
    except UsageError as error:
        if form:
            raise SystemExit(f"benchmarks.streaming: {error}, or take --format bedgraph, tsv or summary") from None
        print(f"{error}; measured as bedGraph", file=sys.stderr)
        return "bedgraph"
    return "bigwig"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fasta", type=Path, help="real sequence")
    parser.add_argument("--model", default="dna", help="a model's folder, or a built-in one")
    parser.add_argument("--megabases", type=float, nargs="+", default=[1, 10, 100])
    parser.add_argument("--format", choices=["summary", "bedgraph", "bigwig", "tsv"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--both-strands", action="store_true")
    parser.add_argument("--check", action="store_true", help="hold the shortest run against chunks of another size")
    parser.add_argument("--out", help="write the rows as JSON")
    options = parser.parse_args()
    chosen = usable(options.format)
    suffix = {"bigwig": "bw"}.get(chosen, chosen)
    common = ["--model", options.model, "--device", options.device, *["--both-strands"][: options.both_strands]]
    common += [] if options.batch_tokens is None else ["--batch-tokens", str(options.batch_tokens)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        fasta, out = Path(folder, "joined.fa"), Path(folder, f"out.{suffix}")
        for megabases in sorted(options.megabases):
            bases = round(megabases * 1e6)
            write_record(options.fasta, bases, fasta)
            form = ["--summary"] if chosen == "summary" else ["--format", chosen]
            found = measured(["score", str(fasta), *common, *form, "--out", str(out)])
            rows.append(
                {
                    "Mb": megabases,
                    "seconds": found["seconds"],
                    "processor s": found["cpu"],
                    "bases/s": round(bases / found["seconds"]),
                    "peak MiB": round(found["peak"] / 2**20),
                    "GPU MiB": None if not found["gpu"] else round(found["gpu"] / 2**20),
                    "output MiB": round(out.stat().st_size / 2**20, 1),
                }
            )
            print_table(rows[-1:])
        if options.check:
            write_record(options.fasta, round(min(options.megabases) * 1e6), fasta)
            tracks = [Path(folder, f"{size}.bedgraph") for size in (5000, 12345)]
            for size, track in zip((5000, 12345), tracks, strict=True):
                where = ["--model", options.model, "--device", options.device]
                measured(["score", str(fasta), *where, "--out", str(track), "--batch-tokens", str(size)])
            print(f"largest difference between chunks of 5,000 and 12,345: {largest_difference(*tracks):.1e}")
    print_table(rows, f"mambagen score, {chosen}, model {options.model}")
    if len(rows) > 1:
        for what in ("seconds", "processor s"):
            slope, start = np.polyfit([row["Mb"] for row in rows], [row[what] for row in rows], 1)
            print(f"{what}: {start:.1f} + {slope:.2f} a Mb ({1e6 / slope:,.0f} bases each)")
        growth = rows[-1]["peak MiB"] - rows[0]["peak MiB"]
        print(f"memory of the longest less that of the shortest: {growth} MiB")
    write_json(options.out, "streaming", rows)


if __name__ == "__main__":
    main()
