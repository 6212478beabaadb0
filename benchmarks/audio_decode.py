"""Generating audio sample by sample: eager steps beside the compiled stepper, samples a second; and reading a prompt.

    python -m benchmarks.audio_decode [--device cpu|cuda] [--model NAME_OR_FOLDER] [--d-model 64] [--layers 8]
        [--pool 4 4] [--batch 1 8 ...] [--threads 1 2] [--prompt 10] [--likelihood FILE.flac ...] [--out audio.json]

Drawing from the model's distribution is part of every row. The limit beside the numbers is the time in which the
weights that a sample needs are read: on a CPU, by one core, measured here on memory as large as all weights of that
precision; on a GPU, by one multiprocessor from the second-level cache at 64 bytes a clock cycle. (A sample needs all
weights of the outermost stages, a quarter of the next ones', a sixteenth of the centre's, with pools of 4 and 4.)
Rows give the median of the runs and, as machines are shared, the best of them; on a CPU with one thread also the
processor's own time, in which other work on the machine does not count.

`--likelihood` reads sound with the stepper in each precision: nats a sample, and what bfloat16 costs.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import mambagen
from benchmarks.common import print_table, write_json
from mambagen.models.audio_stepper import PREFILL_CHUNK, Stepper
from mambagen.models.audio_unet import AudioUNet, AudioUNetConfig

L2_BYTES_A_CLOCK = 64  # of one multiprocessor
RATE = 16_000


def microseconds(run: Callable[[int], object], steps: int, device: str, runs: int = 7) -> tuple[float, float, float]:
    """Of a sample: the median and the best of some runs of that many steps, and the least of the processor's time."""
    times, own = [], []
    for _ in range(runs + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        start, processor = time.perf_counter(), time.process_time()
        run(steps)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / steps * 1e6)
        own.append((time.process_time() - processor) / steps * 1e6)
    return statistics.median(times[1:]), min(times[1:]), min(own[1:])


def weights_a_sample(model: AudioUNet) -> float:
    """How many weights one sample needs on average, the embedding and single vectors aside."""
    count, share = float(model.lm_head.weight.numel()), 1.0
    for level, pool in enumerate(model.config.pool):
        count += share * sum(_matrices(block) for where in ("down", "up") for block in model.blocks(where, level))
        share /= pool
        count += share * sum(layer.weight.numel() for layer in model.pools(level))
    return count + share * sum(_matrices(block) for block in model.blocks("centre"))


def _matrices(block: Any) -> int:
    return sum(p.numel() for p in block.parameters() if p.ndim > 1)


def limit_us(model: AudioUNet, device: str, size: int) -> float:
    """See the head of this file; `size` is that of a weight in bytes."""
    if device == "cuda":
        clock = torch.cuda.get_device_properties(0).clock_rate * 1e3
        return weights_a_sample(model) * size / (L2_BYTES_A_CLOCK * clock) * 1e6
    everything = sum(p.numel() for p in model.parameters())
    memory = torch.ones(everything * size // 4)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    best = microseconds(lambda n: [memory.sum() for _ in range(n)], 10, "cpu")[2]
    torch.set_num_threads(threads)
    return best * weights_a_sample(model) / everything


def decoding(model: AudioUNet, batch: int, threads: int, device: str) -> list[dict[str, Any]]:
    """A row for every way."""
    torch.set_num_threads(threads)
    ways = [("eager", "float32"), ("auto", "float32"), ("auto", "bfloat16")]
    if device == "cuda":
        ways.append(("graph", "bfloat16"))
    rows: list[dict[str, Any]] = []
    for backend, precision in ways:
        stepper = Stepper(model, batch, backend, precision)
        cycles = 2 if backend == "eager" else max(4, 100 // batch)
        median, best, own = microseconds(stepper.generate, cycles * model.config.cycle, device)
        eager = rows[0]["us a sample"] if rows else median
        limit = limit_us(model, device, 2 if precision == "bfloat16" else 4)
        rows.append(
            {
                "streams": batch,
                "threads": threads,
                "way": "eager step" if backend == "eager" else f"ours ({stepper.backend}), {precision}",
                "us a sample": median,
                "best": best,
                "processor us": own if device == "cpu" and threads == 1 else None,
                "samples/s": round(batch / median * 1e6),
                "times real time": batch / median * 1e6 / RATE,
                "times eager": eager / median,
                "limit us": limit,
            }
        )
    return rows


def prefill(model: AudioUNet, seconds: float, threads: int, device: str) -> dict[str, Any]:
    """Reading a prompt of one stream."""
    torch.set_num_threads(threads)
    tokens = torch.randint(0, model.config.vocab_size, (1, round(seconds * RATE)), device=device)

    def read(steps: int) -> None:
        Stepper(model, 1).prefill(tokens)

    median, best, own = microseconds(read, 1, device, runs=3)
    row = {"prompt s": seconds, "threads": threads, "median s": median / 1e6, "best s": best / 1e6}
    return row | {"processor s": own / 1e6 if device == "cpu" else None}


def likelihood(folder: str, paths: list[str], device: str) -> list[dict[str, Any]]:
    """Nats a sample of sound in files, as the stepper of each precision sees it; at most four seconds of a file."""
    from mambagen.data.audio_files import read_audio

    model, quantiser = mambagen.load(folder, device)
    clips = [torch.from_numpy(quantiser.encode(read_audio(path, quantiser.rate).samples[: 4 * RATE])) for path in paths]
    rows: list[dict[str, Any]] = []
    for precision in ("float32", "bfloat16"):
        total, count = 0.0, 0
        for clip in clips:
            tokens = clip.long()[None].to(device)
            logits = Stepper(model, 1, "auto", precision).read(tokens)
            total += F.cross_entropy(logits[0].double(), tokens[0], reduction="sum").item()
            count += tokens.numel()
        nats = total / count
        rows.append({"precision": precision, "samples": count, "nats a sample": f"{nats:.5f}"})
        rows[-1]["more than float32"] = f"{nats - float(rows[0]['nats a sample']):+.5f}"
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--model", help="a built-in model or a folder, instead of fresh weights")
    parser.add_argument("--d-model", type=int, default=64)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--pool", type=int, nargs="+", default=[4, 4])
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--threads", type=int, nargs="+", help="on a CPU (default: 1, and all)")
    parser.add_argument("--prompt", type=float, default=10.0, help="seconds (0: none)")
    parser.add_argument("--likelihood", nargs="+", metavar="FILE", help="with --model: sound to read")
    parser.add_argument("--out", help="leave the rows as JSON")
    options = parser.parse_args()
    if options.likelihood:
        if not options.model:
            parser.error("--likelihood needs --model")
        rows = likelihood(options.model, options.likelihood, options.device)
        print_table(rows, options.model)
        write_json(options.out, "audio_likelihood", rows)
        return
    if options.model:
        from mambagen.models.saving import load_model

        model: AudioUNet = load_model(options.model, options.device, [AudioUNet.kind])[0]
    else:
        config = AudioUNetConfig(d_model=options.d_model, n_layer=options.layers, pool=tuple(options.pool))
        model = AudioUNet(config, seed=0).to(options.device).eval()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{model.config.description}: {parameters:,} parameters, {weights_a_sample(model):,.0f} weights a sample")
    batches = options.batch or ((1, 16, 128) if options.device == "cuda" else (1, 2, 8))
    all_threads = torch.get_num_threads()
    threads = options.threads or (sorted({1, all_threads}) if options.device == "cpu" else [all_threads])
    rows = [row for batch in batches for n in threads for row in decoding(model, batch, n, options.device)]
    print_table(rows, f"generating on {options.device}")
    prompts = [prefill(model, options.prompt, n, options.device) for n in threads] if options.prompt else []
    print_table(prompts, f"reading a prompt, in pieces of {PREFILL_CHUNK:,} samples")
    write_json(options.out, "audio_decode", rows + prompts)


if __name__ == "__main__":
    main()
