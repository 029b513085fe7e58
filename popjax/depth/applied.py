"""A depth method brought to a request: its layers named, and the model without those it drops.

What cannot be done together is refused here. Leaves out what prompt tokens do at a layer that stays
(`nn/passing.py`).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from jax.sharding import Mesh

from popjax.config import ModelConfig
from popjax.depth.method import FULL, DepthMethod, DepthPlan
from popjax.eviction import FastKVzip
from popjax.methods import Method, Scout
from popjax.sparsity import Params

if TYPE_CHECKING:
    from popjax.request import Request


def applied(
    request: Request, params: Params, config: ModelConfig, mesh: Mesh | None
) -> tuple[Request, Params, ModelConfig, tuple[int, ...]]:
    """The request with its depth method settled, what runs it, and which layers of the model run.

    No array is copied. Raises ValueError or CheckpointError for a method that cannot apply to this
    model, or not with the rest of the request.
    """
    every = tuple(range(config.num_layers))
    if request.depth is None:
        return request, params, config, every
    if not isinstance(request.depth, DepthMethod):
        raise ValueError(f"depth {request.depth!r} is not a DepthMethod: give one, or its name")
    if isinstance(request.method, Scout) and request.method.copied < 1:
        raise ValueError(
            f"a scout with copied {request.method.copied} has copies in given layers, which a "
            "depth method numbers anew: give copies to all pruned layers (copied=1.0), or leave "
            "out depth"
        )
    depth = request.depth.for_model(config, params)
    kept, plan = depth.decode_layers(config), depth.plan(config)
    if plan is not None:
        _check(request, plan, depth.budget, mesh)
    request = dataclasses.replace(request, depth=None if plan is None else depth)
    if kept == every:
        return request, params, config, every
    if request.context is not None:
        raise ValueError(
            "a context holds entries of every layer, and this depth method drops some: leave out "
            "context= or depth="
        )
    return request, *without_others(params, config, kept), kept


def without_others(
    params: Params, config: ModelConfig, kept: tuple[int, ...]
) -> tuple[Params, ModelConfig]:
    """Parameters and config of the layers `kept` alone, numbered anew, in their order."""
    if kept == tuple(range(config.num_layers)):
        return params, config
    others = {name: leaf for name, leaf in params.items() if not name.startswith("layer_")}
    layers = {f"layer_{i}": params[f"layer_{old}"] for i, old in enumerate(kept)}
    narrow = dataclasses.replace(config, layers=tuple(config.layers[i] for i in kept))
    return {**others, **layers}, narrow


def _check(request: Request, plan: DepthPlan, budget: str, mesh: Mesh | None) -> None:
    """Raise ValueError for a plan that does not go with the rest of the request."""
    eviction, evicts = request.eviction, request.eviction is not None
    if FULL not in plan.layers and type(request.method) is not Method:
        raise ValueError(
            f"every layer is skipped, so {type(request.method).__name__} has no prompt to rank "
            "channels by: skip fewer, or leave out method="
        )
    if plan.empty_layers and (evicts or request.context is not None or mesh is not None):
        raise ValueError(
            "layers without prompt entries (kv=False) run alone, on one device: leave out kv=, "
            "context= and mesh=, or let skipped layers have entries (kv=True)"
        )
    if isinstance(eviction, FastKVzip):
        raise ValueError(
            "fast-kvzip scores entries by the attention input of every prompt token, which "
            "skipped layers do not have: use another kv= method, or no depth="
        )
    if evicts and plan.boundary != "last":
        raise ValueError(
            "skipped layers are scored for eviction by the boundary token's query, which "
            "handle_boundary=False leaves out: leave out kv=, or handle the boundary"
        )
    if budget != "shared" and request.evict_every is not None:
        raise ValueError(
            "equal shares for skipped layers hold for the prompt alone: leave out evict_every, or "
            "give eviction='shared'"
        )


__all__ = ["applied", "without_others"]
