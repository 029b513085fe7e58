"""The interface of a sparsity method: observe in prefill, plan once, select at every step.

A method is a frozen dataclass, hashable and static under jit. It returns indices and masks; it
never touches shapes, weights or caches. Every default does nothing, so the base class is dense
decoding. Subclasses are final: they override defaults, never each other's code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.masked_mlp import Selection, gated_channels
from kernels_pallas.row_products import expand
from popjax.config import LayerConfig, ModelConfig
from popjax.sparsity import ChannelPartition, Params, Plan


def channels(x: jax.Array, mlp: Params, activation: str) -> jax.Array:
    """Activations [..., F] of x [..., D] under the FFN parameters `mlp`, gated or not."""
    return gated_channels(x, mlp.get("gate"), mlp["up"], activation, mlp.get("up_bias"))


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """What a calibrated method brings to a run, before a prompt is seen.

    leaves: arrays beside the weights by path, and `decoding` those that the prompt does without;
    partition: that which holds for the whole run, None where the method plans one.
    """

    leaves: dict[str, Any]
    partition: Any = None
    decoding: dict[str, Any] = dataclasses.field(default_factory=dict)


class LayerActs:
    """What one layer shows to `observe` during prefill.

    x [B, T, D] normed FFN input; residual [B, T, D] the stream it came from; valid [B, T] non-pad
    tokens. Channel activations are evaluated when first asked for: a statistic that does without
    them leaves the layer free to evaluate only the channels that are kept. On a mesh F are the
    channels of one shard, and `shards` names the mesh axes that split them. gain [D]: what a norm
    multiplies the layer's output by, None without one.
    """

    def __init__(
        self,
        x: jax.Array,
        residual: jax.Array,
        valid: jax.Array,
        params: Params,
        activation: str,
        shards: tuple[str, ...] | None = None,
        gain: jax.Array | None = None,
    ) -> None:
        self.x, self.residual, self.valid = x, residual, valid
        self.activation, self.shards, self.gain = activation, shards, gain
        self._params = params
        self._h: jax.Array | None = None

    @property
    def evaluated(self) -> bool:
        return self._h is not None

    def channels(self) -> jax.Array:
        """h [B, T, F] = act(x gate^T) * (x up^T), or act(x up^T + bias), pads included."""
        if self._h is None:
            self._h = channels(self.x, self._params, self.activation)
        return self._h

    def counted_channels(self) -> jax.Array:
        """h [B, T, F] in float32 with the rows of pad tokens zero, so that pads never count."""
        h = self.channels().astype(jnp.float32)
        return jnp.where(self.valid[:, :, None], h, 0.0)

    def counted_ups(self) -> jax.Array:
        """u [B, T, F] = x up^T of a gated FFN in float32, with the rows of pad tokens zero."""
        u = expand(self.x, self._params["up"]).astype(jnp.float32)
        return jnp.where(self.valid[:, :, None], u, 0.0)

    def over_channels(self, h: jax.Array) -> jax.Array:
        """The sum [B, T, 1] of h [B, T, F] over all F channels, those of other shards too."""
        total = jnp.sum(h, axis=-1, keepdims=True)
        return total if self.shards is None else jax.lax.psum(total, self.shards)


@dataclasses.dataclass(frozen=True)
class Method:
    """Dense decoding: every channel for every token.

    The base class of all methods, which override some of its functions.
    """

    def for_model(self, config: ModelConfig) -> Method:
        """This method with model-dependent settings resolved; ValueError if it cannot apply."""
        return self

    @property
    def calibration(self) -> str | None:
        """The file of statistics that the method is calibrated by; None where it needs none."""
        return None

    def calibrated(
        self, statistics: Any, params: Params, config: ModelConfig, partition: Any
    ) -> Calibrated:
        """What the method makes of a `ChannelStatistics` of the layers that run.

        partition: the one that the caller gave. "layer_{i}/mlp/calibrated" [F] is then among the
        parameters that `observe` gets.
        """
        return Calibrated({}, partition)

    @property
    def whole_prompt(self) -> bool:
        """Whether a prompt must be prefilled in one piece, since layers are pruned as it runs."""
        return False

    def evaluated(self, mlp_dim: int) -> int:
        """How many of a layer's `mlp_dim` channels a decode step evaluates."""
        return mlp_dim

    def observe(self, params: Params, acts: Any) -> Any:
        """Statistic of one layer during prefill: a pytree of arrays [F, ...], split by a mesh.

        acts: `LayerActs`, or `experts.ExpertActs` of a layer with experts, and then arrays
        [E, ...].
        """
        return ()

    def combine(self, before: Any, now: Any) -> Any:
        """The statistic of a prompt so far and its next chunk: norms over tokens, as they are."""
        return jax.tree.map(lambda a, b: jnp.sqrt(a * a + b * b), before, now)

    def prefill_partition(self, statistic: Any, layer: LayerConfig, given: Any) -> Any:
        """Channels that reach this layer's output during prefill; None for all of them.

        A ChannelPartition, or an ExpertPartition of a layer with experts. `given` is one that the
        caller supplied for this layer.
        """
        return None

    def plan(self, config: ModelConfig, statistics: tuple[Any, ...]) -> Plan:
        """The decision for this prompt, from the statistics of all layers together."""
        return Plan()

    def selection(self, partition: ChannelPartition) -> Selection | None:
        """How a layer's candidates are chosen at every step; None: all channels are on."""
        return None

    def beside(self) -> Method:
        """The method of the FFN that every token uses beside experts: dense unless overridden."""
        return Method()

    def expert_selection(self) -> dict[str, bool]:
        """How candidates of experts are chosen: see `nn.expert_masks.expert_mask`."""
        return {"weighted": True, "shared": False}


def check_evaluated(
    method: Method, config: ModelConfig, counts: Sequence[int] | None = None
) -> None:
    """Raise ValueError where the method leaves a layer no channel to evaluate.

    counts: channels evaluated in each layer, where a plan says so; else what the method announces.
    """
    if counts is None:
        counts = [method.evaluated(layer.channels) for layer in config.layers]
    for i, count in enumerate(counts):
        if count == 0:
            raise ValueError(
                f"{method} leaves no FFN channel of layer {i}, which has "
                f"{config.layers[i].channels}: lower the ratio"
            )


def check_share(name: str, value: float, low: float = 0.0, high: float = 1.0) -> None:
    """Raise ValueError unless `value` is a number within low..high."""
    if not isinstance(value, int | float):
        raise ValueError(
            f"{name} {value!r} is a {type(value).__name__}: give a Python number in "
            f"{low:g}..{high:g}, as float() makes one"
        )
    if isinstance(value, bool) or not low <= value <= high:
        raise ValueError(
            f"{name} {value!r} is outside {low:g}..{high:g}: give a share in that range"
        )
