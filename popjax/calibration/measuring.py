"""Measuring channel statistics: two passes of dense prompts, seen through the methods' interfaces.

The first pass adds up moments of the channels, the second ranks magnitudes, since those that CHESS
ranks are weighted by moments. Leaves out files (`statistics.py`) and cutting a text into prompts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.masked_mlp import ACTIVATIONS
from kernels_pallas.row_products import expand
from popjax import cache as kv
from popjax.calibration.statistics import (
    STEPS,
    ChannelStatistics,
    LayerStatistics,
    check_dense,
    sites_of,
)
from popjax.config import LayerConfig, ModelConfig
from popjax.eviction.method import AttentionActs, KvMethod
from popjax.leaves import with_leaves
from popjax.methods import Method
from popjax.methods.method import LayerActs
from popjax.nn import ops
from popjax.nn.transformer import Inputs, Outputs, Transformer
from popjax.nonfinite import not_finite
from popjax.program import Program
from popjax.sparsity import Params

# Magnitudes are ranked over every eighth token of a prompt: enough for quantiles, and sorting all
# would take longer than the model.
_EVERY = 8


@dataclasses.dataclass(frozen=True)
class Moments(Method):
    """Sums [F] over the tokens of a prompt: of h, h^2 and u^2."""

    def observe(self, params: Params, acts: LayerActs) -> Any:
        h = acts.counted_channels()
        found = {"mean": h, "energy": h * h}
        if "gate" in params:
            up = expand(acts.x.astype(jnp.float32), params["up"].astype(jnp.float32))
            found["up_energy"] = up * up
        return {name: jnp.sum(value, axis=(0, 1)) for name, value in found.items()}


@dataclasses.dataclass(frozen=True)
class Magnitudes(Method):
    """Quantiles [STEPS + 1] of what the FFN and its down read, and of weighted gates."""

    def observe(self, params: Params, acts: LayerActs) -> Any:
        found = {"mlp": quantiles(acts.x), "down": quantiles(acts.counted_channels())}
        if "gate" in params:
            x, gate = (array.astype(jnp.float32) for array in (acts.x[:, ::_EVERY], params["gate"]))
            opened = ACTIVATIONS[acts.activation](expand(x, gate))
            found["gate"] = quantiles(opened * params["calibrated"][None, None, :], every=1)
        return found


@dataclasses.dataclass(frozen=True)
class AttentionMagnitudes(KvMethod):
    """Quantiles [STEPS + 1] of what q, k, v and o read."""

    window: int = 0

    def observe(self, params: Params, layer: LayerConfig, acts: AttentionActs) -> Any:
        entries = (acts.k, acts.v, acts.query_positions, acts.key_positions)
        out = ops.cached_attention(acts.q, *entries, layer.window, softcap=layer.softcap)
        return {"attention": quantiles(acts.x), "output": quantiles(out)}


def quantiles(x: jax.Array, every: int = _EVERY) -> jax.Array:
    """Quantiles [STEPS + 1] of |x| over every so many tokens of x [B, T, ...], float32."""
    magnitudes = jnp.abs(x[:, ::every].astype(jnp.float32)).reshape(-1)
    return jnp.quantile(magnitudes, jnp.linspace(0.0, 1.0, STEPS + 1, dtype=jnp.float32))


def _observed(
    params: Params, tokens: jax.Array, *, config: ModelConfig, method: Method, eviction: KvMethod
) -> Any:
    """Statistics of tokens [T] as both interfaces saw them, one pair a layer."""
    T = tokens.shape[0]
    cache = kv.empty(config, 1, T, params["embed"]["table"].dtype)
    inputs = Inputs(tokens[None], jnp.arange(T, dtype=jnp.int32)[None])
    model = Transformer(config, method, eviction=eviction)
    out = model.apply({"params": params}, inputs, cache, None, method="prefill")
    out = cast(Outputs, out)
    return tuple(zip(out.statistics, out.seen, strict=True))


_OBSERVED = Program(_observed, static=("config", "method", "eviction"))


def measure(
    params: Params,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    on_sample: Callable[[int], None] | None = None,
) -> ChannelStatistics:
    """Statistics of every layer over prompts of one length, each token counting alike.

    Quantiles are means over prompts of each one's own, as CHESS's code averages them [inferred for
    the others]. `on_sample` is told how many prompts were run, twice as many in all as were given.
    Raises ValueError for prompts of different lengths or none, and for a mixture.
    """
    check_dense("a channel statistic", config)
    lengths = {len(prompt) for prompt in prompts}
    if len(lengths) != 1 or min(lengths) < 1:
        raise ValueError(
            f"prompts have {sorted(lengths)} tokens: give at least one, all of one length above 0"
        )
    heard = counting(on_sample)
    static: dict[str, Any] = {"config": config}
    first = static | {"method": Moments(), "eviction": KvMethod()}
    moments = means_over_prompts(params, prompts, first, heard)
    for layer, _ in moments:
        for name in layer:
            layer[name] = layer[name] / min(lengths)
    weighted = params
    if config.gated:
        rms = {
            f"layer_{i}/mlp/calibrated": jnp.asarray(np.sqrt(layer["up_energy"]), jnp.float32)
            for i, (layer, _) in enumerate(moments)
        }
        weighted = with_leaves(params, rms)
    second = static | {"method": Magnitudes(), "eviction": AttentionMagnitudes()}
    ranked = means_over_prompts(weighted, prompts, second, heard)
    pairs = zip(moments, ranked, strict=True)
    return tuple(_statistics(config, first, {**ffn, **seen}) for (first, _), (ffn, seen) in pairs)


def counting(on_sample: Callable[[int], None] | None) -> Callable[[], None]:
    """What is to be called after each prompt; it tells `on_sample` how many there were."""
    done = 0

    def heard() -> None:
        nonlocal done
        done += 1
        if on_sample is not None:
            on_sample(done)

    return heard


def means_over_prompts(
    params: Params,
    prompts: Sequence[Sequence[int]],
    static: dict[str, Any],
    heard: Callable[[], None],
) -> Any:
    """Means over prompts of what each shows, in float64."""
    total = None
    for prompt in prompts:
        found = _OBSERVED(params, jnp.asarray(prompt, jnp.int32), **static)
        found = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64) / len(prompts), found)
        total = found if total is None else jax.tree.map(np.add, total, found)
        heard()
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(total)):
        raise not_finite("what the model shows on the prompts is not finite", params)
    return total


def _statistics(
    config: ModelConfig, moments: dict[str, np.ndarray], ranked: dict[str, np.ndarray]
) -> LayerStatistics:
    energy, mean = moments["energy"], moments["mean"]
    return LayerStatistics(
        energy,
        mean,
        np.maximum(energy - mean * mean, 0.0),
        moments.get("up_energy"),
        {site: ranked[site] for site in sites_of(config)},
    )


__all__ = ["counting", "means_over_prompts", "measure", "quantiles"]
