"""Sparsity methods: one method, one file, one paper. `METHODS` maps command names to classes."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from popjax.methods.frozen import Frozen
from popjax.methods.griffin import Griffin
from popjax.methods.method import LayerActs, Method
from popjax.methods.online_pruning import OnlinePruning
from popjax.methods.rescore_all import RescoreAll

METHODS: dict[str, type[Method]] = {
    "dense": Method,
    "online-pruning": OnlinePruning,
    "frozen": Frozen,
    "rescore-all": RescoreAll,
    "griffin": Griffin,
}


def method_named(name: str, **options: Any) -> Method:
    """The method called `name` with its options; None-valued options are left out.

    Raises ValueError for an unknown name or an option that the method does not have.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise ValueError(f"method {name!r} is unknown: use one of {', '.join(METHODS)}{hint}")
    kind = METHODS[name]
    known = {field.name for field in dataclasses.fields(kind)}
    given = {key: value for key, value in options.items() if value is not None}
    extra = sorted(set(given) - known)
    if extra:
        raise ValueError(
            f"method {name!r} has no option {extra[0]!r}: it takes {sorted(known) or 'none'}"
        )
    missing = "ratio" in known and "ratio" not in given and "model_ratio" not in given
    if missing:
        raise ValueError(f"method {name!r} needs a ratio: give the share of FFN channels to prune")
    return kind(**given)


def method_name(method: Method) -> str:
    """The command-line name of a method."""
    return next(name for name, kind in METHODS.items() if type(method) is kind)


__all__ = [
    "METHODS",
    "Frozen",
    "Griffin",
    "LayerActs",
    "Method",
    "OnlinePruning",
    "RescoreAll",
    "method_name",
    "method_named",
]
