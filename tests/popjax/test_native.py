"""Own checkpoints: config and parameters survive, on one device and sharded over a mesh."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import checkpoints
from popjax import axes
from popjax.config import LayerConfig, ModelConfig, RopeConfig
from popjax.native import restore_native, save_native
from popjax.nn.transformer import init_params
from popjax.run import Request, run

CONFIG = ModelConfig(
    family="llama",
    vocab_size=64,
    embed_dim=16,
    layers=(
        LayerConfig(4, 2, 8, 32, window=5, rope=RopeConfig(kind="llama3", factor=8.0)),
        LayerConfig(4, 2, 8, 48),
    ),
    max_positions=64,
)


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


def test_restored_config_and_parameters_are_the_saved_ones(tmp_path, params):
    save_native(tmp_path / "own", CONFIG, params)
    config, restored = restore_native(tmp_path / "own")
    assert config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, params, restored)
    request = Request([[1, 2, 3]], 6)
    np.testing.assert_array_equal(
        run(params, CONFIG, request).tokens, run(restored, config, request).tokens
    )


def test_restore_onto_a_mesh_shards_by_letters(tmp_path, params):
    save_native(tmp_path / "own", CONFIG, params)
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("model",))
    _, restored = restore_native(tmp_path / "own", mesh=mesh)
    up = restored["layer_1"]["mlp"]["up"]
    assert up.sharding.spec == axes.partition_spec("layer_1/mlp/up", mesh_axes=("model",))
    assert [shard.data.shape for shard in up.addressable_shards] == [(24, 16)] * 2
    norm = restored["layer_0"]["attn_norm"]["scale"]
    assert [shard.data.shape for shard in norm.addressable_shards] == [(16,)] * 2
    jax.tree.map(np.testing.assert_array_equal, params, restored)


def test_a_mesh_that_does_not_divide_is_refused_by_name(tmp_path, params):
    save_native(tmp_path / "own", CONFIG, params)
    mesh = Mesh(np.asarray(jax.devices()[:8]), ("model",))
    with pytest.raises(ValueError, match="attn/"):
        restore_native(tmp_path / "own", mesh=mesh)


def test_parameters_of_another_config_are_refused(tmp_path, params):
    other = CONFIG.with_mlp_dims((32, 40))
    save_native(tmp_path / "own", other, params)
    with pytest.raises(checkpoints.CheckpointError, match="layer_1/mlp"):
        restore_native(tmp_path / "own")
