"""The audio U-Net (the layout of SaShiMi, arXiv 2202.09729) over any causal mixer: samples in, the next one out.

Stages at falling rates: `pool` frames of a stage are one of the next, `expand_pool` times as wide. With `stages=5`
blocks stand before each DownPool, in the centre, and after each UpPool; with 3, the older layout, there are none before
the DownPools. (The names count the stages for two pools; other numbers of pools have more or fewer.)

    tokens -> embedding -> blocks -> DownPool -> blocks -> DownPool -> centre
                             |                     |                     |
    logits <- head <- norm <- blocks <- UpPool <- blocks <- UpPool <-----+        with a skip around every layer

DownPool folds `pool` frames into the channels, (length, H) -> (length / pool, pool H), and maps them to the next width.
UpPool maps back and unfolds, one pooled frame late: what it gives to a position was computed from frames that had ended
before it, and nothing is seen ahead. So one step needs the deep stages only when a frame is full, and in between hands
out what UpPool has left over; that queue and DownPool's unfinished frame are part of the state.

A class is a vector for every level, added to the residual stream where the level begins and again where its way up
begins. It tells at most log(classes) nats in a whole clip, a gradient of next to nothing at any one sample, so its way
must be short: one vector beside the tokens' embeddings alone has all stages to pass, and is forgotten.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from mambagen.errors import UsageError
from mambagen.models.config import Count, Positive
from mambagen.models.initialisation import init_weights as init_mamba
from mambagen.models.mamba_block import MambaBlock, RMSNorm
from mambagen.models.optimiser_groups import parameter_groups
from mambagen.models.s4_mixer import S4
from mambagen.models.s4d_mixer import S4D
from mambagen.models.unet_blocks import Block, make_blocks

BlockKind = Literal["mamba", "s4", "s4d", "s4+mlp", "s4d+mlp", "attention+mlp"]

MIDDLE = 128  # the token that stands before the first sample: silence


class AudioUNetConfig(BaseModel):
    """What determines the weights of an audio U-Net; unknown keys and impossible values raise ValidationError."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    d_model: Count = 64  # channels of the outermost stage
    n_layer: Count = 8  # layers a stage
    pool: Annotated[tuple[Annotated[int, Field(ge=2, le=64)], ...], Field(min_length=1, max_length=4)] = (4, 4)
    expand_pool: Annotated[int, Field(ge=1, le=4)] = 2  # how much wider each next stage is
    stages: Literal[3, 5] = 5  # the layout: 5 with blocks before the DownPools, 3 without
    outer: BlockKind = "mamba"  # the layers of all stages but the centre
    centre: BlockKind = "mamba"  # the layers at the lowest rate
    vocab_size: Annotated[int, Field(ge=2, le=65536)] = 256
    classes: Annotated[int, Field(ge=0)] = 0  # of a conditional model; the class `classes` stands for none of them
    d_state: Annotated[int, Field(ge=1, le=256)] = 16  # of Mamba: states a channel
    d_conv: Annotated[int, Field(ge=1, le=8)] = 4  # of Mamba: width of the convolution
    expand: Count = 2  # of Mamba: inner channels a channel
    ssm_state: Annotated[int, Field(ge=1, le=1024)] = 32  # of S4 and S4D: complex states a channel, conjugate pairs
    mlp_expand: Count = 2  # inner channels a channel of the feed-forward networks
    head_width: Annotated[int, Field(ge=2, multiple_of=2)] = 32  # of attention
    attention_window: Annotated[int, Field(ge=2)] = 1024  # positions that attention sees, at the rate of its stage
    norm_epsilon: Positive = 1e-5

    @model_validator(mode="after")
    def _heads_fit(self) -> "AudioUNetConfig":
        for kind, width in ((self.outer, self.d_model), (self.centre, self.width(len(self.pool)))):
            if kind.startswith("attention") and width % self.head_width:
                raise ValueError(f"head_width {self.head_width} does not divide a stage's width of {width}")
        return self

    def width(self, level: int) -> int:
        """Channels at a level: 0 is the outermost, len(pool) the centre."""
        return self.d_model * self.expand_pool**level

    @property
    def class_sizes(self) -> list[int]:
        """Channels of a class's vectors: one where each level begins, then one on each way up."""
        widths = [self.width(level) for level in range(len(self.pool) + 1)]
        return widths + widths[:-1]

    @property
    def cycle(self) -> int:
        """Samples in one frame of the centre: what stepping does repeats with this period."""
        return math.prod(self.pool)

    @property
    def depth(self) -> int:
        """Layers in all stages together."""
        outer = len(self.pool) * (2 if self.stages == 5 else 1)
        return self.n_layer * (outer + 1)

    @property
    def description(self) -> str:
        """The shape in a few words, for a model card."""
        pools = ", ".join(map(str, self.pool))
        return (
            f"{self.outer} outside and {self.centre} in the centre, d_model {self.d_model}, {self.n_layer} layers "
            f"a stage, {self.stages}-stage layout, pools {pools}"
        )


class StageState(NamedTuple):
    """What is carried from one stretch of a sequence to the next, at one level; nothing is changed in place.

    c, the frames of the pooled frame that has begun, is the same in all rows and is read off the shapes.
    """

    down: tuple[Any, ...]  # of the blocks before the DownPool
    buffer: Tensor  # (batch, c, H) float32: the unfinished frame
    queue: Tensor  # (batch, pool - c, H) float32: what UpPool gives to the next positions
    deeper: Any  # StageState of the next level, or at the last the tuple of the centre's states
    up: tuple[Any, ...]  # of the blocks after the UpPool


class AudioUNet(nn.Module):
    """A U-Net language model over quantised audio.

    The token sequence is already shifted: position t holds sample t - 1 (the first one `MIDDLE`), and the logits there
    are of sample t. With a `seed` the weights are a function of it and the config alone.
    """

    kind = "audio-unet"  # what a model folder's config.json calls it
    input_policy = "quantiser"  # and what it calls the way from a waveform to tokens

    def __init__(self, config: AudioUNetConfig, seed: int | None = None) -> None:
        super().__init__()
        self.config = config
        levels = range(len(config.pool))
        outer = [
            [make_blocks(config.outer, config.n_layer, config.width(level), config.depth, config) for level in levels]
            for _ in range(2)
        ]
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        # a row is all vectors of a class, one after another as in `class_sizes`
        self.class_embedding = nn.Embedding(config.classes + 1, sum(config.class_sizes)) if config.classes else None
        if self.class_embedding is not None:
            # only windows of its class have gradients for a row; decay would pull at it in every step
            self.class_embedding.weight._no_weight_decay = True  # type: ignore[attr-defined]
        self.down = nn.ModuleList(outer[0] if config.stages == 5 else [])
        self.down_pool = nn.ModuleList(nn.Linear(s * config.width(i), config.width(i + 1)) for i, s in _pools(config))
        self.centre = make_blocks(config.centre, config.n_layer, config.width(len(config.pool)), config.depth, config)
        self.up_pool = nn.ModuleList(nn.Linear(config.width(i + 1), s * config.width(i)) for i, s in _pools(config))
        self.up = nn.ModuleList(outer[1])
        self.norm_f = RMSNorm(config.d_model, config.norm_epsilon)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size)
        self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Draw all weights anew, on the CPU: Mamba, S4 and S4D as published, norms 1, embeddings normal of deviation 1,

        linear maps and their biases uniform in ±inputs^-1/2. A class's vectors have deviation 1 at the outermost level
        and 0.5 below it: about what the stream has there in fresh weights (1 at the input, 0.6 and 0.3 to 0.5 after one
        and two DownPools, 0.7 to 1.2 on the way up), so that the norms do not drown them. With a `seed` the global
        generator is left as it was.
        """
        if seed is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.init_weights()
            return
        if self.embedding.weight.is_meta:
            return  # parameters are being counted
        for module in self.modules():
            if isinstance(module, MambaBlock):
                init_mamba(module, module.config)
            elif isinstance(module, S4 | S4D):
                module.init_weights()
            elif isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
            elif isinstance(module, nn.Embedding):
                module.weight.copy_(torch.randn(module.weight.shape, device="cpu"))
        if self.class_embedding is not None:
            outermost = (0, len(self.config.pool) + 1)
            for place, vectors in enumerate(self._vectors(self.class_embedding.weight)):
                vectors.mul_(1.0 if place in outermost else 0.5)
        of_mamba = {id(p) for m in self.modules() if isinstance(m, MambaBlock) for p in m.parameters()}
        for module in self.modules():
            if isinstance(module, nn.Linear) and id(module.weight) not in of_mamba:
                for parameter in (module.weight, module.bias):
                    if parameter is not None:
                        bound = module.in_features**-0.5
                        parameter.copy_(torch.empty(parameter.shape, device="cpu").uniform_(-bound, bound))

    def forward(
        self,
        tokens: Tensor,
        state: StageState | None = None,
        classes: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, StageState | None]:
        """Predict each next sample.

        Args:
            tokens: (batch, length) of any integer type; any length.
            state: what the stretch before left, or `allocate_state`; None (as in training) carries nothing.
            classes: (batch,) of a conditional model, `config.classes` for none; None is none in every row.
            resets: (batch, length) bool, True where a packed document begins: nothing flows across. Documents begin at
                multiples of `config.cycle` samples, as frames of the centre are shared by none.

        Returns:
            logits (batch, length, vocab_size) in float32, and the new state (None where none was given).

        Raises:
            UsageError: classes for a model without them, or a document that begins inside a frame.
        """
        x, after = self.backbone(tokens, state, classes, resets)
        return self.head(x), after

    def backbone(
        self,
        tokens: Tensor,
        state: StageState | None = None,
        classes: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, StageState | None]:
        """`forward` without the head: (batch, length, d_model), of which the positions of interest go to `head`."""
        length = tokens.shape[1]
        if resets is not None:
            self._check_resets(resets, state)
        x, given = self._embed(tokens), self.class_vectors(classes)
        vectors = () if given is None else self._vectors(given[:, None])
        if state is None:
            missing = -length % self.config.cycle
            x = F.pad(x, (0, 0, 0, missing))
            resets = None if resets is None else F.pad(resets, (0, missing))
        x, after = self._stage(0, x, state, resets, vectors)
        return x[:, :length], after

    def step(self, token: Tensor, state: StageState, classes: Tensor | None = None) -> tuple[Tensor, StageState]:
        """One position: tokens (batch,) -> logits (batch, vocab_size) and the new state; other arguments as above."""
        return self.step_with(token, state, self.class_vectors(classes))

    def step_with(self, token: Tensor, state: StageState, given: Tensor | None) -> tuple[Tensor, StageState]:
        """`step` with what `class_vectors` gives: (batch or 1, sum(class_sizes)), None for nothing."""
        x, after = self._step(0, self._embed(token), state, () if given is None else self._vectors(given))
        return self.head(x), after

    def class_vectors(self, classes: Tensor | None) -> Tensor | None:
        """All vectors of each row's class, (batch, sum(class_sizes)) in float32 at least, in the order of

        `AudioUNetConfig.class_sizes`; of none, (1, ...), where no classes are given; None of a model without them.

        Raises:
            UsageError: classes for a model without them.
        """
        if self.class_embedding is None:
            if classes is not None:
                raise UsageError("classes: this model is not conditional; train one with classes, or give none")
            return None
        weight = self.class_embedding.weight
        found = weight[-1:] if classes is None else self.class_embedding(classes.long())
        return found.to(torch.promote_types(weight.dtype, torch.float32))

    def head(self, x: Tensor) -> Tensor:
        """The outermost stage's result (..., d_model) -> logits (..., vocab_size), float32 at least."""
        return _linear(self.lm_head, self.norm_f(x))

    def allocate_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> StageState:
        """The state before the first token; `dtype` is that of the blocks' parts in low precision."""
        device = device or self.embedding.weight.device
        wide = torch.promote_types(dtype or self.embedding.weight.dtype, torch.float32)

        def states(blocks: Sequence[Block]) -> tuple[Any, ...]:
            return tuple(block.allocate_state(batch, device, dtype) for block in blocks)

        after: Any = states(self.blocks("centre"))
        for level, pool in reversed(_pools(self.config)):
            buffer = torch.zeros(batch, 0, self.config.width(level), device=device, dtype=wide)
            queue = torch.zeros(batch, pool, self.config.width(level), device=device, dtype=wide)
            after = StageState(
                states(self.blocks("down", level)), buffer, queue, after, states(self.blocks("up", level))
            )
        return cast(StageState, after)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for an optimiser; see `mambagen.models.optimiser_groups`."""
        return parameter_groups(self, weight_decay)

    # ---- one level and all below it

    def _stage(
        self, level: int, x: Tensor, state: Any, resets: Tensor | None, vectors: Sequence[Tensor]
    ) -> tuple[Tensor, Any]:
        """x (batch, frames, H) -> what the level gives back, (batch, frames, H), and the state.

        `vectors` are the classes', (batch or 1, 1, H') each as in `class_sizes`, or none at all.
        """
        x = self._entering(level, x, vectors)
        if level == len(self.config.pool):
            outputs, after = _run(self.blocks("centre"), x, state, resets)
            return outputs[-1] + x, after
        outputs, down = _run(self.blocks("down", level), x, None if state is None else state.down, resets)
        skips = [x, *outputs]
        y, after = self._below(level, skips[-1], state, resets, vectors)
        y = self._rising(level, y + skips.pop(), vectors)
        outputs, up = _run(self.blocks("up", level), y, None if state is None else state.up, resets, skips)
        out = outputs[-1] if self.config.stages == 5 else outputs[-1] + y
        return out, None if after is None else after._replace(down=down, up=up)

    def _below(
        self, level: int, x: Tensor, state: StageState | None, resets: Tensor | None, vectors: Sequence[Tensor]
    ) -> tuple[Tensor, StageState | None]:
        """DownPool, the deeper levels, UpPool: what they give to the frames x, and the state without the blocks'."""
        pool, length, (down, up) = self.config.pool[level], x.shape[1], self.pools(level)
        frames = x if state is None else torch.cat([state.buffer, x], 1)
        begun = frames.shape[1] - length  # of x's first pooled frame
        whole = frames.shape[1] // pool
        starts = None if resets is None else F.pad(resets, (begun, 0))[:, ::pool]  # marks of pooled frames
        deeper = None if state is None else state.deeper
        given = frames[:, :0]
        if whole:
            pooled = frames[:, : whole * pool].unflatten(1, (whole, pool)).flatten(2)
            marks = None if starts is None else starts[:, :whole].contiguous()
            y, deeper = self._stage(level + 1, _linear(down, pooled), deeper, marks, vectors)
            given = _linear(up, y).unflatten(2, (pool, -1)).flatten(1, 2)
        if state is None:
            given = F.pad(given, (0, 0, pool, -pool))  # one pooled frame late
        else:
            given = torch.cat([frames.new_zeros(len(x), begun, x.shape[2]), state.queue, given], 1)
        if starts is not None:
            # what came before a document's first frame is another's
            first = starts.repeat_interleave(pool, 1)[:, : given.shape[1]]
            first = F.pad(first, (0, given.shape[1] - first.shape[1]))
            given = given.masked_fill(first[..., None], 0)
            if deeper is not None and starts.shape[1] > whole:  # the document's first frame is not full yet
                deeper = _forget(deeper, starts[:, whole])
        given = given[:, begun:]
        if state is None:
            return given, None
        after = StageState((), frames[:, whole * pool :].clone(), given[:, length:].clone(), deeper, ())
        return given[:, :length], after

    def _step(self, level: int, x: Tensor, state: Any, vectors: Sequence[Tensor]) -> tuple[Tensor, Any]:
        """One frame of a level, x (batch, H); `vectors` (batch or 1, H') each."""
        x = self._entering(level, x, vectors)
        if level == len(self.config.pool):
            outputs, after = _step_through(self.blocks("centre"), x, state)
            return outputs[-1] + x, after
        outputs, down = _step_through(self.blocks("down", level), x, state.down)
        skips = [x, *outputs]
        frame, deeper = torch.cat([state.buffer, skips[-1][:, None]], 1), state.deeper
        y, queue = self._rising(level, state.queue[:, 0] + skips.pop(), vectors), state.queue[:, 1:]
        outputs, up = _step_through(self.blocks("up", level), y, state.up, skips)
        out = outputs[-1] if self.config.stages == 5 else outputs[-1] + y
        pool = self.config.pool[level]
        if frame.shape[1] == pool:
            down_pool, up_pool = self.pools(level)
            below, deeper = self._step(level + 1, _linear(down_pool, frame.flatten(1)), deeper, vectors)
            queue = _linear(up_pool, below).unflatten(1, (pool, -1))
            frame = frame[:, :0]
        return out, StageState(down, frame, queue, deeper, up)

    def blocks(self, where: str, level: int | None = None) -> Sequence[Block]:
        """The blocks of a stage: "down" or "up" of a level, or "centre"."""
        found = getattr(self, where)
        if level is not None:
            found = found[level] if len(found) else []
        return cast(Sequence[Block], found)

    def pools(self, level: int) -> tuple[nn.Linear, nn.Linear]:
        """The DownPool's and the UpPool's map between a level and the next."""
        return cast(tuple[nn.Linear, nn.Linear], (self.down_pool[level], self.up_pool[level]))

    # ---- input

    def _embed(self, tokens: Tensor) -> Tensor:
        """The tokens' embeddings (..., d_model), in float32 at least."""
        if tokens.dtype not in (torch.int64, torch.int32):  # bytes travel to a GPU at an eighth of the cost
            tokens = tokens.long()
        x = self.embedding(tokens)
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def _vectors(self, rows: Tensor) -> Sequence[Tensor]:
        """Rows of the class embedding (..., sum(class_sizes)) cut into views."""
        return rows.split(self.config.class_sizes, -1)

    def _entering(self, level: int, x: Tensor, vectors: Sequence[Tensor]) -> Tensor:
        """x with the classes' vectors of where a level begins."""
        return x + vectors[level] if vectors else x

    def _rising(self, level: int, x: Tensor, vectors: Sequence[Tensor]) -> Tensor:
        """x with those of where its way up begins."""
        return x + vectors[len(self.config.pool) + 1 + level] if vectors else x

    def _check_resets(self, resets: Tensor, state: StageState | None) -> None:
        first = 0 if state is None else self._phase(state)
        places = (torch.arange(resets.shape[1], device=resets.device) + first) % self.config.cycle
        if bool((resets & (places != 0)).any()):
            raise UsageError(
                f"resets: a document begins inside a pooled frame; place documents at multiples of "
                f"{self.config.cycle} samples (pools {self.config.pool})"
            )

    def _phase(self, state: StageState) -> int:
        """How many samples of the centre's frame have gone by."""
        gone, size = 0, 1
        for pool in self.config.pool:
            gone, size, state = gone + size * state.buffer.shape[1], size * pool, state.deeper
        return gone


def _pools(config: AudioUNetConfig) -> list[tuple[int, int]]:
    return list(enumerate(config.pool))


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """In the weights' precision (or autocast's), the result in float32 at least."""
    y = F.linear(x.to(layer.weight.dtype), layer.weight, layer.bias)
    return y.to(torch.promote_types(y.dtype, torch.float32))


def _run(
    blocks: Sequence[Block], x: Tensor, state: Any, resets: Tensor | None, skips: list[Tensor] | None = None
) -> tuple[list[Tensor], Any]:
    """What each block puts out, the last of `skips` added (and taken) while there are any; and the blocks' states."""
    outputs, after = [], []
    for i, block in enumerate(blocks):
        x, block_state = block(x, None if state is None else state[i], resets)
        if skips:
            x = x + skips.pop()
        outputs.append(x)
        after.append(block_state)
    return outputs, None if state is None else tuple(after)


def _step_through(
    blocks: Sequence[Block], x: Tensor, state: Any, skips: list[Tensor] | None = None
) -> tuple[list[Tensor], Any]:
    """`_run` for one frame."""
    outputs, after = [], []
    for block, block_state in zip(blocks, state, strict=True):
        x, block_state = block.step(x, block_state)
        if skips:
            x = x + skips.pop()
        outputs.append(x)
        after.append(block_state)
    return outputs, tuple(after)


def _forget(state: Any, rows: Tensor) -> Any:
    """The state with the marked rows (batch,) as before the first position, where everything is zero."""
    if isinstance(state, Tensor):
        return state.masked_fill(rows.view(-1, *[1] * (state.dim() - 1)), 0)
    parts = [_forget(part, rows) for part in state]
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
