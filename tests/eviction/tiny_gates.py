"""Gates for the tiny llama in which nothing is zero or one, and their equations in NumPy."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from popjax.axes import GATE_WIDTH
from popjax.eviction.fast_kvzip import gate_logits, gate_scores
from popjax.eviction.gates import Gates, gate_shapes
from tests.popjax.tiny_models import CONFIGS, random_params

EPS = float(np.finfo(np.float32).eps)
CONFIG = dataclasses.replace(CONFIGS["llama"], max_positions=256)
PARAMS = random_params(CONFIG)
K, G, A, D = 2, 2, GATE_WIDTH, 32


def random_gates(seed: int = 0) -> Gates:
    """Gates in which nothing is zero or one."""
    rng = np.random.default_rng(seed)
    gates = []
    for i in range(CONFIG.num_layers):
        made = {}
        for name, shape in gate_shapes(CONFIG, i).items():
            values = rng.standard_normal(shape)
            made[name] = np.exp(0.3 * values) if name.endswith("_norm") else 0.5 * values
        gates.append({name: jnp.asarray(value, jnp.float32) for name, value in made.items()})
    return tuple(gates)


GATES = random_gates()


@functools.partial(jax.jit, static_argnums=2)
def scored(gate: dict[str, jax.Array], x: jax.Array, twice: bool = False) -> jax.Array:
    return gate_scores(gate_logits(gate, x, twice))


def rms(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6) * scale


def oracle(gate: dict[str, jax.Array], x: np.ndarray, added: int = 1) -> np.ndarray:
    """The gate's equations [K, n] token by token in float64, as the paper writes them."""
    arrays = {name: np.asarray(value, np.float64) for name, value in gate.items()}
    found = np.zeros((K, len(x)))
    for s, token in enumerate(x.astype(np.float64)):
        for h in range(K):
            k = rms(arrays["k"][h] @ token, arrays["k_norm"])
            for g in range(G):
                q = rms(arrays["q"][h, g] @ token + arrays["q_bias"][h, g], arrays["q_norm"])
                own = k @ q / math.sqrt(A) + added * arrays["bias"][h, g]
                sinks = arrays["sinks"][h] @ q / math.sqrt(A)
                found[h, s] += 1 / (1 + np.exp(sinks - own).sum()) / G
    return found
