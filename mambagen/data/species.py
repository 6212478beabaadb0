"""Genomes of several species, each divided into training, validation and test stretches that share no base.

The species of a record is the name of its file up to the first dot, of its folder where each species has one, or what
the fifth column of a splits BED says:

    genomes/human.fa.gz                     human.chr22  0        800000   train  human
    genomes/mouse.fa.gz                     human.chr22  800000   900000   valid  human
    genomes/cow/chr1.fa, genomes/cow/...    human.chr22  900000   1000000  test   human
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mambagen.data.genome import Genome, Span, Stretches, subtract, union
from mambagen.errors import InputError, UsageError

log = logging.getLogger("mambagen")

ENDINGS = (".fa", ".fasta", ".fna", ".fas", ".gb", ".gbk", ".gbff", ".genbank", ".2bit")
PACKED = (".gz", ".bgz", ".bgzip")
SPLITS = ("train", "valid", "test")

Interval = tuple[str, int, int, str]  # record, start, end, split


@dataclass(frozen=True)
class SpeciesParts:
    """What each species has of each part; all tuples are in the order of `species`, which is that of the alphabet."""

    species: tuple[str, ...]
    train: tuple[Stretches, ...]
    valid: tuple[Stretches, ...]
    test: tuple[Stretches, ...]

    def part(self, split: str) -> tuple[Stretches, ...]:
        """The stretches of "train", "valid" or "test"."""
        return {"train": self.train, "valid": self.valid, "test": self.test}[split]

    def only(self, names: Sequence[str]) -> "SpeciesParts":
        """Some of the species."""
        rows = [i for i, name in enumerate(self.species) if name in names]
        parts = (tuple(part[i] for i in rows) for part in (self.train, self.valid, self.test))
        return SpeciesParts(tuple(self.species[i] for i in rows), *parts)

    def fingerprints(self, split: str) -> dict[str, str]:
        """Species -> digits that change when a stretch's name, place or sequence does."""
        return {name: part.fingerprint() for name, part in zip(self.species, self.part(split), strict=True)}


def species_files(folder: Path) -> dict[str, list[Path]]:
    """Species -> its sequence files, of a folder that holds a file, or a folder of files, for each.

    Raises:
        InputError: there is none.
    """
    found: dict[str, list[Path]] = {}
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        raise InputError.at(folder, None, f"the folder cannot be read: {error.strerror}") from None
    for path in inside:
        if path.name.startswith("."):
            continue
        if path.is_dir():
            files = [file for file in sorted(path.iterdir()) if _is_sequence(file)]
            if files:
                found.setdefault(path.name, []).extend(files)
        elif _is_sequence(path):
            found.setdefault(species_of(path), []).append(path)
    if not found:
        kinds = ", ".join(ENDINGS[:4])
        raise InputError.at(folder, None, f"no sequence file in it; a species is a file ({kinds}; .gz) or a folder")
    return found


def _is_sequence(path: Path) -> bool:
    name = path.name.lower()
    for ending in PACKED:
        name = name.removesuffix(ending)
    return path.is_file() and not path.name.startswith(".") and name.endswith(ENDINGS)


def species_of(path: Path | str) -> str:
    """The species of a file: its name up to the first dot."""
    return Path(path).name.split(".")[0]


def species_column(bed: Path | str) -> dict[str, str]:
    """Record -> species, by the fifth column of a splits BED; empty where it has four columns.

    Raises:
        InputError: names the line where a record changes its species, or a row has none while others do; or the file
            cannot be read.
    """
    found: dict[str, str] = {}
    lines: dict[str, int] = {}
    without: int | None = None
    try:
        text = Path(bed).read_text("utf-8")
    except OSError as error:
        raise InputError.at(bed, None, f"the splits cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError.at(bed, None, "the splits are no text; give a plain BED file") from None
    for number, line in enumerate(text.split("\n"), start=1):
        fields = line.split()
        if len(fields) < 4 or fields[0].startswith("#") or fields[0] in ("track", "browser"):
            continue
        if len(fields) == 4:
            without = without or number
            continue
        record, species = fields[0], fields[4]
        if found.setdefault(record, species) != species:
            raise InputError.at(
                bed, number, f"record '{record}' is {species} here and {found[record]} in line {lines[record]}"
            )
        lines.setdefault(record, number)
    if found and without:
        raise InputError.at(bed, without, "no species in this row (the fifth column), while other rows name one")
    return found


def read_species(genome: Genome, by_file: Mapping[str, str], by_record: Mapping[str, str]) -> list[str]:
    """The species of each record of a genome: by `by_record`, where that names any of them, else by its file.

    Raises:
        InputError: a record that `by_record` does not name, where it names others.
    """
    names = []
    use_records = any(record.id in by_record for record in genome.records)
    for record in genome.records:
        if not use_records:
            names.append(by_file.get(record.path, species_of(record.path)))
        elif record.id in by_record:
            names.append(by_record[record.id])
        else:
            raise InputError.at(
                record.path, record.line, f"record '{record.id}' has no species in the splits, where others have one"
            )
    return names


def divide(
    genome: Genome,
    species: Sequence[str],
    intervals: Sequence[Interval] = (),
    fractions: tuple[float, float] = (0.1, 0.1),
    records: tuple[Sequence[str], Sequence[str]] = ((), ()),
    seed: int = 0,
) -> SpeciesParts:
    """Divide the records of each species into training, validation and test stretches.

    Args:
        species: of each record.
        intervals: (record, start, end, split), 0-based and half-open. Where some are given they rule: test is what
            they call so, validation theirs less test, training theirs less both. A record that they do not name is
            left out with a warning.
        fractions: else, the shares of each species that become validation and test: of each record one stretch,
            placed by `seed` and the record's name, its first part validation and its last test.
        records: or names of records for validation and for test, as they are or without what stands before the colon
            (a name that several files share is FILE:NAME): the same chromosomes of every species.

    Raises:
        InputError: intervals that do not fit their records, or name none. UsageError: unknown records, fractions that
            leave nothing, fewer than two species with training sequence.
    """
    if intervals:
        spans = _by_intervals(genome, intervals)
    elif records[0] or records[1]:
        spans = _by_records(genome, records)
    else:
        spans = _by_fraction(genome, species, fractions, seed)
    parts: dict[str, dict[str, list[tuple[int, int, int]]]] = {}
    for i, (name, mine) in enumerate(zip(species, spans, strict=True)):
        for split in SPLITS:
            rows = [(i, start, end) for start, end in mine[split]]
            parts.setdefault(name, {}).setdefault(split, []).extend(rows)
    names = []
    for name in sorted(parts):
        if parts[name]["train"]:
            names.append(name)
        else:
            log.warning("species %s has no training sequence and is left out", name)
    if len(names) < 2:
        what = f"only {names[0]} has" if names else "no species has"
        raise InputError(f"{what} training sequence; a classifier needs two species: a file each, or a splits column")
    columns = [
        tuple(Stretches(genome.records, parts[name][split], genome.tokenizer) for name in names) for split in SPLITS
    ]
    return SpeciesParts(tuple(names), *columns)


def _by_intervals(genome: Genome, intervals: Sequence[Interval]) -> list[dict[str, list[Span]]]:
    index = {record.id: i for i, record in enumerate(genome.records)}
    named: list[dict[str, list[Span]]] = [{split: [] for split in SPLITS} for _ in genome.records]
    touched = set()
    for name, start, end, split in intervals:
        if name not in index:
            continue  # the intervals of a data set may name more than was loaded
        record = genome.records[index[name]]
        if not 0 <= start < end <= len(record):
            raise InputError(
                f"interval {name}:{start}-{end} does not fit its record of {len(record)} bases "
                f"({record.path}:{record.line}); are the splits of this assembly?"
            )
        if split not in SPLITS:
            raise InputError(f"interval {name}:{start}-{end}: the split must be train, valid or test, not '{split}'")
        named[index[name]][split].append((start, end))
        touched.add(index[name])
    if not touched:
        raise InputError(f"the splits name no record of the data (they name '{intervals[0][0]}' first)")
    missing = [record for i, record in enumerate(genome.records) if i not in touched]
    if missing:
        named_first = ", ".join(f"'{record.id}' ({record.path}:{record.line})" for record in missing[:3])
        log.warning("the splits do not name %d records, which are left out: %s", len(missing), named_first)
    for i in range(len(genome.records)):
        test = union(named[i]["test"])
        valid = subtract(union(named[i]["valid"]), test)
        train = subtract(union(named[i]["train"]), union([*valid, *test]))
        named[i] = {"train": train, "valid": valid, "test": test}
    return named


def _by_records(genome: Genome, records: tuple[Sequence[str], Sequence[str]]) -> list[dict[str, list[Span]]]:
    valid, test = set(records[0]), set(records[1])
    if both := valid & test:
        raise UsageError(f"record '{min(both)}' is to be both validation and test")
    spans: list[dict[str, list[Span]]] = []
    met = set()
    for record in genome.records:
        names = {record.id, record.id.rpartition(":")[2]}
        split = "test" if names & test else "valid" if names & valid else "train"
        met |= names & (valid | test)
        spans.append({name: [(0, len(record))] if name == split else [] for name in SPLITS})
    if missing := (valid | test) - met:
        some = ", ".join(record.id for record in genome.records[:5])
        raise UsageError(f"no record '{min(missing)}' to hold out; the data has {some}, ...")
    return spans


def _by_fraction(
    genome: Genome, species: Sequence[str], fractions: tuple[float, float], seed: int
) -> list[dict[str, list[Span]]]:
    valid, test = fractions
    if not (valid >= 0 and test >= 0 and 0 < valid + test < 1):
        raise UsageError(f"the held-out shares, {valid:g} and {test:g}, must be above 0 and together below 1")
    spans: list[dict[str, list[Span]]] = [{split: [] for split in SPLITS} for _ in genome.records]
    for name in sorted(set(species)):  # each by itself, so that each has its share
        rows = [i for i, other in enumerate(species) if other == name]
        own = Genome([genome.records[i] for i in rows], genome.tokenizer)
        train, held = own.hold_out(valid + test, seed=seed)
        for row, start, end in train:
            spans[rows[row]]["train"].append((start, end))
        for row, start, end in held:
            middle = start + round((end - start) * valid / (valid + test))
            spans[rows[row]]["valid"] += [(start, middle)] if middle > start else []
            spans[rows[row]]["test"] += [(middle, end)] if end > middle else []
    return spans
