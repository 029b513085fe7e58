"""Running on a mesh: what of a model each device holds, and how arrays come and go.

One `jax.shard_map` around the unchanged model code: every device runs a smaller model, its share of
the heads, the FFN channels or experts and the vocabulary, and the residual stream is the same on
all of them. Channels are ranked, chosen and packed inside each shard with equal counts, so pruning
adds no collective. Leaves out which collectives the model needs: those are in `nn/`; and what
partitions look like on either side: that is `renumbering.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from checkpoints import nested
from popjax import axes
from popjax.config import ModelConfig
from popjax.sparsity import Params

DATA, MODEL, GROUP = "data", "model", "group"
AXES = (DATA, MODEL, GROUP)
_NAMES = {
    "N": "query heads",
    "K": "key/value heads",
    "F": "FFN channels",
    "E": "experts",
    "V": "vocabulary",
}


def tensor_axes(mesh: Mesh | None) -> tuple[str, ...] | None:
    """Mesh axes that split N, F and V; None without a mesh."""
    return None if mesh is None else tuple(name for name in (MODEL, GROUP) if name in mesh.shape)


def shard_count(mesh: Mesh, letter: str = "F") -> int:
    """Into how many shards the mesh splits a letter."""
    names = axes.spec(letter, mesh_axes=mesh.axis_names)[0] or ()
    return math.prod(mesh.shape[name] for name in ((names,) if isinstance(names, str) else names))


def automatic(mesh: Mesh) -> Mesh:
    """The same devices under axes of type Auto, whatever types they came with.

    Programs here say where arrays lie at their borders and leave the inside to XLA, which axes of
    other types forbid. Raises ValueError for anything but a mesh.
    """
    if not isinstance(mesh, Mesh):
        raise ValueError(
            f"mesh {mesh!r} is a {type(mesh).__name__}: give a jax.sharding.Mesh, such as "
            "jax.make_mesh((8,), ('model',))"
        )
    kinds = (jax.sharding.AxisType.Auto,) * len(mesh.axis_names)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)


def validate(config: ModelConfig, mesh: Mesh) -> None:
    """Raise ValueError unless this mesh can run this model."""
    mesh = automatic(mesh)
    unknown = [str(name) for name in mesh.axis_names if name not in AXES]
    if unknown or MODEL not in mesh.shape:
        wrong = f"has an axis {unknown[0]!r}" if unknown else f"has no axis {MODEL!r}"
        raise ValueError(
            f"mesh {dict(mesh.shape)} {wrong}: use 'model' (splits N, K, F and V) and, for more "
            "devices than key/value heads, 'group' (splits N, F and V further)"
        )
    if mesh.shape.get(DATA, 1) > 1:
        raise ValueError(
            f"mesh axis 'data' has size {mesh.shape[DATA]}, above 1: the rows of a batch B share "
            "one partition, so run a process a share of the prompts, or use 'model' and 'group'"
        )
    for i, layer in enumerate(config.layers):
        sizes = axes.sizes(config, layer)
        for letter in (name for name in _NAMES if name in sizes):
            _check_divides(letter, sizes[letter], mesh, f" of layer {i}" if letter != "V" else "")
        if mesh.shape.get(GROUP, 1) > 1 and layer.num_kv_heads != mesh.shape[MODEL]:
            raise ValueError(
                f"mesh {dict(mesh.shape)} leaves {layer.num_kv_heads // mesh.shape[MODEL]} of the "
                f"K = {layer.num_kv_heads} key/value heads of layer {i} to a group of "
                f"{mesh.shape[GROUP]} devices, which can share only one: make 'model' "
                f"{layer.num_kv_heads}, or 'group' 1"
            )


def _check_divides(letter: str, size: int, mesh: Mesh, where: str) -> None:
    shards = shard_count(mesh, letter)
    if size % shards:
        names = (MODEL,) if letter == "K" else tensor_axes(mesh) or ()
        product = " x ".join(f"{name} {mesh.shape[name]}" for name in names)
        raise ValueError(
            f"{letter} = {size} ({_NAMES[letter]}{where}) is not a multiple of {shards}, the "
            f"shards that mesh axes {product} make: use a divisor of {size}, the greatest that "
            f"fits is {math.gcd(size, shards)}"
        )


def local_config(config: ModelConfig, mesh: Mesh | None) -> ModelConfig:
    """The config of the model that one device runs: its share of N, K, F, E and V."""
    if mesh is None:
        return config
    tensor, heads = shard_count(mesh), shard_count(mesh, "K")
    layers = tuple(
        dataclasses.replace(
            layer,
            num_heads=layer.num_heads // tensor,
            num_kv_heads=layer.num_kv_heads // heads,
            mlp_dim=layer.mlp_dim // tensor,
            moe=layer.moe and dataclasses.replace(layer.moe, held=layer.moe.num_experts // tensor),
        )
        for layer in config.layers
    )
    return dataclasses.replace(config, vocab_size=config.vocab_size // tensor, layers=layers)


def mesh_over(config: ModelConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all devices (or those given) for this model: 'group' where K cannot be split more.

    Raises ValueError where their number does not divide the model.
    """
    devices = jax.devices() if devices is None else list(devices)
    heads = math.gcd(*(layer.num_kv_heads for layer in config.layers))
    model = heads if len(devices) % heads == 0 else len(devices)
    kinds = (jax.sharding.AxisType.Auto,) * 2
    sizes = (model, len(devices) // model)
    if sizes[1] > 1:
        mesh = jax.make_mesh(sizes, (MODEL, GROUP), kinds, devices=devices)
    else:
        mesh = jax.make_mesh(sizes[:1], (MODEL,), kinds[:1], devices=devices)
    validate(config, mesh)
    return mesh


def named(letters: str, mesh: Mesh) -> NamedSharding:
    """Where an array whose leading axes are `letters` lies on the mesh; "" is everywhere."""
    return NamedSharding(mesh, axes.spec(letters, mesh_axes=mesh.axis_names))


def param_letters(params: Params) -> Any:
    """Axis letters of every parameter, packed ones too, as a tree of strings."""
    return jax.tree_util.tree_map_with_path(lambda path, _: axes.letters(joined(path)), params)


def joined(path: tuple[Any, ...]) -> str:
    return "/".join(entry.key for entry in path)


def over_mesh(*ins: Any, outs: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function of arrays, with static keywords, one that takes whole arrays on a `mesh`.

    Given the keyword mesh=, every device calls the function with its shards, and that keyword tells
    it to expect them; without it nothing changes. `ins`, `outs`: axis letters of each argument and
    of the result, as trees (or prefixes of trees) of strings, or functions of the argument that
    give one. Where letters split nothing all devices must return the same.
    """

    def decorate(fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fn)
        def mapped(*args: Any, **static: Any) -> Any:
            mesh = static.get("mesh")
            if mesh is None:
                return fn(*args, **static)
            pairs = zip(ins, args, strict=True)
            letters = tuple(held(arg) if callable(held) else held for held, arg in pairs)
            specs = jax.tree.map(lambda held: named(held, mesh).spec, (letters, outs))
            body = functools.partial(fn, **static)
            # check_vma would refuse gathered logits, which are equal everywhere but not provably.
            options = {"in_specs": specs[0], "out_specs": specs[1], "check_vma": False}
            return jax.shard_map(body, mesh=mesh, **options)(*args)

        return mapped

    return decorate


def on_all(condition: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Inside `over_mesh`: whether a condition (bool array) holds on every device."""
    if mesh is None:
        return condition
    return jax.lax.pmin(condition.astype(jnp.int32), tensor_axes(mesh)) > 0


def each(fn: Callable[[Any, NamedSharding], Any], tree: Any, letters: Any, mesh: Mesh) -> Any:
    """`fn` of each leaf of the tree and its sharding; `letters` as in `over_mesh`."""

    def branch(held: str, subtree: Any) -> Any:
        return jax.tree.map(lambda leaf: fn(leaf, named(held, mesh)), subtree)

    return jax.tree.map(branch, letters, tree)


def abstract(tree: Any, letters: Any, mesh: Mesh) -> Any:
    """Shapes (anything with shape and dtype) with their shardings, to compile for without data."""

    def one(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return each(one, tree, letters, mesh)


def abstract_params(config: ModelConfig, mesh: Mesh, dtype: Any) -> Params:
    """The parameters of a config as shapes on a mesh. Raises ValueError as `validate`."""
    validate(config, mesh)
    shapes = axes.parameter_shapes(config)
    return nested(
        {
            path: jax.ShapeDtypeStruct(shape, dtype, sharding=named(axes.letters(path), mesh))
            for path, shape in shapes.items()
        }
    )


def placed(tree: Any, letters: Any, mesh: Mesh | None) -> Any:
    """Arrays of this host, the same on every host, put on the mesh; themselves without one."""
    return tree if mesh is None else each(_put, tree, letters, mesh)


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    # Asks only for the parts that this process's devices hold.
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def placer(config: ModelConfig, mesh: Mesh) -> Callable[[str, np.ndarray], jax.Array]:
    """Puts the parameter at a path on the mesh, for `checkpoints.convert`; raises as `validate`."""
    validate(config, mesh)
    auto = automatic(mesh)
    return lambda path, array: placed(array, axes.letters(path), auto)


def placed_params(params: Params, config: ModelConfig, mesh: Mesh) -> Params:
    """Parameters put on a mesh as a mesh run wants them. Raises ValueError as `validate`."""
    validate(config, mesh)
    return placed(params, param_letters(params), automatic(mesh))


def mesh_of(params: Params, config: ModelConfig) -> Mesh | None:
    """The mesh that the parameters lie on, None for one device.

    Raises ValueError for a mesh that cannot run the model, or arrays placed in any other way.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if all(len(leaf.sharding.device_set) == 1 for _, leaf in leaves):
        _check_automatic(leaves)
        return None
    found = (getattr(leaf.sharding, "mesh", None) for _, leaf in leaves)
    mesh = next((held for held in found if isinstance(held, Mesh)), None)
    if mesh is not None:
        validate(config, mesh)
    for path, leaf in leaves:
        letters = axes.letters(joined(path))
        if mesh is None or not leaf.sharding.is_equivalent_to(named(letters, mesh), leaf.ndim):
            raise ValueError(
                f"parameter {joined(path)!r} ({letters}) lies on several devices as "
                f"{leaf.sharding}: load with popjax.load(mesh=...) or place the parameters with "
                "popjax.sharding.placed_params"
            )
    return mesh


def _check_automatic(leaves: Sequence[tuple[tuple[Any, ...], jax.Array]]) -> None:
    """Raise ValueError for arrays of one device under axes whose type forbids what programs do."""
    for path, leaf in leaves:
        mesh = getattr(leaf.sharding, "mesh", None)
        if isinstance(mesh, Mesh) and mesh != automatic(mesh):
            raise ValueError(
                f"parameter {joined(path)!r} lies on a mesh with axes of types "
                f"{', '.join(kind.name for kind in mesh.axis_types)}, not Auto: place the "
                "parameters with popjax.sharding.placed_params"
            )


def fetched(tree: Any) -> Any:
    """NumPy arrays of global arrays, also of those that this process holds only a part of."""
    return jax.tree.map(_fetched, tree)


def _fetched(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        if not leaf.is_fully_replicated:
            leaf = _everywhere(cast(NamedSharding, leaf.sharding).mesh)(leaf)
    return np.asarray(leaf)


@functools.cache
def _everywhere(mesh: Any) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))
