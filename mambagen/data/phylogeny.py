"""Trees of species: drawn, read from Newick text and written as such."""

import re
from dataclasses import dataclass

import numpy as np

from mambagen.errors import UsageError


@dataclass(frozen=True)
class Node:
    """A node and the branch that leads to it: ``length`` in expected substitutions a site; the root has no parent."""

    name: str
    parent: int  # index of the parent, which comes before; -1 for the root
    length: float


@dataclass(frozen=True)
class Tree:
    """Nodes with parents before children; node 0 is the root."""

    nodes: tuple[Node, ...]

    def children(self, node: int) -> list[int]:
        """Indices of the nodes below, next to this one."""
        return [i for i, other in enumerate(self.nodes) if other.parent == node]

    def tips(self) -> list[int]:
        """Indices of the species."""
        parents = {node.parent for node in self.nodes}
        return [i for i in range(len(self.nodes)) if i not in parents]

    def path(self, node: int) -> list[int]:
        """The nodes from below the root down to this one."""
        way: list[int] = []
        while node > 0:
            way.append(node)
            node = self.nodes[node].parent
        return way[::-1]

    def depth(self, node: int) -> float:
        """Substitutions a site from the root."""
        return sum(self.nodes[i].length for i in self.path(node))

    def distance(self, one: int, other: int) -> float:
        """Substitutions a site between two nodes."""
        apart = set(self.path(one)) ^ set(self.path(other))
        return sum(self.nodes[i].length for i in apart)

    def scaled(self, divergence: float) -> "Tree":
        """The same with lengths multiplied so that the species farthest from each other are ``divergence`` apart."""
        tips = self.tips()
        widest = max(self.distance(a, b) for a in tips for b in tips)
        if widest <= 0:
            raise UsageError("the tree has no branch longer than 0; give its branches lengths")
        factor = divergence / widest
        return Tree(tuple(Node(node.name, node.parent, node.length * factor) for node in self.nodes))

    def newick(self) -> str:
        """Newick text with the names of species and inner nodes and the branches' lengths."""

        def text(node: int) -> str:
            below = self.children(node)
            inside = f"({','.join(text(child) for child in below)})" if below else ""
            length = f":{self.nodes[node].length:.10g}" if node else ""
            return f"{inside}{self.nodes[node].name}{length}"

        return text(0) + ";"


def star_tree(species: int) -> Tree:
    """All species from one ancestor, equally far from each other."""
    return Tree((Node("root", -1, 0.0), *(Node(f"sp{i + 1}", 0, 0.5) for i in range(species))))


def yule_tree(species: int, rng: np.random.Generator) -> Tree:
    """A tree of pure birth with ``species`` tips, all at one depth; who splits is drawn.

    The times between splits are the expected ones, 1/k where there are k lineages, so that no two species are all but
    the same by chance; the depth is 1/2.
    """
    if species < 2:
        return star_tree(species)
    waits = [1 / k for k in range(2, species + 1)]
    total = sum(waits)
    parents, lengths = [-1, 0, 0], [0.0, 0.0, 0.0]
    living = [1, 2]
    for wait in waits:
        for node in living:
            lengths[node] += wait / total / 2
        if len(living) < species:
            split = living.pop(int(rng.integers(len(living))))
            parents += [split, split]
            lengths += [0.0, 0.0]
            living += [len(parents) - 2, len(parents) - 1]
    names, inner = {}, 0
    tips = sorted(set(range(len(parents))) - set(parents))
    for i in range(1, len(parents)):
        if i not in tips:
            inner += 1
        names[i] = f"sp{tips.index(i) + 1}" if i in tips else f"anc{inner}"
    return Tree((Node("root", -1, 0.0), *(Node(names[i], parents[i], lengths[i]) for i in range(1, len(parents)))))


def parse_newick(text: str) -> Tree:
    """A tree from Newick text: every branch has a length, every species a name, which must be fit for a file.

    Raises UsageError, saying what is wrong and where.
    """
    nodes: list[Node] = [Node("root", -1, 0.0)]
    words = re.findall(r"[(),;]|:[^(),;:]*|[^(),;:]+", "".join(text.split()))
    at = 0
    stack: list[int] = []
    current = 0
    began = False

    def wrong(what: str) -> UsageError:
        return UsageError(f"the tree {text[:40]!r}...: {what} (Newick, as in '((a:1,b:1):2,c:3);')")

    while at < len(words):
        word = words[at]
        at += 1
        if word == "(":
            stack.append(current)
            nodes.append(Node("", current, 0.0))
            current, began = len(nodes) - 1, True
        elif word == ",":
            if not stack:
                raise wrong("a comma outside of brackets")
            nodes.append(Node("", stack[-1], 0.0))
            current = len(nodes) - 1
        elif word == ")":
            if not stack:
                raise wrong("a bracket closes that was not opened")
            current = stack.pop()
        elif word.startswith(":"):
            try:
                length = float(word[1:])
            except ValueError:
                raise wrong(f"{word!r} is no length") from None
            if not 0 <= length < float("inf"):
                raise wrong(f"{word!r} is no length")
            nodes[current] = Node(nodes[current].name, nodes[current].parent, length)
        elif word != ";":
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", word):
                raise wrong(f"{word!r} is no name that a file can have")
            nodes[current] = Node(word, nodes[current].parent, nodes[current].length)
    if stack or not began:
        raise wrong("a bracket is open at the end" if stack else "it has no species")
    tree = Tree(tuple(nodes))
    names = [nodes[i].name for i in tree.tips()]
    if "" in names or len(set(names)) < len(names):
        raise wrong("every species needs a name of its own")
    named = [
        node if node.name else Node("root" if i == 0 else f"anc{i}", node.parent, node.length)
        for i, node in enumerate(nodes)
    ]
    return Tree(tuple(named))
