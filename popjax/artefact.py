"""Arrays that were made with one model, in a file that names the model and is refused for others.

Leaves out what the arrays mean and whether they are complete: their readers check that.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import checkpoints
from popjax.config import ModelConfig
from popjax.fingerprint import fingerprint
from popjax.sparsity import Params


@dataclasses.dataclass(frozen=True)
class Form:
    """Which file an artefact lies in: its kind and version, and the command that writes such."""

    kind: str
    version: str
    command: str

    def check(self, path: str | os.PathLike[str]) -> None:
        """Raise CheckpointError unless a file is of this form, whatever model it is for."""
        checkpoints.check_bundle(path, self.kind, self.version, self.command)


def save_artefact(
    path: str | os.PathLike[str],
    form: Form,
    arrays: Mapping[str, Any],
    params: Params,
    config: ModelConfig,
    **about: str,
) -> Path:
    """Write arrays of this model into one new safetensors file; returns its path.

    Raises CheckpointError where the path exists.
    """
    named = {"fingerprint": fingerprint(params, config), **about}
    return checkpoints.save_bundle(path, form.kind, form.version, arrays, named)


def load_artefact(
    path: str | os.PathLike[str],
    form: Form,
    params: Params,
    config: ModelConfig,
    words: tuple[str, str],
) -> dict[str, np.ndarray]:
    """The arrays that `save_artefact` wrote for this model.

    words: what they are, and what to do about those of another model. Raises CheckpointError for a
    file that is damaged, of another kind or version, or of another model.
    """
    arrays, about = checkpoints.load_bundle(path, form.kind, form.version, form.command)
    mine, (what, remedy) = fingerprint(params, config), words
    if about.get("fingerprint") != mine:
        raise checkpoints.CheckpointError(
            f"{path} holds {what} of another model or dtype (fingerprint "
            f"{about.get('fingerprint')}, this one has {mine}): {remedy}"
        )
    return arrays


def given_path(name: str, value: Any, command: str) -> str:
    """The path that a method was given as `name`. Raises ValueError for anything but a path.

    command: what writes such files.
    """
    if isinstance(value, str | os.PathLike):
        path = os.fspath(value)
        if isinstance(path, str):
            return path
    raise ValueError(f"{name} {value!r} is not a path: give the file that `{command}` wrote")


__all__ = ["Form", "given_path", "load_artefact", "save_artefact"]
