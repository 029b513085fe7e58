"""Linen shells: they declare the parameters that the axes table lists and call `ops`.

Left out: what is pruned. The MLP asks the method; attention does not know of methods. On a mesh a
shell holds one shard of its heads or channels, and `shards` names the mesh axes that split them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels_pallas.masked_mlp import masked_mlp, project
from popjax import axes, scouts
from popjax.cache import Kept, LayerCache, write_layer
from popjax.config import LayerConfig, ModelConfig
from popjax.eviction.method import AttentionActs
from popjax.methods.method import LayerActs, Method, channels
from popjax.nn import ops
from popjax.packing import pack_layer
from popjax.sparsity import ChannelPartition, Params, keeps_order

RopeTable = tuple[jax.Array, jax.Array]


def declare(module: nn.Module, name: str, config: ModelConfig) -> jax.Array:
    """The parameter `name` of `module`, shaped by the axes table from the module's own path."""
    path = "/".join((*module.path, name))
    shape = axes.shape(path, config)
    if name == "scale" or name.endswith("_norm"):
        init: Callable = nn.initializers.zeros if config.norm_offset else nn.initializers.ones
    elif name == "bias" or name.endswith("_bias"):
        init = nn.initializers.zeros
    else:
        init = nn.initializers.normal(0.02)
    return module.param(name, init, shape)


def declare_rows(module: nn.Module, name: str, config: ModelConfig) -> jax.Array:
    """As `declare` of a matrix [..., D], which may be kept as tiles [..., D/128, 128]."""
    held = module.get_variable("params", name)
    *lead, width = axes.shape("/".join((*module.path, name)), config)
    if held is None or held.ndim == len(lead) + 1:
        return declare(module, name, config)
    if held.shape != (*lead, width // held.shape[-1], held.shape[-1]):
        rows = " x ".join(map(str, lead))
        raise ValueError(f"{name} has shape {held.shape}, expected {rows} rows of {width} weights")
    return held


def summed(y: jax.Array, shards: tuple[str, ...] | None) -> jax.Array:
    """The sum of y over the shards of a mesh; y itself without one."""
    return y if shards is None else jax.lax.psum(y, shards)


class Norm(nn.Module):
    """RMS norm with a scale [D], or layer norm with a bias [D] too."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale, config = declare(self, "scale", self.config), self.config
        if config.norm == "layer":
            return ops.layer_norm(x, scale, declare(self, "bias", config), config.norm_eps)
        return ops.rms_norm(x, scale, config.norm_eps, config.norm_offset)

    def gain(self) -> jax.Array | None:
        """What multiplies each number once normalised [D], float32; None before it is made."""
        scale = self.get_variable("params", "scale")
        if scale is None:
            return None
        return scale.astype(jnp.float32) + (1.0 if self.config.norm_offset else 0.0)


class Attention(nn.Module):
    """Grouped-query attention of one layer over its cache."""

    config: ModelConfig
    layer: LayerConfig
    implementation: str = "xla"
    shards: tuple[str, ...] | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cache: LayerCache,
        slot: jax.Array,
        table: RopeTable | None,
        positions: tuple[jax.Array, jax.Array] | None,
        kept: Kept | None = None,
    ) -> tuple[Any, LayerCache, Any]:
        """x [B, T, D] at query positions [B, T] attends to key positions [B, S] -> [B, T, D].

        `kept` adds what an eviction left of the layer. The third result is what it saw. Without
        positions nothing attends: tokens leave keys and values, and the other results are None.
        """
        *q, k, v = self._projected(x, "kv" if positions is None else "qkv")
        if self.config.qk_norm:
            k = self._normed(k, "k")
        if table is not None:
            k = ops.rotate(k, table)
        cache = write_layer(cache, k, v, slot)
        if positions is None:
            return None, cache, None
        (q,) = q
        if self.config.qk_norm:
            q = self._normed(q, "q")
        if table is not None:
            q = ops.rotate(q, table)
        if self.config.query_scale is not None:
            # Into the queries, so that everything that reads them divides by sqrt(H) as ever.
            q = ops.scaled(q, self.config.query_scale * math.sqrt(self.layer.head_dim))
        options = (self.layer.window, self.implementation, kept, self.layer.softcap)
        out = ops.cached_attention(q, cache.k, cache.v, *positions, *options)
        out = ops.above(out, self._threshold("o"))
        y = ops.heads_out(out, declare(self, "o", self.config), self.implementation)
        y = summed(y, self.shards)
        if self.config.o_bias:
            y = ops.shifted(y, declare(self, "o_bias", self.config))
        return y, cache, AttentionActs(x, q, cache.k, cache.v, *positions, slot)

    def _projected(self, x: jax.Array, names: str) -> list[jax.Array]:
        """Heads [B, T, heads, H] of some of q, k and v, in this order."""
        threshold = self._threshold("q")
        if threshold is None or names == "kv":
            return self._heads(x, names)
        # Keys and values stay in the cache, and are of the whole input.
        return self._heads(ops.above(x, threshold), "q") + self._heads(x, "kv")

    def _threshold(self, name: str) -> jax.Array | None:
        """What inputs of q or o must exceed in a calibrated run; None in any other."""
        return self.get_variable("params", f"{name}_threshold")

    def _normed(self, heads: jax.Array, name: str) -> jax.Array:
        """RMS norm of q or k [B, T, heads, H], over each head or all of them."""
        config, shards = self.config, None
        if config.qk_norm_over == "head":
            scale = declare(self, f"{name}_norm", config)
        else:
            scale = declare(self, f"{name}_all_norm", config)
            if self.shards is not None:
                # Devices of a group hold the same keys, which must not count twice.
                shards = axes.mesh_axes("N" if name == "q" else "K", self.shards)
        return ops.rms_norm(heads, scale, config.norm_eps, config.norm_offset, shards)

    def _heads(self, x: jax.Array, names: str) -> list[jax.Array]:
        weights = [declare(self, name, self.config) for name in names]
        heads = ops.heads_in(x, weights, self.implementation)
        if self.config.qkv_bias:
            biases = [declare(self, f"{name}_bias", self.config) for name in names]
            heads = [
                y + b.astype(y.dtype)[None, None, :, :] for y, b in zip(heads, biases, strict=True)
            ]
        return heads


class Mlp(nn.Module):
    """Feed-forward layer whose channels a method may observe, partition and mask.

    On a mesh its output is that of its own channels, to be summed over shards. What no channel
    carries, the bias of down, is left to the block, and so is the norm that its output goes through
    in some families, `after`, which methods may know of.
    """

    config: ModelConfig
    layer: LayerConfig
    method: Method
    implementation: str = "xla"
    shards: tuple[str, ...] | None = None
    after: Norm | None = None

    def setup(self) -> None:
        self.gate = declare_rows(self, "gate", self.config) if self.config.gated else None
        self.up, self.down = (declare_rows(self, name, self.config) for name in ("up", "down"))
        self.up_bias = declare(self, "up_bias", self.config) if self.config.mlp_bias else None

    def _weights(self) -> Params:
        matrices = {"gate": self.gate, "up": self.up, "down": self.down}
        held = {name: w.reshape(w.shape[0], -1) for name, w in matrices.items() if w is not None}
        vectors = {
            "up_bias": self.up_bias,
            **{name: self.get_variable("params", name) for name in ("calibrated", *scouts.names())},
        }
        return held | {name: vector for name, vector in vectors.items() if vector is not None}

    def prefill(
        self,
        x: jax.Array,
        residual: jax.Array,
        valid: jax.Array,
        given: ChannelPartition | None,
    ) -> tuple[jax.Array, object]:
        """FFN output [B, T, D] of prompt tokens and the method's statistic of this layer.

        x is the normed input [B, T, D], residual the layer's stream, valid [B, T] the non-pad
        tokens. `given` replaces the partition that the method would choose here.
        """
        weights, activation = self._weights(), self.config.activation
        gain = None if self.after is None else self.after.gain()
        acts = LayerActs(x, residual, valid, weights, activation, self.shards, gain)
        statistic = self.method.observe(weights, acts)
        part = self.method.prefill_partition(statistic, self.layer, given)
        if part is not None and part.threshold is not None:
            # As thresholds go, prompt tokens are like any other.
            return self.decode(x, valid, part, None)[0], statistic
        if part is None or keeps_order(part, self.layer.mlp_dim):
            return project(acts.channels(), weights["down"]), statistic
        if acts.evaluated:
            # Every channel was needed for the statistic: only the projection can be spared.
            kept = part.kept_mask(self.layer.mlp_dim)
            return project(acts.channels(), weights["down"], kept), statistic
        packed, _ = pack_layer(weights, part, self.layer.mlp_dim)
        return project(channels(x, packed, activation), packed["down"]), statistic

    def decode(
        self,
        x: jax.Array,
        valid: jax.Array,
        part: ChannelPartition | None,
        recorded: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """FFN output [B, T, D] of new tokens and the mask [B or 1, T, R+C] used (None: all on).

        Every token is masked on its own, so T teacher-forced tokens equal T single steps.
        `recorded` [B, T, R+C] replaces the mask that the method would choose.
        """

        selection = None if part is None else self.method.selection(part)
        if selection is not None:
            # A finished row is padding: zeroed, it cannot sway a choice that the batch shares.
            x = jnp.where(valid[:, :, None], x, jnp.zeros((), x.dtype))
        scouted = selection is not None and part is not None and part.point == "scout"
        return masked_mlp(
            x,
            self.gate,
            self.up,
            self.down,
            activation=self.config.activation,
            selection=selection,
            given=recorded,
            rows=_rows(part),
            up_bias=self.up_bias,
            scout=scouts.needed(self._weights()) if scouted else None,
            implementation=self.implementation,
        )


def _rows(part: ChannelPartition | None) -> jax.Array | None:
    """The evaluated channels [R + C] of full weights; None where the weights are just those."""
    if part is None or not part.indexed:
        return None
    return jnp.concatenate([part.retained, part.candidate])
