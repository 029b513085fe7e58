"""The one decoder-only transformer: a Python loop over layers that may all differ.

A loop, not lax.scan: layers may differ in width and window, and on the CPU backend a scan over
stacked weights copies every layer before using it (4 against 25 GB/s measured).
Left out: sampling, batching, packing. Families differ by config only. On a mesh the
config is that of one shard, and `shards` names the mesh axes that split heads, channels and words.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from kernels_pallas.masked_mlp import NATIVE
from kernels_pallas.row_products import contract_rows
from popjax.cache import Cache, LayerCache, write_positions
from popjax.config import LayerConfig, ModelConfig
from popjax.depth.method import FULL, LATER, DepthPlan
from popjax.eviction.method import KvMethod
from popjax.methods.method import Method
from popjax.nn import ops
from popjax.nn.experts import Moe
from popjax.nn.layers import Attention, Mlp, Norm, declare, summed
from popjax.nn.passing import Columns, begun, run_layers
from popjax.sparsity import Params, Partitions


@struct.dataclass
class Inputs:
    """Tokens [B, T] int32 and their positions [B, T] int32; position -1 marks padding."""

    tokens: jax.Array
    positions: jax.Array


@struct.dataclass
class Outputs:
    """Logits [B, V] of the last token or [B, T, V] of all, the cache, and by-products.

    `statistics`: what the method observed, one entry a layer, and `seen` what the eviction method
    did (prefill), None where no token of the prompt was observed.
    `masks`: each layer's step masks [B or 1, T, R+C], None where everything was on (decode).
    """

    logits: jax.Array
    cache: Cache
    statistics: tuple[Any, ...] = ()
    masks: tuple[jax.Array | None, ...] = ()
    seen: tuple[Any, ...] = ()


class Embedding(nn.Module):
    """A table [V, D]: looked up on the way in, contracted on the way out."""

    config: ModelConfig
    implementation: str = "xla"
    shards: tuple[str, ...] | None = None

    def setup(self) -> None:
        self.table = declare(self, "table", self.config)

    def lookup(self, tokens: jax.Array, scale: float | None = None) -> jax.Array:
        """Rows [B, T, D] of tokens [B, T], times scale rounded as the table is."""
        if self.shards is None:
            return self._rows(tokens, scale)
        # One shard has the row of a token, the others add zero.
        rows = tokens - jax.lax.axis_index(self.shards) * self.table.shape[0]
        here = (rows >= 0) & (rows < self.table.shape[0])
        found = self._rows(rows, scale)
        found = jnp.where(here[:, :, None], found, jnp.zeros((), found.dtype))
        return summed(found, self.shards)

    def _rows(self, rows: jax.Array, scale: float | None) -> jax.Array:
        factor = jnp.asarray(1 if scale is None else scale, self.table.dtype)
        if self.implementation not in NATIVE:
            found = jnp.take(self.table, rows, axis=0, mode="clip")
            return found if scale is None else found * factor
        # By the kernel, in float32: of a bfloat16 table XLA's CPU backend makes a copy a call. And
        # scaled by it: a product of XLA's may or may not be fused with the sum that reads it, and
        # its last bits with it, by what else a program does.
        shares = jnp.full((rows.size, 1), factor.astype(jnp.float32))
        clipped = jnp.clip(rows, 0, self.table.shape[0] - 1).reshape(-1, 1)
        found = contract_rows(shares, self.table, clipped, implementation="native")
        return found.reshape(*rows.shape, -1)

    def logits(self, x: jax.Array) -> jax.Array:
        logits = ops.logits(x, self.table, self.implementation)
        if self.shards is None:
            return logits
        return jax.lax.all_gather(logits, self.shards, axis=logits.ndim - 1, tiled=True)


def gated(y: jax.Array, gate: jax.Array | None) -> jax.Array:
    """A branch [B, T, D] times a virtual gate [B, T] (arXiv 2602.03295, Eq. 5); None leaves it."""
    return y if gate is None else y * gate[:, :, None].astype(y.dtype)


class Block(nn.Module):
    """One decoder layer: attention, then the MLP, or both of the same input."""

    config: ModelConfig
    layer: LayerConfig
    method: Method
    implementation: str = "xla"
    shards: tuple[str, ...] | None = None
    eviction: KvMethod = KvMethod()

    def setup(self) -> None:
        place = (self.implementation, self.shards)
        if self.config.norm_place != "post":
            self.attn_norm, self.mlp_norm = Norm(self.config), Norm(self.config)
        if self.config.norm_place != "pre":
            self.attn_out_norm, self.mlp_out_norm = Norm(self.config), Norm(self.config)
        self.attn = Attention(self.config, self.layer, *place)
        if self.layer.moe is None:
            after = [] if self.config.norm_place == "pre" else [self.mlp_out_norm]
            self.mlp = Mlp(self.config, self.layer, self.method, *place, *after)
        else:
            if self.layer.mlp_dim:
                # To its method what every token uses is an FFN as of any layer without experts.
                alone = dataclasses.replace(self.layer, moe=None)
                self.shared = Mlp(self.config, alone, self.method.beside(), *place)
            beside = self.shared if self.layer.mlp_dim else None
            self.moe = Moe(self.config, self.layer, self.method, *place, beside)
        self.ffn = self.mlp if self.layer.moe is None else self.moe
        if self.config.mlp_bias:
            self.mlp_bias = declare(self, "mlp_bias", self.config)

    def attend(
        self, x: jax.Array, *context: Any, gate: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, Any, Any]:
        """What the MLP reads and the stream after attention, both [B, T, D]; cache, by-product."""
        y, cache, acts = self.attn(self._read(x, "attn_norm"), *context)
        after = x + gated(self._given(y, "attn_out_norm"), gate)
        weights = cast(Params, self.attn.variables["params"])
        seen = self.eviction.observe(weights, self.layer, acts)
        return x if self.config.parallel else after, after, cache, seen

    def entries(self, x: jax.Array, cache: LayerCache, slot: jax.Array, table: Any) -> LayerCache:
        """The layer's cache with what tokens x [B, T, D] leave there that pass the layer by."""
        return self.attn(self._read(x, "attn_norm"), cache, slot, table, None)[1]

    def prefill(
        self,
        x: jax.Array,
        valid: jax.Array,
        given: Any,
        *context: Any,
        gate: jax.Array | None = None,
    ) -> Any:
        read, x, cache, seen = self.attend(x, *context, gate=gate)
        y, statistic = self.ffn.prefill(self._mlp_input(read), read, valid, given)
        return x + gated(self._projected(y), gate), cache, (statistic, seen)

    def decode(self, x: jax.Array, valid: jax.Array, part: Any, mask: Any, *context: Any) -> Any:
        read, x, cache, seen = self.attend(x, *context)
        y, mask = self.ffn.decode(self._mlp_input(read), valid, part, mask)
        return x + self._projected(y), cache, (mask, seen)

    def _read(self, x: jax.Array, norm: str) -> jax.Array:
        return x if self.config.norm_place == "post" else getattr(self, norm)(x)

    def _mlp_input(self, x: jax.Array) -> jax.Array:
        return ops.above(self._read(x, "mlp_norm"), self.get_variable("params", "mlp_threshold"))

    def _given(self, y: jax.Array, norm: str) -> jax.Array:
        return y if self.config.norm_place == "pre" else getattr(self, norm)(y)

    def _projected(self, y: jax.Array) -> jax.Array:
        """What the MLP adds to the stream, of its channels' sum y [B, T, D]."""
        y = summed(y, self.shards)
        if self.config.mlp_bias:
            y = ops.shifted(y, self.mlp_bias)
        # What removed channels gave on average (`methods.flap`).
        y = ops.shifted(y, self.get_variable("params", "mlp_compensation"))
        return self._given(y, "mlp_out_norm")


class Transformer(nn.Module):
    """Decoder-only language model; `method` decides what is observed, partitioned and masked.

    `eviction` may observe attention in prefill, and `depth` let its tokens pass layers by.
    """

    config: ModelConfig
    method: Method
    implementation: str = "xla"
    shards: tuple[str, ...] | None = None
    eviction: KvMethod = KvMethod()
    depth: DepthPlan | None = None

    def setup(self) -> None:
        place = (self.implementation, self.shards)
        self.embed = Embedding(self.config, *place)
        if self.config.position_offset is not None:
            self.positions = Embedding(self.config, self.implementation)
        for i, layer in enumerate(self.config.layers):
            passed = self.depth is not None and self.depth.layers[i] != FULL
            # The prompt is not seen there: nothing to observe, and its last token runs dense.
            method = Method() if passed else self.method
            block = Block(self.config, layer, method, *place, self.eviction)
            setattr(self, f"layer_{i}", block)
        self.final_norm = Norm(self.config)
        if not self.config.tie_embeddings:
            self.head = Embedding(self.config, *place)

    def prefill(
        self,
        inputs: Inputs,
        cache: Cache,
        partition: Partitions | None,
        all_logits: bool = False,
        gates: jax.Array | None = None,
    ) -> Outputs:
        """Run prompt tokens; logits of the last one, or of all of them with `all_logits`.

        gates [L, B, T]: virtual ones on both branches of each layer.
        """
        if self.depth is not None:
            return self._shallow(self.depth, inputs, cache, partition)
        x, keys, tables = self._enter(inputs, cache)
        valid = inputs.positions >= 0
        layers, observed = [], []
        for i, layer in enumerate(self.config.layers):
            given = None if partition is None else partition[i]
            context = self._context(i, layer, inputs, cache, keys, tables)
            gate = None if gates is None else gates[i]
            block = getattr(self, f"layer_{i}")
            x, written, both = block.prefill(x, valid, given, *context, gate=gate)
            layers.append(written)
            observed.append(both)
        statistics, seen = zip(*observed, strict=True)
        logits = self._logits(x if all_logits else x[:, -1, :])
        left = self._leave(inputs, layers, keys, cache)
        return Outputs(logits, left, statistics=statistics, seen=seen)

    def _shallow(
        self, plan: DepthPlan, inputs: Inputs, cache: Cache, partition: Partitions | None
    ) -> Outputs:
        """`prefill` whose tokens pass some layers by; a chunk before the last has no logits."""
        cache = begun(plan, cache, inputs.positions)
        x, keys, tables = self._enter(inputs, cache)
        columns = Columns(inputs.positions, keys, tables, cache.length)
        blocks = [getattr(self, f"layer_{i}") for i in range(self.config.num_layers)]
        x, layers, observed = run_layers(plan, blocks, x, columns, cache, partition)
        statistics, seen = zip(*observed, strict=True)
        none = jnp.zeros((x.shape[0], 0), jnp.float32)
        logits = none if plan.boundary == LATER else self._logits(x[:, -1, :])
        cache = self._leave(inputs, layers, keys, cache)
        return Outputs(logits, cache, statistics=statistics, seen=seen)

    def states(self, inputs: Inputs, cache: Cache) -> tuple[jax.Array, ...]:
        """The stream [B, T, D] before the first layer and after each, of tokens that run them."""
        x, keys, tables = self._enter(inputs, cache)
        valid, found = inputs.positions >= 0, [x]
        for i, layer in enumerate(self.config.layers):
            context = self._context(i, layer, inputs, cache, keys, tables)
            x, _, _ = getattr(self, f"layer_{i}").prefill(x, valid, None, *context)
            found.append(x)
        return tuple(found)

    def decode(
        self,
        inputs: Inputs,
        cache: Cache,
        partition: Partitions | None,
        masks: tuple[jax.Array, ...] | None,
        all_logits: bool = False,
    ) -> Outputs:
        """Run new tokens, one a row or several given ones; `masks` [B, T, R+C] a layer replay.

        Where the CPU kernels run, activations are float32 whatever the weights are stored in: the
        kernels compute so anyway, and XLA's CPU backend is slow at anything in bfloat16.
        """
        x, keys, tables = self._enter(inputs, cache)
        if self.implementation in NATIVE:
            x = x.astype(jnp.float32)
        valid = inputs.positions >= 0
        layers, both = [], []
        for i, layer in enumerate(self.config.layers):
            part = None if partition is None else partition[i]
            recorded = None if masks is None else masks[i]
            context = self._context(i, layer, inputs, cache, keys, tables)
            block = getattr(self, f"layer_{i}")
            x, written, found = block.decode(x, valid, part, recorded, *context)
            layers.append(written)
            both.append(found)
        masks, seen = zip(*both, strict=True)
        logits = self._logits(x if all_logits else x[:, -1, :])
        cache = self._leave(inputs, layers, keys, cache)
        return Outputs(logits, cache, masks=masks, seen=seen)

    def _enter(self, inputs: Inputs, cache: Cache) -> tuple[jax.Array, jax.Array, dict]:
        kinds = {(layer.rope, layer.head_dim) for layer in self.config.layers}
        tables = {
            (rope, H): None if rope is None else ops.rope_table(inputs.positions, rope, H)
            for rope, H in kinds
        }
        return self._embedded(inputs), write_positions(cache, inputs.positions), tables

    def _embedded(self, inputs: Inputs) -> jax.Array:
        x = self.embed.lookup(inputs.tokens, self.config.embed_scale)
        if self.config.position_offset is not None:
            # Padding has position -1: some row, for what is never read.
            x = x + self.positions.lookup(inputs.positions + self.config.position_offset)
        return x

    def _context(
        self,
        i: int,
        layer: LayerConfig,
        inputs: Inputs,
        cache: Cache,
        keys: jax.Array,
        tables: dict,
    ) -> tuple[Any, ...]:
        table = tables[(layer.rope, layer.head_dim)]
        positions = (inputs.positions, cache.keys_of(i, keys))
        return cache.layers[i], cache.length, table, positions, cache.kept_of(i)

    def _leave(self, inputs: Inputs, layers: list, keys: jax.Array, cache: Cache) -> Cache:
        length = cache.length + inputs.tokens.shape[1]
        return dataclasses.replace(cache, layers=tuple(layers), positions=keys, length=length)

    def _logits(self, x: jax.Array) -> jax.Array:
        x = self.final_norm(x)
        logits = self.embed.logits(x) if self.config.tie_embeddings else self.head.logits(x)
        return ops.soft_capped(logits, self.config.final_softcap)


def init_params(config: ModelConfig, key: jax.Array, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Random parameters of a config, for tests and benchmarks: normal(0.02), scales one."""
    from popjax.cache import empty

    model = Transformer(config, Method())
    tokens = jnp.zeros((1, 1), jnp.int32)
    make = jax.jit(
        lambda: model.init(
            key, Inputs(tokens, tokens), empty(config, 1, 1, dtype), None, method="prefill"
        )["params"]
    )
    return jax.tree.map(lambda leaf: leaf.astype(dtype), make())


__all__ = ["Inputs", "Outputs", "Transformer", "init_params"]
