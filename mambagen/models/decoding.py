"""Fast generation: a language model whose weights are packed once and stepped by mambagen.kernels.mamba_decode."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mambagen.errors import UsageError
from mambagen.kernels.mamba_decode import LayerWeights, Sampling, StackWeights, choose_backend, make_decoder
from mambagen.models.generation import PREFILL_CHUNK
from mambagen.models.mamba_block import MambaBlock
from mambagen.models.mamba_lm import MambaLM, State
from mambagen.models.mamba_mixer import MambaState

READ_BY_STEPS = 16  # tokens of a prompt up to which stepping costs less than a pass over the whole of it


class Decoder:
    """Generates from a model for a fixed number of streams; holds their state and the logits of their next tokens.

        decoder = Decoder(model, batch=2)
        decoder.prefill(prompt)                          # (2, length) ids -> logits of the next token
        tokens = decoder.generate(1000, temperature=0.8)  # (2, 1000) ids; call again to go on
        logits = decoder.step(tokens[:, -1])             # or token by token, as `MambaLM.step`

    The weights are copied: what training does to the model afterwards is not seen.
    """

    def __init__(self, model: MambaLM, batch: int = 1, backend: str = "auto", precision: str | None = None) -> None:
        """
        Args:
            model: on the device where the decoder is to run.
            batch: how many streams.
            backend: of mambagen.kernels.mamba_decode: "auto", "cuda", "graph", "cpu" or "reference".
            precision: of the weights on a GPU's "cuda" backend, "bfloat16" (default) or "float32".

        Raises:
            UsageError: an option is unknown, or the backend cannot run this model here.
        """
        self.model, self.batch = model, batch
        try:
            weights = stack_weights(model)
            self.backend = choose_backend(weights, backend)
            self._decoder = make_decoder(weights, batch, self.backend, precision or "bfloat16")
        except ValueError as error:
            raise UsageError(str(error)) from error
        self._device = model.lm_head.weight.device
        self.position = 0  # tokens that the streams have seen

    @property
    def logits(self) -> Tensor:
        """Of the next token, (batch, padded_vocab_size); nothing of meaning before the first token was read."""
        return self._decoder.logits.clone()

    @property
    def state(self) -> State:
        """A copy of the state after the last token, as `MambaLM.step` takes it."""
        return tuple(MambaState(conv, ssm) for conv, ssm in zip(*self._decoder.state(), strict=True))

    def load_state(self, state: State, logits: Tensor | None = None, position: int = 0) -> None:
        """Go on from a state (of `MambaLM` or of `state`), the logits that belong to it, and the tokens seen so far."""
        self._decoder.load_state([layer.conv for layer in state], [layer.ssm for layer in state])
        self._decoder.logits.copy_(torch.zeros_like(self._decoder.logits) if logits is None else logits)
        self.position = position

    def reset(self) -> None:
        """Back to the state before the first token."""
        self.load_state(self.model.allocate_state(self.batch))

    @torch.no_grad()
    def prefill(self, tokens: Tensor) -> Tensor:
        """Read tokens (batch, length) after what was read before; the logits of the next one, (batch, vocabulary).

        Long ones pass through `model.forward` in chunks, so that the time is that of a forward and memory is bounded.
        """
        tokens = self._checked(tokens, "tokens", 2)
        if tokens.shape[1] <= READ_BY_STEPS:
            self._decoder.read(tokens)
            self.position += tokens.shape[1]
            return self.logits
        dtype = self.model.lm_head.weight.dtype
        state: State | None = tuple(MambaState(layer.conv.to(dtype), layer.ssm) for layer in self.state)
        for chunk in tokens.split(PREFILL_CHUNK, dim=1):
            hidden, state = self.model.backbone(chunk, state)
        assert state is not None
        self.load_state(state, self.model.head(hidden[:, -1]), self.position + tokens.shape[1])
        return self.logits

    def step(self, tokens: Tensor) -> Tensor:
        """Read one token of each stream, ids (batch,); the logits of the next, (batch, padded_vocab_size).

        Ids on a GPU are not looked at from here, which would wait for it: there the kernel takes the nearest id.
        """
        tokens = self._checked(tokens, "tokens", 1)
        self._decoder.read(tokens[:, None])
        self.position += 1
        return self.logits

    def read(self, tokens: Tensor) -> Tensor:
        """Read tokens (batch, length) one by one; the logits after each, (batch, length, padded_vocab_size)."""
        tokens = self._checked(tokens, "tokens", 2)
        after = self._decoder.read(tokens)
        self.position += tokens.shape[1]
        return after

    def generate(
        self,
        steps: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        allowed: Iterable[int] | None = None,
        streams: Sequence[int] | None = None,
    ) -> Tensor:
        """Draw `steps` tokens for every stream and read them, all inside one compiled loop: ids (batch, steps).

        A token is a function of the model, what its stream has read, the options, the seed, the stream's name and the
        position: not of the other streams, nor of how many tokens are asked for at once.

        Args:
            steps: how many.
            temperature: 0 takes the likeliest token; 1 samples the model's distribution.
            top_k: draw from the k likeliest only.
            top_p: draw from the fewest tokens that together have this probability, after temperature and top_k.
            seed: with the stream's name and the position it makes the random numbers.
            allowed: the ids that may be drawn (default: the vocabulary without its padding).
            streams: the streams' names, one a row (default: 0, 1, ...), 0 to 2^32 - 1.

        Raises:
            UsageError: an option is out of its range, or nothing was read yet.
        """
        if self.position == 0:
            raise UsageError("generate: read a token first (BOS where there is nothing to continue)")
        if steps < 1:
            raise UsageError(f"steps: {steps} is less than 1")
        try:
            sampling = Sampling(temperature, top_k, top_p, seed)
        except ValueError as error:
            raise UsageError(str(error)) from error
        names = range(self.batch) if streams is None else streams
        if len(names) != self.batch or any(not 0 <= name < 1 << 32 for name in names):
            raise UsageError(f"streams: needs {self.batch} numbers from 0 to 2^32 - 1")
        tokens = self._decoder.draw(
            steps, sampling, self._bias(allowed), self.position, torch.tensor(list(names), device=self._device)
        )
        self.position += steps
        return tokens

    def _bias(self, allowed: Iterable[int] | None) -> Tensor:
        """0 for ids that may be drawn, -inf for the others."""
        config = self.model.config
        bias = torch.full((config.padded_vocab_size,), -math.inf)
        ids = list(range(config.vocab_size) if allowed is None else allowed)
        for token in ids:
            if not 0 <= token < config.vocab_size:
                raise UsageError(f"allowed: {token} is outside the vocabulary of {config.vocab_size}")
        if not ids:
            raise UsageError("allowed: no token is left to draw")
        bias[ids] = 0
        return bias.to(self._device)

    def _checked(self, tokens: Tensor, name: str, dimensions: int) -> Tensor:
        shape = "(batch,)" if dimensions == 1 else "(batch, length)"
        if tokens.dim() != dimensions or tokens.shape[0] != self.batch or tokens.numel() == 0:
            raise UsageError(f"{name}: needs {shape} with a batch of {self.batch}, not {tuple(tokens.shape)}")
        tokens = tokens.to(self._device).long()
        if dimensions == 1 and tokens.is_cuda:
            return tokens
        if int(tokens.min()) < 0 or int(tokens.max()) >= self.model.config.padded_vocab_size:
            raise UsageError(f"{name}: has an id outside the vocabulary of {self.model.config.padded_vocab_size}")
        return tokens


def stack_weights(model: MambaLM) -> StackWeights:
    """The parameters of a model as the plain tensors that mambagen.kernels.mamba_decode takes; nothing is copied."""
    backbone = model.backbone
    layers = []
    for block in backbone.layers:
        assert isinstance(block, MambaBlock)
        w = block.mixer.weights()
        layers.append(
            LayerWeights(
                block.norm.weight.detach(),
                w.in_proj.detach(),
                w.conv_weight.detach().squeeze(1),
                w.conv_bias.detach(),
                *(v.detach() for v in (w.x_proj, w.dt_proj, w.dt_bias, w.A_log, w.D, w.out_proj)),
            )
        )
    return StackWeights(
        backbone.embedding.weight.detach(),
        layers,
        backbone.norm_f.weight.detach(),
        model.lm_head.weight.detach(),
        model.config.norm_epsilon,
    )
