"""Speed of eval-sc09 from sound files to figures: reading, judging, scoring with intervals, in clips a second.

    python -m benchmarks.judge [--clips 2000] [--device cpu] [--threads 2] [--judge MODEL] [--out FILE]

The clips are noise, written as WAV files first; what they are makes no difference to the time.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch

from benchmarks.common import print_table, write_json
from mambagen.data.generated_clips import read_generated
from mambagen.pipelines.sc09_judge import DigitJudge
from mambagen.pipelines.sc09_metrics import score
from mambagen.pipelines.sc09_reference import moments_and_prediction


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=2000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--judge", default="digit-judge")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    judge = DigitJudge(arguments.judge, arguments.device)
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as place:
        for number in range(arguments.clips):
            noise = 0.1 * random.normal(size=16_000)
            soundfile.write(Path(place) / f"{number:05d}.wav", noise, 16_000, subtype="PCM_16")
        judge.judge(read_generated(place, limit=2 * judge.batch).samples)  # the device is ready, the kernels chosen
        times = [time.perf_counter()]
        clips = read_generated(place)
        times.append(time.perf_counter())
        judged = judge.judge(clips.samples)
        times.append(time.perf_counter())
        score(judged.features, judged.log_p, *moments_and_prediction(judged))
        times.append(time.perf_counter())
    read, asked, scored = np.diff(times).tolist()
    rows = [
        {
            "device": str(judge.device), "threads": torch.get_num_threads(), "clips": arguments.clips, "read s": read,
            "judge s": asked, "score s": scored, "clips/s": arguments.clips / (read + asked + scored),
        }
    ]  # fmt: skip
    print_table(rows)
    write_json(arguments.out, "judging spoken digits", rows)


if __name__ == "__main__":
    main()
