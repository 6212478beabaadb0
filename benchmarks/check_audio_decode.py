"""Holds the audio U-Net's decoders on this GPU to float64, then times the one-launch kernel; stops at the first fault.

    python -m benchmarks.check_audio_decode            # every group, each in a process of its own with a time limit
    python -m benchmarks.check_audio_decode small      # one group here

Needs a GPU of compute capability 9.0 or newer. Waits in the kernel are given up after some seconds with a message.
"""

import itertools
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor

from mambagen.kernels.unet_decode import Sampling, UNetWeights, cuda
from mambagen.kernels.unet_decode.cuda import CudaDecoder
from mambagen.kernels.unet_decode.graph import GraphDecoder
from mambagen.kernels.unet_decode.reference import ReferenceDecoder
from mambagen.models.audio_stepper import Stepper, unet_weights
from mambagen.models.audio_unet import AudioUNet, AudioUNetConfig
from mambagen.pipelines.audio_language_model import shifted
from mambagen.pipelines.generate_audio import AudioVoice
from mambagen.pipelines.sc09_judge import DigitJudge

SECONDS = 150  # of a group
WATCHDOG = 3000  # milliseconds
CLIPS = 256
WAYS = (("cuda", "bfloat16", 64), ("cuda", "bfloat16", 256), ("graph", "bfloat16", 256), ("graph", "float32", 256))
SHAPES = {
    "small": AudioUNetConfig(d_model=32, n_layer=2),
    "three": AudioUNetConfig(d_model=32, n_layer=2, stages=3, pool=(2, 8)),
    "published": AudioUNetConfig(),
}


def weights_of(config: AudioUNetConfig) -> UNetWeights:
    """Fresh weights, everything moved off the ones and zeros that would hide its use."""
    model = AudioUNet(config, seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.02 + 0.1 * parameter.abs()))
    found = unet_weights(model.cuda())
    assert found is not None
    return found


def doubled(weights: UNetWeights) -> UNetWeights:
    """The same in float64."""

    def of(v: Any) -> Any:
        if isinstance(v, Tensor):
            return v.double()
        if isinstance(v, tuple):
            return type(v)(*map(of, v))
        return [of(part) for part in v] if isinstance(v, list) else v

    result = of(weights)
    assert isinstance(result, UNetWeights)
    return result


def correct(name: str) -> None:
    """Logits of given samples, from the beginning and from a state; bfloat16 matrices may be 3 % off."""
    weights = weights_of(SHAPES[name])
    for batch, streams in ((1, 1), (2, 2), (5, 1), (5, 2)):
        tokens = torch.randint(0, 256, (batch, 70), generator=torch.Generator().manual_seed(0)).cuda()
        condition = torch.randn(batch, sum(weights.condition_sizes), generator=torch.Generator().manual_seed(1)).cuda()
        reference = ReferenceDecoder(doubled(weights), batch)
        reference.condition(condition)
        expected = reference.read(tokens)
        decoders: dict[str, ReferenceDecoder | CudaDecoder] = {
            f"cuda, {streams} a block": CudaDecoder(weights, batch, streams, watchdog=WATCHDOG),
            "graph, bfloat16": GraphDecoder(weights, batch, "bfloat16"),
            "graph, float32": GraphDecoder(weights, batch, "float32"),
        }
        for way, decoder in decoders.items():
            decoder.condition(condition)
            logits = torch.cat([decoder.read(tokens[:, :21]), decoder.read(tokens[:, 21:])], 1).double()
            error = ((logits - expected).abs().max() / expected.abs().max()).item()
            allowed = 1e-4 if way.endswith("float32") else 0.03
            print(f"{name}, batch {batch}, {way}: relative error {error:.2e}", flush=True)
            if not error < allowed:
                worst = (logits - expected).abs().amax((0, 2))
                raise SystemExit(f"wrong; the first bad position is {int((worst > allowed).float().argmax())}")


def draws(name: str) -> None:
    """A stream's samples do not depend on the batch, on how a run is cut, nor on the run; guidance included."""
    weights = weights_of(SHAPES[name])
    for guidance, streams in ((None, 1), (2.0, 1), (2.0, 2)):
        seeds = torch.arange(6).cuda()
        whole = CudaDecoder(weights, 6, streams, WATCHDOG).draw(500, Sampling(top_p=0.95), seeds, guidance)
        part = CudaDecoder(weights, 2, streams, WATCHDOG)
        cut = torch.cat([part.draw(n, Sampling(top_p=0.95), seeds[2:4], guidance) for n in (1, 399, 100)], 1)
        same = torch.equal(cut, whole[2:4])
        print(
            f"{name}, guidance {guidance}, {streams} a block: {len(whole.unique())} values drawn, the same in pieces: "
            f"{same}",
            flush=True,
        )
        if not same:
            raise SystemExit("draws differ")


def few() -> None:
    """A few samples, one and two streams a block, and pairs of blocks: to run under compute-sanitizer."""
    weights = weights_of(SHAPES["small"])
    for batch, streams, guidance in ((1, 1, None), (4, 2, 2.0), (4, 1, 2.0)):
        drawn = CudaDecoder(weights, batch, streams).draw(20, Sampling(), torch.arange(batch).cuda(), guidance)
        print(f"guidance {guidance}, {batch} streams, {streams} a block: {drawn[:, :8].tolist()}", flush=True)


def repeatable() -> None:
    """Thousands of samples of the published size: the same bits again, in other company, one or two streams a block."""
    weights = weights_of(SHAPES["published"])
    for guidance in (None, 2.0):
        first: Tensor | None = None
        for batch, streams in ((2, 1), (2, 2), (128, 1), (128, 1), (256, 2), (256, 2), (512, 2)):
            seeds = torch.arange(batch).cuda()
            drawn = CudaDecoder(weights, batch, streams).draw(8000, Sampling(), seeds, guidance)
            first = drawn if first is None else first
            apart = (drawn[:2] != first[:2]).any(0)
            where = int(apart.float().argmax()) if apart.any() else None
            print(f"guidance {guidance}, {batch} streams, {streams} a block: first sample apart {where}", flush=True)
            if where is not None:
                raise SystemExit("samples differ: a race, or sums whose order varies")


def heard() -> None:
    """The built-in digits by every way of stepping: heard as asked, and whether draws follow the model's distribution.

    Given what came before, a drawn sample's surprise less the entropy of its distribution has mean 0; the sum of these
    over its standard deviation is a standard normal number, if the steps compute what the model's forward pass does.
    A forward pass in float32 says what the distributions were, so that rounding in the steps shows as an excess.
    """
    voice, judge = AudioVoice("digits", "cuda"), DigitJudge("digit-judge", "cuda")
    for guidance, temperature in ((1.0, 1.0), (2.0, 1.0), (2.0, 0.9)):
        for backend, precision, batch in WAYS:
            began = time.monotonic()
            asked = torch.arange(CLIPS, device="cuda") % len(judge.digits)
            parts = []
            for seeds in torch.arange(CLIPS).split(batch):
                stepper = Stepper(voice.model, batch, backend, precision)
                stepper.prefill(classes=asked[seeds])
                parts.append(torch.cat([stepper.generate(4000, temperature, seeds=seeds, guidance=guidance)
                                        for _ in range(4)], 1))  # fmt: skip
            drawn = torch.cat(parts)
            seconds = time.monotonic() - began
            listened = judge.judge(voice.quantiser.decode(drawn.cpu().numpy()))
            right = float((listened.heard == asked.cpu().numpy()).mean())
            figures = [
                surprises(voice.model, some, which, temperature, guidance)
                for some, which in zip(drawn.long().split(32), asked.split(32), strict=True)
            ]
            excess, variance = (torch.stack(v).sum(0) for v in zip(*figures, strict=True))
            z = " ".join(f"{v:.1f}" for v in (excess / variance.sqrt()).tolist())
            nats = " ".join(f"{v:.5f}" for v in (excess / drawn.numel() * len(excess)).tolist())
            print(
                f"guidance {guidance:g}, temperature {temperature:g}, {backend} {precision}, {batch} clips at once: "
                f"heard as asked {right:.3f}; by quarter z {z}, excess {nats} nats a sample; {seconds:.1f} s",
                flush=True,
            )


@torch.no_grad()
def surprises(
    model: AudioUNet, drawn: Tensor, classes: Tensor, temperature: float, guidance: float
) -> tuple[Tensor, Tensor]:
    """Sums over clips, by quarter of their length: surprise less entropy, and its variance."""
    logits = model(shifted(drawn), None, classes)[0].double()
    if guidance != 1:
        without = model(shifted(drawn), None, torch.full_like(classes, model.config.classes))[0].double()
        logits = without + guidance * (logits - without)
    log_p = (logits / temperature).log_softmax(-1)
    p = log_p.exp()
    entropy, squares = -(p * log_p).sum(-1), (p * log_p.square()).sum(-1)
    surprise = -log_p.gather(-1, drawn[..., None]).squeeze(-1)

    def quarters(v: Tensor) -> Tensor:
        return v.sum(0).unflatten(0, (4, -1)).sum(1)

    return quarters(surprise - entropy), quarters(squares - entropy.square())


def pairs() -> None:
    """Streams with a block each and two a block, with guidance and without in turn on one decoder: the same bits."""
    weights = weights_of(SHAPES["published"])
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    for batch in (2, 32, processors // 2 * 2, 2 * processors):
        seeds = torch.arange(batch).cuda() // 2
        drawn = []
        for streams in (2, 1, 1, None):
            decoder = CudaDecoder(weights, batch, streams)
            turns = ((3000, 2.0), (500, None), (1, 2.0), (1500, 2.0))
            drawn.append(torch.cat([decoder.draw(n, Sampling(), seeds, guidance) for n, guidance in turns], 1))
        same = [torch.equal(made, drawn[0]) for made in drawn[1:]]
        print(
            f"{batch // 2} guided: a block each as two a block {same[0]}, again {same[1]}, by default {same[2]}",
            flush=True,
        )
        if not all(same):
            raise SystemExit("samples differ")


def microseconds(weights: UNetWeights, batch: int, streams: int | None, guidance: float | None = None) -> float:
    """A sample of each of `batch` streams, `streams` a block, one launch of 4,000; no watchdog, which costs time."""
    decoder = CudaDecoder(weights, batch, streams)
    seeds = torch.arange(batch).cuda()
    decoder.draw(64, Sampling(), seeds, guidance)
    torch.cuda.synchronize()
    start = time.perf_counter()
    decoder.draw(4000, Sampling(), seeds, guidance)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / 4000 * 1e6


def speed() -> None:
    """Microseconds a sample of the published size; of a block's streams companions in guidance count too."""
    weights = weights_of(SHAPES["published"])
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    for guidance, rows in ((None, 1), (2.0, 2)):
        for count in (1, 2, 16, 64, processors // 2, 128, processors, 2 * processors):
            batch = rows * count
            if batch > 2 * processors:
                continue
            for streams in (1, 2):
                us = microseconds(weights, batch, streams, guidance)
                print(
                    f"{count} {'guided ' if guidance else ''}streams, {streams} a block: {us:.1f} us a sample, "
                    f"{count / us * 1e6:,.0f} samples/s",
                    flush=True,
                )


def tune() -> None:
    """The same by warps of a block and bytes of a slot."""
    weights = weights_of(SHAPES["published"])
    for warps, slot in itertools.product((16, 8), (16384, 32768)):
        cuda.WARPS, cuda.SLOT = warps, slot
        times = [microseconds(weights, batch, streams) for batch, streams in ((1, 1), (128, 1), (256, 2))]
        print(
            f"{warps} warps, slots of {slot >> 10} KB: {', '.join(f'{us:.1f}' for us in times)} us a sample "
            "of 1, 128 and 256 streams",
            flush=True,
        )


GROUPS = {
    **{name: (lambda name=name: correct(name)) for name in SHAPES},  # type: ignore[misc]
    "draws": lambda: draws("small"),
    "few": few,
    "repeatable": repeatable,
    "heard": heard,
    "pairs": pairs,
    "speed": speed,
    "tune": tune,
}


def main() -> None:
    if len(sys.argv) > 1:
        for name in sys.argv[1:]:
            GROUPS[name]()
        return
    for name in GROUPS:
        print(f"== {name}", flush=True)
        try:
            done = subprocess.run([sys.executable, "-m", "benchmarks.check_audio_decode", name], timeout=SECONDS)
        except subprocess.TimeoutExpired:
            raise SystemExit(f"{name}: not done after {SECONDS} s") from None
        if done.returncode:
            raise SystemExit(f"{name}: failed")


if __name__ == "__main__":
    main()
