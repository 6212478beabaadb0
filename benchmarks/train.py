"""Whole models on a GPU: train steps and forward passes in tokens a second, with peak memory.

    python -m benchmarks.train [--out train.json] [--figure linear.png] [--layers 12] [--d-model 256]
    python -m benchmarks.train --audio [--out train.json]     # the audio U-Net of 6.26M, and SaShiMi
    python -m benchmarks.train --profile [--audio]            # one of our train steps, kernel by kernel

A step is forward, cross entropy, backward and fused AdamW under bfloat16 autocast; "graph": forward and backward are
recorded as a CUDA graph, as the training loop does where launching kernels is what takes the time. Where mamba_ssm is
installed its language model of the same shape runs beside ours. `--figure` draws the time a token from 8K to 1M at the
same number of tokens in flight.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import median_ms, print_table, write_json
from mambagen.models import MambaConfig, MambaLM
from mambagen.training.cuda_graph import MAX_TOKENS, GraphedPass

SHAPES = ((64, 1024), (1, 131072), (1, 1048576))
AUDIO_SHAPES = ((16, 16000), (1, 131072), (1, 958464))
VOCABULARY = 16


def ours(layers: int, d_model: int) -> nn.Module:
    """Our language model."""
    return MambaLM(MambaConfig(d_model=d_model, n_layer=layers, vocab_size=12), seed=0).cuda()


def official(layers: int, d_model: int) -> nn.Module | None:
    """The official language model of the same shape, or None where it is not installed."""
    try:
        from mamba_ssm.models.config_mamba import MambaConfig as OfficialConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    except ImportError:
        return None
    config = OfficialConfig(
        d_model=d_model, n_layer=layers, vocab_size=VOCABULARY, ssm_cfg={}, rms_norm=True, residual_in_fp32=True,
        fused_add_norm=True, pad_vocab_size_multiple=8,
    )  # fmt: skip
    return MambaLMHeadModel(config, device="cuda")


def audio(layers: str) -> nn.Module:
    """The audio U-Net of the published size with these layers everywhere."""
    from mambagen.models import AudioUNet, AudioUNetConfig

    return AudioUNet(AudioUNetConfig.model_validate({"outer": layers, "centre": layers}), seed=0).cuda()


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """(batch, length, vocabulary) from either model."""
    out = model(tokens)
    return out[0] if isinstance(out, tuple) and not hasattr(out, "logits") else out.logits


def measure(name: str, model: nn.Module, batch: int, length: int, graph: bool = False) -> dict[str, Any]:
    """Tokens a second and gigabytes for one model and shape."""
    tokens = draw_tokens(batch, length)
    step = train_step(model, tokens, graph)

    def forward() -> None:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            logits_of(model, tokens)

    if graph:
        forward = recorded(forward)
    row: dict[str, Any] = {"model": name, "graph": "yes" if graph else "no", "batch": batch, "length": length}
    for part, run in (("train", step), ("forward", forward)):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            row |= _rate(part, run, batch * length, graph)
        except torch.cuda.OutOfMemoryError:
            row |= {f"{part} Mtok/s": None, f"{part} GB": None}
    return row


def draw_tokens(batch: int, length: int) -> Tensor:
    """The same tokens every time."""
    torch.manual_seed(0)
    return torch.randint(7, 11, (batch, length), device="cuda")


def train_step(model: nn.Module, tokens: Tensor, graph: bool = False) -> Callable[[], None]:
    """Forward, cross entropy, backward and optimiser; with `graph` all but the last are one launch."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def loss_of(piece: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            logits = logits_of(model, piece["tokens"])
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), piece["tokens"].flatten(), reduction="sum")

    piece = {"tokens": tokens}
    graphed = GraphedPass(model, loss_of, piece) if graph else None

    def step() -> None:
        if graphed:
            graphed(piece, tokens.numel())
        else:
            (loss_of(piece) / tokens.numel()).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def recorded(run: Callable[[], None]) -> Callable[[], None]:
    """The same work as a CUDA graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _rate(part: str, run: Callable[[], None], tokens: int, graph: bool) -> dict[str, float | None]:
    milliseconds = median_ms(run, seconds=0.6)
    memory = None if graph else torch.cuda.max_memory_allocated() / 1e9  # a graph's memory was taken when it was made
    return {f"{part} Mtok/s": tokens / milliseconds / 1e3, f"{part} GB": memory}


def linear_rows(layers: int, d_model: int, tokens: int = 1 << 20) -> list[dict[str, Any]]:
    """The same tokens in flight as ever fewer, ever longer sequences."""
    model = ours(layers, d_model)
    rows = [measure("mambagen", model, tokens // length, length) for length in [1 << k for k in range(13, 21)]]
    for row in rows:
        row["train time a token / that at 8K"] = rows[0]["train Mtok/s"] / row["train Mtok/s"]
    return rows


def draw_linear(rows: list[dict[str, Any]], path: str) -> None:
    """Time a token and memory against length."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    lengths = [row["length"] for row in rows]
    for part in ("train", "forward"):
        left.plot(lengths, [1e3 / row[f"{part} Mtok/s"] for row in rows], marker="o", label=part)
        right.plot(lengths, [row[f"{part} GB"] for row in rows], marker="o", label=part)
    left.set(xscale="log", ylim=(0, None), xlabel="length", ylabel="nanoseconds a token")
    right.set(xscale="log", ylim=(0, None), xlabel="length", ylabel="peak memory, GB")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(f"{torch.cuda.get_device_name()}: 1,048,576 tokens in flight, bfloat16")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    print(f"drawn: {path}")


def profile(step: Callable[[], None], title: str, steps: int = 3) -> None:
    """Print the kernels of a step by the time they take, and the time of a step as it is measured."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    whole = median_ms(step)
    torch.cuda.synchronize()
    with profiler(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    rows = sorted(seen.key_averages(), key=lambda row: -row.self_device_time_total)
    total = sum(row.self_device_time_total for row in rows)
    table = [
        {
            "kernel": row.key[:90],
            "calls a step": row.count / steps,
            "ms a step": row.self_device_time_total / steps / 1000,
            "share": f"{row.self_device_time_total / total:.1%}",
        }
        for row in rows[:40]
    ]
    print_table(table, f"{title}: {whole:.2f} ms a step, {total / steps / 1000:.2f} ms of kernels")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="write the rows as JSON")
    parser.add_argument("--figure", help="draw time a token against length")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--audio", action="store_true", help="the audio U-Net instead")
    parser.add_argument("--profile", action="store_true", help="only print where the time of our train steps goes")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.train: needs a GPU; see benchmarks.tokens for the CPU")
    rows: list[dict[str, Any]] = []
    language = [("mambagen", lambda: ours(options.layers, options.d_model))]
    language.append(("mamba_ssm", lambda: official(options.layers, options.d_model)))  # type: ignore[arg-type, return-value]
    sound = [("Mamba U-Net", lambda: audio("mamba")), ("SaShiMi", lambda: audio("s4+mlp"))]
    if options.profile:
        for batch, length in AUDIO_SHAPES if options.audio else SHAPES:
            model = audio("mamba") if options.audio else ours(options.layers, options.d_model)
            profile(train_step(model, draw_tokens(batch, length)), f"{batch} x {length}")
        return
    for name, build in sound if options.audio else language:
        model = build()
        if model is None:
            continue
        for batch, length in AUDIO_SHAPES if options.audio else SHAPES:
            rows.append(measure(name, model, batch, length))
            print(rows[-1], flush=True)
            if batch * length <= MAX_TOKENS:
                rows.append(measure(name, model, batch, length, graph=True))
                print(rows[-1], flush=True)
        del model
        torch.cuda.empty_cache()
    print_table(rows, "audio U-Nets" if options.audio else f"{options.layers} layers, d_model {options.d_model}")
    if options.figure:
        linear = linear_rows(options.layers, options.d_model)
        print_table(linear, "the same tokens in flight")
        draw_linear(linear, options.figure)
        rows += [{"part": "linear", **row} for row in linear]
    write_json(options.out, "train", rows)


if __name__ == "__main__":
    main()
