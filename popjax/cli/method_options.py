"""Options of single methods: how experts are ranked, which layers stay whole, what is foretold.

Those that several methods share are in `options.py`; a method that lacks an option refuses it.
"""

from __future__ import annotations

from typing import Annotated

import typer

_PANEL = "Method"

MinTokens = Annotated[
    int | None,
    typer.Option(
        help="Prompt tokens from which on an expert is ranked by them (1); online-pruning of "
        "mixtures.",
        rich_help_panel=_PANEL,
    ),
]
Unseen = Annotated[
    str | None,
    typer.Option(
        help="How an expert that fewer reached is pruned: by its weights, or not at all (dense).",
        rich_help_panel=_PANEL,
    ),
]
Shared = Annotated[
    str | None,
    typer.Option(
        help="dense or pruned: the FFN that every token of a mixture uses beside experts.",
        rich_help_panel=_PANEL,
    ),
]
Ends = Annotated[
    str | None,
    typer.Option(
        help="dense or pruned: the first and the last layer, with gate-first and scout.",
        rich_help_panel=_PANEL,
    ),
]
Rest = Annotated[
    str | None,
    typer.Option(
        help="foretold or off: channels that scout does not evaluate exactly.",
        rich_help_panel=_PANEL,
    ),
]
# Of `calibrate scout`, which makes the copies, and of a plan, which counts them.
Bits = Annotated[
    int | None,
    typer.Option(
        help="4, 6 or 8 (4): bits of a weight in the copies; scout.", rich_help_panel=_PANEL
    ),
]
Copied = Annotated[
    float | None,
    typer.Option(
        help="Share of the pruned layers that have copies (1), the others read gate and up whole: "
        "with 6 bits 0.7 holds about as much, and loses less at a ratio of 0.25; scout.",
        rich_help_panel=_PANEL,
    ),
]

__all__ = ["Bits", "Copied", "Ends", "MinTokens", "Rest", "Shared", "Unseen"]
