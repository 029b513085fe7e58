"""Fast KVzip (arXiv 2601.17668): a small trained gate guesses in prefill what KVzip would score.

A gate reads the normed input of its attention layer and gives each key/value head a score in (0, 1)
for every token: the share of the token's own key in a softmax with learned sink keys, of width 16.
Gates are parameters (`gates.py`, `gate_training.py`). The authors evict after every 16 000 tokens
of prefill, the next ones seeing only what stays; here the whole prompt is scored, then evicted
once. Entries are taken by rank, not by a strict threshold.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from popjax.config import LayerConfig
from popjax.eviction.allocation import Candidates, over_layers
from popjax.eviction.method import AttentionActs, LayerEntries, Scores
from popjax.eviction.sinks import WithSinks
from popjax.nn.ops import rms_norm
from popjax.sparsity import Params

# The authors' window: these tokens of prompts at least that long, a fiftieth of shorter ones.
LONG_WINDOW, LONG_PROMPT, SHORT_SHARE = 4096, 16_000, 50
# As in their norm, whatever the model's own.
_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class FastKVzip(WithSinks):
    """Keep the entries of all layers and heads that the model's gates score highest.

    Needs parameters with gates: `popjax.eviction.gates.with_gates`. window: the last tokens, which
    always stay; 0 is the authors' rule, the last 4096 of prompts of 16 000 tokens and more, 2 % of
    shorter ones. It depends on each row's length and is data: no length compiles anew. sinks: first
    tokens, which always stay. bias_twice: add the gate's bias twice, as the authors' training does
    and their inference does not. Raises ValueError for values outside their range, and for a prompt
    whose sinks and window are more than `tokens`.
    """

    bias_twice: bool = False

    def recent(self, length: int) -> int:
        """The last tokens of a prompt of `length` that always stay."""
        if self.window:
            return self.window
        return LONG_WINDOW if length >= LONG_PROMPT else length // SHORT_SHARE

    def budget(self, length: int) -> int:
        sure = min(self.sure(length), length)
        if self.tokens is not None and self.tokens < sure:
            raise ValueError(
                f"tokens {self.tokens} is below the {sure} entries a head that always stay of a "
                f"prompt of {length}: keep more, or give a window of fewer"
            )
        return super().budget(length)

    def sure(self, length: int) -> int:
        return self.sinks + self.recent(length)

    def protected(self, positions: jax.Array, lengths: jax.Array) -> jax.Array:
        recent = jnp.where(lengths >= LONG_PROMPT, LONG_WINDOW, lengths // SHORT_SHARE)
        if self.window:
            recent = jnp.full_like(lengths, self.window)
        return (positions < self.sinks) | (positions >= (lengths - recent)[:, None])

    def observe(self, params: Params, layer: LayerConfig, acts: AttentionActs) -> Any:
        """Scores [B, K, S] of this chunk's tokens, zero elsewhere."""
        gate = params.get("kv_gate")
        if gate is None:
            raise ValueError(
                "fast-kvzip needs gates, and these parameters have none: add trained ones with "
                "popjax.eviction.gates.with_gates(params, load_gates(...))"
            )
        scores = gate_scores(gate_logits(gate, acts.x, self.bias_twice)).swapaxes(1, 2)
        empty = jnp.zeros(acts.k.shape[:3], jnp.float32)
        return lax.dynamic_update_slice(empty, scores, (0, 0, acts.slot))

    def combine(self, before: Any, now: Any) -> Any:
        return jnp.maximum(before, now)

    def score(
        self, params: Params, layer: LayerConfig, statistic: Any, entries: LayerEntries
    ) -> jax.Array:
        return statistic

    def allocate(self, scores: Scores, candidates: Candidates) -> Scores:
        return over_layers(scores, candidates)


def gate_logits(gate: Params, x: jax.Array, bias_twice: bool = False) -> jax.Array:
    """Log-odds [..., K, G] float32 of a token's own key against the sinks, of inputs x [..., D].

    q = RMS(W_q x + b_q) [K, G, A], k = RMS(W_k x) [K, A]; the own key scores q.k / sqrt(A) + b, a
    sink q.s / sqrt(A), and the log-odds are the first less the log of the summed exponentials of
    the second. Sums in float32. Fast KVzip, sink attention gate.
    """
    K, G, A, D = gate["q"].shape
    shape = x.shape[:-1]
    q = _projected(x, gate["q"].reshape(-1, D)).reshape(*shape, K, G, A)
    q_bias = gate["q_bias"].astype(jnp.float32)
    q = q + q_bias.reshape((1,) * len(shape) + q_bias.shape)
    k = _projected(x, gate["k"].reshape(-1, D)).reshape(*shape, K, A)
    q, k = rms_norm(q, gate["q_norm"], _EPS), rms_norm(k, gate["k_norm"], _EPS)
    bias = gate["bias"].astype(jnp.float32) * (2.0 if bias_twice else 1.0)
    own = jnp.einsum("...KGA,...KA->...KG", q, k) * (A**-0.5)
    own = own + bias.reshape((1,) * len(shape) + bias.shape)
    sinks = gate["sinks"].astype(jnp.float32)
    others = jnp.einsum("...KGA,KZA->...KGZ", q, sinks) * (A**-0.5)
    return own - jax.nn.logsumexp(others, axis=-1)


def gate_scores(logits: jax.Array) -> jax.Array:
    """Scores [..., K] in (0, 1) of log-odds [..., K, G]: the mean share over a head's queries."""
    return jnp.mean(jax.nn.sigmoid(logits), axis=-1)


def _projected(x: jax.Array, rows: jax.Array) -> jax.Array:
    """x [..., D] under rows [R, D]: [..., R] float32, whatever dtype either has."""
    dtype = x.dtype if x.dtype == rows.dtype else jnp.dtype(jnp.float32)
    x, rows = x.astype(dtype), rows.astype(dtype)
    return jnp.einsum("...D,RD->...R", x, rows, preferred_element_type=jnp.float32)


__all__ = ["FastKVzip", "gate_logits", "gate_scores"]
