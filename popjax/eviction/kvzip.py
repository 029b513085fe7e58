"""KVzip (arXiv 2505.23416): an entry matters as far as repeating the context makes use of it.

Query-agnostic: after prefill the model is asked to repeat the context, piece by piece, and each
entry scores the largest attention that any token of the repetition pays it. Scoring costs about as
much as the prefill. Entries are taken by rank; the authors keep what is strictly above the score of
a rank, which drops ties and thus entries of the budget. Leaves out words: ids are given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from popjax.config import LayerConfig, ModelConfig
from popjax.eviction.allocation import Candidates, over_layers, per_head, per_layer
from popjax.eviction.method import (
    AttentionActs,
    KvMethod,
    LayerEntries,
    Scores,
    ShadowPass,
    check_whole,
)
from popjax.eviction.sinks import WithSinks
from popjax.nn.ops import attention_mask, soft_capped
from popjax.sparsity import Params

SCOPES = ("global", "layer", "head")
INSTRUCTION = "\n\nRepeat the previous context exactly."
CONTINUATION = "\n\nRepeat the part of the previous context exactly, starting with "
# Queries whose attention is held at a time: [N, 256, 2 pieces] is 37 MB at N = 9.
QUERY_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class KVzip(WithSinks):
    """Keep the entries that the model attends to most while it repeats the context.

    piece: tokens repeated in a pass (authors: 2000); sinks: first tokens, the system prompt for
    instance, which always stay, compete for attention, and are not repeated. instruction_ids: asked
    before the first piece; continuation_ids: before later ones, followed by the last `pointer`
    tokens of the piece before; postfix_ids: after either. All may be empty; `worded` fills them.
    scope: where entries compete, "global" (authors), "layer", where each head is sure of a share
    `floor` of an equal budget, or "head". All tokens of a pass are listened to, its instruction
    too, as in the authors' code. Raises ValueError for values outside their range.
    """

    piece: int = 2000
    pointer: int = 8
    instruction_ids: tuple[int, ...] = ()
    continuation_ids: tuple[int, ...] = ()
    postfix_ids: tuple[int, ...] = ()
    scope: str = "global"
    floor: float = 0.2

    def __post_init__(self) -> None:
        check_whole("piece", self.piece, 1)
        check_whole("pointer", self.pointer)
        for name in ("instruction_ids", "continuation_ids", "postfix_ids"):
            ids = getattr(self, name)
            if not isinstance(ids, tuple) or not all(type(i) is int and i >= 0 for i in ids):
                raise ValueError(f"{name} {ids!r} is not a tuple of token ids: give one")
        if self.scope not in SCOPES:
            raise ValueError(f"scope {self.scope!r} is unknown: use one of {SCOPES}")
        if isinstance(self.floor, bool) or not 0 <= self.floor <= 1:
            raise ValueError(f"floor {self.floor!r} is outside 0..1: give a share of the budget")
        super().__post_init__()

    def worded(self, encode: Callable[[str], Sequence[int]], postfix: str = "") -> KVzip:
        """This method with the authors' instructions, as a tokenizer without special tokens has it.

        postfix: what a chat template puts between the end of a question and its answer.
        """
        texts = (INSTRUCTION, CONTINUATION, postfix)
        ids = (tuple(int(i) for i in encode(text)) if text else () for text in texts)
        first, later, after = ids
        return dataclasses.replace(
            self, instruction_ids=first, continuation_ids=later, postfix_ids=after
        )

    def for_model(self, config: ModelConfig) -> KvMethod:
        ids = (*self.instruction_ids, *self.continuation_ids, *self.postfix_ids)
        if ids and max(ids) >= config.vocab_size:
            raise ValueError(
                f"the instructions have a token id {max(ids)} outside 0..{config.vocab_size - 1}: "
                "encode them with this model's tokenizer"
            )
        return super().for_model(config)

    def observe(self, params: Params, layer: LayerConfig, acts: AttentionActs) -> Any:
        return jnp.zeros(acts.k.shape[:3], jnp.float32)

    def combine(self, before: Any, now: Any) -> Any:
        return jnp.maximum(before, now)

    def shadow_tokens(self, length: int) -> int:
        repeated = max(length - self.sinks, 0)
        asking = len(self.instruction_ids)
        if repeated > self.piece:
            asking = max(asking, len(self.continuation_ids) + min(self.pointer, self.piece))
        return asking + len(self.postfix_ids) + min(self.piece, repeated)

    def shadow_passes(self, prompts: Sequence[Sequence[int]], slots: int) -> Iterator[ShadowPass]:
        longest = max(len(prompt) for prompt in prompts)
        for first in range(self.sinks, longest, self.piece):
            yield self._pass(prompts, first, slots)

    def _pass(self, prompts: Sequence[Sequence[int]], first: int, T: int) -> ShadowPass:
        """The pass that repeats each prompt from position `first` on, right-aligned in T slots."""
        tokens = np.zeros((len(prompts), T), np.int32)
        positions = np.full((len(prompts), T), -1, np.int32)
        span = np.zeros((2, len(prompts)), np.int32)
        for row, prompt in enumerate(prompts):
            end = min(first + self.piece, len(prompt))
            span[:, row] = min(first, end), end
            if first >= end:
                continue
            asked = list(self.instruction_ids)
            if first > self.sinks:
                pointer = prompt[first - min(self.pointer, self.piece) : first]
                asked = [*self.continuation_ids, *pointer]
            said = [*asked, *self.postfix_ids, *prompt[first:end]]
            tokens[row, T - len(said) :] = said
            positions[row, T - len(said) :] = len(prompt) + np.arange(len(said))
        return ShadowPass(*map(jnp.asarray, (tokens, positions, span[0], span[1])))

    def listen(
        self, params: Params, layer: LayerConfig, acts: AttentionActs, asked: ShadowPass
    ) -> Any:
        """Scores [B, K, S] of this pass's piece, zero elsewhere.

        The softmax of a query is over the sinks, the piece and the pass's own tokens, not the rest.
        """
        T = acts.q.shape[1]
        P = min(self.piece, T)
        slots = jnp.arange(acts.k.shape[2], dtype=jnp.int32)[None, :]
        prompt = jnp.where(slots < acts.slot, acts.key_positions, -1)
        zeroth = acts.slot - jnp.max(prompt, axis=1) - 1
        start = zeroth + asked.first
        of_sinks = (prompt >= 0) & (prompt < self.sinks)
        of_piece = (prompt >= asked.first[:, None]) & (prompt < asked.end[:, None])
        own = jnp.where(slots >= acts.slot, acts.key_positions, -1)
        rows = jnp.full_like(start, acts.slot)
        parts = (
            (zeroth, self.sinks, jnp.where(of_sinks, prompt, -1)),
            (start, P, jnp.where(of_piece, prompt, -1)),
            (rows, T, own),
        )
        keys = jnp.concatenate([_cut(acts.k, at, n, 1) for at, n, _ in parts], axis=2)
        places = jnp.concatenate([_cut(held, at, n, 0) for at, n, held in parts], axis=1)
        positions = (acts.query_positions, places)
        span = (self.sinks, self.sinks + P)
        found = strongest(acts.q, keys, *positions, layer.window, span, layer.softcap)
        empty = jnp.zeros(acts.k.shape[:3], jnp.float32)
        return jax.vmap(lambda row, new, at: lax.dynamic_update_slice(row, new, (0, at)))(
            empty, found, start
        )

    def score(
        self, params: Params, layer: LayerConfig, statistic: Any, entries: LayerEntries
    ) -> jax.Array:
        return statistic

    def allocate(self, scores: Scores, candidates: Candidates) -> Scores:
        if self.scope == "head":
            return per_head(scores, candidates)
        if self.scope == "layer":
            return per_layer(scores, candidates, self.floor)
        return over_layers(scores, candidates)


def strongest(
    q: jax.Array,
    k: jax.Array,
    query_positions: jax.Array,
    key_positions: jax.Array,
    window: int | None,
    span: tuple[int, int],
    softcap: float | None = None,
) -> jax.Array:
    """Largest weight [B, K, end - first] float32 that any query pays to keys first .. end - 1.

    q [B, T, N, H] attends to all of k [B, K, S, H]; positions [B, T] and [B, S], -1 for what is not
    there. The largest over queries and over the N / K heads of a key/value head; a block of queries
    at a time, so that [N, T, S] is never held.
    """
    (B, T, N, H), K = q.shape, k.shape[1]
    step = min(QUERY_BLOCK, T)
    exact = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

    def block(i: jax.Array, best: jax.Array) -> jax.Array:
        # The last block reaches back: a query counted twice changes no maximum.
        at = jnp.minimum(i * step, T - step)
        queries = lax.dynamic_slice_in_dim(q, at, step, axis=1).reshape(B, step, K, N // K, H)
        places = lax.dynamic_slice_in_dim(query_positions, at, step, axis=1)
        seen = attention_mask(places, key_positions, window)[:, None, None]
        scores = jnp.einsum(
            "BTKGH,BKSH->BKGTS", queries, k, precision=exact, preferred_element_type=jnp.float32
        )
        scores = soft_capped(scores * (H**-0.5), softcap)
        scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
        weights = jnp.where(seen, jax.nn.softmax(scores, axis=-1), 0.0)
        return jnp.maximum(best, jnp.max(weights[..., slice(*span)], axis=(2, 3)))

    nothing = jnp.zeros((B, K, span[1] - span[0]), jnp.float32)
    return lax.fori_loop(0, -(-T // step), block, nothing)


def _cut(x: jax.Array, at: jax.Array, count: int, axis: int) -> jax.Array:
    """Slots at .. at + count - 1 of each row of x [B, ...], `axis` that of a row; at [B]."""
    return jax.vmap(lambda row, first: lax.dynamic_slice_in_dim(row, first, count, axis))(x, at)


__all__ = ["CONTINUATION", "INSTRUCTION", "SCOPES", "KVzip", "strongest"]
