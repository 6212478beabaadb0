"""Genomes as the jobs open them: small files in memory, large ones prepared in the cache; how they are divided; audits.

From Python:

    from mambagen.pipelines.genomes import open_genome, split_rows
    genome = open_genome(["hg38"], DnaTokenizer())
    train, valid = genome.hold_out(intervals=split_rows(["hg38"], genome))
"""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mambagen.data.dna_tokens import DnaTokenizer
from mambagen.data.genome import Genome, Span, union
from mambagen.data.intervals import Interval, chromosome_intervals, held_out, overlap
from mambagen.data.prepared import Progress, prepare, unpacked_size
from mambagen.data.windows import IntervalSampler, WindowSampler
from mambagen.data_manifests import cache_home, chromosomes_of, default_splits, read_bed, resolve_dna
from mambagen.errors import InputError, ResourceError, UsageError

log = logging.getLogger("mambagen")

PREPARE_FROM = 1 << 28  # bases: from here on a genome is mapped from its prepared file, not held in memory

Row = dict[str, Any]


def prepared_folder() -> Path:
    """Where prepared genomes are kept."""
    return cache_home() / "prepared"


def open_genome(
    data: Sequence[str | Path], tokenizer: DnaTokenizer | None = None, prepare_from: int = PREPARE_FROM
) -> Genome:
    """The genome behind what a user gave as data; from ``prepare_from`` bases on it is mapped from the cache.

    Raises:
        InputError, UsageError: as ``resolve_dna`` and the readers do.
    """
    paths = resolve_dna(data)
    if unpacked_size(paths) >= prepare_from:
        try:
            return Genome.from_files(paths, tokenizer, prepared_folder())
        except ResourceError as error:
            log.warning("%s; reading into memory instead", error)
    return Genome.from_files(paths, tokenizer)


def split_rows(data: Sequence[str | Path], genome: Genome, bed: str | Path | None = None) -> list[Interval]:
    """The intervals that divide a genome: those of a BED file, or else those that its data sets bring."""
    if bed is not None:
        return list(read_bed(bed))
    rows: list[Interval] = list(default_splits(data))
    for paths, labels in chromosomes_of(data):
        own = {str(path) for path in paths}
        rows += chromosome_intervals([record for record in genome.records if record.path in own], labels)
    return rows


def prepare_data(
    data: Sequence[str],
    lower_case: str,
    done: Callable[[list[Row]], None],
    progress: Progress | None = None,
) -> None:
    """Prepare each file behind ``data`` in the cache and hand its row to ``done``; a bad file does not stop the others.

    Raises:
        InputError, ResourceError: at the end, for the files that could not be prepared.
    """
    tokenizer = DnaTokenizer.model_validate({"lower_case": lower_case})
    failures: list[InputError] = []
    for path in resolve_dna(data):
        if str(path) == "-":
            raise UsageError("stdin cannot be prepared: a prepared genome is found again by its file")
        began = time.monotonic()
        try:
            found = prepare(path, tokenizer, prepared_folder(), progress)
        except InputError as error:
            failures.append(error)
            continue
        done(
            [
                {
                    "source": str(path),
                    "records": len(found.records),
                    "bases": found.bases,
                    "state": "made" if found.made else "was there",
                    "seconds": round(time.monotonic() - began, 2),
                    "path": str(found.path),
                }
            ]
        )
    if failures:
        raise InputError("; ".join(str(failure) for failure in failures))


def audit_data(data: Sequence[str], lengths: Sequence[int], bed: str | Path | None = None) -> list[Row]:
    """How many held-out bases training windows of each length can reach, by the way that windows are drawn.

    A row for each length and way: inside of training stretches, around intervals as published, and around intervals
    with ``--strict-split``. ``starts`` counts different windows, ``overlap_valid`` and ``overlap_test`` distinct bases.

    Raises:
        InputError: the data are not divided.
    """
    genome = open_genome(data)
    rows = split_rows(data, genome, bed)
    train, valid = genome.hold_out(0.1, intervals=rows)
    parts = {
        split: held_out(genome.records, [row for row in rows if row[3] == split]) for split in ("valid", "test")
    } if rows else {"valid": _spans(valid), "test": {}}  # fmt: skip
    found: list[Row] = []
    for length in lengths:
        for way in ("stretches", "intervals", "intervals --strict-split"):
            if way != "stretches" and not any(row[3] == "train" for row in rows):
                continue
            row: Row = {"length": length, "windows": way}
            try:
                sampler = (
                    WindowSampler(train, length - 1, 1, seed=0)
                    if way == "stretches"
                    else IntervalSampler(train, rows, length - 1, 1, seed=0, strict=way != "intervals")
                )
            except InputError:  # no room for a window of this length
                found.append(row | {"starts": 0, "overlap_valid": 0, "overlap_test": 0, "share_of_held_out": 0.0})
                continue
            reach = sampler.reach()
            shared = {split: overlap(reach, spans) for split, spans in parts.items()}
            held = sum(b - a for spans in parts.values() for s in spans.values() for a, b in union(s))
            found.append(
                row
                | {
                    "starts": sampler.starts,
                    "overlap_valid": shared["valid"],
                    "overlap_test": shared["test"],
                    "share_of_held_out": round(sum(shared.values()) / held, 6) if held else 0.0,
                }
            )
    return found


def simulate(out: str | Path, **settings: Any) -> list[Row]:
    """Write simulated species to a folder; a row a species. See ``mambagen.data.simulate.simulate_species``."""
    from mambagen.data.simulate import simulate_species

    made = simulate_species(out=out, **settings)
    depth = {made.tree.nodes[tip].name: tip for tip in made.tree.tips()}
    return [
        {
            "species": name,
            "chromosomes": len(records),
            "bases": sum(map(len, records.values())),
            "nearest": min((made.tree.distance(depth[name], depth[other]), other) for other in depth if other != name)[
                1
            ],
            "divergence_to_nearest": round(
                min(made.tree.distance(depth[name], depth[other]) for other in depth if other != name), 6
            ),
            "path": str(made.files[name]),
        }
        for name, records in made.genomes.items()
    ]


def _spans(stretches: Any) -> dict[int, list[Span]]:
    spans: dict[int, list[Span]] = {}
    for record, start, end in stretches:
        spans.setdefault(record, []).append((start, end))
    return spans
