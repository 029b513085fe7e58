"""Sets of channels become packed weights, beside everything else unchanged."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from popjax.packing import down_norms, pack
from popjax.sparsity import ChannelPartition
from tests.popjax.tiny_models import CONFIGS, random_params

CONFIG = CONFIGS["llama"]


def partition(retained: Any, candidate: Any, k_selected: int = 0) -> ChannelPartition:
    return ChannelPartition(
        jnp.asarray(retained, jnp.int32), jnp.asarray(candidate, jnp.int32), k_selected=k_selected
    )


def test_packing_copies_chosen_rows_and_shares_the_rest() -> None:
    params = random_params(CONFIG)
    parts = (partition([40, 2], [7, 0, 5], 1), partition(range(20), range(20, 40), 9))
    packed, config, placed = pack(params, CONFIG, parts)
    assert [layer.mlp_dim for layer in config.layers] == [5, 40]
    rows = [40, 2, 7, 0, 5]
    for name in ("gate", "up", "down"):
        original = np.asarray(params["layer_0"]["mlp"][name])
        assert (np.asarray(packed["layer_0"]["mlp"][name]) == original[rows]).all()
    assert packed["layer_0"]["attn"] is params["layer_0"]["attn"]
    assert packed["embed"] is params["embed"]
    # The second layer evaluates every channel, so its weights serve as they are.
    assert packed["layer_1"]["mlp"] is params["layer_1"]["mlp"]
    assert [part.packed for part in placed] == [True, False]
    for part, i in zip(placed, range(2), strict=True):
        down = np.asarray(params[f"layer_{i}"]["mlp"]["down"], np.float64)
        wanted = np.linalg.norm(down[np.asarray(part.candidate)], axis=1)
        np.testing.assert_allclose(part.candidate_norm, wanted, rtol=1e-6)


def test_packing_everything_copies_nothing() -> None:
    params = random_params(CONFIG)
    parts = tuple(partition(range(width), []) for width in (48, 40))
    packed, config, placed = pack(params, CONFIG, parts)
    assert config == CONFIG
    assert placed == parts
    for i in range(2):
        assert packed[f"layer_{i}"]["mlp"] is params[f"layer_{i}"]["mlp"]


def test_norms_of_rows_in_float32() -> None:
    down = jnp.full((3, 4), 300.0, jnp.float16)  # its square overflows float16
    norms = down_norms(down)
    assert norms.dtype == jnp.float32
    assert norms.tolist() == [600.0] * 3
