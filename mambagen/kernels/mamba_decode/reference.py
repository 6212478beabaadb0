"""Decoding in plain torch operations, written as its definition; as a CUDA graph it is the fallback on any GPU."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mambagen.kernels.mamba_decode import LayerWeights, Sampling, StackWeights

WORD = 0xFFFFFFFF


class ReferenceDecoder:
    """`Decoder` in the dtype of the weights, float32 at least where it matters (state, norms, residual, logits)."""

    def __init__(self, weights: StackWeights, batch: int) -> None:
        self.weights = weights
        self.wide = torch.promote_types(weights.embedding.dtype, torch.float32)
        first = weights.layers[0]
        channels, width = first.conv_weight.shape
        zero = torch.zeros((), device=weights.embedding.device, dtype=self.wide)
        self._conv = [zero.new_zeros(batch, width - 1, channels) for _ in weights.layers]
        self._ssm = [zero.new_zeros(batch, *first.A_log.shape) for _ in weights.layers]
        self.logits = zero.new_zeros(batch, weights.head.shape[0])

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        return read_by_steps(self._step, self.logits, tokens)

    @torch.no_grad()
    def draw(self, steps: int, sampling: Sampling, bias: Tensor, position: int, streams: Tensor) -> Tensor:
        drawn = []
        where = torch.full_like(streams, position)
        for _ in range(steps):
            token = draw_tokens(self.logits + bias, sampling, where, streams)
            self._step(token)
            drawn.append(token)
            where = where + 1
        return torch.stack(drawn, 1)

    def load_state(self, conv: Sequence[Tensor], ssm: Sequence[Tensor]) -> None:
        for to, given in zip([*self._conv, *self._ssm], [*conv, *ssm], strict=True):
            to.copy_(given)

    def state(self) -> tuple[list[Tensor], list[Tensor]]:
        return [v.clone() for v in self._conv], [v.clone() for v in self._ssm]

    def _step(self, token: Tensor) -> None:
        weights = self.weights
        x = weights.embedding[token].to(self.wide)
        for layer, conv, ssm in zip(weights.layers, self._conv, self._ssm, strict=True):
            x = x + mixer_step(rms_norm(x, layer.norm, weights.epsilon), layer, conv, ssm)
        x = rms_norm(x, weights.norm_f, weights.epsilon)
        self.logits.copy_(F.linear(x.to(weights.head.dtype), weights.head))


def read_by_steps(step: Callable[[Tensor], None], logits: Tensor, tokens: Tensor) -> Tensor:
    """(batch, steps, vocabulary): `logits` as each step on a column of tokens, (batch, steps), leaves them."""
    after = []
    for token in tokens.unbind(1):
        step(token)
        after.append(logits.clone())
    return torch.stack(after, 1)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), epsilon)


def mixer_step(x: Tensor, w: LayerWeights, conv: Tensor, ssm: Tensor) -> Tensor:
    """One position of a mixer, x (batch, D) -> (batch, D); the state (batch, d_conv - 1, E), (batch, E, N) moves on."""
    wide, low = x.dtype, w.in_proj.dtype
    rank, d_state = w.dt_proj.shape[1], w.A_log.shape[1]
    x, z = F.linear(x.to(low), w.in_proj).to(wide).chunk(2, dim=-1)
    window = torch.cat([conv, x[:, None]], dim=1)
    x = F.silu((window * w.conv_weight.T.to(wide)).sum(1) + w.conv_bias.to(wide))
    dt, B, C = F.linear(x.to(low), w.x_proj).split([rank, d_state, d_state], dim=-1)
    dt = F.softplus(F.linear(dt, w.dt_proj).to(wide) + w.dt_bias.to(wide))
    h = torch.exp(dt[..., None] * -torch.exp(w.A_log.to(wide))) * ssm + (dt * x)[..., None] * B[:, None].to(wide)
    y = ((h * C[:, None].to(wide)).sum(-1) + w.D.to(wide) * x) * F.silu(z)
    conv.copy_(window[:, 1:])
    ssm.copy_(h)
    return F.linear(y.to(low), w.out_proj).to(wide)


def draw_tokens(logits: Tensor, sampling: Sampling, position: Tensor, streams: Tensor) -> Tensor:
    """One token of each row of logits (batch, vocabulary); -inf is never drawn. ids (batch,) int64."""
    return pick(logits, sampling, uniform(sampling.seed, position, streams))


def pick(logits: Tensor, sampling: Sampling, numbers: Tensor) -> Tensor:
    """The same with the random numbers given, (batch,) in [0, 1).

    Ties are ordered by id, the lower first. The token is the first whose cumulative weight, in the order of ids,
    exceeds the random number's share of the whole.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scaled = (logits - logits.amax(-1, keepdim=True)).double() * sampling.inverse_temperature
    weights = torch.exp(scaled)
    if sampling.top_k is not None or sampling.top_p < 1:
        _, order = logits.sort(dim=-1, descending=True, stable=True)
        falling = weights.gather(-1, order)
        if sampling.top_k is not None:
            falling[:, sampling.top_k :] = 0
        if sampling.top_p < 1:
            before = falling.cumsum(-1) - falling
            falling = falling.masked_fill(before >= sampling.top_p * falling.sum(-1, keepdim=True), 0)
        weights = torch.zeros_like(weights).scatter(-1, order, falling)
    passed = weights.cumsum(-1)
    target = numbers[:, None] * passed[:, -1:]
    found = ((passed > target) & (weights > 0)).int()
    return found.argmax(-1)


def uniform(seed: int | Tensor, position: Tensor, streams: Tensor) -> Tensor:
    """Numbers in [0, 1) with 24 random bits, a function of (seed, position, stream): Philox4x32-10.

    The counter is (position low, position high, stream, 0), the key the seed's 64 bits, the result the first word
    (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
    """
    c0, c1, c2, c3 = position & WORD, position >> 32 & WORD, streams & WORD, torch.zeros_like(streams)
    k0, k1 = seed & WORD, seed >> 32 & WORD
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # 64-bit products: the bits are right though the sign is not
        c0, c1, c2, c3 = (b >> 32 & WORD) ^ c1 ^ k0, b & WORD, (a >> 32 & WORD) ^ c3 ^ k1, a & WORD
        k0, k1 = k0 + 0x9E3779B9 & WORD, k1 + 0xBB67AE85 & WORD
    return (c0 >> 8).double() * 2.0**-24


class GraphDecoder(ReferenceDecoder):
    """The same as CUDA graphs: one launch a token, however many operations that is."""

    def __init__(self, weights: StackWeights, batch: int) -> None:
        super().__init__(weights, batch)
        device = weights.embedding.device
        self._token = torch.zeros(batch, dtype=torch.int64, device=device)
        self._position = torch.zeros(batch, dtype=torch.int64, device=device)
        self._streams = torch.zeros(batch, dtype=torch.int64, device=device)
        self._bias = torch.zeros(weights.head.shape[0], device=device)
        self._reading = self._capture(None)
        self._drawing: dict[Sampling, torch.cuda.CUDAGraph] = {}

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        after = []
        for token in tokens.unbind(1):
            self._token.copy_(token)
            self._reading.replay()
            after.append(self.logits.clone())
        return torch.stack(after, 1)

    @torch.no_grad()
    def draw(self, steps: int, sampling: Sampling, bias: Tensor, position: int, streams: Tensor) -> Tensor:
        if sampling not in self._drawing:
            self._drawing = {sampling: self._capture(sampling)}  # only the last: graphs hold memory
        self._position.fill_(position)
        self._streams.copy_(streams)
        self._bias.copy_(bias)
        drawn = torch.empty(steps, len(streams), dtype=torch.int64, device=streams.device)
        for i in range(steps):
            self._drawing[sampling].replay()
            drawn[i] = self._token
        return drawn.T.contiguous()

    @torch.no_grad()
    def _capture(self, sampling: Sampling | None) -> torch.cuda.CUDAGraph:
        def step() -> None:
            if sampling is not None:
                self._token.copy_(draw_tokens(self.logits + self._bias, sampling, self._position, self._streams))
                self._position.add_(1)
            self._step(self._token)

        held = [self._token, self._position, self.logits, *self._conv, *self._ssm]
        before = [v.clone() for v in held]
        stream = torch.cuda.Stream(self._token.device)
        stream.wait_stream(torch.cuda.current_stream(self._token.device))
        with torch.cuda.stream(stream):  # libraries set themselves up outside the capture
            step()
        torch.cuda.current_stream(self._token.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        for v, was in zip(held, before, strict=True):
            v.copy_(was)
        return graph
