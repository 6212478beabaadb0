"""New DNA out of a causal language model: from nothing, or going on from sequences.

From Python:

    from mambagen.pipelines.generate_dna import generate_dna
    for made in generate_dna("runs/my-run", length=1000, count=3, seed=1):
        print(made.name, made.sequence)

A base is a function of the model, the prompt, the options, the seed and the sequence's number: not of how many are made
or of the batch in which they are. Only A, C, G and T are drawn. Without a prompt the first base is drawn evenly among
the four, as no training window tells what begins a sequence, and the model goes on from there.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mambagen.data.dna_tokens import IUPAC_CODES, A, C, DnaTokenizer, G, T
from mambagen.data.fasta import read_records
from mambagen.data.whole_file import byte_output
from mambagen.errors import InputError, UsageError
from mambagen.kernels.mamba_decode import Sampling
from mambagen.models.decoding import Decoder
from mambagen.models.mamba_lm import MambaLM
from mambagen.models.mamba_mixer import MambaState
from mambagen.pipelines.dna_models import DEFAULT_MODEL, load_dna_model
from mambagen.training.loop import choose_device

BASES = (A, C, G, T)
STREAMS = {"cpu": 16, "cuda": 256}  # sequences that are made at once
STEPS = 4096  # bases between two looks at the host
HELD = 1 << 28  # bases that wait to be written, at most
LINE = 80


@dataclass(frozen=True)
class Prompt:
    """What a sequence begins with: its name and its letters, which may be none."""

    name: str
    sequence: bytes


@dataclass(frozen=True)
class Made:
    """A new sequence; ``sequence`` does not hold the prompt."""

    name: str
    sequence: str
    prompt: Prompt


def read_prompts(given: str | None) -> list[Prompt]:
    """Prompts of a command line: a FASTA or GenBank file, ``-`` for stdin, the letters themselves, or none.

    U is read as T. A record without letters is a prompt of none.

    Raises InputError for a file that cannot be read, or text that is neither.
    """
    if given is None:
        return [Prompt("generated", b"")]
    if given == "-" or Path(given).exists():
        return [Prompt(r.id, r.sequence.tobytes()) for r in read_records(given, rna=True, keep_empty=True)]
    letters = given.encode("utf-8")
    if not letters or letters.translate(None, IUPAC_CODES):
        raise InputError(f"--prompt {given[:40]}: no such file, and no DNA sequence")
    return [Prompt("prompt", letters.translate(bytes.maketrans(b"Uu", b"Tt")))]


def generate_dna(
    model: Path | str | MambaLM = DEFAULT_MODEL,
    prompts: Sequence[Prompt] = (Prompt("generated", b""),),
    length: int = 1000,
    count: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    device: str = "auto",
    batch: int | None = None,
    tokenizer: DnaTokenizer | None = None,
) -> Iterator[Made]:
    """Yield ``count`` sequences of ``length`` new bases for each prompt, in order.

    Args:
        batch: sequences that are made at once (default by device and length).

    Raises:
        ModelError: there is no such model. UsageError: an option is out of its range.
    """
    if length < 1 or count < 1:
        raise UsageError(f"length {length} and number {count}: they must be at least 1")
    try:
        Sampling(temperature, top_k, top_p)  # said now, not at the first base
    except ValueError as error:
        raise UsageError(str(error)) from error
    where = choose_device(device)
    if isinstance(model, MambaLM):
        loaded, tokenizer = model.to(where).eval(), tokenizer or DnaTokenizer()
    else:
        loaded, tokenizer = load_dna_model(model, where, [MambaLM.kind])
    streams = min(batch or STREAMS[where.type], count, max(1, HELD // length))

    def made() -> Iterator[Made]:
        decoder = Decoder(loaded, streams)
        for prompt in prompts:
            known = tokenizer.encode(prompt.sequence)
            own_seed = _seed(seed, prompt.name)
            first = None if len(known) else [_first_base(own_seed, number) for number in range(count)]
            for group in range(0, count, streams):
                numbers = [min(group + i, count - 1) for i in range(streams)]  # the last group is filled up
                _begin(decoder, known, None if first is None else [first[number] for number in numbers])
                parts = [] if first is None else [np.array([[first[number]] for number in numbers], dtype=np.uint8)]
                left = length - len(parts)
                while left:
                    steps = min(left, STEPS)
                    drawn = decoder.generate(steps, temperature, top_k, top_p, own_seed, BASES, numbers)
                    parts.append(drawn.to(torch.uint8).cpu().numpy())
                    left -= steps
                tokens = np.concatenate(parts, 1)
                for row in range(min(streams, count - group)):
                    yield Made(f"{prompt.name}_{group + row + 1}", _letters(tokens[row]), prompt)

    return made()


def write_fasta(
    made: Iterator[Made], out: Path | str | None, about: str, with_prompt: bool = False, line: int = LINE
) -> None:
    """Write sequences as FASTA, to a file that is whole or not there, or to stdout; ``about`` goes into each header."""
    with byte_output(out) as stream:
        for new in made:
            text = (new.prompt.sequence.decode() if with_prompt else "") + new.sequence
            begun = f" prompt={new.prompt.name}:{len(new.prompt.sequence)}" if new.prompt.sequence else ""
            stream.write(f">{new.name}{begun} {about}\n".encode())
            for at in range(0, len(text), line):
                stream.write(text[at : at + line].encode() + b"\n")


def _begin(decoder: Decoder, known: NDArray[np.uint8], first: Sequence[int] | None) -> None:
    """Bring the decoder to where the prompt ends, or to after the first base of each stream."""
    if first is not None:
        decoder.reset()
        decoder.step(torch.tensor(first))
        return
    reader = Decoder(decoder.model, 1)  # the prompt is read once, whatever the number of streams
    logits = reader.prefill(torch.from_numpy(known.copy())[None])
    state = tuple(MambaState(*(_repeated(v, decoder.batch) for v in layer)) for layer in reader.state)
    decoder.load_state(state, _repeated(logits, decoder.batch), len(known))


def _repeated(row: torch.Tensor, times: int) -> torch.Tensor:
    return row.expand(times, *row.shape[1:]).contiguous()


def _seed(seed: int, name: str) -> int:
    """Of the random numbers of a prompt: prompts of one run do not draw alike."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\t{name}".encode(), digest_size=8).digest(), "little") >> 1


def _first_base(seed: int, number: int) -> int:
    return BASES[hashlib.blake2b(f"{seed}\t{number}".encode(), digest_size=1).digest()[0] % 4]


_TEXT = bytes.maketrans(bytes(BASES), b"ACGT")


def _letters(tokens: NDArray[np.uint8]) -> str:
    return tokens.tobytes().translate(_TEXT).decode("ascii")
