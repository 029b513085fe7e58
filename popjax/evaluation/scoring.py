"""Token pairs to log-likelihoods, in batches in which no row sways another.

A partition is shared by the rows of a batch, so that with anything but dense a batch holds one
context with its continuations, and its context is prefilled once. Leaves out text (`encoding.py`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from popjax import sharding
from popjax.buckets import bucket, left_padded
from popjax.config import ModelConfig
from popjax.continuation import continuation_logits
from popjax.evaluation.encoding import Pair
from popjax.evaluation.protocols import SINGLE_PASS, SPLIT, Case, checked_protocol
from popjax.evaluation.single_pass import PREFILL_SCORES, judged
from popjax.nonfinite import not_finite
from popjax.sparsity import Params

# Logits [B, n, V] of the split protocol are held whole: at most 256 MB, but for one long row.
_LOGITS = 2**26


@dataclasses.dataclass(frozen=True)
class Score:
    """Log-likelihood of a continuation (nats), its tokens, and whether greedy decoding gives it."""

    logprob: float
    tokens: int
    greedy: bool


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Scores pairs of one model under one case and protocol; batch_size rows at most at a time."""

    params: Params
    config: ModelConfig
    case: Case = Case()
    protocol: str = SPLIT
    batch_size: int = 16

    def __post_init__(self) -> None:
        checked_protocol(self.protocol, self.case)
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int):
            raise ValueError(f"batch_size {self.batch_size!r} is not a whole number: give one")
        if self.batch_size < 1:
            raise ValueError(f"batch_size {self.batch_size} is below 1: score at least one row")

    def scores(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Score]]:
        """The score of every pair with its index, longest pairs first, as batches are done.

        Raises ValueError for a score that is not finite, after those before it were given.
        """
        for batch in self._batches(pairs):
            run = self._single if self.protocol == SINGLE_PASS else self._split
            logprobs, best = run([pairs[i] for i in batch])
            for row, i in enumerate(batch):
                n = len(pairs[i].continuation)
                total = math.fsum(logprobs[row, :n].tolist())
                if not math.isfinite(total):
                    what = f"a log-likelihood under {self.case.name} is {total}"
                    raise not_finite(what, self.params)
                yield i, Score(total, n, bool(best[row, :n].all()))

    def _batches(self, pairs: Sequence[Pair]) -> list[list[int]]:
        """Indices of pairs that are scored together: of like length, or of one context."""
        order = sorted(range(len(pairs)), key=lambda i: (-_length(pairs[i]), pairs[i].context))
        if self.case.dense:
            return self._cut(order, pairs)
        if self.protocol == SINGLE_PASS:
            return [[i] for i in order]
        groups: dict[tuple[int, ...], list[int]] = {}
        for i in order:
            groups.setdefault(pairs[i].context, []).append(i)
        return [batch for group in groups.values() for batch in self._cut(group, pairs)]

    def _cut(self, order: list[int], pairs: Sequence[Pair]) -> list[list[int]]:
        """The indices in batches within batch_size, what logits may hold, and the context length.

        The longest context of a batch and its longest continuation, of another row, go together.
        """
        batches: list[list[int]] = []
        before = longest = 0
        for i in order:
            before = max(before, len(pairs[i].context))
            longest = max(longest, len(pairs[i].continuation))
            rows = len(batches[-1]) + 1 if batches else 1
            held = rows * bucket(longest) * self.config.vocab_size
            over = held > _LOGITS or before + longest > self.config.max_positions
            if not batches or rows > self.batch_size or over:
                batches.append([])
                before, longest = len(pairs[i].context), len(pairs[i].continuation)
            batches[-1].append(i)
        return batches

    def _split(self, batch: list[Pair]) -> tuple[np.ndarray, np.ndarray]:
        rows = _filled(batch)
        contexts = [pair.context for pair in rows]
        shared = contexts[:1] if len(set(contexts)) == 1 else contexts
        logits = continuation_logits(
            self.params,
            self.config,
            self.case.method,
            shared,
            [pair.continuation for pair in rows],
            eviction=self.case.eviction,
            depth=self.case.depth,
        )
        tokens = np.zeros(logits.shape[:2], np.int32)
        for row, pair in enumerate(rows):
            tokens[row, : len(pair.continuation)] = pair.continuation
        logprobs, best = _judged(logits, jnp.asarray(tokens))
        return np.asarray(logprobs), np.asarray(best)

    def _single(self, batch: list[Pair]) -> tuple[np.ndarray, np.ndarray]:
        rows = _filled(batch)
        mesh = sharding.mesh_of(self.params, self.config)
        inputs = left_padded([(*pair.context, *pair.continuation[:-1]) for pair in rows])
        n = min(bucket(max(len(pair.continuation) for pair in rows)), inputs.tokens.shape[1])
        tokens = np.zeros((len(rows), n), np.int32)
        for row, pair in enumerate(rows):
            tokens[row, n - len(pair.continuation) :] = pair.continuation
        found = PREFILL_SCORES(
            self.params,
            sharding.placed(inputs, "B", mesh),
            sharding.placed(jnp.asarray(tokens), "B", mesh),
            config=self.config,
            method=self.case.method.for_model(self.config),
            mesh=mesh,
        )
        return _left_aligned(found[0], batch), _left_aligned(found[1], batch)


def _left_aligned(held: jax.Array, batch: list[Pair]) -> np.ndarray:
    """Values [B, n] of right-aligned continuations, each row from its first column on."""
    given = np.asarray(held)
    moved = np.zeros_like(given)
    for row, pair in enumerate(batch):
        n = len(pair.continuation)
        moved[row, :n] = given[row, given.shape[1] - n :]
    return moved


_judged = jax.jit(judged)


def _length(pair: Pair) -> int:
    return len(pair.context) + len(pair.continuation)


def _filled(batch: list[Pair]) -> list[Pair]:
    """The batch with its last pair repeated up to 1, 2, 4, 8, ... rows: few programs to compile."""
    rows = 1 << (len(batch) - 1).bit_length()
    return batch + batch[-1:] * (rows - len(batch))


__all__ = ["Score", "Scorer"]
