"""Safetensors folders of the Hugging Face layout, checked before a tensor is touched.

The header is validated here (format: huggingface.co/docs/safetensors, "Format") and tensors are
read with plain file reads rather than through a memory map: mapped pages count as resident memory,
and a file that shrinks under a map kills the process. Leaves out which tensors a model needs.
"""

import os
from dataclasses import dataclass
from io import RawIOBase
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from checkpoints import buffers
from checkpoints.errors import CheckpointError, few
from checkpoints.folders import INDEX, SINGLE, checked_file, is_plain_name, no_weights
from checkpoints.json_files import parse_json_object, read_json_object, refuse_lfs_pointer
from checkpoints.source import TensorInfo

MAX_HEADER_BYTES = 100_000_000
# numpy's own limit is 64; no checkpoint comes near, and the product of a hostile shape stays cheap.
MAX_RANK = 16

NUMPY_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype(np.bool_),
}
# Types whose span can be checked but which are never read as weights.
_OTHER_BITS = {"C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8}
_OTHER_BITS |= {"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
_BITS = {name: dtype.itemsize * 8 for name, dtype in NUMPY_DTYPES.items()} | _OTHER_BITS


@dataclass(frozen=True)
class _Entry:
    path: Path
    info: TensorInfo
    offset: int
    num_bytes: int


def read_header(path: Path) -> dict[str, _Entry]:
    """Every tensor of one safetensors file in file order; `CheckpointError` for a bad file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(64)
            if not start:
                raise CheckpointError(f"{path} is empty: fetch it again")
            refuse_lfs_pointer(path, start)
            file.seek(8)
            length = _header_length(path, start, size)
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not raw.startswith(b"{"):
        raise CheckpointError(
            f"{path} is not a safetensors file: its header does not start with {{"
        )
    header = parse_json_object(raw, f"the header of {path}")
    _check_metadata(path, header.pop("__metadata__", {}))
    entries = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    ordered = sorted(entries.items(), key=lambda item: (item[1].offset, item[1].num_bytes))
    _check_spans(path, ordered, 8 + length, size)
    return dict(ordered)


def _header_length(path: Path, start: bytes, size: int) -> int:
    if size < 8:
        raise CheckpointError(
            f"{path} is {size} bytes long, too short for a safetensors header: fetch it again"
        )
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path} claims a header of {length} bytes; the limit is {MAX_HEADER_BYTES}: "
            "it is damaged or not a safetensors file"
        )
    if 8 + length > size:
        raise CheckpointError(
            f"{path} claims a header of {length} bytes but is only {size} bytes long: "
            "it is truncated, fetch it again"
        )
    return length


def _check_metadata(path: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings")


def _is_count_list(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _entry(path: Path, name: str, value: Any, base: int) -> _Entry:
    """One header entry, its type and shape checked against its byte span."""
    where = f"{path}: tensor {name!r}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise CheckpointError(f"{where} has the unknown dtype {str(dtype)[:40]!r}")
    if not _is_count_list(shape) or len(shape) > MAX_RANK:
        raise CheckpointError(
            f"{where} has the bad shape {str(shape)[:80]}: at most {MAX_RANK} sizes, each >= 0"
        )
    if not _is_count_list(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{where} has the bad data_offsets {str(offsets)[:80]}: need [begin, end] in order"
        )
    begin, end = offsets
    bits = prod(shape) * _BITS[dtype]
    if bits != 8 * (end - begin):
        raise CheckpointError(
            f"{where} spans {end - begin} bytes, but {dtype}{str(shape)[:80]} takes {bits // 8}"
        )
    return _Entry(path, TensorInfo(tuple(shape), dtype), base + begin, end - begin)


def _check_spans(path: Path, ordered: list[tuple[str, _Entry]], base: int, size: int) -> None:
    position = base
    for name, entry in ordered:
        if entry.offset != position:
            kind = "leaves a hole before" if entry.offset > position else "overlaps"
            raise CheckpointError(
                f"{path}: the header {kind} tensor {name!r} at byte {entry.offset - base}, "
                f"expected {position - base}"
            )
        position += entry.num_bytes
    if position > size:
        raise CheckpointError(
            f"{path} is truncated: its header describes {position} bytes, the file has {size}: "
            "fetch it again"
        )
    if position < size:
        raise CheckpointError(f"{path} has {size - position} bytes that no tensor owns")


class SafetensorsFolder:
    """A `TensorSource` over one or several safetensors files whose headers have been checked."""

    def __init__(self, location: str, entries: dict[str, _Entry]) -> None:
        self.location = location
        self._entries = entries

    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def info(self, name: str) -> TensorInfo:
        return self._entry(name).info

    def read(self, name: str) -> np.ndarray:
        entry = self._entry(name)
        dtype = NUMPY_DTYPES.get(entry.info.dtype)
        if dtype is None:
            raise CheckpointError(
                f"{entry.path}: tensor {name!r} is {entry.info.dtype}, which is not read; "
                f"readable: {', '.join(NUMPY_DTYPES)}"
            )
        return read_span(entry.path, name, entry.offset, dtype, entry.info.shape)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise CheckpointError(f"{self.location} has no tensor {name!r}")
        return self._entries[name]


def read_span(
    path: Path, name: str, offset: int, dtype: np.dtype, shape: tuple[int, ...]
) -> np.ndarray:
    """The array of `shape` stored at a byte offset; `CheckpointError` if the bytes are gone."""
    array = buffers.empty(shape, dtype)
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            _fill(file, array.reshape(-1).view(np.uint8).data)
    except EOFError as error:
        raise CheckpointError(
            f"{path} shrank while tensor {name!r} was read: fetch it again"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read tensor {name!r}: {error}") from error
    return array


def _fill(file: RawIOBase, view: memoryview) -> None:
    # One call reads at most 2 GiB.
    while view:
        count = file.readinto(view)
        if not count:
            raise EOFError
        view = view[count:]


def open_folder(path: str | os.PathLike[str]) -> SafetensorsFolder:
    """Opens a Hugging Face folder: `model.safetensors`, or its index and shards.

    As in transformers, the single file wins where both exist. `CheckpointError` for a missing,
    damaged or refused file.
    """
    folder = Path(path)
    if not folder.is_dir():
        kind = "is not a folder" if folder.exists() else "does not exist"
        raise CheckpointError(f"{path} {kind}: pass a folder with {SINGLE!r} or {INDEX!r}")
    present = {entry.name for entry in folder.iterdir()}
    if SINGLE in present:
        return SafetensorsFolder(str(folder), read_header(checked_file(folder, SINGLE)))
    if INDEX in present:
        return SafetensorsFolder(str(folder), _read_sharded(folder))
    raise no_weights(folder)


def _read_sharded(folder: Path) -> dict[str, _Entry]:
    index = checked_file(folder, INDEX)
    weight_map = _weight_map(index)
    entries: dict[str, _Entry] = {}
    for shard in sorted(set(weight_map.values())):
        found = read_header(checked_file(folder, shard))
        indexed = {name for name, file in weight_map.items() if file == shard}
        absent = sorted(indexed - set(found))
        if absent:
            raise CheckpointError(
                f"{index} places in {shard!r}, which lacks it, {few(absent, 'tensor')}"
            )
        extra = sorted(set(found) - indexed)
        if extra:
            raise CheckpointError(
                f"{folder / shard} holds what {INDEX!r} does not place there, "
                f"{few(extra, 'tensor')}"
            )
        entries |= found
    return entries


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map from tensor names to files")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not is_plain_name(file):
            raise CheckpointError(
                f"{index} places tensor {name!r} in {str(file)[:80]!r}: only plain file names in "
                "the same folder are allowed"
            )
        if not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} places tensor {name!r} in {file[:80]!r}: only .safetensors files are read"
            )
    return weight_map
