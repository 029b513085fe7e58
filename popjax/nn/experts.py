"""Linen shell of a mixture of experts, whose channels a method may observe, partition and mask.

Beside the experts there may be an `Mlp` that every token uses, weighted by a sigmoid of the input
where the config says so. On a mesh a device holds some of the experts, whole, and routes all
tokens; its output is that of its own experts and channels, to be summed over shards.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from popjax.config import LayerConfig, ModelConfig, MoeConfig
from popjax.expert_partition import ExpertPartition
from popjax.methods.experts import ExpertActs, ExpertStatistic
from popjax.methods.method import Method
from popjax.nn import expert_rows
from popjax.nn import moe as mixture
from popjax.nn.expert_masks import expert_mask, over_channels
from popjax.nn.layers import Mlp, declare, declare_rows
from popjax.sparsity import ChannelPartition, Params, unrouted, whole_partition


class Moe(nn.Module):
    """The experts of one layer; `shared` is the FFN beside them."""

    config: ModelConfig
    layer: LayerConfig
    method: Method
    implementation: str = "xla"
    shards: tuple[str, ...] | None = None
    shared: Mlp | None = None

    def setup(self) -> None:
        self.router = declare(self, "router", self.config)
        self.gate, self.up, self.down = (
            declare_rows(self, name, self.config) for name in ("gate", "up", "down")
        )
        if self._moe.shared_gate:
            self.shared_gate = declare(self, "shared_gate", self.config)

    def prefill(
        self, x: jax.Array, residual: jax.Array, valid: jax.Array, given: Any
    ) -> tuple[jax.Array, Any]:
        """FFN output [B, T, D] of prompt tokens and the method's statistic; see `Mlp.prefill`."""
        weights = self._weights()
        acts = ExpertActs(*self._routed(x, valid), weights, self.config.activation)
        statistic, beside = self.method.observe(weights, acts), None
        if self.shared is not None:
            beside, seen = self.shared.prefill(x, residual, valid, self._given_beside(given))
            if isinstance(statistic, ExpertStatistic):
                statistic = dataclasses.replace(statistic, shared=seen)
        part = self.method.prefill_partition(statistic, self.layer, given)
        kept = None if part is None or part.in_order else part.kept()
        y = acts.output(kept).reshape(x.shape)
        return y if beside is None else y + self._gated(x, beside), statistic

    def decode(
        self,
        x: jax.Array,
        valid: jax.Array,
        part: ExpertPartition | None,
        recorded: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """FFN output [B, T, D] of new tokens and the mask [B, T, k W + S] used (None: all on).

        S are the evaluated channels of `part.shared`, none without it. `recorded` replaces the mask
        that the method would choose.
        """
        flat, routes = self._routed(x, valid)
        work = self._listed if self._lists_rows(routes, part) else self._ragged
        of_experts, of_shared = _split(recorded, part, self._moe)
        y, mask = work(flat, routes, part, of_experts, x.shape[:2])
        y = y.reshape(x.shape)
        mask = None if mask is None else mask.reshape(*x.shape[:2], -1)
        if self.shared is None:
            return y, mask
        kept = None if part is None else part.shared
        beside, other = self.shared.decode(x, valid, kept, of_shared)
        return y + self._gated(x, beside), _joined(mask, other, part, x.shape[:2])

    @property
    def _moe(self) -> MoeConfig:
        assert self.layer.moe is not None, "only layers with experts have this module"
        return self.layer.moe

    def _weights(self) -> Params:
        return {"gate": self.gate, "up": self.up, "down": self.down}

    def _routed(self, x: jax.Array, valid: jax.Array) -> tuple[jax.Array, mixture.Routes]:
        """Tokens [B T, D] and where they go."""
        flat = x.reshape(-1, x.shape[-1])
        first: jax.Array | int = 0
        if self.shards is not None:
            first = jax.lax.axis_index(self.shards).astype(jnp.int32) * self._moe.here
        options = (self._moe, valid.reshape(-1), first, self.implementation)
        return flat, mixture.route(flat, self.router, *options)

    def _given_beside(self, given: ExpertPartition | None) -> ChannelPartition | None:
        """What a given partition says of `shared`, which it may leave whole."""
        if given is None or given.shared is not None:
            return None if given is None else given.shared
        return unrouted(whole_partition(dataclasses.replace(self.layer, moe=None)))

    def _gated(self, x: jax.Array, y: jax.Array) -> jax.Array:
        if not self._moe.shared_gate:
            return y
        scale = jnp.einsum("BTD,D->BT", x, self.shared_gate, preferred_element_type=jnp.float32)
        return y * jax.nn.sigmoid(scale).astype(y.dtype)[:, :, None]

    def _lists_rows(self, routes: mixture.Routes, part: ExpertPartition | None) -> bool:
        tiled, tokens = self.down.ndim > 3, routes.experts.shape[0]
        how = expert_rows.listing(self.implementation, tiled, tokens, self._moe, part)
        return how is not None

    def _listed(
        self,
        x: jax.Array,
        routes: mixture.Routes,
        part: ExpertPartition | None,
        recorded: jax.Array | None,
        rows: tuple[int, ...],
    ) -> tuple[jax.Array, jax.Array | None]:
        """Output [N, D] and mask [B, T, k, W] with rows by index."""
        weights, shape, counts = self._weights(), self.down.shape, None
        listed = jnp.arange(shape[1], dtype=jnp.int32)[None, :]
        if part is not None and not part.in_order:
            assert part.order is not None, "with_order() fills in the order"
            listed, counts = part.order[:, : part.width], part.counts()
        named = expert_rows.rows_of(routes, shape, listed, counts)
        how = self.implementation
        h = expert_rows.listed_channels(x, named, weights, self.config.activation, how)
        mask = self._mask(h, routes, part, recorded, rows, channels=False)
        on = None if mask is None else mask.reshape(h.shape)
        return expert_rows.listed_output(h, named, routes, weights, on, how), mask

    def _ragged(
        self,
        x: jax.Array,
        routes: mixture.Routes,
        part: ExpertPartition | None,
        recorded: jax.Array | None,
        rows: tuple[int, ...],
    ) -> tuple[jax.Array, jax.Array | None]:
        """Output [N, D] and mask [B, T, k, W] with tokens sorted by expert, all channels worked."""
        acts = ExpertActs(x, routes, self._weights(), self.config.activation)
        if part is None or (part.in_order and part.all_on and recorded is None):
            return acts.output(), None
        h = acts.order.back(acts.channels())
        mask = self._mask(h, routes, part, recorded, rows, channels=True)
        shape = (*rows, self._moe.top_k)
        every = jnp.ones((*shape, part.width), bool) if mask is None else mask
        on = over_channels(every, routes.experts.reshape(shape), part)
        h = jnp.where(on.reshape(h.shape), h, jnp.zeros((), h.dtype))
        sorted_h = acts.order.sort(h)
        return mixture.ragged_output(sorted_h, acts.order, routes, self._weights()), mask

    def _mask(
        self,
        h: jax.Array,
        routes: mixture.Routes,
        part: ExpertPartition | None,
        recorded: jax.Array | None,
        rows: tuple[int, ...],
        *,
        channels: bool,
    ) -> jax.Array | None:
        """The mask [B, T, k, W] in use; None where everything evaluated is on."""
        if recorded is not None or part is None or part.all_on:
            return recorded
        shape = (*rows, self._moe.top_k)
        assert math.prod(shape) == h.shape[0], "one row a pair of a token and an expert"
        experts = routes.experts.reshape(shape)
        given = (h.reshape(*shape, -1), experts, part)
        mask = expert_mask(*given, **self.method.expert_selection(), channels=channels)
        if self.shards is None:
            return mask
        # Of experts elsewhere nothing is on here, so that the masks of devices add up.
        return mask & (experts < self._moe.here)[..., None]


def _split(
    mask: jax.Array | None, part: ExpertPartition | None, moe: MoeConfig
) -> tuple[jax.Array | None, jax.Array | None]:
    """A recorded mask [B, T, k W + S] as those of experts [B, T, k, W] and [B, T, S] of shared."""
    if mask is None:
        return None, None
    assert part is not None, "masks come with the partition that they index"
    of_experts = mask[:, :, : part.routed].reshape(*mask.shape[:2], moe.top_k, -1)
    return of_experts, None if part.shared is None else mask[:, :, part.routed :]


def _joined(
    mask: jax.Array | None,
    other: jax.Array | None,
    part: ExpertPartition | None,
    rows: tuple[int, ...],
) -> jax.Array | None:
    """Inverse of `_split`, of masks [B, T, k W] and [B or 1, T, S]; None: all on."""
    if part is None or part.shared is None or (mask is None and other is None):
        return mask
    masks = ((mask, part.routed), (other, part.shared.evaluated))
    every = [jnp.bool_(True) if held is None else held for held, _ in masks]
    wide = [jnp.broadcast_to(m, (*rows, n)) for m, (_, n) in zip(every, masks, strict=True)]
    return jnp.concatenate(wide, axis=-1)
