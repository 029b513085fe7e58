"""Depth: which layers a prompt runs, by which method, and what that spares.

One method, one file, one paper. `DEPTH_METHODS` maps command names to classes.
"""

from __future__ import annotations

from typing import Any

from popjax.depth.method import DepthMethod
from popjax.depth.prefill_pruning import PrefillPruning
from popjax.depth.short_gpt import ShortGPT
from popjax.registry import name_of, resolved

DEPTH_METHODS: dict[str, type[DepthMethod]] = {
    "prefill-pruning": PrefillPruning,
    "short-gpt": ShortGPT,
}


def depth_method_named(name: str, **options: Any) -> DepthMethod:
    """The depth method called `name` with its options; None-valued options are left out.

    Raises ValueError for an unknown name or an option that the method does not have.
    """
    kind, given = resolved(DEPTH_METHODS, "depth method", name, options)
    return kind(**given)


def depth_method_name(method: DepthMethod) -> str:
    """The command-line name of a depth method."""
    return name_of(DEPTH_METHODS, method)


__all__ = [
    "DEPTH_METHODS",
    "DepthMethod",
    "PrefillPruning",
    "ShortGPT",
    "depth_method_name",
    "depth_method_named",
]
