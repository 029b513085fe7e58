"""The options about the cache: what of a prompt stays in it, and how the prompt is run into it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from popjax.cli.options import blamed

if TYPE_CHECKING:
    from popjax.eviction import KvMethod
    from popjax.methods import Method

_PANEL = "Cache"

Kv = Annotated[
    str | None,
    typer.Option(
        "--kv",
        help="Evict cache entries of the prompt: laprox, snapkv, adakv, criticalkv, pyramidkv, "
        "prefixkv, h2o, tova, streaming-llm or kvzip; with --kv-gates fast-kvzip.",
        rich_help_panel=_PANEL,
    ),
]
KvKeep = Annotated[
    float | None,
    typer.Option(help="Share of the prompt's cache entries that stays.", rich_help_panel=_PANEL),
]
KvTokens = Annotated[
    int | None,
    typer.Option(
        help="Entries a key/value head that stay, on average; instead of --kv-keep.",
        rich_help_panel=_PANEL,
    ),
]
KvWindow = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Last prompt tokens, which always stay and judge the others (32).",
        rich_help_panel=_PANEL,
    ),
]
KvEvery = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Cut the cache to --kv-tokens again after so many new tokens.",
        rich_help_panel=_PANEL,
    ),
]
PrefillChunk = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Run the prompt so many tokens at a time: less memory for a long one.",
        rich_help_panel=_PANEL,
    ),
]


def chosen_kv(
    name: str | None, keep: float | None, tokens: int | None, window: int | None
) -> KvMethod | None:
    """The eviction method that the options describe; a budget alone means laprox."""
    from popjax.eviction import kv_method_named

    given: dict[str, Any] = {"keep": keep, "tokens": tokens, "window": window}
    if name is None and all(value is None for value in given.values()):
        return None
    if keep is None and tokens is None:
        raise typer.BadParameter(
            "no budget was given: say --kv-keep 0.2 or --kv-tokens 256", param_hint="--kv"
        )
    try:
        return kv_method_named(name or "laprox", **given)
    except ValueError as error:
        both = "--kv-keep / --kv-tokens" if "one of keep and tokens" in str(error) else "--kv"
        hint = blamed(str(error), given, both, "--kv-")
        raise typer.BadParameter(str(error), param_hint=hint) from error


def check_pieces(
    eviction: KvMethod | None, method: Method, every: int | None, chunk: int | None
) -> None:
    """Wrong usage where --kv-every or --prefill-chunk cannot go with the methods chosen."""
    from popjax.request import check_again, check_chunk

    try:
        check_again(every, eviction)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--kv-every") from error
    try:
        check_chunk(chunk, method, eviction)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--prefill-chunk") from error
