"""Files of vectors, written as they come: .npz, .h5 and .parquet.

In .npz and .h5, pooled: `embedding` (rows, d_model) float32, and a row each in `record`, `start`, `end` and `name`. A
vector a base: `embedding` (bases, d_model), where region i has the rows `offset[i]` to `offset[i + 1]`. In Parquet:
columns `record`, `start`, `end`, `name`, `embedding`, a row a region or a base.
"""

import io
import json
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from mambagen.errors import UsageError
from mambagen.pipelines.likelihood import Span

Vectors = NDArray[np.float32]

SUFFIXES = (".npz", ".h5", ".hdf5", ".parquet")
ROWS_AT_ONCE = 4096


class EmbeddingFile(Protocol):
    """Takes vectors of spans in order; to be used as a context manager."""

    def write(self, at: int, start: int, vectors: Vectors) -> None: ...
    def __enter__(self) -> "EmbeddingFile": ...
    def __exit__(self, *error: Any) -> None: ...


def check_suffix(path: Path | str) -> str:
    """The kind of file that a name asks for: npz, h5 or parquet.

    Raises UsageError where it asks for none of them, or the package that writes it is not installed.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"{path}: the name must end in {', '.join(SUFFIXES)}, which says what is written")
    kind = {".hdf5": "h5"}.get(suffix, suffix[1:])
    for needed, package, what in (("h5", "h5py", "HDF5"), ("parquet", "pyarrow", "Parquet")):
        if kind == needed:
            try:
                __import__(package)
            except ImportError:
                raise UsageError(
                    f"{path}: {what} is written by {package}: pip install {package}, or use .npz"
                ) from None
    return kind


def open_embeddings(
    path: Path, kind: str, spans: Sequence[Span], dimension: int, pooled: bool, about: Mapping[str, Any]
) -> EmbeddingFile:
    """A file to write; ``about`` (model, layer, pool) is kept in it."""
    writers: dict[str, Any] = {"npz": _NpzFile, "h5": _Hdf5File, "parquet": _ParquetFile}
    file: EmbeddingFile = writers[kind](path, spans, dimension, pooled, about)
    return file


def _tables(spans: Sequence[Span], pooled: bool) -> dict[str, NDArray[Any]]:
    """What stands beside the vectors."""
    table: dict[str, NDArray[Any]] = {
        "record": np.array([span.record.id for span in spans], dtype=str),
        "start": np.array([span.start for span in spans], dtype=np.int64),
        "end": np.array([span.end for span in spans], dtype=np.int64),
        "name": np.array([span.name or span.record.id for span in spans], dtype=str),
    }
    if not pooled:
        table["offset"] = np.concatenate([[0], np.cumsum([len(span) for span in spans], dtype=np.int64)])
    return table


def _rows(spans: Sequence[Span], pooled: bool) -> int:
    return len(spans) if pooled else sum(len(span) for span in spans)


class _NpzFile:
    """numpy's own: a zip file of arrays, here without compression, the vectors last."""

    def __init__(
        self, path: Path, spans: Sequence[Span], dimension: int, pooled: bool, about: Mapping[str, Any]
    ) -> None:
        self._zip = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True)
        for name, values in {**_tables(spans, pooled), "about": np.array(json.dumps(dict(about)))}.items():
            with self._zip.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, values, allow_pickle=False)
        self._vectors = self._zip.open("embedding.npy", "w", force_zip64=True)
        header = {"descr": "<f4", "fortran_order": False, "shape": (_rows(spans, pooled), dimension)}
        np.lib.format.write_array_header_1_0(self._vectors, header)

    def write(self, at: int, start: int, vectors: Vectors) -> None:
        self._vectors.write(np.ascontiguousarray(vectors, dtype="<f4").data)

    def __enter__(self) -> "_NpzFile":
        return self

    def __exit__(self, *error: Any) -> None:
        self._vectors.close()
        self._zip.close()


class _Held(ABC):
    """A file that rows go to some at a time: what is held is written at the end, unless the work has failed."""

    _file: Any

    @abstractmethod
    def _flush(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush()
        self._file.close()


class _Hdf5File(_Held):
    def __init__(
        self, path: Path, spans: Sequence[Span], dimension: int, pooled: bool, about: Mapping[str, Any]
    ) -> None:
        import h5py

        self._disk = _LastingDisk(path)
        self._file = h5py.File(self._disk, "w")
        self._file.attrs.update({key: "" if value is None else value for key, value in about.items()})
        for name, values in _tables(spans, pooled).items():
            if values.dtype.kind == "U":
                self._file.create_dataset(name, data=values.astype(object), dtype=h5py.string_dtype())
            else:
                self._file.create_dataset(name, data=values)
        rows = _rows(spans, pooled)
        chunk = (max(1, min(rows, 1024)), dimension)
        self._vectors = self._file.create_dataset("embedding", (rows, dimension), "f4", chunks=chunk if rows else None)
        self._held: list[Vectors] = []
        self._written = 0

    def write(self, at: int, start: int, vectors: Vectors) -> None:
        self._held.append(vectors)
        if sum(map(len, self._held)) >= ROWS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        if self._held:
            rows = np.concatenate(self._held)
            self._vectors[self._written : self._written + len(rows)] = rows
            self._written += len(rows)
            self._held = []
        if self._disk.failure:
            raise self._disk.failure

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            super().__exit__(kind, error, trace)
        finally:
            self._file.close()  # also where the last rows did not fit
            self._disk.close()
        if kind is None and self._disk.failure:
            raise self._disk.failure


class _LastingDisk(io.FileIO):
    """A new file whose failed writes are remembered, not raised: HDF5 crashes the process where it cannot close."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+")
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        """All of ``data``, or what of it fits."""
        view = memoryview(data).cast("B")
        try:
            done = 0
            while done < len(view):
                done += super().write(view[done:])
        except OSError as error:
            self.failure = self.failure or error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.failure = self.failure or error
            return size or 0


class _ParquetFile(_Held):
    def __init__(
        self, path: Path, spans: Sequence[Span], dimension: int, pooled: bool, about: Mapping[str, Any]
    ) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._spans, self._pooled, self._dimension, self._pa = spans, pooled, dimension, pa
        vector = pa.list_(pa.field("element", pa.float32(), nullable=False), dimension)
        columns = [("record", pa.string()), ("start", pa.int64()), ("end", pa.int64()), ("name", pa.string())]
        self._schema = pa.schema([*columns, ("embedding", vector)], metadata={"mambagen": json.dumps(dict(about))})
        self._file = pq.ParquetWriter(path, self._schema)
        self._held: list[tuple[int, int, Vectors]] = []

    def write(self, at: int, start: int, vectors: Vectors) -> None:
        self._held.append((at, start, vectors))
        if sum(len(rows) for _, _, rows in self._held) >= ROWS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        if not self._held:
            return
        pa = self._pa
        record: list[str] = []
        name: list[str] = []
        start: list[int] = []
        end: list[int] = []
        for at, first, rows in self._held:
            span = self._spans[at]
            record += [span.record.id] * len(rows)
            name += [span.name or span.record.id] * len(rows)
            start += [span.start] if self._pooled else range(first, first + len(rows))
            end += [span.end] if self._pooled else range(first + 1, first + len(rows) + 1)
        vectors = np.concatenate([rows for _, _, rows in self._held])
        field = self._schema.field("embedding").type
        flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), type=field)
        arrays = [pa.array(record), pa.array(start, pa.int64()), pa.array(end, pa.int64()), pa.array(name), flat]
        self._file.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
        self._held = []
