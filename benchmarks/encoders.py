"""Encoders by length on a GPU: forward pass and train step of the same number of tokens, time and memory; S4D by FFT.

    python -m benchmarks.encoders [--encoders bigs bimamba bert] [--size 7m] [--tokens 131072] [--out encoders.json]
        [--figure encoders.png] [--parts s4d length]
    python -m benchmarks.encoders --rows encoders.json [later.json] --figure encoders.png   # drawn, nothing measured
    python -m benchmarks.encoders --profile ours [--tokens 131072]   # the train steps of "s4d", kernel by kernel
    python -m benchmarks.encoders --profile forward --encoders bigs --lengths 32768     # or train: passes of encoders

"s4d", which comes first: the train step of one S4D layer (forward, backward) as it is, by our FFT at any rate ("fft",
the same where systems do not share channels enough), and beside the usual implementation in plain torch, which holds
the (channels, states, length) Vandermonde matrix and multiplies FFTs. "length": encoders of one size
at lengths of 128 to 131072, under bfloat16 autocast, launched from Python and, as "graph", recorded as CUDA graphs,
which is how the training loop runs steps of so few tokens; `bert` is attention by PyTorch's flash kernels. --out is
written anew after every row, so a time limit loses nothing.
"""

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.common import median_ms, print_table, write_json
from benchmarks.train import profile, recorded
from mambagen.kernels.s4d import chunked
from mambagen.models.config import MAMBA_SIZES
from mambagen.models.encoders import build_encoder, count_parameters, match_parameters
from mambagen.models.s4d_mixer import S4D, S4DConfig
from mambagen.training.cuda_graph import GraphedPass

LENGTHS = tuple(1 << k for k in range(7, 18))
WAYS = ("ours", "fft", "plain")
PASSES = ("forward", "train")


def measured(run: Callable[[], object], others: int = 0) -> tuple[float | None, float | None]:
    """(milliseconds, peak GB) of a call; (None, None) where the memory does not suffice.

    `others`: bytes that are held for something else, such as graphs that were recorded before.
    """
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        milliseconds = median_ms(run, seconds=0.3)
    except torch.cuda.OutOfMemoryError:
        return None, None
    return milliseconds, (torch.cuda.max_memory_allocated() - others) / 1e9


def encoder_rows(encoders: list[str], size: str, tokens: int, lengths: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A row an encoder and length, as they are measured."""
    for name in encoders:
        encoder = encoder_of(name, size)
        for length in lengths:
            ids = inputs(tokens, length)
            batch = len(ids)
            own = sum(tensor.numel() * tensor.element_size() for tensor in (ids, *encoder.parameters()))
            others = torch.cuda.memory_allocated() - own
            forward, train = passes(encoder, ids)
            row: dict[str, Any] = {"encoder": name, "parameters": sum(p.numel() for p in encoder.parameters())}
            row |= {"batch": batch, "length": length}
            for part, run in (("forward", forward), ("train", train)):
                milliseconds, gigabytes = measured(run, others)
                row[f"{part} Mtok/s"] = None if milliseconds is None else batch * length / milliseconds / 1e3
                row[f"{part} GB"] = gigabytes
            makers = {"forward": partial(recorded, forward), "train": partial(recorded_train, encoder, ids)}
            for part, make in makers.items():  # a graph holds memory until it is gone
                fits = row[f"{part} Mtok/s"] is not None
                row[f"{part} graph Mtok/s"] = batch * length / median_ms(make(), seconds=0.3) / 1e3 if fits else None
            yield row
        encoder.zero_grad(set_to_none=True)
        del encoder


def encoder_of(name: str, size: str) -> nn.Module:
    """An encoder of as many parameters as the Mamba model of this size, on the GPU."""
    built = build_encoder(name, match_parameters(name, count_parameters("mamba", MAMBA_SIZES[size].model_dump())))
    assert isinstance(built, nn.Module)
    return built.cuda()


def inputs(tokens: int, length: int) -> Tensor:
    """Random bases: about so many tokens in rows of a length."""
    return torch.randint(7, 11, (max(1, tokens // length), length), device="cuda")


def passes(encoder: nn.Module, ids: Tensor) -> tuple[Callable[[], None], Callable[[], None]]:
    """A forward pass, and one with backward."""

    def forward() -> None:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            encoder(ids, None)

    def train() -> None:
        loss_of(encoder, ids).backward()
        encoder.zero_grad(set_to_none=True)

    return forward, train


def loss_of(encoder: nn.Module, ids: Tensor) -> Tensor:
    """Something to differentiate."""
    with torch.autocast("cuda", torch.bfloat16):
        out = encoder(ids, None)
    return cast(Tensor, out.float().square().mean())


def recorded_train(encoder: nn.Module, ids: Tensor) -> Callable[[], None]:
    """The pass with backward as the training loop records it."""

    piece = {"ids": ids}
    graphed = GraphedPass(encoder, lambda piece: loss_of(encoder, piece["ids"]), piece)

    def train() -> None:
        graphed(piece, 1)
        encoder.zero_grad(set_to_none=True)

    return train


def plain_s4d(layer: S4D, x: Tensor) -> Tensor:
    """The layer's output in plain torch, as S4D is usually written; x is (batch, length, channels)."""
    dt, A, C, D = layer.system()
    length = x.shape[1]
    z = dt[:, None] * A
    coefficients = C * (torch.exp(z) - 1) / A
    powers = torch.exp(z[..., None] * torch.arange(length, device=x.device))
    kernel = 2 * torch.einsum("hn,hnl->hl", coefficients, powers).real
    wide = x.float().transpose(1, 2)
    y = torch.fft.irfft(torch.fft.rfft(wide, 2 * length) * torch.fft.rfft(kernel, 2 * length), 2 * length)[..., :length]
    return (y + wide * D[:, None]).transpose(1, 2).to(x.dtype)


class LayerCase(NamedTuple):
    """An S4D layer and its input."""

    layer: S4D
    x: Tensor

    def output(self, way: str) -> Tensor:
        """By the layer as it is ("ours"), with its convolution by FFT at any rate ("fft"), or by plain torch."""
        if way == "plain":
            return plain_s4d(self.layer, self.x)
        by_fft = patch.object(chunked, "pays", lambda *facts: False) if way == "fft" else contextlib.nullcontext()
        with by_fft:
            y: Tensor = self.layer(self.x)[0]
        return y

    def train(self, way: str) -> None:
        """Forward and backward."""
        self.output(way).float().square().mean().backward()
        self.layer.zero_grad(set_to_none=True)
        self.x.grad = None


def s4d_cases(tokens: int, channels: int = 256, states: int = 32) -> Iterator[tuple[dict[str, Any], LayerCase]]:
    """A case a length and way to share systems, with what begins its row."""
    for systems in (channels, 1):
        for length in (512, 1024, 4096, 16384, 65536):
            torch.manual_seed(0)
            layer = S4D(S4DConfig(d_model=channels, d_state=states, n_ssm=systems)).cuda()
            x = torch.randn(max(1, tokens // length), length, channels, device="cuda", dtype=torch.bfloat16)
            yield {"systems": systems, "batch": len(x), "length": length}, LayerCase(layer, x.requires_grad_())


def s4d_rows(tokens: int) -> Iterator[dict[str, Any]]:
    """A row a case: ours beside our own by FFT and plain torch, and how far from plain the first is."""
    for row, case in s4d_cases(tokens):
        for way in WAYS:
            milliseconds, gigabytes = measured(partial(case.train, way))
            row |= {f"{way} ms": milliseconds, f"{way} GB": gigabytes}
        row["difference"] = difference(case)
        yield row


def difference(case: LayerCase) -> float | None:
    """How far ours is from plain torch, as a share of it; None where the memory does not suffice."""
    try:
        with torch.no_grad():
            ours, plain = (case.output(way).float() for way in ("ours", "plain"))
        return float((ours - plain).norm() / plain.norm())
    except torch.cuda.OutOfMemoryError:
        return None


def draw(rows: list[dict[str, Any]], path: str, device: str) -> None:
    """Speed of both passes, from Python and as graphs, against length; `device` is the GPU's name."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for name in dict.fromkeys(row["encoder"] for row in rows):
        own = sorted((row for row in rows if row["encoder"] == name), key=lambda row: row["length"])
        for axis, key in zip(axes, ("forward Mtok/s", "train Mtok/s"), strict=True):
            lines = axis.plot([row["length"] for row in own], [row[key] for row in own], marker="o", label=name)
            graphs = [row.get(key.replace("Mtok/s", "graph Mtok/s")) for row in own]
            if any(graphs):
                axis.plot([row["length"] for row in own], graphs, linestyle="--", color=lines[0].get_color())
            axis.set(xscale="log", yscale="log", xlabel="length", ylabel=key)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(f"{device}, bfloat16; solid: launched from Python, dashed: as CUDA graphs")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoders", nargs="+", default=["bigs", "bigs-stack", "bimamba", "bert"])
    parser.add_argument("--parts", nargs="+", choices=("s4d", "length"), default=["s4d", "length"])
    parser.add_argument("--size", default="7m")
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--out")
    parser.add_argument("--figure")
    parser.add_argument("--rows", nargs="+", help="--out files of runs before: only draw what they measured")
    parser.add_argument("--profile", choices=(*WAYS, *PASSES), help="only print where the time goes")
    args = parser.parse_args()
    if args.rows:
        before = [json.loads(Path(file).read_text()) for file in args.rows]
        rows = [row for run in before for row in run["rows"] if "encoder" in row]
        draw(rows, args.figure or "encoders.png", before[0]["gpu"])
        return
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.encoders: needs a CUDA device")
    if args.profile in PASSES:
        for name in args.encoders:
            encoder = encoder_of(name, args.size)
            for length in args.lengths:
                run = passes(encoder, inputs(args.tokens, length))[PASSES.index(args.profile)]
                profile(run, f"{args.profile}, {name}, length {length:,}")
        return
    if args.profile:
        for row, case in s4d_cases(args.tokens):
            profile(partial(case.train, args.profile), f"{args.profile}, {row}")
        return
    rows = []

    def taken(measuring: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows of a part, each printed and written when it is there."""
        own = []
        for row in measuring:
            own.append(row)
            rows.append(row)
            print(row, flush=True)
            write_json(args.out, "encoders", rows)
        return own

    if "s4d" in args.parts:
        print_table(taken(s4d_rows(args.tokens)), "train step of an S4D layer, 256 channels")
    if "length" in args.parts:
        encoders = taken(encoder_rows(args.encoders, args.size, args.tokens, args.lengths))
        print_table(encoders, f"encoders of {args.size}")
        if args.figure:
            draw(encoders, args.figure, torch.cuda.get_device_name())


if __name__ == "__main__":
    main()
