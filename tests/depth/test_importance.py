"""Virtual gates and block influence: gradients against differences, samples, and the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import checkpoints
from popjax.depth import PrefillPruning, ShortGPT
from popjax.depth.artefact import load_scores, save_scores
from popjax.depth.choosing import by_place, layer_count, lowest
from popjax.depth.importance import gated_loss, influences, measure, squared_gradients
from tests.depth.shallow import config_of, params_of
from tests.popjax.tiny_models import PROMPTS, random_params

CONFIG, PARAMS = config_of("qwen3"), params_of("qwen3")
TOKENS, PROMPT = jnp.asarray(PROMPTS[1][:14], jnp.int32), 9


@pytest.fixture(scope="module")
def loss() -> Any:
    """`gated_loss` of gates [2, L], prefill's first."""
    prompt = jnp.int32(PROMPT)

    @jax.jit
    def one(gates: jax.Array) -> jax.Array:
        pair = (gates[0], gates[1])
        return gated_loss(pair, PARAMS, TOKENS, prompt, config=CONFIG)

    return one


@pytest.fixture(scope="module")
def scores() -> Any:
    """Of prefill and decode, [L] each, of one sample."""
    one = jax.jit(squared_gradients, static_argnames="config")
    return one(PARAMS, TOKENS, jnp.int32(PROMPT), config=CONFIG)


def test_scores_are_squared_differences_of_the_loss(loss: Any, scores: Any) -> None:
    """Central differences at two steps, extrapolated: wrong by the fourth power of the step."""
    found = np.stack(scores)
    ones = np.ones((2, CONFIG.num_layers), np.float32)

    def difference(at: tuple[int, int], step: float) -> float:
        moved = np.zeros_like(ones)
        moved[at] = step
        return (float(loss(ones + moved)) - float(loss(ones - moved))) / (2 * step)

    # Of losses near 40 in float32, 2e-6 each, over twice the smaller step, times 4/3.
    rounding = 4 / 3 * float(loss(ones)) * float(np.finfo(np.float32).eps) * 4 / 2**-5
    for at in np.ndindex(*ones.shape):
        slope = (4 * difference(at, 2**-5) - difference(at, 2**-4)) / 3
        assert np.sqrt(found[at]) == pytest.approx(abs(slope), rel=2e-3, abs=rounding)


def test_the_loss_is_that_of_what_follows_the_prompt(loss: Any, scores: Any) -> None:
    prefill, decode = (np.asarray(each) for each in scores)
    # What leaves the last layer for prompt tokens before the last is read by nobody.
    assert prefill[-1] == 0 and (prefill[:-1] > 0).all() and (decode > 0).all()
    logits = _logits(TOKENS)
    logprobs = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    wanted = -sum(logprobs[t, TOKENS[t + 1]] for t in range(PROMPT - 1, len(TOKENS) - 1))
    assert float(loss(np.ones((2, CONFIG.num_layers), np.float32))) == pytest.approx(wanted, 1e-5)


def _logits(tokens: jax.Array) -> jax.Array:
    from popjax import cache as kv
    from popjax.methods import Method
    from popjax.nn.transformer import Inputs, Transformer

    T = tokens.shape[0]
    inputs = Inputs(tokens[None], jnp.arange(T, dtype=jnp.int32)[None])
    held = kv.empty(CONFIG, 1, T, jnp.float32)
    model = Transformer(CONFIG, Method())
    out: Any = model.apply({"params": PARAMS}, inputs, held, None, True, method="prefill")
    return out.logits[0]


def test_a_layer_that_does_nothing_has_no_influence() -> None:
    params = dict(PARAMS)
    layer = params["layer_1"]
    zero = {
        "attn": {**layer["attn"], "o": jnp.zeros_like(layer["attn"]["o"])},
        "mlp": {**layer["mlp"], "down": jnp.zeros_like(layer["mlp"]["down"])},
    }
    params["layer_1"] = {**layer, **zero}
    one = jax.jit(influences, static_argnames="config")
    found = np.asarray(one(params, TOKENS, config=CONFIG))
    assert abs(found[1]) < 1e-6 and (found[[0, 2, 3]] > 1e-3).all() and (found <= 2).all()


def test_measured_scores_are_kept_for_their_model_alone(tmp_path: Path) -> None:
    prompts, done = [PROMPTS[1][:8], PROMPTS[1][8:16]], []
    scores = measure(PARAMS, CONFIG, prompts, 3, on_sample=done.append)
    assert done == [1, 2] and scores["prefill"][-1] == 0
    path = save_scores(tmp_path / "scores.safetensors", scores, PARAMS, CONFIG, "two prompts")
    held = load_scores(path, PARAMS, CONFIG)
    np.testing.assert_allclose(held["decode"], scores["decode"], rtol=1e-6)
    chosen = PrefillPruning(skip=0.5, choose="scores", importance=str(path))
    assert chosen.for_model(CONFIG, PARAMS).choose == lowest(held["prefill"].tolist(), 2)
    dropped = ShortGPT(skip=0.25, importance=str(path)).for_model(CONFIG, PARAMS)
    assert dropped.layers == lowest(held["influence"].tolist(), 1)
    with pytest.raises(checkpoints.CheckpointError, match="of another model"):
        chosen.for_model(CONFIG, random_params(CONFIG, seed=1))
    with pytest.raises(checkpoints.CheckpointError, match="exists"):
        save_scores(path, scores, PARAMS, CONFIG, "again")


@pytest.mark.parametrize("prompts", [[], [[1]], [[1, 2], [1, 2, 3]]])
def test_prompts_of_no_use_are_refused(prompts: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="all of one length above 1"):
        measure(PARAMS, CONFIG, prompts, 2)


def test_counts_are_the_published_ones_and_sets_are_of_their_place() -> None:
    published = [(0.3125, 32, 10), (1 / 3, 36, 12), (1 / 3, 48, 16), (0.25, 32, 8)]
    assert [layer_count(share, layers) for share, layers, _ in published] == [10, 12, 16, 8]
    assert layer_count(0.5, 5) == 3 and layer_count(0.33, 30) == 10
    assert by_place("last", 12, 36) == tuple(range(24, 36))
    assert by_place("first", 2, 6) == (0, 1)
    assert by_place("every", 2, 6) == (2, 5)
    assert by_place("every", 0, 6) == () and by_place("last", 6, 6) == tuple(range(6))
    assert lowest([3.0, 1.0, 1.0, 0.5], 2) == (2, 3)
