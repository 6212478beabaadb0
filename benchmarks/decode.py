"""Generating token by token: eager steps, a CUDA graph of them, and the compiled decoder; tokens a second.

    python -m benchmarks.decode [--device cpu|cuda] [--layers 12] [--d-model 256] [--batch 1 8 ...] [--out decode.json]

On a GPU the limit beside the numbers is the time in which the multiprocessors of a cluster can read their part of the
weights from the second-level cache (64 bytes a clock cycle each); every layer adds three exchanges between them. On a
CPU it is the time in which one core reads the weights. Where mamba_ssm is installed, its generation with a CUDA graph
runs too. Drawing from the model's distribution is part of every row.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import print_table, write_json
from mambagen.models import MambaConfig, MambaLM
from mambagen.models.decoding import Decoder
from mambagen.models.generation import draw

L2_BYTES_A_CLOCK = 64  # of one multiprocessor
START = 7  # the token that begins every stream


def microseconds(run: Callable[[int], object], steps: int, device: str) -> float:
    """Of a step: the median of five runs of that many."""
    times = []
    for _ in range(6):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run(steps)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / steps * 1e6)
    return statistics.median(times[1:])


def eager(model: MambaLM, batch: int, device: str) -> float:
    """`MambaLM.step` and a draw in torch operations."""

    @torch.no_grad()
    def run(steps: int) -> None:
        state = model.allocate_state(batch)
        token = torch.full((batch,), START, device=device)
        generator = torch.Generator(device).manual_seed(0)
        for _ in range(steps):
            logits, state = model.step(token, state)
            token = draw(logits, 1.0, None, 1.0, generator)

    return microseconds(run, 20, device)


def compiled(
    model: MambaLM, batch: int, device: str, backend: str, precision: str | None = None
) -> tuple[float, Decoder]:
    """`Decoder.generate`."""
    decoder = Decoder(model, batch, backend, precision)
    decoder.step(torch.full((batch,), START, device=device))
    steps = 200 if backend == "graph" else 1000 if device == "cuda" else max(8, 400 // batch)
    return microseconds(decoder.generate, steps, device), decoder


def official(layers: int, d_model: int, batch: int) -> float | None:
    """mamba_ssm's own generation with its CUDA graph, or None where it is not installed."""
    try:
        from mamba_ssm.models.config_mamba import MambaConfig as OfficialConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    except ImportError:
        return None
    config = OfficialConfig(d_model=d_model, n_layer=layers, vocab_size=16, ssm_cfg={}, rms_norm=True)
    model = MambaLMHeadModel(config, device="cuda", dtype=torch.bfloat16)
    prompt = torch.full((batch, 1), START, device="cuda")
    return microseconds(lambda n: model.generate(prompt, n + 1, cg=True, top_k=0, temperature=1.0), 300, "cuda")


def limit_us(model: MambaLM, batch: int, device: str, decoder: Decoder) -> float:
    """See the head of this file."""
    if device == "cuda":
        from mambagen.kernels.mamba_decode.cuda import CudaDecoder

        inner = decoder._decoder
        if not isinstance(inner, CudaDecoder):
            return float("nan")
        clock = torch.cuda.get_device_properties(0).clock_rate * 1e3
        return inner.layout.block_bytes / (L2_BYTES_A_CLOCK * clock) * 1e6
    count = sum(p.numel() for p in model.parameters())
    weights = torch.randn(count)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    time_of_sum = microseconds(lambda n: [weights.sum() for _ in range(n)], 10, "cpu")
    torch.set_num_threads(threads)
    return time_of_sum


def measure(layers: int, d_model: int, batch: int, device: str) -> list[dict[str, Any]]:
    """A row for every way."""
    model = MambaLM(MambaConfig(d_model=d_model, n_layer=layers), seed=0).to(device)
    ours, decoder = compiled(model, batch, device, "auto")
    rows = {"eager step": eager(model, batch, device)}
    if device == "cuda":
        rows["CUDA graph of the step"] = compiled(model, batch, device, "graph")[0]
        rows["mamba_ssm, CUDA graph"] = official(layers, d_model, batch) or float("nan")
        if decoder.backend == "cuda":
            rows["ours, float32 weights"] = compiled(model, batch, device, "cuda", "float32")[0]
    rows["ours"] = ours
    limit = limit_us(model, batch, device, decoder)
    found = []
    for name, us in rows.items():
        if us == us:
            row = {"d_model": d_model, "layers": layers, "batch": batch, "way": name, "us a step": us}
            row |= {"tokens/s": round(batch / us * 1e6), "times eager": rows["eager step"] / us, "limit us": limit}
            found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--layers", type=int)
    parser.add_argument("--d-model", type=int)
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--out", help="leave the rows as JSON")
    options = parser.parse_args()
    models = [(8, 64), (12, 256)]
    if options.layers or options.d_model:
        models = [(options.layers or 12, options.d_model or 256)]
    batches = options.batch or ((1, 8, 16, 64, 128) if options.device == "cuda" else (1, 4, 16))
    rows = [
        row for layers, width in models for batch in batches for row in measure(layers, width, batch, options.device)
    ]
    print_table(rows, f"decoding on {options.device}")
    write_json(options.out, "decode", rows)


if __name__ == "__main__":
    main()
