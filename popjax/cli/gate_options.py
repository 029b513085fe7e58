"""`--kv-gates`, the file that `--kv fast-kvzip` needs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from popjax.cli.artefacts import check_artefact_of

if TYPE_CHECKING:
    from popjax.eviction import KvMethod
    from popjax.model import LanguageModel

GateFile = Annotated[
    Path | None,
    typer.Option(
        "--kv-gates",
        help="The file of python -m scripts.train_gates, for --kv fast-kvzip.",
        rich_help_panel="Cache",
    ),
]


def check_gates(eviction: KvMethod | None, path: Path | None) -> None:
    """Wrong usage unless a file of gates is given where the method needs one, and only there."""
    from popjax.eviction import FastKVzip
    from popjax.eviction.gates import FORM

    needed = isinstance(eviction, FastKVzip)
    check_artefact_of(("--kv", "fast-kvzip"), needed, path, "--kv-gates", FORM)


def with_gates(model: LanguageModel, path: Path | None) -> LanguageModel:
    """The model with the gates of a file beside its weights; itself without a file."""
    if path is None:
        return model
    from popjax.eviction import gates

    held = gates.load_gates(path, model.params, model.config)
    return dataclasses.replace(model, params=gates.with_gates(model.params, held))


__all__ = ["GateFile", "check_gates", "with_gates"]
