"""Strict reading of the JSON files of a checkpoint. Leaves out what their keys mean."""

import json
import os
from pathlib import Path
from typing import Any, NoReturn

from checkpoints.errors import CheckpointError

# The largest real index files are a few MB; the limit keeps a hostile file from filling memory.
MAX_JSON_BYTES = 100_000_000
_LFS_PREFIX = b"version https://git-lfs"


def refuse_lfs_pointer(path: Path, start: bytes) -> None:
    """`CheckpointError` if a file's first bytes are those of a Git LFS pointer."""
    if start.startswith(_LFS_PREFIX):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder"
        )


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key!r} occurs twice")
        result[key] = value
    return result


def parse_json_object(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object without duplicate keys, NaN or Infinity; `CheckpointError` otherwise."""
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} must be a JSON object, found {type(value).__name__}")
    return value


def read_json_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in a file of at most 100 MB; `CheckpointError` if it is anything else."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if len(data) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_JSON_BYTES} bytes, too large for JSON")
    refuse_lfs_pointer(path, data)
    return parse_json_object(data, str(path))
