"""Where a command is told to write: refused before the work, not after it.

Leaves out writing itself, which is whole or not at all (`checkpoints`), or line by line
(`evaluation/journal.py`).
"""

from __future__ import annotations

from pathlib import Path

import typer


def check_writable(file: Path | None, option: str, *, new: bool = False) -> None:
    """Wrong usage where a file cannot be written, or exists and must be `new`."""
    if file is None:
        return
    try:
        device = file.exists() and not file.is_file()
        exists, missing = file.exists(), not file.parent.is_dir()
    except OSError as error:  # a name too long for the system, or a folder that is closed
        raise typer.BadParameter(
            f"{str(file)[:80]} cannot be a file here ({error.strerror}): choose another",
            param_hint=option,
        ) from error
    if device or missing:
        raise typer.BadParameter(
            f"{file} must be a file in a folder that exists, and no folder itself: choose another",
            param_hint=option,
        )
    if exists and new:
        raise typer.BadParameter(f"{file} exists: choose another name", param_hint=option)


__all__ = ["check_writable"]
