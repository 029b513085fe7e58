"""`popjax export`: a statically pruned model as a Hugging Face folder that other tools load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from popjax.cli import options
from popjax.cli.terminal import Status, command, say

if TYPE_CHECKING:
    from popjax.methods import Method
    from popjax.model import LanguageModel

Folder = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="Where to write; new, or an empty folder.")
]
Text = Annotated[
    Path | None,
    typer.Option(
        "--text", help="Text that decides which channels stay, as UTF-8; not with --statistics."
    ),
]
MethodName = Annotated[
    str,
    typer.Option(
        "--method",
        help="frozen or griffin: how channels are ranked on the text; with --statistics wanda-sp.",
    ),
]
Ratio = Annotated[float, typer.Option(help="Share of FFN channels to remove, 0 to 1.")]
SAMPLES, WINDOW = 16, 512
Samples = Annotated[
    int | None, typer.Option(min=1, help=f"How many windows of the text are read ({SAMPLES}).")
]
Window = Annotated[int | None, typer.Option(min=1, help=f"Tokens of each window ({WINDOW}).")]


@command
def export(
    folder: Folder,
    text: Text = None,
    model: options.Model = None,
    revision: options.Revision = None,
    dtype: options.Dtype = None,
    offline: options.Offline = False,
    method: MethodName = "frozen",
    ratio: Ratio = options.DEFAULT_RATIO,
    statistics: options.Statistics = None,
    samples: Samples = None,
    window: Window = None,
) -> None:
    """Remove FFN channels for good, and save what is left as an ordinary checkpoint.

    Unlike the other commands, which decide anew for every prompt, this decides once, from --text or
    --statistics.
    """
    chosen = options.chosen_method(method, ratio=ratio, statistics=statistics)
    _check_method(chosen)
    given = {"--text": text, "--samples": samples, "--window": window}
    words = _words(given, method, chosen.calibration is not None)
    _check_folder(folder)
    loaded = options.ModelChoice(model, revision, dtype, offline).load()
    with Status() as status:
        status.say("Ranking channels")
        from popjax.exporting import calibrated_partition, statically_pruned

        windows = [[0]]
        if words is not None:
            windows = windows_of(loaded, words, samples or SAMPLES, window or WINDOW)
        narrow = statically_pruned(loaded, calibrated_partition(loaded, windows, chosen))
        status.say(f"Writing {folder}")
        narrow.save(str(folder))
    before, after = (m.config.layers[0].mlp_dim for m in (loaded, narrow))
    say(f"popjax: wrote {folder}, with {after} of {before} FFN channels in every layer")


def _check_method(method: Method) -> None:
    """Wrong usage for a method whose pruning no plain checkpoint holds."""
    from popjax.exporting import check_calibration
    from popjax.methods import Method, method_name

    try:
        check_calibration(method)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--method") from error
    if type(method).selection is not Method.selection:
        raise typer.BadParameter(
            f"{method_name(method)} chooses channels anew at every step, which no plain checkpoint "
            "can do: use frozen or griffin",
            param_hint="--method",
        )


def _check_folder(folder: Path) -> None:
    """Wrong usage for a place that is taken, or that takes no folder."""
    from checkpoints import CheckpointError, refuse_existing

    try:
        refuse_existing(folder)
    except CheckpointError as error:
        raise typer.BadParameter(str(error), param_hint="FOLDER") from error


def _words(given: dict[str, Any], method: str, calibrated: bool) -> str | None:
    """The text that channels are ranked on; None where statistics say it all."""
    text = given["--text"]
    if calibrated:
        unused = [option for option, value in given.items() if value is not None]
        if unused:
            raise typer.BadParameter(
                f"{method} ranks channels by --statistics: leave it out", param_hint=unused[0]
            )
        return None
    if text is None:
        raise typer.BadParameter(f"{method} ranks channels on one: give it", param_hint="--text")
    return options.read_words(text, "--text")


def windows_of(model: LanguageModel, words: str, samples: int, window: int) -> list[list[int]]:
    """At most `samples` windows of `window` tokens, evenly spread over the text."""
    window = min(window, model.config.max_positions - 1)
    tokens = model.encode(words)[0]
    starts = range(0, max(len(tokens) - window, 0) + 1, window)
    step = max(len(starts) // samples, 1)
    return [tokens[start : start + window] for start in starts[::step][:samples]]


__all__ = ["export"]
