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


def load_bundle(
    path: str | os.PathLike[str], kind: str, version: str
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays and strings of a file that `save_bundle` wrote as this kind and version.

    `CheckpointError` for a file that is missing, damaged, truncated, of another kind or version.
    """
    source = Path(path)
    if not source.is_file():
        raise CheckpointError(f"{source} is not a file: give the path of a saved {kind}")
    entries = read_header(source)
    with safe_open(str(source), framework="np") as opened:
        about = dict(opened.metadata() or {})
    if about.get(_KIND) != kind:
        raise CheckpointError(
            f"{source} holds {about.get(_KIND, 'something else')!r}, not a {kind}: give the path "
            f"of a saved {kind}"
        )
    if about.get(_VERSION) != version:
        raise CheckpointError(
            f"{source} is a {kind} of version {about.get(_VERSION)!r}, and this popjax reads "
            f"{version!r}: make it again"
        )
    folder = SafetensorsFolder(str(source), entries)
    return {name: folder.read(name) for name in folder.names()}, about


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
