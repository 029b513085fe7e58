"""The options about depth: which layers a prompt skips."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from popjax.cli.artefacts import check_artefact

if TYPE_CHECKING:
    from popjax.depth import DepthMethod

_PANEL = "Depth"

Depth = Annotated[
    str | None,
    typer.Option(
        "--depth",
        help="Skip layers: prefill-pruning (the prompt alone, all but its last token) or short-gpt "
        "(for good).",
        rich_help_panel=_PANEL,
    ),
]
Skip = Annotated[
    float | None,
    typer.Option(help="Share of the layers to skip, 0 to 1 (a third).", rich_help_panel=_PANEL),
]
LayerScores = Annotated[
    Path | None,
    typer.Option(
        help="Skip the layers of least score in a file that `popjax calibrate` wrote, rather than "
        "the last ones.",
        rich_help_panel=_PANEL,
    ),
]


def chosen_depth(name: str | None, skip: float | None, scores: Path | None) -> DepthMethod | None:
    """The depth method that the options describe; any of them alone means prefill-pruning."""
    from popjax.depth import depth_method_named
    from popjax.depth.artefact import FORM

    if name is None and skip is None and scores is None:
        return None
    name = name or "prefill-pruning"
    given: dict[str, Any] = {"skip": skip, "importance": None if scores is None else str(scores)}
    if name == "prefill-pruning" and scores is not None:
        given["choose"] = "scores"
    try:
        method = depth_method_named(name, **given)
    except ValueError as error:
        message = str(error)
        if "short-gpt needs" in message:
            message = (
                "short-gpt needs --layer-scores, the file that `popjax calibrate prefill-pruning` "
                "wrote"
            )
        blamed = "--skip" if message.startswith("skip ") else "--depth"
        raise typer.BadParameter(message, param_hint=blamed) from error
    check_artefact(scores, "--layer-scores", FORM)
    return method
