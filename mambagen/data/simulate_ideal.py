"""How well any classifier can tell simulated species apart, by the length of what it sees.

Composition is the same everywhere, and on a chromosome that was in no training data a substitution or a short indel
cannot be told from the ancestor's own bases. What is left are the repeats that came after the ancestor: a copy that
came on a branch excludes every species not below that branch. An ideal classifier that is told of each base on which
branch it came (more than a real one can see) knows the set of species that fit; their chances are alike as long as
all tips are equally deep, so it is right with one over the size of that set.
"""

from dataclasses import dataclass

import numpy as np

from mambagen.data.phylogeny import Tree
from mambagen.data.simulate import SimulatedSpecies, SpeciesModel


@dataclass(frozen=True)
class IdealAccuracy:
    """Mean over windows, and its standard error."""

    accuracy: float
    error: float
    windows: int


def ideal_accuracy(
    simulated: SimulatedSpecies, length: int, windows: int = 2000, split: str = "test", seed: int = 0
) -> IdealAccuracy:
    """What an ideal classifier reaches on windows of ``length`` bases of the simulated chromosomes of a split.

    Windows are drawn as evaluations draw them: a species, a record of its by length, a start, each uniformly. Raises
    ValueError where no record of the split is that long.
    """
    tree = simulated.tree
    fits = _species_below(tree)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(3, length))))
    records: dict[str, list[str]] = {}
    for record, start, end, part, species in simulated.splits:
        if part == split and end - start >= length:
            records.setdefault(species, []).append(record)
    if len(records) < len(simulated.genomes):
        raise ValueError(f"no {split} record of every species has {length} bases")
    chances = np.empty(windows)
    names = simulated.species
    for i in range(windows):
        own = records[names[int(rng.integers(len(names)))]]
        starts = np.array([len(simulated.origins[record]) - length + 1 for record in own])
        drawn = int(rng.integers(starts.sum()))
        which = int(np.searchsorted(np.cumsum(starts), drawn, side="right"))
        first = drawn - int(starts[:which].sum())
        seen = np.flatnonzero(np.bincount(simulated.origins[own[which]][first : first + length]))
        chances[i] = 1 / _fitting(fits, [int(origin) - 1 for origin in seen if origin > 1])
    error = float(chances.std(ddof=1) / np.sqrt(windows)) if windows > 1 else float("nan")
    return IdealAccuracy(float(chances.mean()), error, windows)


def expected_ideal_accuracy(model: SpeciesModel, length: int, draws: int = 20_000) -> float:
    """The same without simulating genomes, by length and divergence.

    Copies that overlap a window come by a Poisson process, a branch of length t giving repeat_rate t (length + mean
    copy - 1) of them, less what later deletions took. Each branch is then seen with a chance of its own; the sets of
    species that fit are averaged over ``draws`` (for a star tree the value is exact: 1 - exp(-n) (1 - 1/species)).
    """
    tree = model.build_tree()
    chance = {node: 1 - np.exp(-copies_seen(model, tree, node, length)) for node in range(1, len(tree.nodes))}
    tips = tree.tips()
    if len(tree.nodes) == len(tips) + 1:
        return float(np.mean([chance[tip] + (1 - chance[tip]) / len(tips) for tip in tips]))
    fits = _species_below(tree)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(model.seed, spawn_key=(4, length))))
    total = 0.0
    for tip in tips:
        path = tree.path(tip)
        seen = rng.random((draws // len(tips) + 1, len(path))) < np.array([chance[node] for node in path])
        # The deepest branch seen decides: the species below it are among those below the ones before.
        deepest = np.where(seen.any(axis=1), len(path) - 1 - seen[:, ::-1].argmax(axis=1), -1)
        sizes = np.array([len(tips), *(len(fits[node]) for node in path)])
        total += float((1 / sizes[deepest + 1]).mean())
    return total / len(tips)


def copies_seen(model: SpeciesModel, tree: Tree, node: int, length: int) -> float:
    """The expected number of copies from the branch to ``node`` in a window below it (where deletions are rare)."""
    low, high = model.shortest_repeat, model.longest_repeat
    mean_family = (high - low) / np.log(high / low) if high > low else float(low)
    mean_copy = 0.75 * mean_family
    return float(model.repeat_rate * tree.nodes[node].length * (length + mean_copy - 1))


def _species_below(tree: Tree) -> list[set[int]]:
    """The tips below each node."""
    below: list[set[int]] = [set() for _ in tree.nodes]
    for tip in tree.tips():
        below[0].add(tip)
        for node in tree.path(tip):
            below[node].add(tip)
    return below


def _fitting(below: list[set[int]], branches: list[int]) -> int:
    fits = below[0]
    for node in branches:
        fits = fits & below[node]
    return max(1, len(fits))
