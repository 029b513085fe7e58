"""Training the gates of Fast KVzip: targets are KVzip's scores of the same tokens, model frozen.

SGD with momentum 0.9 on binary cross-entropy, 1000 random tokens a step, as the authors do (arXiv
2601.17668 and its code). Gates of layers share nothing, so each layer is trained
alone: the same result as all at once, with one layer's inputs at a time. The bias is added once, in
training as in use. Leaves out where text comes from and the tokenizer (`scripts/train_gates.py`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from popjax.config import LayerConfig, ModelConfig
from popjax.eviction.fast_kvzip import gate_logits, gate_scores
from popjax.eviction.gates import Gates
from popjax.eviction.kvzip import KVzip
from popjax.eviction.method import AttentionActs, ShadowPass
from popjax.methods import Method
from popjax.prefilling import Prefill, after_listening, prefilled
from popjax.sparsity import Params

# Every so manieth token is for measuring only.
HELD_OUT = 100


@dataclasses.dataclass(frozen=True)
class Training:
    """How gates are trained; the defaults are the authors'. rate: learning rate at its highest."""

    steps: int = 5000
    batch: int = 1000
    rate: float = 0.2
    momentum: float = 0.9
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Examples:
    """Inputs x [n, D] and targets y [K, n] in 0..1 of every layer, for the same n tokens."""

    x: tuple[np.ndarray, ...]
    y: tuple[np.ndarray, ...]

    def split(self) -> tuple[Examples, Examples]:
        """Those to train on, and every 100th, held out."""
        held = (np.arange(self.x[0].shape[0]) + 1) % HELD_OUT == 0
        return self._where(~held), self._where(held)

    def _where(self, chosen: np.ndarray) -> Examples:
        return Examples(tuple(x[chosen] for x in self.x), tuple(y[:, chosen] for y in self.y))


@dataclasses.dataclass(frozen=True)
class _Teacher(KVzip):
    """KVzip that remembers each layer's input beside its scores; for prefill in one piece."""

    def observe(self, params: Params, layer: LayerConfig, acts: AttentionActs) -> Any:
        return super().observe(params, layer, acts), acts.x

    def listen(
        self, params: Params, layer: LayerConfig, acts: AttentionActs, asked: ShadowPass
    ) -> Any:
        return super().listen(params, layer, acts, asked), ()

    def combine(self, before: Any, now: Any) -> Any:
        return super().combine(before[0], now[0]), before[1]


def examples(
    params: Params, config: ModelConfig, contexts: Sequence[Sequence[int]], teacher: KVzip
) -> Examples:
    """Inputs of the attention layers and the teacher's scores of all tokens but its sinks.

    contexts: token ids, each run alone. Raises ValueError for a context that the model cannot
    serve, or with no token beyond the sinks.
    """
    fields = {f.name: getattr(teacher, f.name) for f in dataclasses.fields(KVzip)}
    # Some budget that evicts, or nothing would be scored; nothing is evicted here.
    fields |= {"keep": None, "tokens": teacher.least + 1}
    method = _Teacher(**fields).for_model(config)
    xs: list[list[np.ndarray]] = [[] for _ in config.layers]
    ys: list[list[np.ndarray]] = [[] for _ in config.layers]
    for i, context in enumerate(contexts):
        n = len(context) - teacher.sinks
        if n < 2:
            raise ValueError(
                f"context {i} has {len(context)} tokens, {teacher.sinks} of them sinks, which "
                "leaves nothing to learn from: give longer ones"
            )
        asked = Prefill([context], config, Method(), method)
        outputs = prefilled(params, asked, asked.inputs(), None)
        end = int(outputs.cache.length)
        outputs = after_listening(params, asked, outputs)
        for layer, (scores, x) in enumerate(outputs.seen):
            xs[layer].append(np.asarray(x[0, end - n : end]))
            ys[layer].append(np.asarray(scores[0, :, end - n : end]))
    return Examples(
        tuple(np.concatenate(x) for x in xs), tuple(np.concatenate(y, axis=1) for y in ys)
    )


def gate_loss(gate: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """Cross-entropy in nats of targets y [K, n] under a gate's scores of x [n, D].

    Mean over tokens, sum over heads. Logarithms of scores come from log-odds, so none is infinite.
    """
    logits = gate_logits(gate, x)
    count = jnp.log(jnp.float32(logits.shape[-1]))
    yes = jax.nn.logsumexp(jax.nn.log_sigmoid(logits), axis=-1) - count
    no = jax.nn.logsumexp(jax.nn.log_sigmoid(-logits), axis=-1) - count
    y = y.T.astype(jnp.float32)
    return jnp.sum(jnp.mean(-(y * yes + (1 - y) * no), axis=0))


def constant_loss(y: np.ndarray) -> float:
    """The loss of the best score that knows nothing of the token: each head's mean of y [K, n]."""
    mean = np.clip(y.mean(axis=1, dtype=np.float64), 1e-12, 1 - 1e-12)
    return float(-(mean * np.log(mean) + (1 - mean) * np.log(1 - mean)).sum())


def losses(gates: Gates, held: Examples) -> list[float]:
    """The loss of each layer's gate on examples."""
    triples = zip(gates, held.x, held.y, strict=True)
    return [float(_loss(gate, x, y)) for gate, x, y in triples]


def learning_rate(training: Training) -> Callable[[Any], jax.Array]:
    """The authors' factors: step / 100 in the first hundredth, 1, 1/2 from half, 1/4 from 3/4."""
    steps = training.steps

    def rate(count: Any) -> jax.Array:
        step = jnp.asarray(count).astype(jnp.float32)
        late = jnp.where(step >= 0.75 * steps, 0.25, 0.5)
        factor = jnp.where(step >= 0.5 * steps, late, 1.0)
        return training.rate * jnp.where(step < 0.01 * steps, 0.01 * step, factor)

    return rate


def train(gates: Gates, given: Examples, training: Training) -> Gates:
    """The gates after training.

    Every layer sees the same tokens in the same order, reshuffled whenever all have been seen.
    """
    n = given.x[0].shape[0]
    order = jnp.asarray(_batches(n, training))
    found = []
    for i, gate in enumerate(gates):
        arrays = jnp.asarray(given.x[i]), jnp.asarray(given.y[i])
        found.append(_trained(gate, *arrays, order, training))
    return tuple(found)


def _batches(n: int, training: Training) -> np.ndarray:
    """Token numbers [steps, batch] int32; a batch of fewer where there are not as many tokens."""
    batch = min(training.batch, n)
    rng, each = np.random.default_rng(training.seed), n // batch
    rounds = -(-training.steps // each)
    shuffled = [rng.permutation(n)[: each * batch].reshape(each, batch) for _ in range(rounds)]
    return np.concatenate(shuffled)[: training.steps].astype(np.int32)


_loss = jax.jit(gate_loss)


@functools.partial(jax.jit, static_argnames="training")
def _trained(
    gate: dict[str, jax.Array], x: jax.Array, y: jax.Array, order: jax.Array, training: Training
) -> dict[str, jax.Array]:
    optimiser = optax.sgd(learning_rate(training), momentum=training.momentum)

    def step(state: tuple[Any, Any], tokens: jax.Array) -> tuple[tuple[Any, Any], None]:
        gate, moments = state
        slopes = jax.grad(gate_loss)(gate, x[tokens], y[:, tokens])
        updates, moments = optimiser.update(slopes, moments)
        return (optax.apply_updates(gate, updates), moments), None

    (gate, _), _ = jax.lax.scan(step, (gate, optimiser.init(gate)), order)
    return gate


def overlap(gates: Gates, held: Examples, keep: float) -> float:
    """Share of the entries in the teacher's best `keep`, over layers and heads, that gates keep."""
    pairs = zip(gates, held.x, strict=True)
    mine = [np.asarray(_scores(gate, x)).T.reshape(-1) for gate, x in pairs]
    guessed, true = np.concatenate(mine), np.concatenate([y.reshape(-1) for y in held.y])
    count = max(1, round(keep * true.size))
    best = [set(np.argsort(-scores, kind="stable")[:count].tolist()) for scores in (guessed, true)]
    return len(best[0] & best[1]) / count


_scores = jax.jit(lambda gate, x: gate_scores(gate_logits(gate, x)))


__all__ = [
    "Examples",
    "Training",
    "constant_loss",
    "examples",
    "gate_loss",
    "learning_rate",
    "losses",
    "overlap",
    "train",
]
