"""What all benchmarks share: facts of the machine, medians, tables and the JSON they leave."""

import datetime
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "numba", "numpy", "mambapy", "transformers", "mamba_ssm", "causal_conv1d")


def facts() -> dict[str, Any]:
    """Machine, versions and date, as every result states them."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": device,
        "python": platform.python_version(),
        "versions": versions,
    }


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def median_ms(run: Callable[[], object], device: str = "cuda", seconds: float = 0.15) -> float:
    """The median time of a call in milliseconds.

    On a GPU by CUDA events; on a CPU by the clock, over five runs at least (two where they take more than a minute).
    """
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(run, warmup=20, rep=int(1000 * seconds), return_mode="median"))
    run()
    times: list[float] = []
    while (len(times) < 5 or sum(times) < seconds) and (len(times) < 2 or sum(times) < 60):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def graph_ms(run: Callable[[], object], milliseconds: int = 60) -> float:
    """The median time of a call recorded as a CUDA graph: the GPU's own, without what launching from Python costs."""
    from triton.testing import do_bench_cudagraph

    with torch.cuda.stream(torch.cuda.Stream()):
        return float(do_bench_cudagraph(run, rep=milliseconds, return_mode="median"))


def print_table(rows: list[dict[str, Any]], title: str = "") -> None:
    """The rows as an aligned table; the columns are the first row's keys."""
    if title:
        print(f"\n{title}")
    if not rows:
        return
    columns = list(rows[0])
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[i]) for line in cells)) for i, column in enumerate(columns)]
    for line in [columns, *cells]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_json(path: str | Path | None, benchmark: str, rows: list[dict[str, Any]]) -> None:
    """Leave rows and facts in a file, where a path is given."""
    if path is None:
        return
    Path(path).write_text(json.dumps({"benchmark": benchmark, **facts(), "rows": rows}, indent=1) + "\n")
    print(f"\nwritten: {path}")
