"""The cache: what is written where, which slots count, and how many bytes it holds."""

import jax.numpy as jnp
import numpy as np

from popjax import cache as kv
from tests.popjax.tiny_models import CONFIGS

CONFIG = CONFIGS["llama"]


def numbered(T: int, offset: float) -> jnp.ndarray:
    """[B=2, T, K=2, H=8] with every entry different."""
    return jnp.arange(2 * T * 16, dtype=jnp.float32).reshape(2, T, 2, 8) + offset


def test_an_empty_cache_has_no_position() -> None:
    cache = kv.empty(CONFIG, 3, 10, jnp.dtype("bfloat16"))
    assert len(cache.layers) == 2
    assert cache.layers[1].k.shape == (3, 2, 10, 8)
    assert cache.layers[1].v.dtype == jnp.bfloat16
    assert (np.asarray(cache.positions) == -1).all()
    assert int(cache.length) == 0


def test_new_entries_fill_the_next_slots_and_nothing_else() -> None:
    cache = kv.empty(CONFIG, 2, 6, jnp.dtype("float32"))
    k, v = numbered(3, 1.0), numbered(3, 1000.0)
    layer = kv.write_layer(cache.layers[0], k, v, jnp.int32(2))
    for held, new in ((layer.k, k), (layer.v, v)):
        wanted = np.zeros((2, 2, 6, 8), np.float32)
        wanted[:, :, 2:5] = np.asarray(new).swapaxes(1, 2)
        assert (np.asarray(held) == wanted).all()


def test_positions_are_written_after_the_slots_in_use() -> None:
    cache = kv.empty(CONFIG, 2, 5, jnp.dtype("float32")).replace(length=jnp.int32(2))
    positions = kv.write_positions(cache, jnp.array([[0, 1], [-1, 0]], jnp.int32))
    assert positions.tolist() == [[-1, -1, 0, 1, -1], [-1, -1, -1, 0, -1]]


def test_bytes_held_counts_keys_values_and_positions() -> None:
    cache = kv.empty(CONFIG, 3, 10, jnp.dtype("float32"))
    entries = 2 * 2 * (3 * 2 * 10 * 8)  # layers, keys and values
    assert kv.bytes_held(cache) == 4 * entries + 4 * 3 * 10 + 4
