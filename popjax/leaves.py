"""Arrays beside a model's weights: added for the runs of a method that needs them, and taken away.

No weight is copied, and models without them know nothing of them. Leaves out what they mean: gates
(`eviction/gates.py`), scouts (`scouts.py`), calibrated numbers (`calibration/`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from popjax.sparsity import Params


def with_leaves(params: Params, leaves: Mapping[str, Any]) -> Params:
    """Parameters with arrays added at paths such as "layer_0/mlp/calibrated"."""
    found = dict(params)
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = found
        for parent in parents:
            node[parent] = dict(node.get(parent, {}))
            node = node[parent]
        node[name] = leaf
    return found


def without_leaves(params: Params, part: str, names: Collection[str]) -> Params:
    """Parameters less what is so named in that part of each layer; those without as they are."""
    found = dict(params)
    for name, layer in params.items():
        if name.startswith("layer_") and part in layer:
            kept = {leaf: w for leaf, w in layer[part].items() if leaf not in names}
            found[name] = {**layer, part: kept}
    return found


def check_layers(params: Params, what: str, given: Sequence[Any]) -> None:
    """Raise ValueError unless there is one of `given`, what they are in words, for each layer."""
    layers = sum(name.startswith("layer_") for name in params)
    if layers != len(given):
        raise ValueError(
            f"{what} of {len(given)} layers were given for a model of {layers}: give one each"
        )


__all__ = ["check_layers", "with_leaves", "without_leaves"]
