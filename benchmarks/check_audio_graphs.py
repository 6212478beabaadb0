"""Holds the generators that step by CUDA graphs (U-Nets with S4, WaveNet) to their forward pass, then times them.

    python -m benchmarks.check_audio_graphs                                       # on a GPU, about a minute
    python -m benchmarks.check_audio_graphs --device cpu --streams 2 --steps 64   # the same steps without graphs

Times are of the steps after the graphs were made; a clip is 16,000 of them.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import print_table
from benchmarks.wavenet import WaveNet
from mambagen.kernels.unet_decode import Sampling
from mambagen.kernels.unet_decode.reference import draw_numbers, pick_tokens
from mambagen.models.audio_stepper import Stepper
from mambagen.models.audio_unet import MIDDLE, AudioUNet, AudioUNetConfig

CLIP = 16_000  # samples
MIXERS = {"sashimi": ("s4+mlp", "s4+mlp"), "s4d": ("s4d", "s4d"), "mamba in the centre": ("s4+mlp", "mamba")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 128, 512])
    parser.add_argument("--steps", type=int, default=800, help="that are timed")
    arguments = parser.parse_args()
    device, rows = torch.device(arguments.device), []
    for name, (outer, centre) in MIXERS.items():
        model = AudioUNet(AudioUNetConfig(outer=outer, centre=centre), seed=0).to(device).eval()  # type: ignore[arg-type]
        stepper = Stepper(model, 3)
        made = torch.cat([stepper.generate(n) for n in (5, 60, 7)], 1)
        hold(name, model, made, torch.arange(3, device=device))
        for streams in arguments.streams:
            timed = Stepper(model, streams)
            timed.generate(33)
            seconds = clock(lambda timed=timed: timed.generate(arguments.steps), device)  # type: ignore[misc]
            rows.append(row(name, timed.backend, streams, seconds / arguments.steps))
    wavenet = WaveNet().to(device).eval()
    hold("wavenet", wavenet, wavenet.generate(3, 72), torch.arange(3, device=device))
    for streams in arguments.streams:
        few, many = (
            clock(lambda n=n, streams=streams: wavenet.generate(streams, n), device)  # type: ignore[misc]
            for n in (16, 16 + arguments.steps)
        )
        rows.append(
            row("wavenet", "graph" if device.type == "cuda" else "eager", streams, (many - few) / arguments.steps)
        )
    print_table(rows)


@torch.no_grad()
def hold(name: str, model: nn.Module, made: Tensor, seeds: Tensor) -> None:
    """Samples are those that the forward pass's logits give with the same random numbers, ties of rounding aside."""
    logits, _ = model(F.pad(made.long(), (1, 0), value=MIDDLE)[:, :-1])
    first = 1 if isinstance(model, AudioUNet) else 0  # the U-Net's stepper counts the token before the first sample
    places = torch.arange(made.shape[1], device=made.device) + first
    again = [
        pick_tokens(logits[:, i], Sampling(), draw_numbers(seeds, place.expand_as(seeds)))
        for i, place in enumerate(places)
    ]
    same = float((torch.stack(again, 1) == made).double().mean())
    print(f"{name}: {same:.1%} of {made.numel()} samples are the forward pass's own", flush=True)
    if same < 0.98:
        raise SystemExit(f"{name}: the steps are not those of the forward pass")


def clock(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def row(name: str, way: str, streams: int, seconds: float) -> dict[str, object]:
    facts = {"model": name, "way": way, "streams": streams, "us a step": round(1e6 * seconds, 1)}
    return facts | {"s a batch of clips": round(CLIP * seconds, 1), "clips/s": round(streams / (CLIP * seconds), 2)}


if __name__ == "__main__":
    main()
