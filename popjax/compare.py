"""A generation against the dense model: how much faster its steps were, and how far it strayed.

Distance is measured on the generation's own text, teacher-forced through both models, so that one
early difference does not make all later tokens incomparable. Speed comes from `bench.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from popjax.bench import Weights, bench
from popjax.continuation import continuation_logits
from popjax.methods import Method, method_name
from popjax.report import Comparison
from popjax.run import Request, run
from popjax.sparsity import Partitions

# Fewer steps than this say more about the clock than about the model.
LEAST_TIMED_TOKENS = 16


class Generated(Protocol):
    """The two fields of a Generation that are compared."""

    @property
    def tokens(self) -> list[list[int]]: ...

    @property
    def partition(self) -> Partitions | None: ...


def compare_dense(
    model: Weights,
    prompts: Sequence[Sequence[int]],
    generation: Generated,
    *,
    method: Method,
    rounds: int = 3,
    max_new_tokens: int | None = None,
    on_round: Callable[[int], None] | None = None,
) -> Comparison:
    """Compare what `method` generated for `prompts` (token ids, one a row) with dense decoding.

    max_new_tokens: how many are timed, by default the longest row but at least
    `LEAST_TIMED_TOKENS`, within the model's context. Timing is greedy and ignores end tokens.
    Masks that were replayed are not: the method's own are used. Raises ValueError for rows
    that do not match the prompts, or that hold no token at all.
    """
    rows = generation.tokens
    _check_rows(prompts, rows)
    longest = max(len(row) for row in rows)
    if max_new_tokens is None:
        room = model.config.max_positions - max(len(prompt) for prompt in prompts)
        max_new_tokens = min(max(longest, LEAST_TIMED_TOKENS), room)
    agreement, kl = _distance(model, prompts, generation, method)
    name = method_name(method)
    timed = bench(
        model,
        {name: method},
        prompt_ids=prompts,
        new_tokens=max_new_tokens,
        rounds=rounds,
        on_round=on_round,
    )
    free = run(model.params, model.config, Request(prompts, longest)).tokens
    return Comparison(
        decode_speedup=timed.ratio(name).rounds,
        token_agreement=agreement,
        kl=kl,
        first_difference=tuple(
            _common(row, dense.tolist()) for row, dense in zip(rows, free, strict=True)
        ),
    )


def _check_rows(prompts: Sequence[Sequence[int]], rows: Sequence[Sequence[int]]) -> None:
    if len(rows) != len(prompts) or not all(rows):
        raise ValueError(
            f"{len(prompts)} prompts and {len(rows)} generated rows of lengths "
            f"{[len(row) for row in rows]} cannot be compared: give one row of tokens a prompt"
        )


def _distance(
    model: Weights, prompts: Sequence[Sequence[int]], generation: Generated, method: Method
) -> tuple[float, float]:
    """Share of tokens that dense would choose, and mean KL(dense || method) in nats a token."""
    rows = generation.tokens
    forced = (prompts, rows)
    dense = continuation_logits(model.params, model.config, Method(), *forced)
    pruned = continuation_logits(
        model.params, model.config, method, *forced, partition=generation.partition
    )
    agreed, divergences = [], []
    for i, row in enumerate(rows):
        chosen = np.asarray(jnp.argmax(dense[i], axis=-1))[: len(row)]
        agreed.append(chosen == np.asarray(row))
        divergences.append(np.asarray(divergence(dense[i], pruned[i]))[: len(row)])
    kl = np.mean(np.concatenate(divergences), dtype=np.float64)
    return float(np.mean(np.concatenate(agreed))), float(kl)


@jax.jit
def divergence(dense: jax.Array, pruned: jax.Array) -> jax.Array:
    """KL(dense || pruned) [n] in nats of the distributions with logits [n, V] each."""
    p, q = jax.nn.log_softmax(dense, axis=-1), jax.nn.log_softmax(pruned, axis=-1)
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def _common(row: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts share before they part."""
    equal = 0
    while equal < min(len(row), len(other)) and row[equal] == other[equal]:
        equal += 1
    return equal
