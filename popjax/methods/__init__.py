"""Sparsity methods: one method, one file, one paper. `METHODS` maps command names to classes."""

from __future__ import annotations

from typing import Any

from popjax.methods.chess import CHESS
from popjax.methods.flap import FLAP
from popjax.methods.frozen import Frozen
from popjax.methods.gate_first import GateFirst
from popjax.methods.griffin import Griffin
from popjax.methods.method import LayerActs, Method, check_evaluated
from popjax.methods.online_pruning import OnlinePruning
from popjax.methods.probe_pruning import ProbePruning
from popjax.methods.rescore_all import RescoreAll
from popjax.methods.scout import Scout
from popjax.methods.teal import TEAL
from popjax.methods.wanda_sp import WandaSP
from popjax.registry import name_of, options_of, resolved

METHODS: dict[str, type[Method]] = {
    "dense": Method,
    "online-pruning": OnlinePruning,
    "frozen": Frozen,
    "rescore-all": RescoreAll,
    "gate-first": GateFirst,
    "scout": Scout,
    "griffin": Griffin,
    "wanda-sp": WandaSP,
    "flap": FLAP,
    "probe-pruning": ProbePruning,
    "teal": TEAL,
    "chess": CHESS,
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
    if "statistics" in known and "statistics" not in given:
        raise ValueError(
            f"method {name!r} needs statistics: give the file that `popjax calibrate channels` "
            "wrote, where statistics are taken"
        )
    return kind(**given)


def takes(name: str | None, option: str) -> bool:
    """Whether there is a method of this name, and it has this option."""
    return name in METHODS and option in options_of(METHODS[name])


def method_name(method: Method) -> str:
    """The command-line name of a method."""
    return name_of(METHODS, method)


__all__ = [
    "CHESS",
    "FLAP",
    "METHODS",
    "TEAL",
    "Frozen",
    "GateFirst",
    "Griffin",
    "LayerActs",
    "Method",
    "OnlinePruning",
    "ProbePruning",
    "RescoreAll",
    "Scout",
    "WandaSP",
    "check_evaluated",
    "method_name",
    "method_named",
    "takes",
]
