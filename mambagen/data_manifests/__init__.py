"""Data sets by name: a TOML manifest each, and the code that fetches, checks and finds them."""

from mambagen.data_manifests.cache import (
    FileReport,
    cache_home,
    chromosomes_of,
    default_splits,
    fetch,
    folder_of,
    path_of,
    present,
    resolve_dna,
    sequence_paths,
    verify,
)
from mambagen.data_manifests.manifest import (
    Manifest,
    SplitInterval,
    list_manifests,
    load_manifest,
    manifest_names,
    read_bed,
)

__all__ = [
    "FileReport",
    "Manifest",
    "SplitInterval",
    "cache_home",
    "chromosomes_of",
    "default_splits",
    "fetch",
    "folder_of",
    "list_manifests",
    "load_manifest",
    "manifest_names",
    "path_of",
    "present",
    "read_bed",
    "resolve_dna",
    "sequence_paths",
    "verify",
]
