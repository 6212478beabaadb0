"""Sampling from a language model, token by token with a carried state."""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from mambagen.errors import UsageError
from mambagen.models.mamba_lm import MambaLM, State

PREFILL_CHUNK = 1 << 16  # positions of a prompt that are read at once: bounds the memory, not the length


def generate(
    model: MambaLM,
    prompt: Tensor,
    steps: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    allowed: Iterable[int] | None = None,
) -> Iterator[Tensor]:
    """Yield `steps` further tokens of each prompt, one position at a time as they are drawn.

    Memory and time of a token do not grow with the length: the prompt is read once, then the state is carried.

    Args:
        prompt: (batch, length) or (length,) ids, at least one (BOS where there is nothing to continue).
        steps: how many tokens to draw.
        temperature: 0 takes the likeliest token; 1 samples the model's distribution.
        top_k: draw from the k likeliest only.
        top_p: draw from the fewest tokens that together have this probability (nucleus sampling, arXiv 1904.09751);
            applied after temperature and top_k.
        seed: the tokens are a function of it, the model, the prompt and the options.
        allowed: the ids that may be drawn (default: all of the vocabulary, never its padding).

    Yields:
        ids (batch,), int64, on the model's device.

    Raises:
        UsageError: an option is out of its range (at the call, not at the first token).
    """
    config = model.config
    if prompt.dim() == 1:
        prompt = prompt[None]
    if prompt.dim() != 2 or prompt.numel() == 0:
        raise UsageError(f"prompt: needs one token at least, as (batch, length); this one is {tuple(prompt.shape)}")
    if int(prompt.min()) < 0 or int(prompt.max()) >= config.vocab_size:
        raise UsageError(f"prompt: has a token outside the vocabulary of {config.vocab_size}")
    if steps < 0:
        raise UsageError(f"steps: {steps} is negative")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UsageError(f"temperature: {temperature} is no number of 0 or more")
    if top_k is not None and top_k < 1:
        raise UsageError(f"top_k: {top_k} is less than 1")
    if not 0 < top_p <= 1:
        raise UsageError(f"top_p: {top_p} is outside (0, 1]")
    device = model.lm_head.weight.device
    may_be = torch.zeros(config.padded_vocab_size, dtype=torch.bool, device=device)
    for token in range(config.vocab_size) if allowed is None else allowed:
        if not 0 <= token < config.vocab_size:
            raise UsageError(f"allowed: {token} is outside the vocabulary of {config.vocab_size}")
        may_be[token] = True
    if not may_be.any():
        raise UsageError("allowed: no token is left to draw")
    generator = torch.Generator(device).manual_seed(seed)

    def tokens() -> Iterator[Tensor]:
        if steps == 0:
            return
        logits, state = _read(model, prompt.to(device))
        for i in range(steps):
            token = draw(logits.masked_fill(~may_be, -math.inf), temperature, top_k, top_p, generator)
            yield token
            if i + 1 < steps:
                logits, state = _step(model, token, state)

    return tokens()


def draw(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float, generator: torch.Generator | None
) -> Tensor:
    """One token of each row of logits (batch, vocabulary), as `generate` says; ids (batch,)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.double()  # any temperature above 0 is then fine: the likeliest token's logit stays 0
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kept = logits.topk(top_k, dim=-1)  # exactly k, also where several are equal
        logits = torch.full_like(logits, -math.inf).scatter(-1, kept.indices, kept.values)
    probabilities = logits.softmax(-1)
    if top_p < 1:
        falling, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = falling.cumsum(-1) - falling  # of those that are likelier: the likeliest token always stays
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, falling.masked_fill(before >= top_p, 0))
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


# Not around the whole generator: a context manager open across a `yield` would leak into the caller.
@torch.no_grad()
def _read(model: MambaLM, prompt: Tensor) -> tuple[Tensor, State]:
    """Logits after the last token of the prompt, and the state there."""
    state = model.allocate_state(prompt.shape[0])
    for chunk in prompt.split(PREFILL_CHUNK, dim=1):
        hidden, after = model.backbone(chunk, state)
        state = after
    return model.head(hidden[:, -1]), state


@torch.no_grad()
def _step(model: MambaLM, token: Tensor, state: State) -> tuple[Tensor, State]:
    return model.step(token, state)
