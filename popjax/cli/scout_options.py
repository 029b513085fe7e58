"""`--scout`, the file that `--method scout` needs, and `calibrate scout`, which writes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from popjax.cli.artefacts import check_artefact_of
from popjax.cli.terminal import Status, say, write

if TYPE_CHECKING:
    from popjax.methods import Method
    from popjax.model import LanguageModel

ScoutFile = Annotated[
    Path | None,
    typer.Option(
        "--scout",
        help="The file of popjax calibrate scout, for --method scout.",
        rich_help_panel="Method",
    ),
]


def check_scout(methods: list[Method], path: Path | None) -> None:
    """Wrong usage unless a scout is given where a method needs one, and only there."""
    from popjax.methods import Scout
    from popjax.scouts import FORM

    needed = any(isinstance(method, Scout) for method in methods)
    check_artefact_of(("--method", "scout"), needed, path, "--scout", FORM)


def with_scout(model: LanguageModel, path: Path | None) -> LanguageModel:
    """The model with the scout of a file beside its weights; itself without a file."""
    if path is None:
        return model
    from popjax.scouts import load_scouts, with_scouts

    scouts = load_scouts(path, model.params, model.config)
    return dataclasses.replace(model, params=with_scouts(model.params, scouts))


def check_ends(ends: str | None) -> None:
    """Wrong usage for anything that `Scout` does not take either."""
    from popjax.methods.row_budgets import ENDS

    if ends is not None and ends not in ENDS:
        raise typer.BadParameter(
            f"ends {ends!r} is unknown: use one of {ENDS}", param_hint="--ends"
        )


def calibrate_scout(
    model: LanguageModel,
    out: Path,
    ends: bool = False,
    prompts: Sequence[Sequence[int]] = (),
    about: str = "",
) -> None:
    """Write the scout of a model, that of its first and last layer too with `ends`.

    prompts: token ids that it is rounded by, none for rounding to nearest. Says what it holds.
    """
    from popjax.calibration.input_moments import input_moments
    from popjax.inspection import format_bytes
    from popjax.scouts import check_model, make_scouts, save_scouts, scout_bytes, with_scouts

    check_model(model.config)
    if model.config.num_layers < 3 and not ends:
        raise ValueError(
            f"a scout leaves the first and the last layer whole, and {model.name} has "
            f"{model.config.num_layers}: it takes three layers or more, or --ends pruned"
        )
    with Status() as status:
        moments = None
        if prompts:
            status.say("Compiling")
            moments = input_moments(
                model.params,
                model.config,
                prompts,
                lambda done: status.say(f"Prompt {done} of {len(prompts)} done"),
            )
        status.say("Rounding gate and up")
        scouts = make_scouts(model.params, model.config, ends=ends, moments=moments)
    path = save_scouts(out, scouts, model.params, model.config, about)
    held = scout_bytes(with_scouts(model.params, scouts))
    layers = [model.params[f"layer_{i}"]["mlp"] for i in range(model.config.num_layers)]
    ffn = sum(w.nbytes for mlp in layers for w in mlp.values())
    say(f"{format_bytes(held)}, {held / ffn:.1%} of the FFN weights beside which they are held")
    write(f"{path}\n")
