"""A calibrated method brought to a run: its statistics beside the weights, as data to the programs.

So another ratio or file of the same shapes compiles nothing that the method itself does not ask
for, and nothing is baked into a program. Leaves out what the statistics mean: methods say.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from popjax.calibration.statistics import load_statistics
from popjax.config import ModelConfig
from popjax.leaves import with_leaves
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
    leaves, decoding = (jax.tree.map(jnp.asarray, held) for held in (found.leaves, found.decoding))
    params = with_leaves(params, leaves)
    return request, params, with_leaves(params, decoding)


__all__ = ["prepared"]
