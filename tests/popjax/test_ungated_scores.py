"""Scores of channels whose layer has no gate, pads left out, against NumPy in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from popjax.methods.method import LayerActs
from popjax.methods.scores import channel_scores
from tests.popjax.tiny_models import CONFIGS, random_params


@pytest.mark.parametrize("kind", ["down", "gate-up", "activation"])
def test_scores_without_a_gate(kind: str) -> None:
    params = random_params(CONFIGS["opt"])["layer_0"]["mlp"]
    given = np.random.default_rng(0).standard_normal((3, 7, 32)).astype(np.float32)
    valid = np.arange(7)[None, :] >= np.array([0, 3, 5])[:, None]
    given[~valid] = 5.0
    x = jnp.asarray(given)
    seen = LayerActs(x, x, jnp.asarray(valid), params, "relu")
    up, down, bias = (np.asarray(params[y], np.float64) for y in ("up", "down", "up_bias"))
    real = given.astype(np.float64)[valid]
    norms = np.linalg.norm(np.maximum(real @ up.T + bias, 0), axis=0)
    wanted = {
        "down": norms * np.linalg.norm(down, axis=1),
        "gate-up": np.sqrt(up**2 @ (real**2).sum(axis=0)),
        "activation": norms,
    }[kind]
    np.testing.assert_allclose(channel_scores(params, seen, kind), wanted, rtol=1e-5)
