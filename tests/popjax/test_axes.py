"""One table of axis letters: every parameter has exactly one row, and published sizes come out."""

import dataclasses
import math
from typing import Any

import jax
import pytest
from jax.sharding import PartitionSpec

from popjax import axes
from popjax.families import model_config
from popjax.nn.transformer import init_params
from tests.popjax.published_models import LLAMA_31_8B, PARAMETER_COUNTS
from tests.popjax.tiny_models import CONFIGS

# Every optional parameter at once.
EVERYTHING = dataclasses.replace(CONFIGS["qwen3"], qkv_bias=True, o_bias=True)


def flat_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(key.key for key in path): leaf.shape for path, leaf in leaves}


@pytest.mark.parametrize("config", [*CONFIGS.values(), EVERYTHING], ids=[*CONFIGS, "everything"])
def test_the_model_declares_exactly_what_the_table_lists(config: Any) -> None:
    made = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    assert flat_shapes(made) == axes.parameter_shapes(config)


@pytest.mark.parametrize("name", PARAMETER_COUNTS)
def test_published_parameter_counts(name: str) -> None:
    raw, count = PARAMETER_COUNTS[name]
    assert axes.parameter_count(model_config(raw)) == count


def test_a_published_model_is_made_abstractly() -> None:
    config = model_config(LLAMA_31_8B)
    made = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(made)]
    assert sum(sizes) == PARAMETER_COUNTS["Llama-3.1-8B"][1]


def test_shapes_follow_each_layer_of_its_own() -> None:
    config = CONFIGS["llama"]
    assert axes.shape("layer_0/mlp/gate", config) == (48, 32)
    assert axes.shape("layer_1/mlp/gate", config) == (40, 32)
    assert axes.shape("layer_1/attn/k", config) == (2, 8, 32)


@pytest.mark.parametrize("path", ["layer_0/mlp/bias", "layer_x/mlp/up", "mlp/up", "", "embed"])
def test_a_path_without_a_row_is_an_error(path: str) -> None:
    with pytest.raises(ValueError, match="matches 0 rows"):
        axes.letters(path)


def test_a_path_with_two_rows_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(axes.PARAMETERS, "layer_{i}/mlp/{i}", "F")
    monkeypatch.setitem(axes.PARAMETERS, "layer_3/mlp/up", "FD")
    axes._patterns.cache_clear()
    try:
        with pytest.raises(ValueError, match="matches 2 rows"):
            axes.letters("layer_3/mlp/up")
    finally:
        axes._patterns.cache_clear()


@pytest.mark.parametrize(
    ("path", "spec"),
    [
        ("embed/table", PartitionSpec(("model", "group"), None)),
        ("layer_0/attn/q", PartitionSpec(("model", "group"), None, None)),
        ("layer_0/attn/k_bias", PartitionSpec("model", None)),
        ("layer_7/mlp/down", PartitionSpec(("model", "group"), None)),
        ("final_norm/scale", PartitionSpec(None)),
    ],
)
def test_partition_specs_under_tensor_parallelism(path: str, spec: PartitionSpec) -> None:
    assert axes.partition_spec(path) == spec
    # A mesh without groups, or without anything that splits a model.
    names = [axis if axis is None else "model" for axis in spec]
    assert axes.partition_spec(path, mesh_axes=("model",)) == PartitionSpec(*names)
    assert axes.partition_spec(path, mesh_axes=("data",)) == PartitionSpec(*[None] * len(spec))


def test_a_spec_that_uses_an_axis_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="one mesh axis twice"):
        axes.partition_spec("layer_0/mlp/up", {"F": "model", "D": "model"})
