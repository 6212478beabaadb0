"""Where the genomes of a species classifier come from: files, folders, data sets by name, or a simulation."""

import os
from dataclasses import dataclass
from pathlib import Path

from mambagen.data.dna_tokens import DnaTokenizer
from mambagen.data.genome import EncodedRecord, Genome
from mambagen.data.intervals import Interval
from mambagen.data.simulate import simulate_species
from mambagen.data.species import SpeciesParts, divide, read_species, species_column, species_files, species_of
from mambagen.data_manifests import manifest_names, resolve_dna
from mambagen.errors import InputError, UsageError
from mambagen.pipelines.genomes import open_genome, split_rows

SIMULATED = "simulated"


@dataclass(frozen=True)
class SpeciesSource:
    """What a user gave: data sets, folders or files, how they are divided, and which species are wanted."""

    data: tuple[str, ...] = ()  # none: simulated
    splits: str | None = None
    species: tuple[str, ...] = ()  # none: all
    valid_fraction: float = 0.1
    test_fraction: float = 0.1
    valid_records: tuple[str, ...] = ()
    test_records: tuple[str, ...] = ()
    seed: int = 0
    simulated_species: int = 5
    simulated_length: int = 500_000
    divergence: float = 0.05

    def read(self, tokenizer: DnaTokenizer | None = None) -> SpeciesParts:
        """The genomes, divided.

        Raises:
            InputError: files that cannot be used, or fewer than two species. UsageError: species or records that are
                not there.
        """
        tokenizer = tokenizer or DnaTokenizer()
        if not self.data:
            return self._only(self._simulated(tokenizer))
        by_file = self.files()
        known = set(by_file.values())
        column = species_column(self.splits) if self.splits else {}
        wanted = set(self.species)
        if wanted and (not column or wanted <= set(by_file.values())):  # no need to read the others
            by_file = {path: name for path, name in by_file.items() if name in wanted}
        if not column and (missing := wanted - set(by_file.values())):
            raise UsageError(f"no species '{min(missing)}' among the data; there are {', '.join(sorted(known))}")
        if not by_file:
            raise UsageError(f"none of the species {', '.join(sorted(wanted))} is among the data")
        genome = open_genome(list(by_file), tokenizer)
        species = read_species(genome, by_file, column)
        if wanted:  # records of others are not wanted: no warning of what the splits say of them
            kept = [i for i, name in enumerate(species) if name in wanted]
            genome = Genome([genome.records[i] for i in kept], tokenizer)
            species = [species[i] for i in kept]
        if not genome.records:
            raise UsageError(f"none of the species {', '.join(sorted(wanted))} is among the data")
        records = (self.valid_records, self.test_records)
        return self._only(
            divide(
                genome, species, self.intervals(genome), (self.valid_fraction, self.test_fraction), records, self.seed
            )
        )

    def files(self) -> dict[str, str]:
        """File -> species."""
        found: dict[str, str] = {}
        for given in self.data:
            if os.path.isdir(given):
                for name, paths in species_files(Path(given)).items():
                    found |= {str(path): name for path in paths}
            else:
                found |= {str(path): species_of(path) for path in resolve_dna([given])}
        return found

    def intervals(self, genome: Genome) -> list[Interval]:
        """Of the splits file; else, unless records are named, those of the data sets."""
        if not self.splits and (self.valid_records or self.test_records):
            return []
        named = [given for given in self.data if not os.path.isdir(given)]
        rows = split_rows(named, genome, self.splits)
        if self.splits and not rows:
            raise InputError.at(self.splits, None, "no row in it; a row is record, start, end, train|valid|test")
        return rows

    def title(self) -> str:
        """For cards and reports."""
        if not self.data:
            return f"{self.simulated_species} simulated species"
        return ", ".join(Path(given).name or given for given in self.data[:3]) + (" ..." if self.data[3:] else "")

    def absolute(self) -> tuple[tuple[str, ...], str | None]:
        """`data` and `splits` by absolute paths."""
        known = manifest_names()
        data = tuple(given if given in known or given == "-" else os.path.abspath(given) for given in self.data)
        return data, os.path.abspath(self.splits) if self.splits else None

    def _simulated(self, tokenizer: DnaTokenizer) -> SpeciesParts:
        made = simulate_species(self.simulated_species, self.divergence, self.simulated_length, self.seed)
        records, species = [], []
        for name, chromosomes in made.genomes.items():
            for record, letters in chromosomes.items():
                records.append(EncodedRecord(record, tokenizer.encode(letters), SIMULATED, 1))
                species.append(name)
        genome = Genome(records, tokenizer)
        return divide(genome, species, [(row[0], row[1], row[2], row[3]) for row in made.splits])

    def _only(self, parts: SpeciesParts) -> SpeciesParts:
        if missing := set(self.species) - set(parts.species):
            raise UsageError(f"no species '{min(missing)}' with training data; there are {', '.join(parts.species)}")
        found = parts.only(self.species) if self.species else parts
        if len(found.species) < 2:
            raise InputError(f"only {found.species[0]} has training sequence; a classifier needs two species")
        return found


def lower_as_unknown(source: SpeciesSource) -> SpeciesParts | None:
    """The same genomes with lower-case letters as N, for the check of that shortcut; None where there is no case."""
    if not source.data or "-" in source.data:
        return None
    return source.read(DnaTokenizer(lower_case="n"))
