"""One safetensors file of named arrays that says what it is: kind, version, and strings about it.

For what belongs to a model but is no model: a saved context, trained gates. Written under a
temporary name and renamed; checked whole before an array is read. Leaves out what the arrays mean.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from checkpoints.atomic import new_file
from checkpoints.errors import CheckpointError
from checkpoints.safetensors_files import SafetensorsFolder, read_header

_KIND, _VERSION = "popjax_kind", "popjax_version"


def save_bundle(
    path: str | os.PathLike[str],
    kind: str,
    version: str,
    arrays: Mapping[str, Any],
    about: Mapping[str, str],
) -> Path:
    """Writes arrays (anything NumPy takes) and strings into one new file; returns its path.

    `CheckpointError` where the path exists, or its folder does not.
    """
    target = Path(path)
    if target.exists():
        raise CheckpointError(f"{target} exists: choose another name or remove it first")
    if not target.parent.is_dir():
        raise CheckpointError(f"{target.parent} is not a folder: make it first")
    held = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    metadata = {_KIND: kind, _VERSION: version, **about}
    try:
        with new_file(target) as temporary:
            save_file(held, temporary, metadata=metadata)
            temporary.chmod(0o666 & ~_umask())  # it makes files that only their owner can read
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error}") from error
    return target


def check_bundle(
    path: str | os.PathLike[str], kind: str, version: str, writer: str
) -> tuple[SafetensorsFolder, dict[str, str]]:
    """The file, open with no array read, and its strings, once it is of this kind and version.

    writer: the command or call that makes such files. `CheckpointError` for one that is missing,
    damaged, truncated, of another kind or version.
    """
    source = Path(path)
    if not _is_file(source):
        raise CheckpointError(
            f"{str(source)[:80]} is not a file: give one of kind {kind!r}, as `{writer}` writes it"
        )
    entries = read_header(source)
    with safe_open(str(source), framework="np") as opened:
        about = dict(opened.metadata() or {})
    if about.get(_KIND) != kind:
        held = repr(about[_KIND]) if _KIND in about else "something else"
        raise CheckpointError(
            f"{source} holds {held}, not a {kind}: give one that `{writer}` wrote"
        )
    if about.get(_VERSION) != version:
        raise CheckpointError(
            f"{source} is a {kind} of version {about.get(_VERSION)!r}, and this popjax reads "
            f"{version!r}: make it again with `{writer}`"
        )
    return SafetensorsFolder(str(source), entries), about


def load_bundle(
    path: str | os.PathLike[str], kind: str, version: str, writer: str
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays and strings of a file that `save_bundle` wrote; raises as `check_bundle` does."""
    folder, about = check_bundle(path, kind, version, writer)
    return {name: folder.read(name) for name in folder.names()}, about


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for the system, or a folder that is closed
        return False


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
