"""`--scout`, the file that `--method scout` needs, and `calibrate scout`, which writes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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


def fitted(method: Method, model: LanguageModel) -> Method:
    """The method; a `Scout` as the copies beside the model's weights are: which layers, which bits.

    Wrong usage where they are those of another `--ends`.
    """
    from popjax.methods import Scout
    from popjax.scouts import copied_layers, held_form, share_of

    if not isinstance(method, Scout):
        return method
    layers, ends = model.config.num_layers, method.ends == "pruned"
    held, bits, group = held_form(model.params, layers)
    whole = set(copied_layers(layers, ends, 1.0)) <= set(held)
    copied = 1.0 if whole else share_of(held, layers, ends)
    if copied is None:
        other = "dense" if ends else "pruned"
        raise typer.BadParameter(
            f"the scout has no copies of layers that --ends {method.ends} prunes: give --ends "
            f"{other}, or make it with popjax calibrate scout --ends {method.ends}",
            param_hint="--scout",
        )
    return dataclasses.replace(method, bits=bits, group=group, copied=copied)


def scout_form(ends: str | None, bits: int | None, copied: float | None) -> dict[str, Any]:
    """`ends`, `bits` and `copied` of `make_scouts`; wrong usage for what it does not take."""
    from kernels_pallas.row_products import STORED_BITS
    from popjax.methods.row_budgets import ENDS
    from popjax.scouts import BITS, check_copied

    if ends is not None and ends not in ENDS:
        raise typer.BadParameter(
            f"ends {ends!r} is unknown: use one of {ENDS}", param_hint="--ends"
        )
    if bits is not None and bits not in STORED_BITS:
        raise typer.BadParameter(f"bits {bits} are not offered: use 4, 6 or 8", param_hint="--bits")
    try:
        check_copied(1.0 if copied is None else copied)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--copied") from error
    return {
        "ends": ends == "pruned",
        "bits": BITS if bits is None else bits,
        "copied": 1.0 if copied is None else copied,
    }


def calibrate_scout(
    model: LanguageModel,
    out: Path,
    form: Mapping[str, Any],
    prompts: Sequence[Sequence[int]] = (),
    about: str = "",
) -> None:
    """Write the scout of a model in a form: `ends`, `bits` and `copied` of `make_scouts`.

    prompts: token ids that it is rounded by, none for rounding to nearest. Says what it holds.
    """
    from popjax.calibration.input_moments import input_moments
    from popjax.inspection import format_bytes
    from popjax.scouts import (
        check_model,
        copied_layers,
        make_scouts,
        save_scouts,
        scout_bytes,
        with_scouts,
    )

    check_model(model.config)
    if model.config.num_layers < 3 and not form["ends"]:
        raise ValueError(
            f"a scout leaves the first and the last layer whole, and {model.name} has "
            f"{model.config.num_layers}: it takes three layers or more, or --ends pruned"
        )
    copied_layers(model.config.num_layers, form["ends"], form["copied"])  # or it is refused now
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
        scouts = make_scouts(model.params, model.config, moments=moments, **form)
    path = save_scouts(out, scouts, model.params, model.config, about)
    held = scout_bytes(with_scouts(model.params, scouts))
    layers = [model.params[f"layer_{i}"]["mlp"] for i in range(model.config.num_layers)]
    ffn = sum(w.nbytes for mlp in layers for w in mlp.values())
    say(f"{format_bytes(held)}, {held / ffn:.1%} of the FFN weights beside which they are held")
    write(f"{path}\n")
