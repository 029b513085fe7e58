"""Files made once for a model, as `popjax calibrate` writes them: checked before a model is read.

Leaves out whether they are of this model, which only its weights can say.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from popjax.artefact import Form


def check_artefact(path: Path | None, option: str, form: Form) -> None:
    """Wrong usage unless a file, where one is named, is whole and of this form."""
    from checkpoints import CheckpointError

    if path is None:
        return
    if path == Path():  # what an empty name becomes, too
        raise typer.BadParameter(
            f"the name is empty, or of a folder: give a file that `{form.command}` wrote",
            param_hint=option,
        )
    try:
        form.check(path)
    except CheckpointError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def check_artefact_of(
    owner: tuple[str, str], needed: bool, path: Path | None, option: str, form: Form
) -> None:
    """Wrong usage unless a file of this form is given where it is `needed`, and only there.

    owner: the option and its value that the file is for.
    """
    flag, name = owner
    if needed and path is None:
        raise typer.BadParameter(
            f"{name} needs {option} FILE: write one with {form.command}", param_hint=flag
        )
    if path is not None and not needed:
        raise typer.BadParameter(f"it is of {flag} {name}: name that", param_hint=option)
    check_artefact(path, option, form)


__all__ = ["check_artefact", "check_artefact_of"]
