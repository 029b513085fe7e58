"""Our own checkpoints: (config, params) through orbax, restored onto any mesh.

A folder has two orbax items, `config` (JSON) and `params` (arrays), written together: orbax makes
the folder appear whole or not at all, on one host or many. Leaves out optimiser state and steps.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from checkpoints.atomic import refuse_existing
from checkpoints.buffers import settle
from checkpoints.errors import CheckpointError
from checkpoints.json_files import read_json_object

_CONFIG = "config/metadata"

Shardings = Callable[[str], jax.sharding.Sharding] | Mapping[str, Any]


def _checkpointer() -> Any:
    # Imported on use: orbax takes as long to import as jax itself.
    import orbax.checkpoint as ocp

    return ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(
            params=ocp.StandardCheckpointHandler(), config=ocp.JsonCheckpointHandler()
        )
    )


def save(
    path: str | os.PathLike[str], config: Mapping[str, Any], params: Mapping[str, Any]
) -> Path:
    """Writes a JSON-able config and a nested dict of arrays; the folder.

    `CheckpointError` if the folder exists and is not empty.
    """
    import orbax.checkpoint as ocp

    folder = Path(path).absolute()
    refuse_existing(folder)
    items = ocp.args.Composite(
        params=ocp.args.StandardSave(dict(params)), config=ocp.args.JsonSave(dict(config))
    )
    with _checkpointer() as checkpointer:
        # The only folder that can be in the way is empty.
        checkpointer.save(folder, args=items, force=folder.exists())
    return folder


def restore(
    path: str | os.PathLike[str], *, shardings: Shardings | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config, params) as saved, whatever devices they were saved from.

    `shardings` is a function of the flat path ("layer_0/attn/q") or a tree like params; without
    it every array goes to the first device. `CheckpointError` if the folder is not one of ours or
    damaged, `ValueError` if a sharding is absent or does not divide its array.
    """
    import orbax.checkpoint as ocp

    folder = Path(path).absolute()
    _check_layout(folder)
    config = read_json_object(folder / _CONFIG)
    with _checkpointer() as checkpointer:
        with _damage_named(folder):
            recorded = checkpointer.metadata(folder).item_metadata.params.tree
        target = _abstract(recorded, shardings)
        with _damage_named(folder):
            params = ocp.args.StandardRestore(target)
            restored = checkpointer.restore(folder, args=ocp.args.Composite(params=params)).params
    if shardings is not None or jax.default_backend() != "cpu":
        return config, restored
    leaves, structure = jax.tree.flatten(restored)
    del restored  # so that each array goes as soon as it is copied
    settle(leaves)
    return config, jax.tree.unflatten(structure, leaves)


@contextmanager
def _damage_named(folder: Path) -> Iterator[None]:
    # orbax and tensorstore report unreadable files as any of these.
    try:
        yield
    except (ValueError, OSError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder} is damaged: {error}") from error


def _check_layout(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist: pass a folder written by store.save")
    for needed in (_CONFIG, "params/_METADATA"):
        if not (folder / needed).is_file():
            raise CheckpointError(
                f"{folder} is not a checkpoint of ours: it has no {needed!r}; pass a folder "
                "written by store.save"
            )


def _abstract(recorded: Mapping[str, Any], shardings: Shardings | None) -> dict[str, Any]:
    """The recorded shapes and dtypes as `ShapeDtypeStruct`s with the shardings asked for."""
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def leaf(path: tuple[Any, ...], entry: Any) -> jax.ShapeDtypeStruct:
        keys = [key.key for key in path]
        shape = tuple(entry.shape)
        sharding = default if shardings is None else _sharding(shardings, keys)
        try:
            sharding.shard_shape(shape)
        except ValueError as error:
            raise ValueError(f"cannot shard {'/'.join(keys)} of shape {shape}: {error}") from error
        return jax.ShapeDtypeStruct(shape, entry.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(leaf, dict(recorded))


def _sharding(shardings: Shardings, keys: list[str]) -> jax.sharding.Sharding:
    if callable(shardings):
        return shardings("/".join(keys))
    node: Any = shardings
    for key in keys:
        if not isinstance(node, Mapping) or key not in node:
            raise ValueError(f"shardings has no entry for {'/'.join(keys)}")
        node = node[key]
    return node
