"""What only some families compute, against NumPy: norms, caps, partial rotation, rotary factors."""

import jax.numpy as jnp
import numpy as np
import pytest

from popjax.config import RopeConfig
from popjax.nn import ops

EPS = float(np.finfo(np.float32).eps)
RNG = np.random.default_rng(0)


def close(found: object, wanted: np.ndarray, terms: int) -> None:
    atol = 4 * EPS * np.sqrt(terms) * max(1.0, float(np.abs(wanted).max()))
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=0, atol=atol)


def test_layer_norm() -> None:
    x, scale, bias = (RNG.standard_normal(shape) for shape in ((2, 3, 40), (40,), (40,)))
    shifted, *weights = (jnp.asarray(a, jnp.float32) for a in (x + 5, scale, bias))
    out = ops.layer_norm(shifted, weights[0], weights[1], 1e-5)
    centred = x - x.mean(-1, keepdims=True)
    close(out, centred / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale + bias, 40 * 25)


def test_a_scale_of_one_plus_w_is_added_in_float32() -> None:
    x, w = jnp.ones((1, 8), jnp.bfloat16), jnp.full((8,), 2.0**-9, jnp.bfloat16)
    # 1 + 2^-9 is 1 in bfloat16; times 3 it is not lost before the last rounding.
    three = ops.rms_norm(x, w + 2, 0.0, offset=True)
    np.testing.assert_array_equal(np.asarray(three, np.float32), 3.0)
    y, v = RNG.standard_normal((2, 16)), RNG.standard_normal(16)
    out = ops.rms_norm(jnp.asarray(y, jnp.float32), jnp.asarray(v, jnp.float32), 1e-6, True)
    close(out, y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * (1 + v), 16)


def test_a_norm_over_all_heads() -> None:
    x, scale = RNG.standard_normal((2, 3, 4, 8)), RNG.standard_normal((4, 8))
    out = ops.rms_norm(jnp.asarray(x, jnp.float32), jnp.asarray(scale, jnp.float32), 1e-6)
    close(out, x / np.sqrt((x**2).mean((-2, -1), keepdims=True) + 1e-6) * scale, 32)


def test_a_share_of_a_head_turns_and_the_rest_stays() -> None:
    x = jnp.asarray(RNG.standard_normal((1, 5, 2, 16)), jnp.float32)
    positions = jnp.arange(5, dtype=jnp.int32)[None, :]
    part = ops.rotate(x, ops.rope_table(positions, RopeConfig(share=0.25), 16))
    np.testing.assert_array_equal(part[..., 4:], x[..., 4:])
    whole = ops.rotate(x[..., :4], ops.rope_table(positions, RopeConfig(), 4))
    np.testing.assert_array_equal(part[..., :4], whole)


def test_frequencies_divided_each_by_its_factor() -> None:
    rope = RopeConfig(kind="factors", factors=(1.0, 2.0, 4.0, 8.0), magnitude=1.5)
    plain = ops.rope_frequencies(RopeConfig(), 8)
    np.testing.assert_allclose(ops.rope_frequencies(rope, 8), plain / [1, 2, 4, 8], rtol=EPS)
    cos, sin = ops.rope_table(jnp.zeros((1, 1), jnp.int32), rope, 8)
    assert (cos == 1.5).all() and (sin == 0).all()


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_scores_of_attention_are_capped(softcap: float) -> None:
    q, k, v = (RNG.standard_normal((1, 6, 2, 8)) for _ in range(3))
    mask = np.tril(np.ones((1, 6, 6), bool))
    queries, *entries = (jnp.asarray(a, jnp.float32) for a in (q, k, v))
    keys, values = (a.swapaxes(1, 2) for a in entries)
    out = ops.attention(queries, keys, values, jnp.asarray(mask), softcap)
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(8)
    powers = np.exp(softcap * np.tanh(scores / softcap)) * mask[:, None]
    weights = powers / powers.sum(-1, keepdims=True)
    close(out, np.einsum("bnts,bsnh->btnh", weights, v), 64)
