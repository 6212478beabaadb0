"""Genomes of species that never were: evolved along a tree, so that everything about them is known.

An ancestor's chromosomes pass down a tree. On each branch bases are substituted (HKY85, rates that vary by a gamma
distribution and stay with their site), short pieces are lost and gained, and copies of repeats are inserted anywhere
while as much is deleted elsewhere. The families of repeats change along the tree too, faster than the genome: that
is what tells the species apart on a chromosome that nobody has seen. The process is at equilibrium and the same on
every branch, so composition says nothing, and what an ideal classifier can reach is known
(``mambagen.data.simulate_ideal``).

    simulated = simulate_species(5, divergence=0.01, length=2_000_000, seed=0, out="species")
    simulated.files["sp1"], simulated.splits, simulated.tree.newick()
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mambagen.data.phylogeny import Tree, parse_newick, star_tree, yule_tree
from mambagen.data.substitution import (
    CATEGORIES,
    HKY,
    equilibrium_bases,
    frequencies_of,
    substitute,
    substitute_each,
)
from mambagen.errors import ResourceError, UsageError

LETTERS = np.frombuffer(b"ACGT", dtype=np.uint8)
LINE = 60  # bases a line of the FASTA files


class SpeciesModel(BaseModel):
    """What is simulated. Rates are a site and a unit of time, in which a site is substituted once on average."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    species: int = Field(5, ge=2, le=1000)
    divergence: float = Field(0.01, gt=0, le=10)  # substitutions a site between the two species farthest apart
    length: int = Field(2_000_000, ge=1000)  # bases a species, all chromosomes together, about
    seed: int = Field(0, ge=0, lt=2**63)
    tree: str = "yule"  # "yule", "star" (all equally far) or Newick text, whose species and shape then count
    chromosomes: int = Field(5, ge=1, le=1000)  # equally long; the last is for testing, the one before for validation
    gc: float = Field(0.41, gt=0, lt=1)
    kappa: float = Field(4.0, gt=0)
    alpha: float = Field(0.5, gt=0)
    indel_rate: float = Field(0.1, ge=0)  # short insertions and deletions, as many of each
    indel_length: float = Field(4.0, ge=1)  # mean of their geometric distribution
    repeat_rate: float = Field(0.01, ge=0)  # insertions of repeats
    families: int = Field(4, ge=1, le=1000)  # of repeats that are active on a branch
    shortest_repeat: int = Field(200, ge=20)
    longest_repeat: int = Field(2000, ge=20)
    family_speed: float = Field(20.0, ge=0)  # substitutions in the active families, as a multiple of the genome's
    old_repeats: float = Field(0.2, ge=0, le=0.9)  # share of the ancestor that is repeats already
    old_age: float = Field(0.25, ge=0)  # the oldest of them, in substitutions a site

    @model_validator(mode="after")
    def _fits(self) -> "SpeciesModel":
        if self.longest_repeat < self.shortest_repeat:
            raise ValueError("longest_repeat is less than shortest_repeat")
        if self.length < 1000 * self.chromosomes:
            raise ValueError(f"{self.chromosomes} chromosomes need a length of {1000 * self.chromosomes} or more")
        return self

    def hky(self) -> HKY:
        """The model of substitution."""
        return HKY(tuple(frequencies_of(self.gc)), self.kappa, self.alpha)  # type: ignore[arg-type]

    def build_tree(self) -> Tree:
        """The species' tree, scaled to the divergence."""
        if self.tree == "star":
            tree = star_tree(self.species)
        elif self.tree == "yule":
            tree = yule_tree(self.species, _random(self.seed, 0))
        else:
            tree = parse_newick(self.tree)
        return tree.scaled(self.divergence)


@dataclass(frozen=True)
class SimulatedSpecies:
    """The genomes and the truth about them."""

    model: SpeciesModel
    tree: Tree
    genomes: dict[str, dict[str, NDArray[np.uint8]]]  # species -> record -> (length,) letters A, C, G, T as bytes
    origins: dict[str, NDArray[np.int16]]  # record -> (length,): 1 + the node on whose branch a repeat came, else 0
    splits: tuple[tuple[str, int, int, str, str], ...]  # (record, start, end, train|valid|test, species)
    files: dict[str, Path]  # species -> its FASTA file; empty where none was written

    @property
    def species(self) -> list[str]:
        """Names, in the order of the tree's tips."""
        return list(self.genomes)


def simulate_species(
    species: int = 5,
    divergence: float = 0.01,
    length: int = 2_000_000,
    seed: int = 0,
    out: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
    **model: Any,
) -> SimulatedSpecies:
    """Evolve ``species`` genomes of about ``length`` bases each; the same arguments give the same genomes.

    Args:
        species: how many; with a Newick ``tree`` the number of its tips.
        divergence: expected substitutions a site between the two species farthest apart.
        length: bases a species, over all chromosomes.
        out: a new or empty folder for SPECIES.fa (records SPECIES.chr1, ...), splits.bed (record, start, end, split,
            species), tree.nwk, repeats.bed and parameters.json; None writes nothing.
        model: other fields of ``SpeciesModel``.

    Raises:
        UsageError: impossible settings, or a folder that holds something. ResourceError: the disk refuses.
    """
    try:
        settings = SpeciesModel(species=species, divergence=divergence, length=length, seed=seed, **model)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in fault["loc"])
        what = str(fault["msg"]).removeprefix("Value error, ")
        raise UsageError(f"{key} is {fault['input']!r}: {what}" if key else what) from None
    tree = settings.build_tree()
    if len(tree.tips()) != settings.species:
        settings = settings.model_copy(update={"species": len(tree.tips())})
    folder = _vacant(Path(out)) if out is not None else None
    families = _families(settings, tree)
    genomes: dict[str, dict[str, NDArray[np.uint8]]] = {tree.nodes[tip].name: {} for tip in tree.tips()}
    origins: dict[str, NDArray[np.int16]] = {}
    for chromosome in range(settings.chromosomes):
        if progress:
            progress(f"chromosome {chromosome + 1} of {settings.chromosomes}")
        for tip, strand in _evolved(settings, tree, families, chromosome):
            name = tree.nodes[tip].name
            record = f"{name}.chr{chromosome + 1}"
            genomes[name][record] = LETTERS[strand.bases]
            origins[record] = strand.origins
    splits = tuple(
        (record, 0, len(letters), _split_of(i, settings.chromosomes), name)
        for name, records in genomes.items()
        for i, (record, letters) in enumerate(records.items())
    )
    files = {name: folder / f"{name}.fa" for name in genomes} if folder else {}
    simulated = SimulatedSpecies(settings, tree, genomes, origins, splits, files)
    if folder:
        _write(simulated, folder)
    return simulated


def _split_of(chromosome: int, chromosomes: int) -> str:
    if chromosomes >= 2 and chromosome == chromosomes - 1:
        return "test"
    return "valid" if chromosomes >= 3 and chromosome == chromosomes - 2 else "train"


# ---- evolution ------------------------------------------------------------------------------------------------------


@dataclass
class _Strand:
    """A chromosome on its way: bases 0 to 3, each site's category of rate, and where it came from."""

    bases: NDArray[np.uint8]
    rates: NDArray[np.uint8]
    origins: NDArray[np.int16]

    def __len__(self) -> int:
        return len(self.bases)

    def copy(self) -> "_Strand":
        return _Strand(self.bases.copy(), self.rates.copy(), self.origins.copy())


def _random(seed: int, *stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=stream)))


def _families(model: SpeciesModel, tree: Tree) -> list[list[NDArray[np.uint8]]]:
    """The sequences of the families that are active on the branch to each node; those of the root are the old ones."""
    hky = model.hky()
    rng = _random(model.seed, 1)
    low, high = np.log(model.shortest_repeat), np.log(model.longest_repeat)
    lengths = np.exp(rng.uniform(low, high, model.families)).round().astype(int)
    active: list[list[NDArray[np.uint8]]] = [[equilibrium_bases(hky, int(n), rng) for n in lengths]]
    for node in tree.nodes[1:]:
        time = model.family_speed * node.length
        active.append([substitute_each(f, np.full(len(f), time), hky, rng) for f in active[node.parent]])
    return active


def _evolved(
    model: SpeciesModel, tree: Tree, families: list[list[NDArray[np.uint8]]], chromosome: int
) -> Iterator[tuple[int, _Strand]]:
    """The tips and their chromosome. Only the strands on the way down to one tip are held at a time."""
    root = _ancestor(model, families[0], _random(model.seed, 2, chromosome, 0))
    tips = set(tree.tips())
    stack = [(child, root) for child in reversed(tree.children(0))]
    while stack:
        node, above = stack.pop()
        rng = _random(model.seed, 2, chromosome, node)
        strand = _branch(model, above.copy(), tree.nodes[node].length, node, families[node], rng)
        if node in tips:
            yield node, strand
        stack += [(child, strand) for child in reversed(tree.children(node))]


def _ancestor(model: SpeciesModel, families: list[NDArray[np.uint8]], rng: np.random.Generator) -> _Strand:
    length = model.length // model.chromosomes
    fresh = round(length * (1 - model.old_repeats))
    strand = _Strand(
        equilibrium_bases(model.hky(), fresh, rng),
        rng.integers(0, CATEGORIES, fresh, dtype=np.uint8),
        np.zeros(fresh, dtype=np.int16),
    )
    count = round((length - fresh) / (np.mean([len(f) for f in families]) * _MEAN_SHARE))
    copies, lengths = _copies(model, families, count, model.old_age, 0, rng)
    return _splice(strand, np.empty(0, np.int64), np.empty(0, np.int64), rng.integers(0, fresh + 1, count),
                   lengths, copies)  # fmt: skip


def _branch(
    model: SpeciesModel,
    strand: _Strand,
    time: float,
    node: int,
    families: list[NDArray[np.uint8]],
    rng: np.random.Generator,
) -> _Strand:
    """The strand at the end of a branch.

    Substitutions act on what was there at its beginning; what arrives on the branch is as old as its copies are.
    """
    hky = model.hky()
    substitute(strand.bases, strand.rates, time, hky, rng)
    length = len(strand)
    # short insertions and deletions, as many of each
    gained, lost = rng.poisson(model.indel_rate / 2 * time * length, 2).tolist()
    gain_sizes = rng.geometric(1 / model.indel_length, gained)
    loss_sizes = rng.geometric(1 / model.indel_length, lost)
    gain = int(gain_sizes.sum())
    short = _Strand(
        equilibrium_bases(hky, gain, rng), rng.integers(0, CATEGORIES, gain, dtype=np.uint8), np.zeros(gain, np.int16)
    )
    # copies of repeats, and deletions of the same sizes
    came, went = rng.poisson(model.repeat_rate * time * length, 2).tolist()
    copies, sizes = _copies(model, families, came, time, node, rng)
    _, cut_sizes = _sizes(families, went, rng)
    return _splice(
        strand,
        rng.integers(0, max(1, length), lost + went),
        np.concatenate((loss_sizes, cut_sizes)),
        rng.integers(0, length + 1, gained + came),
        np.concatenate((gain_sizes, sizes)),
        _joined(short, copies),
    )


_MEAN_SHARE = 0.75  # of a family's length that a copy has: half are whole, the others begin anywhere


def _sizes(
    families: list[NDArray[np.uint8]], count: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Family and length of copies; as with real retrotransposons, what is missing is the beginning."""
    family = rng.integers(0, len(families), count)
    whole = np.array([len(f) for f in families])[family]
    share = np.where(rng.random(count) < 0.5, 1.0, rng.random(count))
    return family, np.maximum(1, np.ceil(whole * share)).astype(np.int64)


def _copies(
    model: SpeciesModel,
    families: list[NDArray[np.uint8]],
    count: int,
    oldest: float,
    node: int,
    rng: np.random.Generator,
) -> tuple[_Strand, NDArray[np.int64]]:
    """Copies one after the other, each of some age up to ``oldest`` and on either strand; and their lengths."""
    family, lengths = _sizes(families, count, rng)
    minus = rng.random(count) < 0.5
    ages = rng.uniform(0, oldest, count)
    total = int(lengths.sum())
    pieces = [np.empty(0, dtype=np.uint8)]
    for f, n, reverse in zip(family.tolist(), lengths.tolist(), minus.tolist(), strict=True):
        piece = families[f][len(families[f]) - n :]
        pieces.append(3 - piece[::-1] if reverse else piece)  # complement: A 0 with T 3, C 1 with G 2
    rates = rng.integers(0, CATEGORIES, total, dtype=np.uint8)
    hky = model.hky()
    bases = substitute_each(np.concatenate(pieces), np.repeat(ages, lengths) * hky.rates()[rates], hky, rng)
    return _Strand(bases, rates, np.full(total, node + 1, dtype=np.int16)), lengths


def _joined(one: _Strand, other: _Strand) -> _Strand:
    return _Strand(
        np.concatenate((one.bases, other.bases)),
        np.concatenate((one.rates, other.rates)),
        np.concatenate((one.origins, other.origins)),
    )


def _splice(
    strand: _Strand,
    cut_starts: NDArray[np.int64],
    cut_lengths: NDArray[np.int64],
    at: NDArray[np.int64],
    lengths: NDArray[np.int64],
    content: _Strand,
) -> _Strand:
    """Without the cuts, and with the pieces of ``content`` (of these lengths, in this order) before positions ``at``.

    Cuts may overlap one another and the end; insertions inside of a cut stay.
    """
    size = len(strand)
    edges = np.zeros(size + 1, dtype=np.int32)
    np.add.at(edges, cut_starts, 1)
    np.add.at(edges, np.minimum(cut_starts + cut_lengths, size), -1)
    kept = np.cumsum(edges[:-1]) == 0
    kept_before = np.concatenate(([0], np.cumsum(kept)))

    order = np.argsort(at, kind="stable")
    begins = np.concatenate(([0], np.cumsum(lengths)))[:-1][order]  # in content
    sorted_at, sorted_lengths = at[order], lengths[order]
    inserted_before = np.concatenate(([0], np.cumsum(sorted_lengths)))
    targets = kept_before[sorted_at] + inserted_before[:-1]
    inside = np.arange(int(inserted_before[-1])) - np.repeat(inserted_before[:-1], sorted_lengths)

    new = np.zeros(int(kept_before[-1] + inserted_before[-1]), dtype=bool)
    new[np.repeat(targets, sorted_lengths) + inside] = True
    source = np.repeat(begins, sorted_lengths) + inside

    def spliced(old: NDArray[Any], fresh: NDArray[Any]) -> NDArray[Any]:
        out = np.empty(len(new), dtype=old.dtype)
        out[~new] = old[kept]
        out[new] = fresh[source]
        return out

    return _Strand(
        spliced(strand.bases, content.bases),
        spliced(strand.rates, content.rates),
        spliced(strand.origins, content.origins),
    )


# ---- files ----------------------------------------------------------------------------------------------------------


def _vacant(folder: Path) -> Path:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder}: exists already; choose another --out")
    return folder


def _write(simulated: SimulatedSpecies, folder: Path) -> None:
    """All files into a folder of a temporary name, which gets its own name last."""
    scratch = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        scratch.mkdir(parents=True)
        for name, records in simulated.genomes.items():
            with open(scratch / f"{name}.fa", "wb") as file:
                for record, letters in records.items():
                    file.write(f">{record}\n".encode())
                    file.write(wrapped(letters, LINE))
        rows = ("\t".join(map(str, row)) + "\n" for row in simulated.splits)
        (scratch / "splits.bed").write_text("".join(rows))
        (scratch / "repeats.bed").write_text("".join(_repeat_rows(simulated)))
        (scratch / "tree.nwk").write_text(simulated.tree.newick() + "\n")
        parameters = simulated.model.model_dump() | {"numpy": np.__version__}
        (scratch / "parameters.json").write_text(json.dumps(parameters, indent=1) + "\n")
        if folder.exists():
            folder.rmdir()
        os.rename(scratch, folder)
    except OSError as error:
        raise ResourceError(f"{folder}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # what is left of a failed or interrupted write


def _repeat_rows(simulated: SimulatedSpecies) -> Iterator[str]:
    """Repeats by the branch on which they came; neighbours of one branch are one row."""
    for record, origins in simulated.origins.items():
        edges = np.flatnonzero(np.diff(origins)) + 1
        starts = np.concatenate(([0], edges))
        ends = np.concatenate((edges, [len(origins)]))
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            if node := int(origins[start]):
                yield f"{record}\t{start}\t{end}\t{simulated.tree.nodes[node - 1].name}\n"


def wrapped(letters: NDArray[np.uint8], width: int) -> bytes:
    """The letters in lines of ``width``, each with its end."""
    whole = len(letters) // width * width
    lines = np.full((whole // width, width + 1), ord("\n"), dtype=np.uint8)
    lines[:, :-1] = letters[:whole].reshape(-1, width)
    rest = letters[whole:].tobytes()
    return lines.tobytes() + (rest + b"\n" if rest else b"")
