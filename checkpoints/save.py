"""The way back: our parameter tree to a Hugging Face folder that `transformers` loads.

Rows are read from target to source with each transform's inverse. Leaves out config contents,
tokenizers and sharding of devices: every tensor is gathered to the host, one at a time.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from checkpoints.atomic import new_folder
from checkpoints.engine import Row
from checkpoints.errors import CheckpointError, few
from checkpoints.folders import INDEX, SINGLE, is_plain_name
from checkpoints.slices import parent_of, targets_of

DEFAULT_SHARD_BYTES = 5 * 2**30


def export(tree: Mapping[str, Any], rows: Sequence[Row]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (source name, array) for the leaves of `tree`, in tree order, one at a time.

    Rows whose target the tree lacks are skipped. `CheckpointError`, before the first tensor, for
    a path that no row or more than one row matches, two paths with one name, or a path whose file
    tensor has others too that the tree lacks.
    """
    leaves = dict(_leaves(tree, ""))
    unmatched, ambiguous = [], []
    found: dict[str, tuple[tuple[str, ...], Row]] = {}
    targets = targets_of(leaves, rows)
    for path in targets:
        matches = [(name, row) for row in rows if (name := row.to_source(path)) is not None]
        paths = (matches[0][1].to_targets(matches[0][0]) or ()) if matches else ()
        if not matches or not all(each in targets for each in paths):
            unmatched.append(path)
        elif len(matches) > 1 or found.get(matches[0][0], (paths,))[0] != paths:
            ambiguous.append(f"{path} -> {' or '.join(name for name, _ in matches)}")
        else:
            found[matches[0][0]] = (paths, matches[0][1])
    if unmatched:
        raise CheckpointError(f"no row exports {few(unmatched, 'parameter')}")
    if ambiguous:
        raise CheckpointError(f"the rows give no single name to {few(ambiguous, 'parameter')}")
    return _inverted(leaves, found)


def _inverted(
    leaves: Mapping[str, Any], found: Mapping[str, tuple[tuple[str, ...], Row]]
) -> Iterator[tuple[str, np.ndarray]]:
    for name, (paths, row) in found.items():
        parts = [np.asarray(_part(leaves, path)) for path in paths]
        yield name, np.asarray(row.inverse(parts), order="C")


def _part(leaves: Mapping[str, Any], target: str) -> Any:
    path, index = parent_of(target)
    return leaves[path] if index is None else leaves[path][index]


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def save_safetensors(
    folder: str | os.PathLike[str],
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    config: Mapping[str, Any],
    extra_files: Mapping[str, bytes | str] | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Path:
    """Writes `config.json`, the weights (sharded above `shard_bytes`) and `extra_files`; the path.

    The folder appears whole or not at all. Holds one shard in memory. `CheckpointError` if the
    folder is not empty, a tensor name comes twice, there is no tensor, or a file name is unusable.
    """
    if shard_bytes <= 0:
        raise ValueError(f"shard_bytes must be positive, got {shard_bytes}")
    files: dict[str, bytes | str] = {
        "config.json": json.dumps(dict(config), indent=2, ensure_ascii=False) + "\n"
    }
    for name, content in (extra_files or {}).items():
        if not is_plain_name(name) or name == "config.json" or name.startswith(SINGLE):
            raise CheckpointError(f"extra file {name!r} must be a plain, unused file name")
        files[name] = content
    with new_folder(Path(folder)) as temporary:
        for name, content in files.items():
            raw = content.encode("utf-8") if isinstance(content, str) else content
            (temporary / name).write_bytes(raw)
        _write_shards(temporary, tensors, shard_bytes)
    return Path(folder)


def _write_shards(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], limit: int) -> None:
    names: list[list[str]] = []
    seen: set[str] = set()
    total = 0
    for shard in _shards(tensors, limit):
        for name, array in shard.items():
            if name in seen:
                raise CheckpointError(f"tensor {name!r} comes twice: each name may be saved once")
            seen.add(name)
            total += array.nbytes
        names.append(list(shard))
        # transformers refuses a file whose metadata do not name a framework it knows.
        path = folder / _temporary_name(len(names))
        save_file(shard, path, metadata={"format": "pt"})
        # It makes files that only their owner can read; the config beside them has usual rights.
        path.chmod((folder / "config.json").stat().st_mode)
    if not names:
        raise CheckpointError(f"there is no tensor to save in {folder.parent}")
    _name_shards(folder, names, total)


def _shards(
    tensors: Iterable[tuple[str, np.ndarray]], limit: int
) -> Iterator[dict[str, np.ndarray]]:
    """Groups of tensors of at most `limit` bytes; a larger tensor is a group of its own."""
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, array in tensors:
        if shard and (size + array.nbytes > limit or name in shard):
            yield shard
            shard, size = {}, 0
        shard[name] = np.asarray(array, order="C")
        size += array.nbytes
    if shard:
        yield shard


def _temporary_name(number: int) -> str:
    return f"shard-{number}.partial"


def _name_shards(folder: Path, names: list[list[str]], total: int) -> None:
    """Final names, which hold the number of shards, known only now; and the index if sharded."""
    if len(names) == 1:
        os.rename(folder / _temporary_name(1), folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(names, start=1):
        final = f"model-{number:05d}-of-{len(names):05d}.safetensors"
        os.rename(folder / _temporary_name(number), folder / final)
        weight_map |= dict.fromkeys(shard, final)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
