"""Fine-tuning on labelled DNA: a pretrained encoder, the same from scratch, and k-mers, task by task.

    python -m benchmarks.gue TASKS [--from MODEL] [--encoder bigs] [--size 3.5m] [--only gue_prom_core_all ...]
        [--seeds 0] [--minutes 0.5] [--equivariant] [--out gue.json]

TASKS is a folder of NAME_train.csv.gz, NAME_dev.csv.gz (or _valid) and NAME_test.csv.gz. The figures are Matthews
correlations on the test file, which is looked at once, by the model that was best on validation; the logistic
regression on 5-mer frequencies has its strength chosen on the same validation file. Rows that --out holds are not done
again.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import print_table, write_json


def tasks_in(folder: Path, only: list[str]) -> dict[str, dict[str, str]]:
    """Task -> its train, valid and test file; tasks without one of them are left out."""
    tasks = {}
    for train in sorted(folder.glob("*_train.csv*")):
        name, ending = train.name.split("_train.csv")
        valid = [path for part in ("dev", "valid") if (path := folder / f"{name}_{part}.csv{ending}").exists()]
        test = folder / f"{name}_test.csv{ending}"
        if valid and test.exists() and (not only or name in only):
            tasks[name] = {"data": str(train), "valid": str(valid[0]), "test": str(test)}
    return tasks


def one_run(args: argparse.Namespace, files: dict[str, str], start: str, seed: int, baseline: bool) -> dict[str, Any]:
    """Fine-tune one classifier and measure it on the test file."""
    from mambagen.pipelines.train_classifier import TrainClassifierConfig, train_classifier

    settings: dict[str, Any] = {
        **files, "seed": seed, "batch": args.batch, "device": args.device, "baseline": baseline,
        "reverse_complement": args.reverse_complement, "equivariant": args.equivariant,
        "save_every": "1000m", "minutes": args.minutes,
    }  # fmt: skip
    if start == "pretrained":
        settings |= {"start_from": str(args.start_from), "lr": args.lr_pretrained}
    else:
        settings |= {"encoder": args.encoder, "size": args.size, "lr": args.lr_scratch}
    with tempfile.TemporaryDirectory() as folder:
        result = train_classifier(TrainClassifierConfig(**settings), Path(folder) / "run")
    assert result.test is not None
    row = {"parameters": result.parameters, "valid": result.valid.mcc, "test": result.test.mcc, "steps": result.steps}
    if result.baseline_test is not None:
        row["k-mers"] = result.baseline_test.mcc
    return {**row, "seconds": result.seconds, "equivariant": args.equivariant, "stopped early": result.stopped_early}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a task: test correlations, means over seeds."""
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        line: dict[str, Any] = {"task": task}
        for start in ("pretrained", "scratch"):
            values = [row["test"] for row in rows if row["task"] == task and row["start"] == start]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            line[start] = f"{statistics.mean(values):.3f}{spread}" if values else None
        line["5-mers"] = next((f"{row['k-mers']:.3f}" for row in rows if row["task"] == task and "k-mers" in row), None)
        lines.append(line)
    return lines


def main() -> None:
    """Run what is missing, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", type=Path)
    parser.add_argument("--from", dest="start_from", type=Path)
    parser.add_argument("--encoder", default="bigs")
    parser.add_argument("--size", default="3.5m")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--minutes", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr-pretrained", type=float, default=3e-4)
    parser.add_argument("--lr-scratch", type=float, default=1e-3)
    parser.add_argument("--reverse-complement", action="store_true", help="half of the sequences from the other strand")
    parser.add_argument(
        "--equivariant", action="store_true", help="both strands of each: what has no strand, as sites have"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    rows = json.loads(args.out.read_text())["rows"] if args.out and args.out.exists() else []
    done = {(row["task"], row["start"], row["seed"]) for row in rows}
    starts = ["pretrained", "scratch"] if args.start_from else ["scratch"]
    for seed in args.seeds:
        for task, files in tasks_in(args.tasks, args.only).items():
            for start in starts:
                if (task, start, seed) not in done:
                    baseline = not any(row["task"] == task and "k-mers" in row for row in rows)
                    row = one_run(args, files, start, seed, baseline)
                    rows.append({"task": task, "start": start, "seed": seed, **row})
                    write_json(args.out, "gue", rows)
    print_table(summary(rows), "Matthews correlation on the test files")


if __name__ == "__main__":
    main()
