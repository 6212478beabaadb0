"""Log-mel spectrograms of clips, as the published SC09 classifier sees them; the one module that imports torchaudio.

    features = LogMel()(samples)          # (batch, 16000) float32 -> (batch, 32, 32) in dB, 0 the loudest of each clip

The numbers are those of librosa to 1e-3 dB: `power_to_db(feature.melspectrogram(y, ...), ref=np.max, top_db=80)`. Where
torchaudio cannot be loaded beside the installed torch, torch.stft and librosa's filterbank give the same.
"""

import functools
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

Backend = Literal["auto", "torchaudio", "torch"]
POWER_FLOOR = 1e-10  # librosa's amin: what is below counts as this much


class MelSettings(BaseModel):
    """How a clip becomes a picture: Hann windows of `n_fft` samples, `hop` apart, Slaney's mel scale and norm."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rate: Annotated[int, Field(ge=1)] = 16_000
    n_fft: Annotated[int, Field(ge=2)] = 2048
    hop: Annotated[int, Field(ge=1)] = 512
    n_mels: Annotated[int, Field(ge=1)] = 32
    floor_db: Annotated[float, Field(gt=0)] = 80.0  # what is further below the clip's maximum is set to this

    def frames(self, samples: int) -> int:
        """Frames of a clip: they are centred on multiples of `hop`, with zeros around the clip."""
        return 1 + samples // self.hop


class LogMel:
    """The transform of one setting on any device, float32 or float64."""

    def __init__(self, settings: MelSettings | None = None, backend: Backend = "auto") -> None:
        """`backend`: "auto" takes torchaudio where it loads; asked for by name it may raise ImportError."""
        self.settings = settings or MelSettings()
        self.backend = backend if backend != "auto" else ("torchaudio" if torchaudio_loads() else "torch")
        self._ready: dict[tuple[torch.device, torch.dtype], Any] = {}

    def __call__(self, samples: Tensor) -> Tensor:
        """(batch, n) samples -> (batch, n_mels, frames) in dB: 0 at the maximum of each clip, -floor_db at least.

        A silent clip is 0 everywhere, as librosa has it.
        """
        power = self.power(samples)
        level = 10 * torch.log10(power.clamp(min=POWER_FLOOR))
        return (level - level.amax((-2, -1), keepdim=True)).clamp(min=-self.settings.floor_db)

    def power(self, samples: Tensor) -> Tensor:
        """The mel spectrogram itself, (batch, n_mels, frames)."""
        key = (samples.device, samples.dtype)
        if key not in self._ready:
            make = _with_torchaudio if self.backend == "torchaudio" else _with_torch
            self._ready[key] = make(self.settings, *key)
        result: Tensor = self._ready[key](samples)
        return result


@functools.cache
def torchaudio_loads() -> bool:
    """Whether torchaudio is installed and loads beside this torch (it only does beside one of the same CUDA)."""
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError, RuntimeError, AttributeError):
        return False
    return True


def _with_torchaudio(settings: MelSettings, device: torch.device, dtype: torch.dtype) -> Any:
    import torchaudio

    transform = torchaudio.transforms.MelSpectrogram(
        settings.rate,
        settings.n_fft,
        hop_length=settings.hop,
        n_mels=settings.n_mels,
        power=2.0,
        norm="slaney",
        mel_scale="slaney",
        pad_mode="constant",
    )
    return transform.to(device=device, dtype=dtype)


def _with_torch(settings: MelSettings, device: torch.device, dtype: torch.dtype) -> Any:
    import librosa

    window = torch.hann_window(settings.n_fft, dtype=dtype, device=device)
    bank = librosa.filters.mel(sr=settings.rate, n_fft=settings.n_fft, n_mels=settings.n_mels, dtype="float64")
    filters = torch.from_numpy(bank).to(device=device, dtype=dtype)

    def transform(samples: Tensor) -> Tensor:
        spectrum = torch.stft(
            samples, settings.n_fft, settings.hop, window=window, center=True, pad_mode="constant", return_complex=True
        )
        return filters @ (spectrum.real.square() + spectrum.imag.square())

    return transform
