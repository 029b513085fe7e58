"""How much each layer matters to a prompt and to what follows it: scores of a model, measured once.

Virtual gates of value 1 scale both branches of a layer, one for prompt tokens before the last, one
for the others (arXiv 2602.03295, Eq. 5, 10-13). With targets drawn from the model itself the
expected rise of the loss when a gate closes is half its expected squared gradient (Eq. 6-9), so one
forward and backward pass a sample gives both scores. Block influence (ShortGPT) beside them. Leaves
out files (`artefact.py`) and what the scores decide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from popjax import cache as kv
from popjax.config import ModelConfig
from popjax.methods import Method
from popjax.nn.transformer import Inputs, Outputs, Transformer
from popjax.nonfinite import not_finite
from popjax.program import Program
from popjax.run import Request, run
from popjax.sampling import SamplingConfig
from popjax.sparsity import Params

# Gates of the prefill and of what decodes, [L] each.
Gates = tuple[jax.Array, jax.Array]


def gated_loss(
    gates: Gates, params: Params, tokens: jax.Array, prompt: jax.Array, *, config: ModelConfig
) -> jax.Array:
    """Minus the log-probability of tokens[prompt:] of tokens [T] after those before it.

    Tokens before the last of the prompt go through the gates of prefill, all others through those
    of decode: by causality the same as two stages.
    """
    T = tokens.shape[0]
    positions = jnp.arange(T, dtype=jnp.int32)[None]
    early = positions < prompt - 1
    prefill, decode = (gate[:, None, None] for gate in gates)
    each = jnp.where(early[None], prefill, decode)
    out = _run(config, params, "prefill", Inputs(tokens[None], positions), None, True, each)
    logprobs = jax.nn.log_softmax(cast(Outputs, out).logits[0, :-1], axis=-1)
    chosen = jnp.take_along_axis(logprobs, tokens[1:, None], axis=-1)[:, 0]
    return -jnp.sum(jnp.where(positions[0, :-1] >= prompt - 1, chosen, 0.0))


def squared_gradients(
    params: Params, tokens: jax.Array, prompt: jax.Array, *, config: ModelConfig
) -> Gates:
    """Squared derivative [L] of `gated_loss` by each gate at 1: the scores of one sample."""
    ones = jnp.ones((config.num_layers,), jnp.float32)
    found = jax.grad(gated_loss)((ones, ones), params, tokens, prompt, config=config)
    return cast(Gates, jax.tree.map(jnp.square, found))


def influences(params: Params, tokens: jax.Array, *, config: ModelConfig) -> jax.Array:
    """Mean over tokens [T] of 1 - cos(in, out) of the stream at each layer, [L] float32."""
    positions = jnp.arange(tokens.shape[0], dtype=jnp.int32)[None]
    states = _run(config, params, "states", Inputs(tokens[None], positions))
    states = [x[0].astype(jnp.float32) for x in states]
    norms = [jnp.sqrt(jnp.sum(x * x, axis=-1)) for x in states]
    cosines = [
        jnp.sum(a * b, axis=-1) / (n * m)
        for a, b, n, m in zip(states, states[1:], norms, norms[1:], strict=False)
    ]
    return jnp.stack([1 - jnp.mean(cosine) for cosine in cosines])


def _run(config: ModelConfig, params: Params, method: str, inputs: Inputs, *rest: Any) -> Any:
    cache = kv.empty(config, 1, inputs.tokens.shape[1], params["embed"]["table"].dtype)
    model = Transformer(config, Method())
    return model.apply({"params": params}, inputs, cache, *rest, method=method)


_GRADIENTS = Program(squared_gradients, static=("config",))
_INFLUENCES = Program(influences, static=("config",))


def measure(
    params: Params,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    seed: int = 0,
    on_sample: Callable[[int], None] | None = None,
) -> dict[str, np.ndarray]:
    """Scores [L] "prefill", "decode" and "influence", means over prompts of one length.

    Each prompt is continued by `new_tokens` drawn from the model at temperature 1, whose
    likelihood is the loss. `on_sample` is told the number of finished prompts. Raises ValueError
    for prompts of fewer than two tokens, of different lengths, or none.
    """
    lengths = {len(prompt) for prompt in prompts}
    if len(lengths) != 1 or min(lengths) < 2:
        raise ValueError(
            f"prompts have {sorted(lengths)} tokens: give at least one, all of one length above 1"
        )
    total: dict[str, np.ndarray] = {}
    sampling = SamplingConfig(do_sample=True)
    for i, prompt in enumerate(prompts):
        asked = Request([prompt], new_tokens, sampling=sampling, seed=seed + i)
        drawn = run(params, config, asked).tokens[0].tolist()
        tokens = jnp.asarray([*prompt, *drawn], jnp.int32)
        found = _GRADIENTS(params, tokens, jnp.int32(len(prompt)), config=config)
        turned = _INFLUENCES(params, tokens, config=config)
        values = dict(zip(("prefill", "decode", "influence"), (*found, turned), strict=True))
        for name, value in values.items():
            total[name] = total.get(name, 0.0) + np.asarray(value, np.float64) / len(prompts)
        if on_sample is not None:
            on_sample(i + 1)
    if not all(np.isfinite(value).all() for value in total.values()):
        raise not_finite("layer scores are not finite", params)
    return total


__all__ = ["gated_loss", "influences", "measure", "squared_gradients"]
