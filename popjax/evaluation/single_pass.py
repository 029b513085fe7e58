"""The program of the single-pass protocol: every token of a continuation scored in one prefill.

Logits of a long text are made a few columns at a time, so that what is held does not grow with
the vocabulary times the text. Leaves out which rows come together (`scoring.py`).
"""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from popjax import cache as kv
from popjax import sharding
from popjax.config import ModelConfig
from popjax.continuation import token_logprobs
from popjax.methods import Method
from popjax.nn.transformer import Inputs, Outputs, Transformer
from popjax.program import Program
from popjax.sparsity import Params

# Logits held at a time: 64 MB of float32.
_LOGITS = 2**24


class _Stream(Transformer):
    """The transformer less its head: for logits it gives the stream [B, T, D] itself."""

    def _logits(self, x: jax.Array) -> jax.Array:
        return x


@sharding.over_mesh(sharding.param_letters, "B", "B", outs="B")
def _prefill_scores(
    params: Params,
    inputs: Inputs,
    tokens: jax.Array,
    *,
    config: ModelConfig,
    method: Method,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities [B, n] of tokens [B, n], the last n inputs moved one on, and whether best.

    Inputs are right-aligned, as prompts are.
    """
    here, shards = sharding.local_config(config, mesh), sharding.tensor_axes(mesh)
    (B, T), n = inputs.tokens.shape, tokens.shape[1]
    given = {"params": params}
    cache = kv.empty(here, B, T, params["embed"]["table"].dtype)
    model = _Stream(here, method, shards=shards)
    out = cast(Outputs, model.apply(given, inputs, cache, None, True, method="prefill"))
    x = out.logits[:, T - n :]
    head = Transformer(here, method, shards=shards)

    def scored(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits = cast(jax.Array, head.apply(given, part[0], method="_logits"))
        return judged(logits, part[1])

    step = n
    while step % 2 == 0 and B * step * config.vocab_size > _LOGITS:
        step //= 2
    parts = jax.tree.map(
        lambda held: held.reshape(B, n // step, step, *held.shape[2:]).swapaxes(0, 1), (x, tokens)
    )
    found = jax.lax.map(scored, parts)
    return jax.tree.map(lambda held: held.swapaxes(0, 1).reshape(B, n), found)


def judged(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities [B, n] of tokens [B, n] under logits [B, n, V]; whether each is best."""
    logits = logits.astype(jnp.float32)
    return jax.vmap(token_logprobs)(logits, tokens), jnp.argmax(logits, axis=-1) == tokens


PREFILL_SCORES = Program(_prefill_scores, static=("config", "method", "mesh"))

__all__ = ["PREFILL_SCORES", "judged"]
