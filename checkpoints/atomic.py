"""Files and folders that appear whole or not at all: written under a temporary name, then renamed.

Leaves out locking: two writers of one file both succeed, and the last rename wins.
"""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from checkpoints.errors import CheckpointError


def _temporary_beside(target: Path) -> Path:
    # The same folder, hence the same file system, so that the rename is atomic.
    return target.parent / f".{target.name}.{uuid.uuid4().hex[:12]}.partial"


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Yields a path to write; on success it becomes `target`, on any exception it is removed."""
    temporary = _temporary_beside(target)
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _unusable(target: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{str(target)[:80]} cannot be made ({error.strerror}): choose another place"
    )


def refuse_existing(target: Path) -> None:
    """`CheckpointError` if `target` is a file, a folder that holds something, or cannot be one."""
    try:
        blocked = any(parent.exists() and not parent.is_dir() for parent in target.parents)
        taken = target.exists() and not (target.is_dir() and not any(target.iterdir()))
    except OSError as error:  # too long a name, or a folder that is closed
        raise _unusable(target, error) from error
    if blocked:
        raise _unusable(target, NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
    if taken:
        raise CheckpointError(
            f"{target} exists and is not an empty folder: choose another place or remove it first"
        )


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder to fill; on success it becomes `target`, on any exception it goes.

    `CheckpointError` if `target` is a file or a folder that holds something, or cannot be made.
    """
    refuse_existing(target)
    temporary = _temporary_beside(target)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise _unusable(target, error) from error
    try:
        yield temporary
        if target.exists():
            target.rmdir()  # empty, or the check above was outrun: then this fails, nothing is lost
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
