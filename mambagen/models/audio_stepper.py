"""Fast generation of audio: a U-Net whose weights are packed once and stepped by mambagen.kernels.unet_decode.

    stepper = Stepper(model, batch=2)
    stepper.prefill(prompt, classes)                 # (2, length) samples to go on from; optional
    samples = stepper.generate(16_000, temperature=0.9, seeds=[1, 2])   # (2, 16000) uint8; call again to go on

Models of Mamba layers everywhere run in one compiled loop; those with another mixer in torch's operations, on a GPU as
CUDA graphs of a whole cycle of samples.
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
    Sampling,
    UNetWeights,
    choose_backend,
    make_decoder,
)
from mambagen.models.audio_decoders import (
    BlockDecoder,
    EagerDecoder,
    GraphedBlocks,
    decoder_state,
    stage_state,
    unet_maps,
)
from mambagen.models.audio_unet import MIDDLE, AudioUNet
from mambagen.models.cpu_linear import OneDnnLinear
from mambagen.models.mamba_block import MambaBlock

BACKENDS = ("auto", "cuda", "graph", "cpu", "reference", "eager")
OF_ANY_MIXER = {"eager": EagerDecoder, "reference": BlockDecoder, "graph": GraphedBlocks}
READ_BY_STEPS = 16  # samples of a prompt up to which stepping costs less than a pass over the whole of it
PREFILL_CHUNK = 1 << 15  # samples (of all streams) that are read at once: bounds the memory, not the length


@dataclass(frozen=True)
class Snapshot:
    """Where a stepper was; of use to one of the same model, backend and batch only."""

    state: Any
    logits: Tensor
    position: int
    guided: bool
    prompt: Tensor | None
    classes: Tensor

    def rows(self, streams: Sequence[int]) -> "Snapshot":
        """That of some of the streams, for a stepper of the same model that has so many."""
        rows = torch.tensor(streams, device=self.classes.device)
        each = torch.stack([2 * rows, 2 * rows + 1], 1).flatten() if self.guided else rows
        prompt = None if self.prompt is None else self.prompt[rows]
        state, logits = _select(self.state, each), self.logits[each]
        return Snapshot(state, logits, self.position, self.guided, prompt, self.classes[rows])


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
            backend: "auto", "eager" (`AudioUNet.step`), or one of mambagen.kernels.unet_decode: "cuda", "graph",
                "cpu" or "reference"; with another mixer than Mamba somewhere "eager", "reference" or "graph".
            precision: of the compiled backends' matrices, "bfloat16" or "float32" (not of "cuda"); activations, sums
                and the state are float32. Models with another mixer step in the precision of their weights.

        Raises:
            UsageError: an option is unknown, or the backend cannot run this model here.
        """
        if batch < 1:
            raise UsageError(f"batch: {batch} is less than 1")
        if backend not in BACKENDS:
            raise UsageError(f"backend: {backend!r} is not one of {', '.join(BACKENDS)}")
        self.model, self.batch = model, batch
        self._device = model.lm_head.weight.device
        if precision not in PRECISIONS:
            raise UsageError(f"precision: {precision!r} is not one of {', '.join(PRECISIONS)}")
        weights = unet_weights(model) if backend != "eager" else None
        self.backend = _any_mixer(model, backend) if weights is None else _mamba(weights, backend, precision)

        def make(streams: int) -> Any:  # Decoder, or what is one but for the kind of its state
            if weights is None:
                return OF_ANY_MIXER[self.backend](model, streams)
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
        if self.model.config.classes:
            vectors = self.model.class_vectors(self._row_classes())
            assert vectors is not None
            self._decoder.condition(vectors.detach())

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


def _mamba(weights: UNetWeights, backend: str, precision: str) -> str:
    """The backend that runs for a model of Mamba layers."""
    try:
        return choose_backend(weights, backend, precision)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _any_mixer(model: AudioUNet, backend: str) -> str:
    """The backend that runs for any other model."""
    device = model.lm_head.weight.device.type
    if backend == "auto":
        return "graph" if device == "cuda" else "reference"
    if backend not in OF_ANY_MIXER:
        raise UsageError(f"backend: {backend!r} runs models of Mamba layers only; this one is {_mixers(model)}")
    if backend == "graph" and device != "cuda":
        raise UsageError(f"the backend 'graph' cannot run this: the weights are on {device}")
    return backend


def _select(state: Any, rows: Tensor) -> Any:
    """Rows of a state: nested tuples and lists of tensors (batch, ...), and numbers."""
    if isinstance(state, Tensor):
        return state[rows]
    if not isinstance(state, tuple | list):
        return state
    parts = [_select(part, rows) for part in state]
    return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)


def unet_weights(model: AudioUNet) -> UNetWeights | None:
    """The parameters of a model as mambagen.kernels.unet_decode takes them, or None where it has other mixers."""
    config = model.config
    if config.outer != "mamba" or config.centre != "mamba":
        return None
    maps = unet_maps(model)
    levels = [
        level._replace(
            down=[_layer_weights(block) for block in model.blocks("down", i)],
            up=[_layer_weights(block) for block in model.blocks("up", i)],
        )
        for i, level in enumerate(maps.levels)
    ]
    return maps._replace(levels=levels, centre=[_layer_weights(block) for block in model.blocks("centre")])


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


def _mixers(model: AudioUNet) -> str:
    return f"{model.config.outer} outside, {model.config.centre} in the centre"
