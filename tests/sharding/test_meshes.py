"""Which meshes run a model, what each device then holds, and how channels are counted."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import popjax
from popjax import axes, renumbering, sharding
from popjax.abstract_run import Place, packed
from popjax.compare import compare_dense
from popjax.generate import Options
from popjax.methods import Frozen
from popjax.native import restore_native, save_native
from popjax.run import Request, run
from popjax.sparsity import ChannelPartition
from tests.popjax.tiny_models import PROMPTS, random_params, tiny
from tests.sharding.meshes import PRUNING, SHAPES, case, config_of, mesh_of_shape

CONFIG = config_of("llama")  # N 8, K 4, F 48 and 40, V 96


def with_layers(**sizes: int) -> Any:
    layers = tuple(dataclasses.replace(layer, **sizes) for layer in CONFIG.layers)
    return dataclasses.replace(CONFIG, layers=layers)


@pytest.mark.parametrize(
    ("shape", "config", "sentence"),
    [
        ({"model": 8}, CONFIG, "K = 4 (key/value heads of layer 0) is not a multiple of 8"),
        (
            {"model": 4},
            with_layers(mlp_dim=42),
            "F = 42 (FFN channels of layer 0) is not a multiple of 4, the shards that mesh axes "
            "model 4 make: use a divisor of 42, the greatest that fits is 2",
        ),
        ({"model": 2}, tiny("llama", 97), "V = 97 (vocabulary) is not a multiple of 2"),
        (
            {"model": 4, "group": 2},
            with_layers(num_heads=4),
            "N = 4 (query heads of layer 0) is not a multiple of 8, the shards that mesh axes "
            "model 4 x group 2 make",
        ),
        ({"tensor": 2}, CONFIG, "has an axis 'tensor'"),
        ({"data": 1}, CONFIG, "has no axis 'model'"),
        ({"data": 2, "model": 2}, CONFIG, "mesh axis 'data' has size 2, above 1"),
        (
            {"model": 2, "group": 2},
            CONFIG,
            "leaves 2 of the K = 4 key/value heads of layer 0 to a group of 2 devices",
        ),
    ],
)
def test_a_mesh_that_cannot_run_a_model_is_one_sentence(
    shape: dict[str, int], config: Any, sentence: str
) -> None:
    params = random_params(config)
    with pytest.raises(ValueError) as error:
        sharding.placed_params(params, config, mesh_of_shape(shape))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_data_axis_of_one_is_allowed() -> None:
    params = random_params(CONFIG)
    mesh = mesh_of_shape({"data": 1, "model": 2})
    request = Request([PROMPTS[0]], 4)
    spread = run(sharding.placed_params(params, CONFIG, mesh), CONFIG, request)
    np.testing.assert_array_equal(spread.tokens, run(params, CONFIG, request).tokens)


@pytest.mark.parametrize("name", SHAPES)
def test_each_device_holds_the_model_of_its_local_config(name: str) -> None:
    config, params, spread = case("qwen2", name)
    mesh = mesh_of_shape(SHAPES[name])
    local = sharding.local_config(config, mesh)
    for path, leaf in jax.tree_util.tree_leaves_with_path(spread):
        expected = axes.shape("/".join(key.key for key in path), local)
        assert {shard.data.shape for shard in leaf.addressable_shards} == {expected}
    jax.tree.map(np.testing.assert_array_equal, spread, params)
    abstract = sharding.abstract_params(config, mesh, jnp.float32)
    for wanted, leaf in zip(jax.tree.leaves(abstract), jax.tree.leaves(spread), strict=True):
        assert wanted.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)


def test_a_group_holds_the_heads_that_its_queries_attend() -> None:
    config, params, spread = case("llama", "model=2,group=2")
    mesh = mesh_of_shape(SHAPES["model=2,group=2"])
    keys, attn = np.asarray(params["layer_0"]["attn"]["k"]), spread["layer_0"]["attn"]
    held = {shard.device: np.asarray(shard.data) for shard in attn["k"].addressable_shards}
    queries = {shard.device: shard.index[0] for shard in attn["q"].addressable_shards}
    for model, group in np.ndindex(2, 2):
        device = mesh.devices[model, group]
        np.testing.assert_array_equal(held[device], keys[model : model + 1])
        # Of 8 query heads the first four attend to key head 0, the others to 1.
        assert queries[device] == slice(4 * model + 2 * group, 4 * model + 2 * group + 2, None)


@pytest.mark.parametrize(
    ("heads", "devices", "shape"),
    [(4, 2, {"model": 2}), (4, 4, {"model": 4}), (4, 8, {"model": 4, "group": 2})],
)
def test_a_mesh_over_all_devices_fits_the_model(
    heads: int, devices: int, shape: dict[str, int]
) -> None:
    mesh = sharding.mesh_over(with_layers(num_kv_heads=heads), jax.devices()[:devices])
    assert dict(mesh.shape) == shape


def test_what_is_no_mesh_is_refused() -> None:
    with pytest.raises(ValueError, match="mesh 'model=2' is a str: give a jax.sharding.Mesh"):
        sharding.validate(CONFIG, "model=2")  # type: ignore[arg-type]


def test_devices_that_do_not_divide_a_model_are_refused() -> None:
    with pytest.raises(ValueError, match="N = 8 .query heads of layer 0. is not a multiple of 3"):
        sharding.mesh_over(with_layers(num_kv_heads=1), jax.devices()[:3])


def test_parameters_placed_otherwise_are_refused_by_name() -> None:
    params = random_params(CONFIG)
    mesh = mesh_of_shape({"model": 2})
    everywhere = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    with pytest.raises(ValueError, match="parameter 'embed/table' .VD. lies on several devices"):
        run(everywhere, CONFIG, Request([[1, 2]], 2))


def test_kernels_of_one_cpu_are_refused_by_name() -> None:
    config, _, spread = case("llama", "model=2")
    request = Request([[1, 2]], 2, options=Options(implementation="native"))
    with pytest.raises(ValueError, match="'native'.*2 device"):
        run(spread, config, request)


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        (ChannelPartition([0, 1, 30], []), r"\[2, 1\] retained channels on the 2 shards of F"),
        (ChannelPartition([0, 30], [2, 3]), r"\[2, 0\] candidate channels on the 2 shards of F"),
        (ChannelPartition([0, 30], [2, 31], k_selected=1), "k_selected 1 of layer 0"),
    ],
)
def test_partitions_that_shards_cannot_share_are_refused(
    part: ChannelPartition, sentence: str
) -> None:
    config, _, spread = case("llama", "model=2")
    request = Request([[1, 2]], 2, method=PRUNING["online-pruning"], partition=(part, part))
    with pytest.raises(ValueError, match=sentence):
        run(spread, config, request)


def test_masks_that_shards_cannot_share_are_refused() -> None:
    config, _, spread = case("llama", "model=2")
    part = ChannelPartition([], [0, 1, 30, 31], k_selected=2)
    masks = (jnp.asarray([[[True, True, False, False]]]),) * 2
    request = Request([[1, 2]], 2, partition=(part, part), masks=masks)
    with pytest.raises(ValueError, match=r"masks of layer 0 turn on \[2, 0\] channels on the 2"):
        run(spread, config, request)


def test_channels_and_masks_are_counted_over_all_shards_and_back() -> None:
    mesh = mesh_of_shape({"model": 4})
    part = ChannelPartition(
        jnp.asarray([1, 13, 25, 37]), jnp.asarray([0, 2, 12, 23, 24, 26, 45, 47]), k_selected=4
    )
    config = with_layers(mlp_dim=48)
    partition = (part, part)
    local = renumbering.to_shards(partition, config, mesh)
    assert local is not None
    np.testing.assert_array_equal(local[0].retained, [1] * 4)
    np.testing.assert_array_equal(local[0].candidate, [0, 2, 0, 11, 0, 2, 9, 11])
    assert local[0].k_selected == 1
    back = renumbering.from_shards(local, config, mesh)
    assert back is not None
    for mine, given in zip(jax.tree.leaves(back), jax.tree.leaves(partition), strict=True):
        np.testing.assert_array_equal(mine, given)
    # On every shard its retained channel, then its two candidates; outside, all retained first.
    masks = (jnp.isin(jnp.arange(12), jnp.asarray([0, 1, 2, 3, 4, 7, 8, 11]))[None, None, :],) * 2
    by_shard = renumbering.masks_to_shards(masks, partition, config, mesh)
    assert by_shard is not None
    order = [0, 4, 5, 1, 6, 7, 2, 8, 9, 3, 10, 11]
    np.testing.assert_array_equal(by_shard[0][0, 0], np.asarray(masks[0])[0, 0, order])
    again = renumbering.masks_from_shards(by_shard, partition, config, mesh)
    assert again is not None
    np.testing.assert_array_equal(again[1], masks[1])


def test_a_loaded_model_runs_on_its_mesh(even_checkpoint: Path) -> None:
    mesh = mesh_of_shape({"model": 2})
    alone, spread = popjax.load(str(even_checkpoint)), popjax.load(str(even_checkpoint), mesh=mesh)
    assert spread.mesh == sharding.automatic(mesh) and alone.mesh is None
    up = spread.params["layer_0"]["mlp"]["up"]
    assert [shard.data.shape for shard in up.addressable_shards] == [(24, 32)] * 2
    texts = ["The quick brown fox", "Hello"]
    said = spread.generate(texts, max_new_tokens=6, return_logprobs=True)
    assert said.tokens == alone.generate(texts, max_new_tokens=6).tokens
    assert said.report.implementation == "xla"
    pruned = spread.generate(texts, method="online-pruning", ratio=0.5, max_new_tokens=6)
    assert pruned.report.totals().active == 48


def test_a_model_on_a_mesh_is_compared_and_saved_as_any_other(
    even_checkpoint: Path, tmp_path: Path
) -> None:
    spread = popjax.load(str(even_checkpoint), mesh=mesh_of_shape({"model": 2}))
    prompts = [[5, 6, 7, 8], [9, 10]]
    method = PRUNING["online-pruning"]
    said = spread.generate(prompts, method=method, max_new_tokens=6)
    found = compare_dense(spread, prompts, said, method=method, rounds=1, max_new_tokens=16)
    assert found.kl > 0 and len(found.first_difference) == 2
    spread.save(str(tmp_path / "saved"))
    again = popjax.load(str(tmp_path / "saved"))
    jax.tree.map(np.testing.assert_array_equal, again.params, spread.params)


def test_loading_onto_a_mesh_that_does_not_divide_is_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="V = 405 .vocabulary. is not a multiple of 2"):
        popjax.load(str(tiny_checkpoint), mesh=mesh_of_shape({"model": 2}))


def test_our_own_checkpoint_restored_onto_a_mesh_runs(tmp_path: Path) -> None:
    config, params, _ = case("llama", "model=2,group=2")
    save_native(tmp_path / "own", config, params)
    mesh = mesh_of_shape(SHAPES["model=2,group=2"])
    _, restored = restore_native(tmp_path / "own", mesh=mesh)
    request = Request([PROMPTS[0]], 4)
    np.testing.assert_array_equal(
        run(restored, config, request).tokens, run(params, config, request).tokens
    )


def test_shards_too_narrow_for_a_ratio_are_refused_in_a_forecast() -> None:
    """One of 48 channels stays, of 24 none: what a method announces is of the whole model."""
    place = Place.of(CONFIG, jax.devices()[:2])
    method = Frozen(0.98)
    assert [method.evaluated(layer.mlp_dim) for layer in CONFIG.layers] == [1, 1]
    scores = tuple(jax.ShapeDtypeStruct((y.mlp_dim,), jnp.float32) for y in CONFIG.layers)
    outputs: Any = SimpleNamespace(statistics=place.abstract(scores, "F"))
    params = place.params(CONFIG, jnp.float32)
    with pytest.raises(ValueError, match="leaves no FFN channel of layer 0, which has 48: lower"):
        packed(place, params, CONFIG, method, outputs)


@pytest.mark.parametrize("kind", ["Explicit", "Manual"])
@pytest.mark.parametrize("count", [1, 2])
def test_the_types_of_a_meshs_axes_do_not_matter(
    even_checkpoint: Path, tmp_path: Path, count: int, kind: str
) -> None:
    types = (getattr(jax.sharding.AxisType, kind),)
    mesh = jax.make_mesh((count,), ("model",), types, devices=jax.devices()[:count])
    loaded = popjax.load(str(even_checkpoint), mesh=mesh)
    save_native(tmp_path / "own", loaded.config, loaded.params)
    _, restored = restore_native(tmp_path / "own", mesh=mesh)
    placed = sharding.placed_params(sharding.fetched(loaded.params), loaded.config, mesh)
    request = Request([[5, 6, 7, 8]], 3)
    wanted = run(loaded.params, loaded.config, request).tokens
    for params in (restored, placed):
        assert (run(params, loaded.config, request).tokens == wanted).all()


def test_arrays_of_one_device_under_explicit_axes_are_refused() -> None:
    kinds = (jax.sharding.AxisType.Explicit,)
    mesh = jax.make_mesh((1,), ("model",), kinds, devices=jax.devices()[:1])
    there = jax.device_put(random_params(CONFIG), NamedSharding(mesh, PartitionSpec()))
    with pytest.raises(ValueError, match="of types Explicit, not Auto: .*placed_params"):
        run(there, CONFIG, Request([PROMPTS[0]], 2))


def test_a_mesh_of_one_device_is_no_mesh() -> None:
    params = random_params(CONFIG)
    one = sharding.placed_params(params, CONFIG, Mesh(np.asarray(jax.devices()[:1]), ("model",)))
    assert sharding.mesh_of(one, CONFIG) is None
    request = Request([PROMPTS[0]], 4)
    np.testing.assert_array_equal(
        run(one, CONFIG, request).tokens, run(params, CONFIG, request).tokens
    )
