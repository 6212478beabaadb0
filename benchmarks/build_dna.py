"""Build the model `dna` that comes with the package: train on genomes, round to bfloat16, measure, write its folder.

    python -m benchmarks.build_dna --data genomes/ --splits splits.bed --run runs/dna --part-minutes 7
    python -m benchmarks.build_dna ... --run runs/dna          # the same again goes on where it stopped

The folder of genomes has a FASTA for each species; the splits are rows of record, start, end, split, species. A part
ends by itself after `--part-minutes`, with a checkpoint and exit code 143, until the training is done; the last part
measures and writes (exit code 0). Windows begin at 1,024 bases and double up to `--context`, as a model that is to read
whole chromosomes with its state must have seen long sequence. Where the training was done elsewhere, `--trained MODEL`
measures and writes that model folder; --run then holds the run's config.toml and metrics.jsonl.

Measured on the test intervals of each species, by the rounded weights: perplexity with the state carried through each
interval, and with windows of several lengths that are read alone, beside the best of some Markov chains fitted on the
same training intervals of all species. The figures go into the model card.
"""

import argparse
import json
import math
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mambagen.data.dna_tokens import DnaTokenizer
from mambagen.data.genome import Genome, Stretches
from mambagen.data.markov import MarkovModel
from mambagen.data.sequence_store import SequenceStore
from mambagen.errors import InterruptedRun
from mambagen.models import MambaLM, load_model
from mambagen.models.builtin import WEIGHTS_HOME
from mambagen.models.files import write_folder_atomically
from mambagen.models.saving import model_card, model_writers
from mambagen.pipelines.likelihood import LanguageModel, Span
from mambagen.pipelines.pretrain_dna import PretrainDnaConfig, PretrainDnaResult, pretrain_dna, resume_pretrain_dna
from mambagen.training.loop import set_threads
from mambagen.training.progress import Progress
from mambagen.training.run_folder import read_metrics

MARKOV_ORDERS = (3, 6, 8, 11)
CONTEXTS = (1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18)
FIRST = "human"  # the species whose perplexity is shown by context
RECIPE: dict[str, Any] = {
    "reverse_complement": True,
    "valid_tokens": 1 << 21,
    "save_every": "3m",
    "keep": 2,
    "seed": 1,
}
LICENCE = (
    "Weights: Apache-2.0, as mambagen. Trained on public genome sequence of the archives (INSDC, UCSC, sequencing "
    "centres), which state no claim on it."
)


@dataclass(frozen=True)
class Training:
    """What the card says of it."""

    checkpoint: Path
    steps: int
    tokens: int
    seconds: float


def main() -> None:
    """Train a part, or measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder of FASTA files, or one file")
    parser.add_argument("--splits", required=True, type=Path, help="BED file: record, start, end, split, species")
    parser.add_argument("--run", required=True, type=Path, help="folder of the work, which a second call goes on with")
    parser.add_argument("--size", default="7m")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--context", type=int, default=1 << 16)
    parser.add_argument("--first-length", type=int, default=1 << 10, help="of the windows that training begins with")
    parser.add_argument("--batch-tokens", type=int, default=1 << 19)
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--part-minutes", type=float, help="stop training after so long, to be gone on with")
    parser.add_argument("--trained", type=Path, help="model folder at the end of a run that was made elsewhere")
    parser.add_argument("--test-bases", type=int, help="measure at most so many test bases of a species (default: all)")
    parser.add_argument("--licence", default=LICENCE)
    parser.add_argument("--out", type=Path, default=WEIGHTS_HOME / "dna")
    options = parser.parse_args()

    files = fasta_files(options.data)
    settings: dict[str, Any] = {
        "data": tuple(map(str, files)),
        "splits": str(options.splits),
        "size": options.size,
        "context": options.context,
        "length_warmup": options.first_length,
        "batch_tokens": options.batch_tokens,
        "steps": options.steps,
        "lr": options.lr,
        "device": options.device,
        "threads": options.threads,
    }
    config = PretrainDnaConfig(**settings, **RECIPE)
    if options.trained:
        rows = [row for row in read_metrics(options.run / "metrics.jsonl") if "tokens" in row]
        last = rows[-1]
        training = Training(options.trained, last["step"], last["tokens"], last["seconds"])
    else:
        try:
            result = train_a_part(config, options.run, options.part_minutes)
        except InterruptedRun as stopped:
            print(f"{stopped}\nnot done yet: run the same command again", file=sys.stderr)
            raise SystemExit(stopped.exit_code) from None
        training = Training(result.checkpoint, result.steps, result.tokens, result.seconds)
    set_threads(options.threads or torch.get_num_threads())
    model = rounded(training.checkpoint)
    figures = measure(model, files, options.splits, options.device, options.test_bases)
    write_weights(model, config, training, figures, options.out, options.licence)
    (options.run / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))
    print(f"written to {options.out}", file=sys.stderr)


def fasta_files(folder: Path) -> list[Path]:
    """The FASTA files of a folder, by name."""
    files = [folder] if folder.is_file() else sorted(p for p in folder.glob("*") if is_fasta(p))
    if not files:
        raise SystemExit(f"{folder}: no FASTA files there")
    return files


def is_fasta(path: Path) -> bool:
    """By its name."""
    return path.name.removesuffix(".gz").endswith((".fa", ".fasta", ".fna"))


def train_a_part(config: PretrainDnaConfig, run: Path, minutes: float | None) -> PretrainDnaResult:
    """Begin the run or go on with it; InterruptedRun where the part's time was over before its end."""
    if minutes:
        alarm = threading.Timer(minutes * 60, os.kill, (os.getpid(), signal.SIGTERM))
        alarm.daemon = True
        alarm.start()
    try:
        with Progress() as progress:
            if (run / "config.toml").exists():
                options = {"steps": config.steps, "device": config.device}
                return resume_pretrain_dna(run, options, None, progress)
            return pretrain_dna(config, run, progress)
    finally:
        if minutes:
            alarm.cancel()


def rounded(checkpoint: Path) -> MambaLM:
    """The trained model with every weight as bfloat16 holds it, which is how they are shipped."""
    model, _ = load_model(checkpoint, kinds=[MambaLM.kind])
    assert isinstance(model, MambaLM)
    model.float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


def measure(
    model: MambaLM, files: Sequence[Path], splits: Path, device: str, at_most: int | None = None
) -> dict[str, Any]:
    """Perplexities on the test intervals of each species (the first `at_most` bases), and by context of one of them."""
    rows = [line.split() for line in splits.read_text().splitlines() if line.strip() and not line.startswith("#")]
    tokenizer = DnaTokenizer()
    genome = Genome.from_files(files, tokenizer)
    index = {record.id: i for i, record in enumerate(genome.records)}
    spans: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    train: list[tuple[int, int, int]] = []
    for record, start, end, split, *species in rows:
        if record not in index:
            continue
        span = (index[record], int(start), int(end))
        if split == "train":
            train.append(span)
        elif split == "test":
            own = spans[species[0] if species else "all"]
            left = sys.maxsize if at_most is None else at_most - sum(b - a for _, a, b in own)
            if left > 0:
                own.append((span[0], span[1], min(span[2], span[1] + left)))
    chain = MarkovModel(max(MARKOV_ORDERS), both_strands=True).fit(Stretches(genome.records, train, tokenizer))

    asked = LanguageModel(model, device, tokenizer=tokenizer)
    found: dict[str, Any] = {"at most": at_most, "species": {}, "contexts": {}}
    with SequenceStore(tokenizer) as store:
        stored = [store.put(record.id, record.tokens) for record in genome.records]
        for name in sorted(spans, key=lambda name: (name != FIRST, name)):
            whole = [Span(stored[record], start, end) for record, start, end in spans[name]]
            loss, scored = mean_loss(asked, store, whole)
            parts = Stretches(genome.records, spans[name], tokenizer)
            chains = [chain.perplexity(parts, order) for order in MARKOV_ORDERS]
            found["species"][name] = {
                "bases": scored,
                "perplexity": math.exp(loss),
                "markov": min(chains),  # the order that suits the test data best: in the chain's favour
            }
            print(f"{name}: {found['species'][name]}", file=sys.stderr)
            if name == FIRST:
                for context in (c for c in CONTEXTS if c <= max(len(span) for span in whole)):
                    pieces = [
                        Span(s.record, at, min(at + context, s.end))
                        for s in whole
                        for at in range(s.start, s.end, context)
                    ]
                    found["contexts"][context] = math.exp(mean_loss(asked, store, pieces)[0])
    return found


def mean_loss(model: LanguageModel, store: SequenceStore, spans: Sequence[Span]) -> tuple[float, int]:
    """(nats a base, bases) over spans, each read alone from its first base on."""
    total, scored = 0.0, 0
    for _, _, scores in model.spans(store, spans):
        there = scores[scores == scores]
        total -= float(there.sum(dtype="float64"))
        scored += len(there)
    return total / max(1, scored), scored


def write_weights(
    model: MambaLM,
    config: PretrainDnaConfig,
    training: Training,
    figures: dict[str, Any],
    folder: Path,
    licence: str,
) -> None:
    """The model's folder in the package, with a card that says what was measured."""
    names = [Path(name).name.split(".")[0] for name in config.data]
    part = f" (the first {figures['at most']:,} bases of each species)" if figures["at most"] else ""
    quality = [
        f"Perplexity on test intervals{part}, which were not trained on (4 is chance), the state carried through each; "
        f"beside it, Markov chains fitted on the same training intervals of all species, the best of orders "
        f"{', '.join(map(str, MARKOV_ORDERS))} for each. Weights in "
        "bfloat16, computed in float32.\n\n| species | test bases | perplexity | Markov chain |\n|-|-|-|-|"
    ]
    for name, row in figures["species"].items():
        quality.append(f"| {name} | {row['bases']:,} | {row['perplexity']:.3f} | {row['markov']:.3f} |")
    if figures["contexts"]:
        head = f"\nThe same for {FIRST} where windows of so many bases are read alone:\n\n| bases | perplexity |\n|-|-|"
        quality.append(head)
        quality += [f"| {context:,} | {value:.3f} |" for context, value in figures["contexts"].items()]
    text = model_card(
        model,
        title=f"DNA: the language model of score, score-variants, embed and generate-dna ({config.size} parameters)",
        data=(
            f"The training intervals of {len(names)} genomes: {', '.join(names)}. Human: slices of the assemblies hg16 "
            "to hg38; other mammals and vertebrates: the ENCODE pilot regions ENm001 and ENm002; invertebrates, "
            "plants, fungi and bacteria: chromosomes or parts of them. Both strands. Lower case is read as upper case."
        ),
        licence=licence,
        recipe=(
            f"`python -m benchmarks.build_dna`: the next base, {training.steps:,} steps of {config.batch_tokens:,} "
            f"bases ({training.tokens:,} in all), windows from {config.length_warmup:,} to {config.context:,} bases, "
            f"AdamW with peak learning rate {config.lr:g}, seed {config.seed}; {training.seconds:,.0f} s of training."
        ),
        quality="\n".join(quality),
    ).replace('"path/to/this/folder"', '"dna"')
    with torch.no_grad():
        shipped = MambaLM(model.config)
        shipped.load_state_dict(model.state_dict())
        shipped.bfloat16()
    writers = model_writers(shipped, DnaTokenizer().model_dump(mode="json"), text)
    write_folder_atomically(folder, writers, unlisted=["README.md"], replace=True)
    for file in folder.iterdir():
        os.chmod(file, 0o644)


if __name__ == "__main__":
    began = time.monotonic()
    main()
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
