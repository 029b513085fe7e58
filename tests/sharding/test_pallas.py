"""The TPU kernels inside each shard of a mesh, interpreted: as XLA computes it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from popjax import sharding
from popjax.config import ModelConfig
from popjax.generate import Options
from popjax.methods import Method, OnlinePruning, RescoreAll
from popjax.nn.transformer import init_params
from popjax.run import Request, run
from popjax.tiles import as_tiles
from tests.popjax.tiny_models import TILED, mixture


@pytest.mark.parametrize(
    ("method", "tiles"),
    [
        pytest.param(Method(), False, marks=pytest.mark.slow),
        (OnlinePruning(ratio=0.5), False),
        (RescoreAll(0.6), True),
    ],
    ids=["dense", "online-pruning", "rescore-all-tiles"],
)
def test_each_shard_runs_the_kernels_on_its_own_channels(method: Method, tiles: bool) -> None:
    assert_shards_run_the_kernels(TILED, method, tiles)


def test_each_shard_fetches_rows_of_its_own_experts() -> None:
    """Half of a token's experts are elsewhere, on average: their rows are not read."""
    layer = dataclasses.replace(mixture(TILED.layers[0], 40), mlp_dim=0)
    config = dataclasses.replace(TILED, layers=(layer,))
    assert_shards_run_the_kernels(config, OnlinePruning(0.5, gamma=0.3), True)


def assert_shards_run_the_kernels(config: ModelConfig, method: Method, tiles: bool) -> None:
    params = init_params(config, jax.random.key(0), jnp.float32)
    mesh = jax.make_mesh((2,), ("model",), devices=jax.devices()[:2])
    held = as_tiles(params) if tiles else params
    placed = sharding.placed_params(held, config, mesh)
    request = Request([[3, 14, 15, 92, 65, 35], [8, 9, 7]], 6, method=method)
    found = {
        name: run(
            placed, config, dataclasses.replace(request, options=Options(implementation=name))
        )
        for name in ("xla", "pallas_interpret")
    }
    assert found["pallas_interpret"].implementation == "pallas_interpret"
    assert (found["xla"].tokens == found["pallas_interpret"].tokens).all()


def test_rows_are_not_left_unpacked_on_a_mesh() -> None:
    config = TILED
    params = as_tiles(init_params(config, jax.random.key(0), jnp.float32))
    mesh = jax.make_mesh((2,), ("model",), devices=jax.devices()[:2])
    placed = sharding.placed_params(params, config, mesh)
    how = Options(implementation="pallas_interpret", pack=False)
    with pytest.raises(ValueError, match="needs one device, and the weights lie on 2: leave pack"):
        run(placed, config, Request([[1]], 2, method=OnlinePruning(ratio=0.5), options=how))
