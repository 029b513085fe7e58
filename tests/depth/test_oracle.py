"""Layers passed by in one program against the definition, written out in two stages.

The oracle knows nothing of columns, caches or modules: tokens before the last run the layers that
run and leave keys and values of the passing state at the others; then the last one runs them all.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popjax.buckets import left_padded
from popjax.config import ModelConfig
from popjax.depth import PrefillPruning
from popjax.depth.method import LATER
from popjax.generate import PROGRAMS
from popjax.methods import Method
from popjax.nn import ops
from popjax.nn.transformer import Inputs
from tests.depth.shallow import HALF, MIXED, config_of, params_of
from tests.popjax.tiny_models import NEWER, PROMPTS, logit_tolerance

# Those that the oracle knows; and those with more, for which our own two stages are the yardstick.
FAMILIES = ("llama", "llama3", "mistral", "qwen2", "qwen3")
OTHERS = ("qwen2_moe", *NEWER)
SETS = {
    "last half": HALF,
    "first and third": MIXED,
    "every layer": PrefillPruning(skip=1.0),
    "no entries": PrefillPruning(choose=(1, 2), kv=False),
}
Entries = tuple[jax.Array, jax.Array]


def heads(params: Any, config: ModelConfig, i: int, x: jax.Array, first: int, name: str) -> Any:
    """Queries, keys or values [1, T, heads, H] of states x [1, T, D] at positions first, ..."""
    layer, attn = config.layers[i], params[f"layer_{i}"]["attn"]
    x = ops.rms_norm(x, params[f"layer_{i}"]["attn_norm"]["scale"], config.norm_eps)
    y = jnp.einsum("BTD,NHD->BTNH", x, attn[name])
    if config.qkv_bias:
        y = y + attn[f"{name}_bias"][None, None]
    if name == "v":
        return y
    if config.qk_norm:
        y = ops.rms_norm(y, attn[f"{name}_norm"], config.norm_eps)
    positions = first + jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    return ops.rotate(y, ops.rope_table(positions, layer.rope, layer.head_dim))


def entries(params: Any, config: ModelConfig, i: int, x: jax.Array, first: int = 0) -> Entries:
    """Keys and values of states x at layer i (arXiv 2602.03295, Eq. 14, 15)."""
    k, v = (heads(params, config, i, x, first, name) for name in "kv")
    return k, v


def whole_layer(
    params: Any, config: ModelConfig, i: int, x: jax.Array, before: Entries | None = None
) -> jax.Array:
    """States x [1, T, D] after layer i, attending to entries `before` them and to their own."""
    own = entries(params, config, i, x, 0 if before is None else before[0].shape[1])
    k, v = own
    if before is not None:
        k, v = (jnp.concatenate(pair, axis=1) for pair in zip(before, own, strict=True))
    return after(params, config, i, x, (k, v), k.shape[1] - x.shape[1])


def after(
    params: Any, config: ModelConfig, i: int, x: jax.Array, seen: Entries, first: int
) -> jax.Array:
    """States x [1, T, D] at positions first, ... after layer i, of the entries seen [1, S, K, H].

    The last entry is that of the last state.
    """
    weights, T, S = params[f"layer_{i}"], x.shape[1], seen[0].shape[1]
    q = heads(params, config, i, x, first, "q")
    at = first + jnp.arange(T, dtype=jnp.int32)[None]
    slots = first + T - S + jnp.arange(S, dtype=jnp.int32)[None]
    mask = ops.attention_mask(at, slots, config.layers[i].window)
    k, v = (y.swapaxes(1, 2) for y in seen)
    out = ops.attention(q, k, v, mask)
    x = x + jnp.einsum("BTNH,NHD->BTD", out, weights["attn"]["o"])
    y = ops.rms_norm(x, weights["mlp_norm"]["scale"], config.norm_eps)
    gate, up = (jnp.einsum("BTD,FD->BTF", y, weights["mlp"][name]) for name in ("gate", "up"))
    return x + jnp.einsum("BTF,FD->BTD", jax.nn.silu(gate) * up, weights["mlp"]["down"])


def two_stages(
    params: Any, config: ModelConfig, kinds: tuple[str, ...], prompt: list[int]
) -> tuple[np.ndarray, list[Entries | None]]:
    """Logits [V] after the prompt, and what all tokens but the last left at each layer."""
    table, n = params["embed"]["table"], len(prompt) - 1
    x, found = table[jnp.asarray(prompt[:-1], jnp.int32)][None], []
    for i, kind in enumerate(kinds):
        found.append(None if kind == "skipped" else entries(params, config, i, x))
        x = whole_layer(params, config, i, x) if kind == "full" else x
    last = table[jnp.asarray(prompt[-1:], jnp.int32)][None]
    for i, before in enumerate(found):
        if before is None:
            last = after(params, config, i, last, entries(params, config, i, last, n), n)
        else:
            last = whole_layer(params, config, i, last, before)
    last = ops.rms_norm(last, params["final_norm"]["scale"], config.norm_eps)
    output = table if config.tie_embeddings else params["head"]["table"]
    return np.asarray(jnp.einsum("BTD,VD->BTV", last, output)[0, 0]), found


def cases() -> list[Any]:
    """Every set on every family; slow ones repeat what quick ones show of another family."""
    quick = {"first and third": "mistral", "every layer": "qwen2", "no entries": "qwen3"}
    return [
        pytest.param(
            family, name, marks=[] if quick.get(name, family) == family else [pytest.mark.slow]
        )
        for family in FAMILIES
        for name in SETS
    ]


@pytest.mark.parametrize(("family", "name"), cases())
def test_one_program_is_the_two_stages(family: str, name: str) -> None:
    config, params = config_of(family), params_of(family)
    depth = SETS[name].for_model(config, params)
    inputs = left_padded(PROMPTS)
    T = inputs.tokens.shape[1]
    static = {"config": config, "method": Method(), "depth": depth.plan(config)}
    out = PROGRAMS.prefill(params, inputs, None, **static, capacity=T)
    for row in (0, 2):
        prompt = PROMPTS[row]
        expected, found = two_stages(params, config, depth.prefill_layers(config), prompt)
        tolerance = logit_tolerance(config, expected)
        np.testing.assert_allclose(out.logits[row], expected, rtol=0, atol=tolerance)
        for held, left in zip(out.cache.layers, found, strict=True):
            for mine, wanted in zip((held.k, held.v), left or (), strict=left is not None):
                mine = mine[row, :, T - len(prompt) : T - 1].swapaxes(0, 1)
                np.testing.assert_allclose(mine, wanted[0], rtol=0, atol=tolerance)


def test_entries_of_skipped_layers_are_of_the_last_state_that_ran() -> None:
    config, params = config_of("qwen3"), params_of("qwen3")
    plan = HALF.for_model(config, params).plan(config)
    inputs, prompt = left_padded(PROMPTS[1:2]), PROMPTS[1]
    T = inputs.tokens.shape[1]
    static = {"config": config, "method": Method(), "depth": plan}
    cache = PROGRAMS.prefill(params, inputs, None, **static, capacity=T).cache
    x = params["embed"]["table"][jnp.asarray(prompt[:-1], jnp.int32)][None]
    for i in range(2):
        x = whole_layer(params, config, i, x)
    for i in (2, 3):
        held = cache.layers[i]
        for mine, wanted in zip((held.k, held.v), entries(params, config, i, x), strict=True):
            mine = mine[0, :, T - len(prompt) : T - 1].swapaxes(0, 1)
            tolerance = logit_tolerance(config, np.asarray(wanted))
            np.testing.assert_allclose(mine, wanted[0], rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", OTHERS)
def test_one_program_is_a_prefill_and_then_a_step(family: str) -> None:
    """The tokens before the last alone, and then the last one as a decode step of all layers."""
    config, params = config_of(family), params_of(family)
    plan = MIXED.for_model(config, params).plan(config)
    assert plan is not None
    prompt = PROMPTS[1]
    static = {"config": config, "method": Method()}
    options = {**static, "capacity": len(prompt)}
    whole, first = left_padded([prompt], len(prompt)), left_padded([prompt[:-1]], len(prompt) - 1)
    out = PROGRAMS.prefill(params, whole, None, depth=plan, **options)
    before = dataclasses.replace(plan, boundary=LATER)
    held = PROGRAMS.prefill(params, first, None, depth=before, **options).cache
    last = Inputs(whole.tokens[:, -1:], whole.positions[:, -1:])
    wanted = np.asarray(PROGRAMS.score(params, last, held, None, **static))[0, 0]
    tolerance = logit_tolerance(config, wanted)
    np.testing.assert_allclose(out.logits[0], wanted, rtol=0, atol=tolerance)
    dense = PROGRAMS.prefill(params, whole, None, **options).logits[0]
    assert np.max(np.abs(np.asarray(dense) - wanted)) > 100 * tolerance
