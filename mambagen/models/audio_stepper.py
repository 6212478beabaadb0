"""Fast generation of audio: a U-Net whose weights are packed once and stepped by mambagen.kernels.unet_decode.

    stepper = Stepper(model, batch=2)
    stepper.prefill(prompt, classes)                 # (2, length) samples to go on from; optional
    samples = stepper.generate(16_000, temperature=0.9, seeds=[1, 2])   # (2, 16000) uint8; call again to go on

Models of Mamba layers everywhere run in one compiled loop; those with another mixer step in plain torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mambagen.errors import UsageError
from mambagen.kernels.mamba_decode import LayerWeights
from mambagen.kernels.unet_decode import (
    PRECISIONS,
    DecoderState,
    LevelWeights,
    Sampling,
    UNetWeights,
    choose_backend,
    make_decoder,
)
from mambagen.kernels.unet_decode.reference import draw_tokens
from mambagen.models.audio_unet import MIDDLE, AudioUNet, StageState
from mambagen.models.cpu_linear import OneDnnLinear
from mambagen.models.mamba_block import MambaBlock
from mambagen.models.mamba_mixer import MambaState

BACKENDS = ("auto", "cuda", "graph", "cpu", "reference", "eager")
READ_BY_STEPS = 16  # samples of a prompt up to which stepping costs less than a pass over the whole of it
PREFILL_CHUNK = 1 << 15  # samples (of all streams) that are read at once: bounds the memory, not the length


@dataclass(frozen=True)
class Snapshot:
    """Where a stepper was; of use to the stepper that gave it only."""

    state: Any
    logits: Tensor
    position: int
    guided: bool
    prompt: Tensor | None
    classes: Tensor


class Stepper:
    """Generates audio for a fixed number of streams; holds their state and the logits of their next samples.

    A sample is a function of the model, the precision, what its stream has heard, its class, its seed, the options and
    the position: not of the other streams, nor of how many samples are asked for at once. The weights are copied:
    what training does to the model afterwards is not seen.
    """

    def __init__(self, model: AudioUNet, batch: int = 1, backend: str = "auto", precision: str = "bfloat16") -> None:
        """
        Args:
            model: on the device where the stepper is to run.
            batch: how many streams.
            backend: "auto", "eager" (`AudioUNet.step`, any mixer), or one of mambagen.kernels.unet_decode: "cuda",
                "graph", "cpu" or "reference".
            precision: of the compiled backends' matrices, "bfloat16" or "float32" (not of "cuda"); activations, sums
                and the state are float32.

        Raises:
            UsageError: an option is unknown, or the backend cannot run this model here.
        """
        if batch < 1:
            raise UsageError(f"batch: {batch} is less than 1")
        if backend not in BACKENDS:
            raise UsageError(f"backend: {backend!r} is not one of {', '.join(BACKENDS)}")
        self.model, self.batch = model, batch
        self._device = model.lm_head.weight.device
        weights = unet_weights(model) if backend != "eager" else None
        if weights is None and backend not in ("auto", "eager"):
            raise UsageError(f"backend: {backend!r} runs models of Mamba layers only; this one is {_mixers(model)}")
        try:
            self.backend = "eager" if weights is None else choose_backend(weights, backend, precision)
            if precision not in PRECISIONS:
                raise ValueError(f"precision: {precision!r} is not one of {', '.join(PRECISIONS)}")
        except ValueError as error:
            raise UsageError(str(error)) from error

        def make(streams: int) -> Any:  # Decoder, or what is one but for the kind of its state
            if weights is None:
                return EagerDecoder(model, streams)
            return make_decoder(weights, streams, self.backend, precision)

        self._make = make
        self.reset()

    def reset(self) -> None:
        """Back to before the first sample, without classes."""
        self._decoder = self._make(self.batch)
        self._guided = False  # with a second stream behind each, which has no class
        self._prompt: Tensor | None = torch.zeros(self.batch, 0, dtype=torch.int64, device=self._device)
        self._classes = torch.full((self.batch,), self.model.config.classes, device=self._device)
        self._started = False
        self._condition()
        self.position = 0  # samples that the streams have heard or made

    @property
    def logits(self) -> Tensor:
        """Of the next sample, (batch, vocab_size), without guidance."""
        self._start()
        return (self._decoder.logits[::2] if self._guided else self._decoder.logits).clone()

    @torch.no_grad()
    def prefill(self, tokens: Tensor | None = None, classes: Tensor | Sequence[int] | None = None) -> Tensor:
        """Hear samples after what was heard before: the logits of the next one, (batch, vocab_size).

        Args:
            tokens: (batch, length) quantised samples as they sound: the token before the first one is put there
                here. None for none: to choose classes. Long ones pass through `AudioUNet.forward`.
            classes: (batch,) from here on, of a conditional model; `config.classes` for none of them.

        Raises:
            UsageError: shapes that do not fit the batch, tokens outside the range, classes that the model has not.
        """
        if classes is not None:
            self._set_classes(classes)
        if tokens is not None:
            tokens = self._checked(tokens)
            if self._prompt is not None:
                self._prompt = torch.cat([self._prompt, tokens], 1)
            self._read(tokens)
            self.position += tokens.shape[1]
        return self.logits

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        """`prefill` by steps, in the stepper's own precision: the logits before each sample, (batch, length, vocab).

        Their cross-entropy with the samples is the likelihood under which this stepper generates.
        """
        tokens = self._checked(tokens)
        first = self.logits
        after = self._decoder.read(self._rows(tokens))[:: 2 if self._guided else 1]
        if self._prompt is not None:
            self._prompt = torch.cat([self._prompt, tokens], 1)
        self.position += tokens.shape[1]
        return torch.cat([first[:, None], after[:, :-1]], 1)

    @torch.no_grad()
    def generate(
        self,
        steps: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seeds: Sequence[int] | Tensor | None = None,
        guidance: float = 1.0,
    ) -> Tensor:
        """Draw `steps` samples for every stream and hear them, all inside one compiled loop: uint8 (batch, steps).

        Args:
            steps: how many.
            temperature: 0 takes the likeliest sample; 1 draws from the model's distribution.
            top_k: draw from the k likeliest only.
            top_p: draw from the fewest that together have this probability, after temperature and top_k.
            seeds: (batch,) one a stream (default: 0, 1, ...).
            guidance: how far to go from the logits without a class to those with it: 1 is the class itself, more
                makes it plainer (arXiv 2207.12598); of a conditional model, from the first call on. Twice the work.

        Returns:
            uint8 where the vocabulary has 256 tokens or fewer, else int64.

        Raises:
            UsageError: an option is out of its range.
        """
        if steps < 1:
            raise UsageError(f"steps: {steps} is less than 1")
        try:
            sampling = Sampling(temperature, top_k, top_p)
        except ValueError as error:
            raise UsageError(str(error)) from error
        named = torch.as_tensor(range(self.batch) if seeds is None else seeds).to(self._device, torch.int64)
        if named.shape != (self.batch,):
            raise UsageError(f"seeds: needs {self.batch}, one a stream")
        if guidance != 1:
            self._begin_guidance(guidance)
        self._start()
        drawn = self._decoder.draw(steps, sampling, self._rows(named), guidance if self._guided else None)
        self.position += steps
        if not self._guided:
            self._prompt = None  # what was made is not kept: the way to guidance is over
        if self._guided:
            drawn = drawn[::2]
        return drawn.to(torch.uint8) if self.model.config.vocab_size <= 256 else drawn

    def snapshot(self) -> Snapshot:
        """Where the streams are now, to come back to with `restore` (other seeds give another way on from there)."""
        self._start()
        state, logits = self._decoder.state(), self._decoder.logits.clone()
        return Snapshot(state, logits, self.position, self._guided, self._prompt, self._classes)

    def restore(self, snapshot: Snapshot) -> None:
        """Back to where the streams were."""
        if snapshot.guided != self._guided:
            self._decoder = self._make(self.batch * (2 if snapshot.guided else 1))
        self._guided, self._prompt, self.position = snapshot.guided, snapshot.prompt, snapshot.position
        self._started = True
        self._set_classes(snapshot.classes)
        self._decoder.load_state(snapshot.state)
        self._decoder.logits.copy_(snapshot.logits)

    # ---- inside

    def _rows(self, v: Tensor) -> Tensor:
        """One a stream -> one a row of the decoder."""
        return v.repeat_interleave(2, 0) if self._guided else v

    def _start(self) -> None:
        if not self._started:
            self._started = True
            self._decoder.read(self._rows(torch.full((self.batch, 1), MIDDLE, device=self._device)))

    def _read(self, tokens: Tensor) -> None:
        """Given tokens, through steps or a pass over all."""
        if not self._started:
            self._started = True
            tokens = torch.cat([tokens.new_full((len(tokens), 1), MIDDLE), tokens], 1)
        tokens = self._rows(tokens)
        if tokens.shape[1] <= READ_BY_STEPS:
            self._decoder.read(tokens)
            return
        classes = self._row_classes() if self.model.config.classes else None
        held: Any = self._decoder.state()
        packed = isinstance(held, DecoderState)
        position, state = (held.position, stage_state(self.model, held)) if packed else held
        for chunk in tokens.split(max(self.model.config.cycle, PREFILL_CHUNK // len(tokens)), dim=1):
            with OneDnnLinear():
                hidden, state = self.model.backbone(chunk, state, classes)
        position += tokens.shape[1]
        self._decoder.load_state(decoder_state(self.model, state, position) if packed else (position, state))
        self._decoder.logits.copy_(self.model.head(hidden[:, -1]))

    def _row_classes(self) -> Tensor:
        """The class of each row of the decoder."""
        classes = self._rows(self._classes)
        if self._guided:
            classes = classes.clone()
            classes[1::2] = self.model.config.classes
        return classes

    def _set_classes(self, classes: Tensor | Sequence[int]) -> None:
        given = torch.as_tensor(classes).to(self._device, torch.int64)
        count = self.model.config.classes
        if given.shape != (self.batch,):
            raise UsageError(f"classes: needs {self.batch}, one a stream")
        if count == 0 and bool((given != 0).any()):
            raise UsageError("classes: this model is not conditional; it was trained without classes")
        if bool(((given < 0) | (given > count)).any()):
            raise UsageError(f"classes: are 0 to {count - 1}, or {count} for none of them")
        self._classes = given
        self._condition()

    def _condition(self) -> None:
        embedding = self.model.class_embedding
        if embedding is not None:
            self._decoder.condition(embedding.weight.detach().float()[self._row_classes()])

    def _begin_guidance(self, guidance: float) -> None:
        if not self.model.config.classes:
            raise UsageError("guidance: this model is not conditional; guidance needs classes")
        if not 0 <= guidance <= 100:
            raise UsageError(f"guidance: {guidance} is outside 0 to 100")
        if self._guided:
            return
        if self._prompt is None:
            raise UsageError("guidance: must be given from the first call of generate on; reset and begin again")
        prompt, self._guided, self._started = self._prompt, True, False
        self._decoder = self._make(2 * self.batch)
        self._condition()
        if prompt.shape[1]:
            self._read(prompt)

    def _checked(self, tokens: Tensor) -> Tensor:
        if tokens.dim() != 2 or tokens.shape[0] != self.batch or tokens.shape[1] == 0:
            raise UsageError(f"tokens: needs (batch, length) with a batch of {self.batch}, not {tuple(tokens.shape)}")
        tokens = tokens.to(self._device).long()
        if int(tokens.min()) < 0 or int(tokens.max()) >= self.model.config.vocab_size:
            raise UsageError(f"tokens: has one outside the {self.model.config.vocab_size} levels of the model")
        return tokens


class EagerDecoder:
    """`Decoder` by `AudioUNet.step`, for any mixer; its state is the model's own."""

    def __init__(self, model: AudioUNet, batch: int) -> None:
        config, weight = model.config, model.lm_head.weight
        self.model = model
        self.logits = torch.zeros(batch, config.vocab_size, device=weight.device)
        self._vectors = torch.zeros(batch, config.d_model, device=weight.device)
        if model.class_embedding is not None:
            self._vectors += model.class_embedding.weight.detach()[-1]
        self._state: Any = model.allocate_state(batch)
        self._position = 0

    def condition(self, vectors: Tensor) -> None:
        self._vectors = vectors

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        after = []
        for token in tokens.unbind(1):
            self._step(token)
            after.append(self.logits.clone())
        return torch.stack(after, 1)

    @torch.no_grad()
    def draw(self, steps: int, sampling: Sampling, seeds: Tensor, guidance: float | None = None) -> Tensor:
        drawn = []
        for _ in range(steps):
            token = draw_tokens(self.logits, sampling, seeds, torch.full_like(seeds, self._position), guidance)
            self._step(token)
            drawn.append(token)
        return torch.stack(drawn, 1)

    def load_state(self, state: tuple[int, StageState]) -> None:
        self._position, self._state = state

    def state(self) -> Any:
        return self._position, self._state

    def _step(self, token: Tensor) -> None:
        x = self.model.embedding(token)
        logits, self._state = self.model.step_embedded(x.float() + self._vectors, self._state)
        self.logits.copy_(logits)
        self._position += 1


# ---- between the model's shapes and the decoder's


def unet_weights(model: AudioUNet) -> UNetWeights | None:
    """The parameters of a model as mambagen.kernels.unet_decode takes them, or None where it has other mixers."""
    config = model.config
    if config.outer != "mamba" or config.centre != "mamba":
        return None
    levels = [
        LevelWeights(
            [_layer_weights(block) for block in model.blocks("down", i)],
            [_layer_weights(block) for block in model.blocks("up", i)],
            pool,
            *(v.detach() for layer in model.pools(i) for v in (layer.weight, layer.bias)),
        )
        for i, pool in enumerate(config.pool)
    ]
    return UNetWeights(
        model.embedding.weight.detach(),
        levels,
        [_layer_weights(block) for block in model.blocks("centre")],
        model.norm_f.weight.detach(),
        model.lm_head.weight.detach(),
        model.lm_head.bias.detach(),
        config.norm_epsilon,
    )


def _layer_weights(block: Any) -> LayerWeights:
    assert isinstance(block, MambaBlock)
    w = block.mixer.weights()
    return LayerWeights(
        block.norm.weight.detach(),
        w.in_proj.detach(),
        w.conv_weight.detach().squeeze(1),
        w.conv_bias.detach(),
        *(v.detach() for v in (w.x_proj, w.dt_proj, w.dt_bias, w.A_log, w.D, w.out_proj)),
    )


def decoder_state(model: AudioUNet, state: Any, position: int) -> DecoderState:
    """A state of `AudioUNet` as the decoders have it."""
    layers: list[MambaState] = []
    buffers, queues = [], []
    for pool in model.config.pool:
        layers += [*state.down, *state.up]
        gone = state.buffer.shape[1]
        buffers.append(torch.cat([state.buffer, torch.zeros_like(state.queue)], 1))
        queues.append(torch.cat([torch.zeros_like(state.buffer), state.queue], 1))
        assert gone + state.queue.shape[1] == pool
        state = state.deeper
    layers += state
    return DecoderState(position, [v.conv.float() for v in layers], [v.ssm for v in layers], buffers, queues)


def stage_state(model: AudioUNet, state: DecoderState) -> StageState:
    """A decoder's state as `AudioUNet` has it."""
    dtype = model.lm_head.weight.dtype
    layers = iter([MambaState(conv.to(dtype), ssm) for conv, ssm in zip(state.conv, state.ssm, strict=True)])
    position, parts = state.position, []
    for i, pool in enumerate(model.config.pool):
        gone, position = position % pool, position // pool
        down, up = (tuple(next(layers) for _ in model.blocks(where, i)) for where in ("down", "up"))
        parts.append((down, state.buffers[i][:, :gone], state.queues[i][:, gone:], up))
    after: Any = tuple(layers)
    for down, buffer, queue, up in reversed(parts):
        after = StageState(down, buffer, queue, after, up)
    assert isinstance(after, StageState)
    return after


def _mixers(model: AudioUNet) -> str:
    return f"{model.config.outer} outside, {model.config.centre} in the centre"
