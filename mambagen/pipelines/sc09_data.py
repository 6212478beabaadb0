"""Real spoken digits by path or by the name of a data set."""

import os
from pathlib import Path

from mambagen.data.spoken_words import SpokenWords, read_spoken_words
from mambagen.data_manifests import load_manifest, manifest_names
from mambagen.data_manifests.audio import audio_folders
from mambagen.errors import InputError


def is_data_set(data: str) -> bool:
    """Whether this names a data set (or a manifest), not a folder or table of clips."""
    return data.endswith(".toml") or data in manifest_names()


def read_words(data: Path | str) -> SpokenWords:
    """The clips of a folder or table, or of a data set by its name (`sc09`).

    Raises:
        InputError: what is not there or cannot be used.
    """
    if not is_data_set(str(data)):
        return read_spoken_words(data)
    folders = audio_folders(load_manifest(str(data)))
    if len(folders) != 1:
        raise InputError(f"the data set '{data}' is {len(folders)} folders; spoken digits are needed in one")
    return read_spoken_words(folders[0])


def lasting(data: str) -> str:
    """The same data from any working folder."""
    return data if data in manifest_names() else os.path.abspath(data)
