"""Training gates: loss, schedule, examples from the teacher, and that it helps."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popjax.eviction import KVzip
from popjax.eviction.gate_training import (
    Examples,
    Training,
    constant_loss,
    examples,
    gate_loss,
    learning_rate,
    losses,
    overlap,
    train,
)
from popjax.eviction.gates import init_gates
from tests.eviction.tiny_gates import (
    CONFIG,
    EPS,
    GATES,
    PARAMS,
    D,
    G,
    K,
    oracle,
    random_gates,
    scored,
)
from tests.popjax.tiny_models import PROMPTS

SLOPES = jax.jit(jax.value_and_grad(gate_loss))


def test_loss_is_the_cross_entropy_of_the_scores() -> None:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((11, D)).astype(np.float32)
    y = rng.random((K, 11)).astype(np.float32)
    found = float(SLOPES(GATES[0], jnp.asarray(x), jnp.asarray(y))[0])
    g = oracle(GATES[0], x)
    want = -(y * np.log(g) + (1 - y) * np.log(1 - g)).mean(axis=1).sum()
    assert found == pytest.approx(want, rel=64 * math.sqrt(D) * EPS)
    mean = np.broadcast_to(y.mean(axis=1, keepdims=True), y.shape)
    blind = -(y * np.log(mean) + (1 - y) * np.log(1 - mean)).mean(axis=1).sum()
    assert constant_loss(y) == pytest.approx(blind, rel=1e-5)


@pytest.mark.parametrize("bias", [-1e4, 1e4])
def test_loss_and_slopes_stay_finite_where_scores_saturate(bias: float) -> None:
    gate = GATES[0] | {"bias": jnp.full((K, G), bias)}
    loss, slopes = SLOPES(gate, jnp.ones((11, D)), jnp.full((K, 11), 0.5))
    assert np.isfinite(float(loss)) and float(loss) > 1e3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))


def test_learning_rate_is_the_authors() -> None:
    rate = learning_rate(Training(steps=5000, rate=0.2))
    steps = {0: 0.0, 1: 0.01, 49: 0.49, 50: 1.0, 2499: 1.0, 2500: 0.5, 3749: 0.5, 3750: 0.25}
    for step, factor in steps.items():
        assert float(rate(jnp.int32(step))) == pytest.approx(0.2 * factor, rel=1e-6)


def test_examples_pair_inputs_with_the_teachers_scores() -> None:
    teacher = KVzip(piece=12, sinks=2, instruction_ids=(1, 2), continuation_ids=(3,))
    contexts = [PROMPTS[1][:0:-1], PROMPTS[1]]
    found = examples(PARAMS, CONFIG, contexts, teacher)
    sizes = [len(context) - 2 for context in contexts]
    assert all(x.shape == (sum(sizes), D) for x in found.x)
    assert all(y.shape == (K, sum(sizes)) and 0 < y.min() < y.max() <= 1 for y in found.y)
    table, scale = PARAMS["embed"]["table"], PARAMS["layer_0"]["attn_norm"]["scale"]
    token = np.asarray(table)[PROMPTS[1][5]].astype(np.float64)
    normed = token / np.sqrt((token**2).mean() + CONFIG.norm_eps) * np.asarray(scale)
    np.testing.assert_allclose(found.x[0][sizes[0] + 3], normed, rtol=16 * EPS, atol=16 * EPS)
    with pytest.raises(ValueError, match="context 0 has 3 tokens, 2 of them sinks"):
        examples(PARAMS, CONFIG, [[1, 2, 3]], teacher)


def learnable(n: int) -> Examples:
    """Inputs, and targets that another gate gives them."""
    rng = np.random.default_rng(6)
    x = tuple(rng.standard_normal((n, D)).astype(np.float32) for _ in GATES)
    teacher = random_gates(seed=7)
    pairs = zip(teacher, x, strict=True)
    return Examples(x, tuple(np.asarray(scored(*pair)).T for pair in pairs))


def test_training_lowers_the_loss_on_held_out_tokens() -> None:
    learnt, held = learnable(3000).split()
    assert (learnt.x[0].shape[0], held.x[0].shape[0]) == (2970, 30)
    gates = init_gates(CONFIG, jax.random.key(0))
    training = Training(steps=300, batch=200)
    trained = train(gates, learnt, training)
    before, after = losses(gates, held), losses(trained, held)
    blind = [constant_loss(y) for y in held.y]
    assert all(b < a and b < c for a, b, c in zip(before, after, blind, strict=True))
    assert overlap(trained, held, 0.3) > overlap(gates, held, 0.3) + 0.2
    again = train(gates, learnt, training)
    pairs = zip(jax.tree.leaves(trained), jax.tree.leaves(again), strict=True)
    assert all((one == other).all() for one, other in pairs)
