"""The arrays of a run without their contents: shapes, dtypes, and the chips they would lie on.

What `run.py` makes from prompts and weights, made here from a ModelConfig. Leaves out compiling
and counting: that is `ahead_of_time.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from kernels_pallas.row_products.tpu import tiled
from popjax import cache as kv
from popjax import generate, sharding
from popjax.config import ModelConfig
from popjax.expert_partition import ExpertPartition, with_order
from popjax.generate import DecodeState, Options
from popjax.methods import Method, check_evaluated
from popjax.nn.transformer import Inputs, Outputs
from popjax.sampling import SamplingConfig, row_keys
from popjax.sparsity import (
    ChannelPartition,
    Params,
    Partitions,
    keeps_order,
    unrouted,
    with_unrouted,
)
from popjax.tiles import has_tiles


@dataclasses.dataclass(frozen=True)
class Place:
    """Chips that a model runs on: one, or a mesh of several over which it is split."""

    chips: tuple[Any, ...]
    mesh: Mesh | None

    @classmethod
    def of(cls, config: ModelConfig, chips: Sequence[Any]) -> Place:
        """Chips for a model. Raises ValueError for a model that they cannot share evenly."""
        mesh = sharding.mesh_over(config, chips) if len(chips) > 1 else None
        return cls(tuple(chips), mesh)

    def abstract(self, tree: Any, letters: Any) -> Any:
        """Shapes with their shardings; letters as in `sharding.abstract`."""
        if self.mesh is not None:
            return sharding.abstract(tree, letters, self.mesh)
        one = SingleDeviceSharding(self.chips[0])
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), tree
        )

    def params(self, config: ModelConfig, dtype: Any) -> Params:
        """The parameters of a config."""
        if self.mesh is not None:
            return sharding.abstract_params(config, self.mesh, dtype)
        alone = sharding.mesh_over(config, self.chips)
        return self.abstract(sharding.abstract_params(config, alone, dtype), "")

    def as_loaded(self, params: Params) -> Params:
        """The parameters with experts as a TPU keeps them; rows of other FFNs are packed anyway."""

        def leaf(path: Any, shape: Any) -> Any:
            path = sharding.joined(path)
            if "/moe/" not in path or not has_tiles(path, shape):
                return shape
            form = jax.eval_shape(tiled, shape)
            return jax.ShapeDtypeStruct(form.shape, form.dtype, sharding=shape.sharding)

        return jax.tree_util.tree_map_with_path(leaf, params)

    def cache(self, config: ModelConfig, rows: int, slots: int, dtype: Any) -> kv.Cache:
        """An empty cache."""
        empty = jax.eval_shape(functools.partial(kv.empty, config, rows, slots, dtype))
        return self.abstract(empty, generate.OUTPUTS.cache)


def outputs_of(place: Place, params: Params, inputs: Inputs, static: dict[str, Any]) -> Outputs:
    """What prefill hands on; `static` as `generate.prefill` takes it."""
    prefill = functools.partial(generate.prefill, **static, mesh=place.mesh)
    outputs = jax.eval_shape(prefill, params, inputs, None)
    return place.abstract(outputs, generate.OUTPUTS)


def packed(
    place: Place, params: Params, config: ModelConfig, method: Method, outputs: Outputs
) -> tuple[Params, ModelConfig, Partitions | None]:
    """What planning and `packing.pack` make of a prefill: parameters, config and partitions."""
    make_plan = functools.partial(generate.make_plan, config=config, method=method, mesh=place.mesh)
    plan, _ = jax.eval_shape(make_plan, outputs.statistics)
    if plan.channels is None:
        return params, config, None
    check_evaluated(method, config, [part.evaluated for part in plan.channels])
    alone = [unrouted(part) for part in plan.channels]
    pairs = list(zip(alone, config.layers, strict=True))
    dims = (layer.mlp_dim if part is None else part.evaluated for part, layer in pairs)
    narrow = config.with_mlp_dims(tuple(dims))
    rows = place.params(narrow, params["embed"]["table"].dtype)
    layers, parts = {}, []
    for i, (whole, (part, layer)) in enumerate(zip(plan.channels, pairs, strict=True)):
        name, ffn = f"layer_{i}", layer.ffn
        layers[name] = params[name]
        if isinstance(whole, ExpertPartition):
            whole = jax.eval_shape(with_order, whole, params[name]["moe"]["down"])
        if part is not None:
            kept = keeps_order(part, layer.mlp_dim)
            layers[name] = params[name] if kept else {**params[name], ffn: rows[name][ffn]}
            part = _packed_partition(part, kept)
        parts.append(with_unrouted(whole, part))
    return {**params, **layers}, narrow, place.abstract(tuple(parts), "F")


def _packed_partition(part: ChannelPartition, whole: bool) -> ChannelPartition:
    norm = None
    if not whole or not part.decided:
        norm = jax.ShapeDtypeStruct(part.candidate.shape, jnp.float32)
    return dataclasses.replace(part, candidate_norm=norm, packed=not whole)


def decode_arguments(
    place: Place,
    outputs: Outputs,
    inputs: Inputs,
    config: ModelConfig,
    room: int,
    sampling: SamplingConfig,
) -> tuple[DecodeState, Any, Any]:
    """State, sampling values and `until` of decoding after a prefill's outputs."""
    keys = jax.eval_shape(functools.partial(row_keys, 0, inputs.tokens.shape[0]))
    values = jax.eval_shape(functools.partial(sampling.values, (), config.vocab_size))
    keys, values, until = place.abstract((keys, values, jax.ShapeDtypeStruct((), jnp.int32)), "")
    start = functools.partial(
        generate.start, flags=sampling.flags(), options=Options(), room=room, mesh=place.mesh
    )
    state = jax.eval_shape(start, outputs.cache, outputs.logits, inputs, keys, None, values)
    return place.abstract(state, generate.STATE), values, until
