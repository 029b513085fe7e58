"""The mathematics of the decoder against drawn masks and plain NumPy in float64."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from popjax.config import RopeConfig
from popjax.nn import ops

EPS = float(np.finfo(np.float32).eps)


def drawn(picture: str) -> np.ndarray:
    rows = [line.split() for line in picture.strip().splitlines()]
    return np.array([[mark == "1" for mark in row] for row in rows])


def mask(queries: list[int], keys: list[int], window: int | None = None) -> np.ndarray:
    return np.asarray(ops.attention_mask(jnp.array([queries]), jnp.array([keys]), window)[0])


def test_causal_mask() -> None:
    picture = """
        1 . . . . .
        1 1 . . . .
        1 1 1 . . .
        1 1 1 1 . .
        1 1 1 1 1 .
        1 1 1 1 1 1
    """
    positions = [0, 1, 2, 3, 4, 5]
    assert (mask(positions, positions) == drawn(picture)).all()


def test_sliding_window_mask() -> None:
    picture = """
        1 . . . . .
        1 1 . . . .
        1 1 1 . . .
        . 1 1 1 . .
        . . 1 1 1 .
        . . . 1 1 1
    """
    positions = [0, 1, 2, 3, 4, 5]
    assert (mask(positions, positions, window=3) == drawn(picture)).all()


def test_left_padding_is_never_seen() -> None:
    picture = """
        . . . . . .
        . . . . . .
        . . 1 . . .
        . . 1 1 . .
        . . 1 1 1 .
        . . . 1 1 1
    """
    positions = [-1, -1, 0, 1, 2, 3]
    assert (mask(positions, positions, window=3) == drawn(picture)).all()


def test_decode_sees_the_cache_but_no_empty_slot() -> None:
    picture = "1 1 1 1 . ."
    keys = [0, 1, 2, 3, -1, -1]
    assert (mask([3], keys) == drawn(picture)).all()
    assert (mask([3], keys, window=2) == drawn(". . 1 1 . .")).all()


def attention_oracle(q: np.ndarray, k: np.ndarray, v: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """One head and one query at a time, in float64."""
    B, T, N, H = q.shape
    group = N // k.shape[1]
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(B, T, N):
        keys, values = k[b, n // group][seen[b, t]], v[b, n // group][seen[b, t]]
        scores = keys.astype(np.float64) @ q[b, t, n] / math.sqrt(H)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ values
    return out


def attention_inputs(T: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, T, 6, 8)).astype(np.float32)
    k, v = rng.standard_normal((2, 2, 2, T, 8)).astype(np.float32)
    positions = np.tile(np.arange(T), (2, 1))
    positions[1] = np.maximum(positions[1] - 3, -1)  # the second row has three pads
    return q, k, v, positions


@pytest.mark.parametrize("window", [None, 3])
def test_attention_of_grouped_queries(window: int | None) -> None:
    q, k, v, positions = attention_inputs(7)
    seen = np.asarray(ops.attention_mask(jnp.asarray(positions), jnp.asarray(positions), window))
    out = np.asarray(ops.attention(*map(jnp.asarray, (q, k, v, seen))))
    real = positions >= 0
    wanted = attention_oracle(q[:, 3:], k, v, seen[:, 3:])
    # Sums of H = 8 and of 7 keys, chained.
    tolerance = 2 * math.sqrt(8) * EPS * 4
    np.testing.assert_allclose(out[:, 3:], wanted, atol=tolerance)
    assert np.isfinite(out[~real]).all()


@pytest.mark.parametrize("window", [None, 5])
def test_long_prompts_attend_block_by_block(
    monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    q, k, v, positions = map(jnp.asarray, attention_inputs(16))
    whole = ops.attention(q, k, v, ops.attention_mask(positions, positions, window))
    monkeypatch.setattr(ops, "QUERY_BLOCK", 4)
    blocks = ops.blocked_attention(q, k, v, positions, positions, window)
    np.testing.assert_allclose(np.asarray(blocks), np.asarray(whole), atol=math.sqrt(16) * EPS * 4)


def test_rms_norm() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 32)).astype(np.float32)
    scale = rng.standard_normal(32).astype(np.float32)
    wanted = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5) * scale
    out = ops.rms_norm(jnp.asarray(x), jnp.asarray(scale), 1e-5)
    np.testing.assert_allclose(np.asarray(out), wanted, atol=math.sqrt(32) * EPS * 8)


def test_rms_norm_is_in_float32_whatever_comes_in() -> None:
    x = jnp.full((1, 4), 300.0, jnp.float16)  # its square overflows float16
    out = ops.rms_norm(x, jnp.ones(4, jnp.float16), 1e-6)
    assert out.dtype == jnp.float16
    assert np.asarray(out, np.float32).tolist() == [[1.0] * 4]


PLAIN = RopeConfig()


def rotated(x: np.ndarray, position: int, rope: RopeConfig = PLAIN) -> np.ndarray:
    table = ops.rope_table(jnp.array([[position]]), rope, x.size)
    return np.asarray(ops.rotate(jnp.asarray(x)[None, None, None, :], table))[0, 0, 0]


def test_rotation_turns_pairs_half_a_head_apart() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(8).astype(np.float32)
    turned = rotated(x, 3)
    for i in range(4):
        pair = complex(x[i], x[i + 4]) * np.exp(3j * 10_000.0 ** (-i / 4))
        assert (turned[i], turned[i + 4]) == pytest.approx((pair.real, pair.imag), abs=8 * EPS)
    assert (rotated(x, 0) == x).all()


def test_products_of_rotated_vectors_depend_on_distance_only() -> None:
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 16)).astype(np.float32)
    near = rotated(q, 9) @ rotated(k, 4)
    far = rotated(q, 25) @ rotated(k, 20)
    # The angle itself is rounded: 25 radians carry an error of 25 eps.
    assert near == pytest.approx(far, abs=16 * 25 * EPS)


def test_linear_scaling_stretches_positions() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(8).astype(np.float32)
    linear = RopeConfig(kind="linear", factor=4.0)
    np.testing.assert_allclose(rotated(x, 12, linear), rotated(x, 3), atol=16 * EPS)


def test_llama3_scaling_by_wavelength() -> None:
    rope = RopeConfig(500_000.0, "llama3", 8.0, 1.0, 4.0, 8192)
    plain = ops.rope_frequencies(RopeConfig(500_000.0), 128).astype(np.float64)
    scaled = ops.rope_frequencies(rope, 128)
    kinds = set()
    for old, new in zip(plain, scaled, strict=True):
        wavelength = 2 * math.pi / old
        if wavelength < 8192 / 4:
            kind, wanted = "kept", old
        elif wavelength > 8192 / 1:
            kind, wanted = "divided", old / 8
        else:
            share = (8192 / wavelength - 1) / (4 - 1)
            kind, wanted = "blended", share * old + (1 - share) * old / 8
        kinds.add(kind)
        assert new == pytest.approx(wanted, rel=4 * EPS)
    assert kinds == {"kept", "divided", "blended"}


def test_logits_are_float32() -> None:
    x, table = jnp.ones((2, 3, 4), jnp.bfloat16), jnp.ones((5, 4), jnp.bfloat16)
    out = ops.logits(x, table)
    assert (out.dtype, out.shape) == (jnp.float32, (2, 3, 5))
    assert (np.asarray(out) == 4.0).all()
