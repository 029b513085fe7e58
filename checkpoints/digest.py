"""Fingerprints of files. Leaves out manifests: what to compare with is the caller's knowledge."""

import hashlib
import os
from pathlib import Path

from checkpoints.errors import CheckpointError


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file as 64 hexadecimal digits; `CheckpointError` if it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"cannot read {path} to compute its SHA-256: {error}") from error
