"""popjax's own checkpoint: (config, params) through orbax, restored onto one device or a mesh.

For restarting quickly and for sharded restore. It is not a format to exchange models in, and holds
no tokenizer: `LanguageModel.save` writes a Hugging Face folder for that.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import jax
from jax.sharding import Mesh, NamedSharding

import checkpoints
from popjax import axes, sharding
from popjax.config import ModelConfig, from_json, to_json
from popjax.eviction.gates import without_gates
from popjax.scouts import check_saved
from popjax.sparsity import Params
from popjax.tiles import as_matrices


def save_native(path: str | os.PathLike[str], config: ModelConfig, params: Params) -> Path:
    """Write config and parameters into a new folder.

    Raises CheckpointError where it is not empty, ValueError for parameters with scouts.
    """
    check_saved(params)
    own = without_gates(as_matrices(params))
    return checkpoints.store.save(path, to_json(config), own)


def restore_native(
    path: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    rules: axes.Rules | None = None,
) -> tuple[ModelConfig, Params]:
    """Config and parameters from a folder that `save_native` wrote.

    With a mesh every parameter is sharded by its axis letters, each device reading its own part:
    under `rules` (letter -> mesh axis), or as `popjax.load(mesh=...)` places them. Raises
    CheckpointError for a damaged or foreign folder, ValueError where a mesh axis does not divide a
    parameter.
    """
    mesh = None if mesh is None else sharding.automatic(mesh)
    shardings = None if mesh is None else _shardings(mesh, rules)
    values, params = checkpoints.store.restore(path, shardings=shardings)
    config = from_json(values)
    if mesh is not None and rules is None:
        sharding.validate(config, mesh)
    found = {"/".join(keys): leaf.shape for keys, leaf in _leaves(params)}
    expected = axes.parameter_shapes(config)
    if found != expected:
        wrong = sorted(set(found.items()) ^ set(expected.items()))[0][0]
        raise checkpoints.CheckpointError(
            f"{path} does not fit its own config: parameter {wrong!r} differs; save it again"
        )
    return config, params


def _shardings(mesh: Mesh, rules: axes.Rules | None) -> Callable[[str], NamedSharding]:
    if rules is None:
        return lambda path: sharding.named(axes.letters(path), mesh)
    return lambda path: NamedSharding(mesh, axes.partition_spec(path, rules))


def _leaves(params: Params) -> list[tuple[tuple[str, ...], jax.Array]]:
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    return [(tuple(entry.key for entry in path), leaf) for path, leaf in flat]
