"""Small genomes of species that are told apart by composition, with their division."""

from pathlib import Path

from tests.data.helpers import random_dna

LETTERS = {"alpha": b"AATTCG", "beta": b"ACGT", "gamma": b"ACCGGT", "delta": b"ACCGGT", "tiny": b"AC", "short": b"AC"}


def genomes(folder: Path) -> tuple[Path, Path]:
    """Species of 24 kb; delta is as gamma but shorter, tiny too little, short in pieces."""
    (folder / "genomes").mkdir()
    rows = []
    for i, (name, letters) in enumerate(LETTERS.items()):
        length = {"delta": 20_000, "tiny": 6000}.get(name, 24_000)
        count = 40 if name == "short" else 1
        texts = [random_dna(length // count, 100 * i + k, letters) for k in range(count)]
        (folder / "genomes" / f"{name}.fa").write_text(
            "".join(f">{name}.{k}\n{text}\n" for k, text in enumerate(texts))
        )
        for k, text in enumerate(texts):
            cut = [0, int(0.7 * len(text)), int(0.85 * len(text)), len(text)]
            for split, start, end in zip(("train", "valid", "test"), cut, cut[1:], strict=False):
                rows.append(f"{name}.{k}\t{start}\t{end}\t{split}\t{name}")
    (folder / "splits.bed").write_text("\n".join(rows) + "\n")
    return folder / "genomes", folder / "splits.bed"
