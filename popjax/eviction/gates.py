"""Gates of Fast KVzip as parameters: made, put beside a model's weights, saved and loaded.

A gate is a subtree "kv_gate" of a layer's attention parameters, there only where it was added, so
models without gates know nothing of them. Files are safetensors; published gates are pickles, which
popjax does not open. Leaves out what gates compute (`fast_kvzip.py`) and their training.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import checkpoints
from checkpoints.safetensors_files import SafetensorsFolder, read_header
from popjax import axes
from popjax.artefact import Form, load_artefact, save_artefact
from popjax.config import ModelConfig
from popjax.leaves import check_layers, with_leaves, without_leaves
from popjax.sparsity import Params

FORM = Form("gates", "1", "python -m scripts.train_gates --text TEXT --out FILE")
GATE = "kv_gate"
# Name -> the name that the authors' modules give it.
NAMES = {
    "q": "q_proj.weight",
    "q_bias": "q_proj.bias",
    "k": "k_proj.weight",
    "q_norm": "q_norm.weight",
    "k_norm": "k_norm.weight",
    "sinks": "k_base",
    "bias": "b",
}
# One dict of arrays a layer, named as above, shaped by `popjax.axes`.
Gates = tuple[dict[str, jax.Array], ...]


def gate_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Shapes of one layer's gate."""
    return {name: axes.shape(f"layer_{layer}/attn/{GATE}/{name}", config) for name in NAMES}


def init_gates(config: ModelConfig, key: jax.Array) -> Gates:
    """Untrained gates, float32: projections uniform in +-1/sqrt(D), norms one, the rest zero."""
    keys = jax.random.split(key, config.num_layers * len(NAMES))
    bound = 1 / math.sqrt(config.embed_dim)
    gates = []
    for i in range(config.num_layers):
        gate = {}
        for j, (name, shape) in enumerate(gate_shapes(config, i).items()):
            if name in ("q", "q_bias", "k"):
                key = keys[i * len(NAMES) + j]
                gate[name] = jax.random.uniform(key, shape, minval=-bound, maxval=bound)
            else:
                gate[name] = jnp.full(shape, 1.0 if name.endswith("_norm") else 0.0)
        gates.append(gate)
    return tuple(gates)


def with_gates(params: Params, gates: Sequence[dict[str, Any]]) -> Params:
    """Parameters with a gate in each layer, for runs with `FastKVzip`; no weight is copied.

    Save a model without them: its file formats have no place for gates. Raises ValueError for
    another number of layers.
    """
    check_layers(params, "gates", gates)
    paths = {f"layer_{i}/attn/{GATE}/{k}": w for i, one in enumerate(gates) for k, w in one.items()}
    return with_leaves(params, paths)


def without_gates(params: Params) -> Params:
    """Inverse of `with_gates`; parameters that have none as they are."""
    return without_leaves(params, "attn", {GATE})


def digest(params: Params) -> str | None:
    """What tells the gates among the parameters from others; None where there are none."""
    found, layers = hashlib.sha256(), sorted(name for name in params if name.startswith("layer_"))
    held = [(name, params[name]["attn"][GATE]) for name in layers if GATE in params[name]["attn"]]
    for name, gate in held:
        for key in NAMES:
            found.update(f"{name}/{key} {gate[key].dtype}{gate[key].shape}".encode())
            found.update(np.asarray(gate[key]).tobytes())
    return found.hexdigest()[:16] if held else None


def save_gates(
    path: str | os.PathLike[str], gates: Gates, params: Params, config: ModelConfig
) -> Path:
    """Write the gates of this model into one new safetensors file; returns its path.

    Raises CheckpointError where the path exists.
    """
    arrays = {f"layer_{i}/{name}": gate[name] for i, gate in enumerate(gates) for name in NAMES}
    return save_artefact(path, FORM, arrays, without_gates(params), config)


def load_gates(path: str | os.PathLike[str], params: Params, config: ModelConfig) -> Gates:
    """The gates that `save_gates` wrote for this model.

    Raises CheckpointError for a file that is damaged, of another version, or of another model.
    """
    _refuse_pickle(Path(path))
    words = ("gates", "train gates for this one")
    arrays = load_artefact(path, FORM, without_gates(params), config, words)
    return _checked(path, arrays, "layer_{}/{}", dict(zip(NAMES, NAMES, strict=True)), config)


def load_published_gates(path: str | os.PathLike[str], config: ModelConfig) -> Gates:
    """Gates of the authors' layout from a safetensors file, for the model of this config.

    Its tensors are named "{layer}.{name}", the name as in the state dicts that the authors' files
    list under "module": q_proj.weight [K*G*16, D], q_proj.bias [K*G*16], k_proj.weight [K*16, D],
    q_norm.weight and k_norm.weight [16], k_base [K, 1, 16, 16], b [K, 1, G]. Nothing in such a file
    says which model it is for. Raises CheckpointError for a pickle, a damaged file or other shapes.
    """
    source = Path(path)
    _refuse_pickle(source)
    if not source.is_file():
        raise checkpoints.CheckpointError(f"{source} is not a file: give a safetensors file")
    folder = SafetensorsFolder(str(source), read_header(source))
    arrays = {name: folder.read(name) for name in folder.names()}
    return _checked(path, arrays, "{}.{}", NAMES, config)


def _checked(
    path: str | os.PathLike[str],
    arrays: dict[str, np.ndarray],
    form: str,
    names: dict[str, str],
    config: ModelConfig,
) -> Gates:
    """Gates from arrays named by `form`; CheckpointError unless they are just this model's."""
    wanted = {form.format(i, name) for i in range(config.num_layers) for name in names.values()}
    if odd := sorted(wanted ^ set(arrays)):
        what = "lacks" if odd[0] in wanted else "has, beyond this model's gates,"
        raise checkpoints.CheckpointError(
            f"{path} {what} {odd[0]!r} ({len(odd)} names differ): these are not gates of a model "
            f"of {config.num_layers} layers"
        )
    gates = []
    for i in range(config.num_layers):
        gate = {}
        for name, shape in gate_shapes(config, i).items():
            called = form.format(i, names[name])
            held, stored = arrays[called], shape
            if names is NAMES:
                stored = _published_shape(name, shape)
            if held.shape != stored or not jnp.issubdtype(held.dtype, jnp.floating):
                raise checkpoints.CheckpointError(
                    f"{path}: {called!r} is {held.dtype}{list(held.shape)}, this model needs "
                    f"floats {list(stored)}: these are gates of another model"
                )
            gate[name] = jnp.asarray(held.reshape(shape))
            if not bool(jnp.all(jnp.isfinite(gate[name]))):
                raise checkpoints.CheckpointError(
                    f"{path}: {called!r} has values that are not finite: train the gates again"
                )
        gates.append(gate)
    return tuple(gates)


def _published_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The authors' shape: heads flattened into rows, and a length of one for time."""
    if name in ("sinks", "bias"):
        return (shape[0], 1, *shape[1:])
    if name in ("q", "k"):
        return (math.prod(shape[:-1]), shape[-1])
    return (math.prod(shape),)


def _refuse_pickle(path: Path) -> None:
    if path.suffix in (".pt", ".pth", ".bin", ".pkl"):
        raise checkpoints.CheckpointError(
            f"{path} is a pickle, which could run anything when opened: write its tensors to a "
            ".safetensors file in an environment you trust it with"
        )


__all__ = [
    "GATE",
    "NAMES",
    "Gates",
    "digest",
    "gate_shapes",
    "init_gates",
    "load_gates",
    "load_published_gates",
    "save_gates",
    "with_gates",
    "without_gates",
]
