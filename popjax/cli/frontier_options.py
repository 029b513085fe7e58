"""The options about quality beside speed: a text, how it is cut, and where the picture goes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from popjax.cli.options import read_words
from popjax.cli.terminal import Status

if TYPE_CHECKING:
    from popjax.bench import BenchResult
    from popjax.evaluation.protocols import Case
    from popjax.model import LanguageModel

_PANEL = "Quality"

Text = Annotated[
    Path | None,
    typer.Option(
        help="UTF-8 text on which every method's loss is measured.", rich_help_panel=_PANEL
    ),
]
Figure = Annotated[
    Path | None,
    typer.Option(
        help="Draw that loss against bytes and time: a .png, .pdf or .svg.", rich_help_panel=_PANEL
    ),
]
WINDOWS, PREFIX, SCORED = 8, 512, 256
Windows = Annotated[
    int | None,
    typer.Option(min=2, help=f"Windows of --text ({WINDOWS}).", rich_help_panel=_PANEL),
]
Prefix = Annotated[
    int | None,
    typer.Option(min=1, help=f"Tokens of a window that decide ({PREFIX}).", rich_help_panel=_PANEL),
]
Scored = Annotated[
    int | None,
    typer.Option(
        min=1,
        help=f"Tokens after those, scored as decode steps ({SCORED}).",
        rich_help_panel=_PANEL,
    ),
]


@dataclasses.dataclass(frozen=True)
class Scoring:
    """The text on which losses are measured, how it is cut, and where the picture goes."""

    text: str
    figure: Path | None
    windows: int
    prefix: int
    scored: int


def chosen(
    text: Path | None,
    figure: Path | None,
    windows: int | None,
    prefix: int | None,
    scored: int | None,
) -> Scoring | None:
    """What the options ask for; None without a text. Wrong usage for others of them without one."""
    if text is not None:
        if figure is not None:
            from popjax.frontier import picture_format

            try:
                picture_format(figure)
            except ValueError as error:
                raise typer.BadParameter(str(error), param_hint="--figure") from error
        size = (windows or WINDOWS, prefix or PREFIX, scored or SCORED)
        return Scoring(read_words(text, "--text"), figure, *size)
    if figure is not None:
        raise typer.BadParameter("the picture shows quality: give --text", param_hint="--figure")
    for option, value in (("--windows", windows), ("--prefix", prefix), ("--scored", scored)):
        if value is not None:
            raise typer.BadParameter("it cuts the text: give --text", param_hint=option)
    return None


def cut(model: LanguageModel, asked: Scoring) -> tuple[list[list[int]], int]:
    """The windows of the text, and how many tokens it has. ValueError for one too short."""
    from popjax.evaluation.paired import text_windows

    return text_windows(model, asked.text, asked.windows, asked.prefix + asked.scored)


def measured(
    model: LanguageModel,
    cases: dict[str, Case],
    result: BenchResult,
    asked: Scoring,
    windows_of_text: tuple[list[list[int]], int],
) -> dict[str, Any]:
    """Loss above dense of every case beside its bytes and time, drawn where that was asked for."""
    from popjax import frontier
    from popjax.bench import DENSE
    from popjax.evaluation.paired import paired_losses
    from popjax.evaluation.protocols import Case

    windows, count = windows_of_text
    with Status() as status:
        status.say("Measuring losses")
        losses = paired_losses(
            model,
            windows,
            asked.prefix,
            {DENSE: Case(), **cases},
            lambda done: status.say(f"Losses: window {done} of {asked.windows} done"),
        )
    found = frontier.points(result, losses)
    protocol = (
        f"{model.name}, split: {asked.windows} windows spread over {count} tokens, "
        f"{asked.prefix} tokens decide, the next {asked.scored} are scored as decode steps; "
        "loss above dense paired by window, with one standard error"
    )
    if asked.figure is not None:
        timed = f"timed at {result.batch} x {result.prompt_tokens} prompt tokens"
        frontier.draw(asked.figure, found, title=f"{protocol}; {timed}")
    return {
        "protocol": protocol,
        "dense_losses": list(losses[DENSE]),
        "points": [point.to_json() for point in found],
    }
