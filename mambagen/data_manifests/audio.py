"""Where the sound files of a data set are."""

from pathlib import Path

from mambagen.data_manifests.cache import path_of, present, unpacked_path
from mambagen.data_manifests.manifest import AudioLayout, Manifest
from mambagen.errors import InputError


def audio_folders(manifest: Manifest) -> list[Path]:
    """The folders (or single files) of a data set that is in place. InputError where it is not, or is not audio."""
    if manifest.kind != "audio":
        raise InputError(f"the data set '{manifest.name}' is {manifest.kind}, not audio")
    if not present(manifest):
        raise InputError(f"the data set '{manifest.name}' is not here yet; run: mambagen data fetch {manifest.name}")
    return [
        unpacked_path(manifest, file) if file.unpack != "none" else path_of(manifest, file)
        for file in manifest.files
        if file.role == "audio"
    ]


def audio_layout(manifest: Manifest) -> AudioLayout:
    """How a data set's files are chosen and divided; without a word of it all are for training."""
    return manifest.audio or AudioLayout()
