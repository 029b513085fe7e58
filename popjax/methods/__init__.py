"""Sparsity methods: one method, one file, one paper. `METHODS` maps command names to classes."""

from __future__ import annotations

from typing import Any

from popjax.methods.frozen import Frozen
from popjax.methods.gate_first import GateFirst
from popjax.methods.griffin import Griffin
from popjax.methods.method import LayerActs, Method, check_evaluated
from popjax.methods.online_pruning import OnlinePruning
from popjax.methods.rescore_all import RescoreAll
from popjax.methods.scout import Scout
from popjax.registry import name_of, options_of, resolved

METHODS: dict[str, type[Method]] = {
    "dense": Method,
    "online-pruning": OnlinePruning,
    "frozen": Frozen,
    "rescore-all": RescoreAll,
    "gate-first": GateFirst,
    "scout": Scout,
    "griffin": Griffin,
}


def method_named(name: str, **options: Any) -> Method:
    """The method called `name` with its options; None-valued options are left out.

    Raises ValueError for an unknown name or an option that the method does not have.
    """
    kind, given = resolved(METHODS, "method", name, options)
    known = options_of(kind)
    missing = "ratio" in known and "ratio" not in given and "model_ratio" not in given
    if missing:
        raise ValueError(f"method {name!r} needs a ratio: give the share of FFN channels to prune")
    return kind(**given)


def method_name(method: Method) -> str:
    """The command-line name of a method."""
    return name_of(METHODS, method)


__all__ = [
    "METHODS",
    "Frozen",
    "GateFirst",
    "Griffin",
    "LayerActs",
    "Method",
    "OnlinePruning",
    "RescoreAll",
    "Scout",
    "check_evaluated",
    "method_name",
    "method_named",
]
