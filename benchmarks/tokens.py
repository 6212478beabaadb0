"""Tokens a second of whole language models, forward and forward + backward: ours, transformers' and mambapy's Mamba.

    python -m benchmarks.tokens [--out tokens.json] [--device cpu|cuda] [--sizes 250k 7m] [--batch B] [--length L]

All three run with the same weights' shapes on the same random DNA, in float32 on a CPU and under bfloat16 autocast on a
GPU, in one process, one after the other, with a warm-up each; medians.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import median_ms, print_table, write_json
from mambagen.models import MAMBA_SIZES, MambaConfig, MambaLM


def ours(config: MambaConfig) -> nn.Module:
    """This project's model."""
    return MambaLM(config, seed=0)


def transformers_model(config: MambaConfig) -> nn.Module:
    """transformers' MambaForCausalLM; without the official CUDA kernels it takes its slow path."""
    from transformers import MambaConfig as Config
    from transformers import MambaForCausalLM

    return MambaForCausalLM(
        Config(
            vocab_size=config.padded_vocab_size,
            hidden_size=config.d_model,
            num_hidden_layers=config.n_layer,
            state_size=config.d_state,
            expand=config.expand,
            conv_kernel=config.d_conv,
            use_cache=False,
        )
    )


def mambapy_model(config: MambaConfig) -> nn.Module:
    """mambapy's Mamba (parallel scan in PyTorch) between an embedding and a head."""
    from mambapy.mamba import Mamba
    from mambapy.mamba import MambaConfig as Config

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model)
            self.body = Mamba(Config(d_model=config.d_model, n_layers=config.n_layer))
            self.head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False)

        def forward(self, tokens: Tensor) -> tuple[Tensor]:
            return (self.head(self.body(self.embedding(tokens))),)

    return Model()


MODELS: dict[str, Callable[[MambaConfig], nn.Module]] = {
    "mambagen": ours,
    "transformers": transformers_model,
    "mambapy": mambapy_model,
}


def row(name: str, size: str, device: str, batch: int, length: int, seconds: float) -> dict[str, Any] | None:
    """One model: tokens a second both ways, or None where its package is missing."""
    try:
        model = MODELS[name](MAMBA_SIZES[size]).to(device).train()
    except ImportError:
        print(f"{name}: not installed, left out")
        return None
    torch.manual_seed(0)
    tokens = torch.randint(7, 11, (batch, length), device=device)

    def loss() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            out = model(tokens)
            logits = out.logits if hasattr(out, "logits") else out[0]
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())

    def forward() -> None:
        with torch.no_grad():
            loss()

    def both() -> None:
        model.zero_grad(set_to_none=True)
        loss().backward()

    result: dict[str, Any] = {"model": name, "size": size, "device": device, "batch": batch, "length": length}
    for part, run in (("forward", forward), ("forward+backward", both)):
        try:
            result[f"{part} tokens/s"] = round(1e3 * batch * length / median_ms(run, device, seconds))
        except torch.cuda.OutOfMemoryError:
            result[f"{part} tokens/s"] = None
    return result


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="write the rows as JSON")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", nargs="+", choices=sorted(MAMBA_SIZES), default=["250k", "7m"])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--batch", type=int)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=1.0, help="measure each at least so long")
    options = parser.parse_args()
    batch = options.batch or (2 if options.device == "cpu" else 64)
    rows = []
    for size in options.sizes:
        for name in options.models:
            result = row(name, size, options.device, batch, options.length, options.seconds)
            if result:
                rows.append(result)
    for result in rows:
        mine = next((r for r in rows if r["model"] == "mambagen" and r["size"] == result["size"]), None)
        for part in ("forward", "forward+backward"):
            theirs = result[f"{part} tokens/s"]
            ratio = mine[f"{part} tokens/s"] / theirs if mine and theirs and mine[f"{part} tokens/s"] else None
            result[f"ours / it, {part}"] = ratio
    print_table(rows)
    write_json(options.out, "tokens", rows)


if __name__ == "__main__":
    main()
