"""A calibrated method brought to a run: its statistics beside the weights, as data to the programs.

So another ratio or file of the same shapes compiles nothing that the method itself does not ask
for, and nothing is baked into a program. Leaves out what the statistics mean: methods say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax.sharding import Mesh

from popjax.calibration.statistics import load_statistics
from popjax.config import ModelConfig
from popjax.sparsity import Params

if TYPE_CHECKING:
    from popjax.request import Request


def prepared(
    request: Request,
    params: Params,
    config: ModelConfig,
    mesh: Mesh | None,
    whole: tuple[Params, ModelConfig, tuple[int, ...]],
) -> tuple[Request, Params, Params]:
    """The request, and parameters for prompt and decoding with what its method is calibrated to.

    whole: the model that the statistics are of, and which of its layers run. No weight is copied.
    Raises ValueError on several devices, CheckpointError for statistics of another model.
    """
    method = request.method.for_model(config)
    if method.calibration is None:
        return request, params, params
    if mesh is not None:
        raise ValueError(
            f"{type(method).__name__} is calibrated over all channels of one device, and these "
            f"weights lie on {mesh.size}: load the model without mesh="
        )
    every = load_statistics(method.calibration, *whole[:2])
    statistics = tuple(every[i] for i in whole[2])
    found = method.calibrated(statistics, params, config, request.partition)
    request = dataclasses.replace(request, partition=found.partition)
    params = with_leaves(params, found.leaves)
    return request, params, with_leaves(params, found.decoding)


def with_leaves(params: Params, leaves: Mapping[str, Any]) -> Params:
    """Parameters with arrays added at paths such as "layer_0/mlp/calibrated", no weight copied."""
    found = dict(params)
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = found
        for parent in parents:
            node[parent] = dict(node.get(parent, {}))
            node = node[parent]
        node[name] = jnp.asarray(leaf)
    return found


__all__ = ["prepared", "with_leaves"]
