"""A picture of sounds: the spectrogram of each file, side by side.

mambagen generate-audio -n 10 --seed 1 --out sounds
python -m benchmarks.sound_figure sounds/*.wav --out docs/figures/digits.png
"""

import argparse
from pathlib import Path

from mambagen.data.audio_files import read_audio

COLUMNS = 5
WINDOW, HOP = 400, 80  # samples
QUIETEST = -90  # dB below full scale that is drawn black


def main() -> None:
    """Read and draw."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = -(-len(options.files) // COLUMNS)
    figure, axes = pyplot.subplots(rows, COLUMNS, figsize=(10, 1.7 * rows), sharex=True, sharey=True, squeeze=False)
    for axis in axes.flat[len(options.files) :]:
        axis.axis("off")
    for axis, file in zip(axes.flat, options.files, strict=False):
        sound = read_audio(file, None)
        axis.specgram(
            sound.samples + 1e-9, NFFT=WINDOW, Fs=sound.rate, noverlap=WINDOW - HOP, scale="dB", mode="magnitude",
            vmin=QUIETEST - 20, vmax=-30, cmap="magma",
        )  # fmt: skip
        axis.set_title(file.stem, fontsize=8)
        axis.tick_params(labelsize=7)
    figure.supxlabel("seconds", fontsize=8)
    figure.supylabel("Hz", fontsize=8)
    figure.tight_layout()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=80)
    print(f"drawn: {options.out}, {options.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
