"""Options that may be repeated: each value once, and each method with the options that it has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer


def of_several(names: list[str], given: dict[str, Any]) -> list[dict[str, Any]]:
    """The options of each of several methods: those that it has, a lone one all that were given.

    Wrong usage for an option that none of them has.
    """
    from popjax.methods import METHODS, takes

    if len(names) < 2 or any(name not in METHODS for name in names):
        return [given for _ in names]
    for option, value in given.items():
        if value is not None and not any(takes(name, option) for name in names):
            raise typer.BadParameter(
                f"none of {', '.join(names)} has that option",
                param_hint=f"--{option.replace('_', '-')}",
            )
    return [{k: v for k, v in given.items() if takes(name, k)} for name in names]


def once(values: Sequence[Any] | None, option: str) -> None:
    """Wrong usage where a repeated option has the same value twice."""
    held = list(values or ())
    twice = next((value for i, value in enumerate(held) if value in held[:i]), None)
    if twice is not None:
        raise typer.BadParameter(f"{twice} is named twice: name it once", param_hint=option)
