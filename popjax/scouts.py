"""Scouts of a model: copies of gate and up in a few bits, made once, beside its weights.

A scout says what every channel would be for a token before a row of the weights is read. It is
arrays of an FFN's parameters, there only where it was added, so models without know nothing of it.
Copies of six bits in 0.7 of the layers hold about as much as copies of four in all.
Quantised to the nearest step, or by what the model reads on a text so that errors make up for each
other; leaves out who chooses by it (`methods/scout.py`).
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import checkpoints
from kernels_pallas.row_products import QuantizedRows, bits_of, quantized
from popjax.artefact import Form, load_artefact, save_artefact
from popjax.calibration.compensated import compensated
from popjax.config import ModelConfig
from popjax.leaves import check_layers, with_leaves, without_leaves
from popjax.sparsity import Params

FORM = Form("scout", "1", "popjax calibrate scout -o FILE")
BITS, GROUP = 4, 64
MATRICES = ("gate", "up")
# One dict of arrays a layer: of a matrix w `scout_w` and `scout_w_scale`.
Scouts = tuple[dict[str, jax.Array], ...]


def names() -> Iterator[str]:
    """Parameters of a scout in an FFN."""
    for name in MATRICES:
        yield from (f"scout_{name}", f"scout_{name}_scale")


def needed(mlp: Params) -> tuple[QuantizedRows, QuantizedRows]:
    """Gate and up [F, D] of the scout among an FFN's parameters, with scales in float32.

    Raises ValueError where there is none.
    """
    if any(name not in mlp for name in names()):
        raise ValueError(
            "scout needs a scout beside the weights of every layer that it prunes: "
            "popjax.scouts.with_scouts(params, make_scouts(params, config)), with ends=True where "
            "the first and last layer are pruned too (popjax calibrate scout --ends pruned), and "
            "the same `copied` as the method's"
        )
    gate, up = (
        QuantizedRows(
            _rows(mlp[f"scout_{name}"]), _rows(mlp[f"scout_{name}_scale"]).astype(jnp.float32)
        )
        for name in MATRICES
    )
    return gate, up


def held_form(params: Params, num_layers: int) -> tuple[tuple[int, ...], int, int]:
    """The layers whose parameters hold copies, and the bits and group of the first of these.

    Raises ValueError where none do.
    """
    mlps = [params[f"layer_{i}"].get("mlp", {}) for i in range(num_layers)]
    held = tuple(i for i, mlp in enumerate(mlps) if "scout_up" in mlp)
    if not held:
        raise ValueError("no layer has a scout beside its weights: give popjax.scouts.with_scouts")
    return held, *_form(mlps[held[0]])


def _form(mlp: Params) -> tuple[int, int]:
    copy = QuantizedRows(_rows(mlp["scout_up"]), _rows(mlp["scout_up_scale"]))
    return copy.bits, copy.shape[1] // copy.scales.shape[1]


def check_form(mlp: Params, bits: int, group: int) -> None:
    """Raise ValueError where an FFN's parameters hold a scout of other bits or groups."""
    if "scout_up" not in mlp:
        return
    found = _form(mlp)
    if found != (bits, group):
        raise ValueError(
            f"the scout beside the weights has {found[0]} bits in groups of {found[1]}, and the "
            f"method counts {bits} bits in groups of {group}: give Scout(bits={found[0]}, "
            f"group={found[1]}), or make another scout"
        )


def _rows(w: jax.Array) -> jax.Array:
    """w [F, n], which may be kept as tiles as matrices are."""
    return w.reshape(w.shape[0], -1)


def check_copied(copied: float) -> None:
    """Raise ValueError unless `copied` is a share of the pruned layers, above 0 and up to 1."""
    number = isinstance(copied, int | float) and not isinstance(copied, bool)
    if not number or not 0 < copied <= 1:
        raise ValueError(
            f"copied {copied!r} is no share of the pruned layers: give one above 0 and up to 1"
        )


def copied_layers(num_layers: int, ends: bool, copied: float) -> tuple[int, ...]:
    """The layers with copies: the share `copied` of all, or of the inner ones, spread evenly.

    Rounded down to whole layers, so that no more is held than asked for. Raises ValueError for a
    share outside (0, 1], or one of less than a layer.
    """
    check_copied(copied)
    pruned = range(num_layers) if ends else range(1, num_layers - 1)
    # A share made of two whole numbers may lie a rounding below what it stands for.
    count = math.floor(copied * len(pruned) + 1e-6)
    if copied < 1 and count < 1:
        raise ValueError(
            f"copied {copied} of {len(pruned)} pruned layers is less than one layer: give "
            f"{1 / max(1, len(pruned)):.2g} or more"
        )
    return tuple(pruned[(2 * i + 1) * len(pruned) // (2 * count)] for i in range(count))


def make_scouts(
    params: Params,
    config: ModelConfig,
    bits: int = BITS,
    group: int = GROUP,
    ends: bool = False,
    moments: Sequence[np.ndarray] | None = None,
    copied: float = 1.0,
) -> Scouts:
    """Copies of each layer's gate and up in `bits` (4, 6, 8), a scale each `group` of weights.

    Without `ends` none of the first and last layer, which `Scout` leaves whole unless told; of the
    others the share `copied` has them (`copied_layers`). Scales are in the dtype of the weights.
    moments: of each layer the second moments [D, D] of its FFN's input
    (`popjax.calibration.input_moments`); with them errors of rounding make up for each other (GPTQ,
    arXiv 2210.17323), which halves what they do to the channels. Raises ValueError for a
    model without gated FFNs, bits and groups that its rows do not allow, or moments of another one.
    """
    check_model(config)
    if moments is not None:
        check_layers(params, "moments", moments)
    held = copied_layers(config.num_layers, ends, copied)
    scouts = []
    for i, layer in enumerate(config.layers):
        scout = {}
        for name in MATRICES if i in held else ():
            w = params[f"layer_{i}"][layer.ffn][name]
            if moments is None:
                copy = _quantized(_rows(w), bits, group)
            else:
                rows = np.asarray(_rows(w), np.float32)
                copy = compensated(rows, moments[i], bits, group, w.dtype)
            scout[f"scout_{name}"] = copy.values
            scout[f"scout_{name}_scale"] = copy.scales.astype(w.dtype)
        scouts.append(scout)
    return tuple(scouts)


_quantized = jax.jit(quantized, static_argnums=(1, 2))


def check_model(config: ModelConfig) -> None:
    """Raise ValueError for a model whose FFNs a scout is not for."""
    mixture = any(layer.moe is not None for layer in config.layers)
    if mixture or not config.gated:
        lacking = "mixtures of experts" if mixture else "no gate"
        raise ValueError(
            f"a scout is of gated FFNs, and this {config.family} model has {lacking}: use "
            "online-pruning"
        )


def with_scouts(params: Params, scouts: Sequence[dict[str, Any]]) -> Params:
    """Parameters with a scout in each layer, for runs with `Scout`; no weight is copied.

    A model is saved without them: its file formats have no place for scouts. Raises ValueError
    for another number of layers.
    """
    check_layers(params, "scouts", scouts)
    paths = {f"layer_{i}/mlp/{k}": w for i, one in enumerate(scouts) for k, w in one.items()}
    return with_leaves(params, paths)


def without_scouts(params: Params) -> Params:
    """Inverse of `with_scouts`; parameters that have none as they are."""
    return without_leaves(params, "mlp", set(names()))


def check_saved(params: Params) -> None:
    """Raise ValueError for parameters with scouts, which no checkpoint has a place for."""
    if scout_bytes(params):
        raise ValueError(
            "a scout lies beside the weights, and no checkpoint has a place for it: save the model "
            "with params=popjax.scouts.without_scouts(params), and the scout by save_scouts"
        )


def digest(params: Params) -> str | None:
    """What tells the scouts among the parameters from others; None where there are none."""
    found = hashlib.sha256()
    layers = ((name, held.get("mlp", {})) for name, held in sorted(params.items()))
    leaves = [(f"{name}/{k}", mlp[k]) for name, mlp in layers for k in names() if k in mlp]
    for name, leaf in leaves:
        found.update(f"{name} {leaf.dtype}{leaf.shape}".encode())
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()[:16] if leaves else None


def scout_bytes(params: Params, layer: int | None = None) -> int:
    """Bytes that the scouts among the parameters hold, or that of one layer."""
    wanted = [f"layer_{layer}"] if layer is not None else list(params)
    mlps = [params.get(name, {}).get("mlp", {}) for name in wanted if name.startswith("layer_")]
    return sum(mlp[name].nbytes for mlp in mlps for name in names() if name in mlp)


def save_scouts(
    path: str | os.PathLike[str],
    scouts: Scouts,
    params: Params,
    config: ModelConfig,
    about: str = "",
) -> Path:
    """Write the scouts of this model into one new safetensors file; returns its path.

    about: what they were measured on. Raises CheckpointError where the path exists.
    """
    arrays = {f"layer_{i}/{name}": w for i, one in enumerate(scouts) for name, w in one.items()}
    return save_artefact(path, FORM, arrays, params, config, about=about)


def load_scouts(path: str | os.PathLike[str], params: Params, config: ModelConfig) -> Scouts:
    """The scouts that `save_scouts` wrote for this model.

    Raises CheckpointError for a file that is damaged, of another version, or of another model.
    """
    words = ("a scout", "run popjax calibrate scout for it")
    arrays = load_artefact(path, FORM, params, config, words)
    ends, copied = _pattern(arrays, config.num_layers)
    held = copied_layers(config.num_layers, ends, copied)
    wanted = {f"layer_{i}/{name}" for i in held for name in names()}
    if not held or (odd := sorted(wanted ^ set(arrays))):
        shows = f", as {odd[0]!r} shows" if held else ": it has no copies"
        raise checkpoints.CheckpointError(
            f"{path} is no scout of this model{shows}: run popjax calibrate scout"
        )
    forms = _forms(path, arrays, held[0], params, config, ends=ends, copied=copied)
    for name, array in arrays.items():
        _check(path, name, array, forms[name])
    return tuple(
        {name: jnp.asarray(arrays[f"layer_{i}/{name}"]) for name in names() if i in held}
        for i in range(config.num_layers)
    )


def _pattern(arrays: Mapping[str, Any], num_layers: int) -> tuple[bool, float]:
    """`ends` and `copied` of a scout's arrays: those that fit, or what is nearest to them."""
    held = tuple(i for i in range(num_layers) if f"layer_{i}/scout_up" in arrays)
    for ends in (False, True):
        if (copied := share_of(held, num_layers, ends)) is not None:
            return ends, copied
    return "layer_0/scout_up" in arrays, 1.0


def share_of(held: Sequence[int], num_layers: int, ends: bool) -> float | None:
    """The share of the pruned layers whose `copied_layers` are those held; None where none is."""
    pruned = num_layers if ends else num_layers - 2
    if not 0 < len(held) <= pruned:
        return None
    copied = len(held) / pruned
    return copied if copied_layers(num_layers, ends, copied) == tuple(held) else None


def _forms(
    path: str | os.PathLike[str],
    arrays: dict[str, np.ndarray],
    first: int,
    params: Params,
    config: ModelConfig,
    **layers: Any,
) -> dict[str, Any]:
    """Shape and dtype of every array of a scout with the bits and groups of its first layer."""
    name = f"layer_{first}/scout_up"
    scale = arrays[f"{name}_scale"]
    group = config.embed_dim // max((1, *scale.shape[1:]))
    try:
        bits = bits_of(arrays[name].dtype)
    except ValueError as error:
        raise checkpoints.CheckpointError(
            f"{path}: {name!r}: {error}; run popjax calibrate scout again"
        ) from error
    make = functools.partial(make_scouts, config=config, bits=bits, group=group, **layers)
    try:
        scouts = jax.eval_shape(make, params)
    except ValueError as error:
        raise checkpoints.CheckpointError(
            f"{path}: '{name}_scale' is {scale.dtype}{list(scale.shape)}, which is no scale for "
            f"each group of {config.embed_dim} weights: run popjax calibrate scout again"
        ) from error
    return {f"layer_{i}/{name}": w for i, one in enumerate(scouts) for name, w in one.items()}


def _check(path: str | os.PathLike[str], name: str, held: np.ndarray, form: Any) -> None:
    """Raise CheckpointError unless an array has its form, and scales that rounding gives."""
    if (held.shape, held.dtype) != (form.shape, form.dtype):
        raise checkpoints.CheckpointError(
            f"{path}: {name!r} is {held.dtype}{list(held.shape)}, and this model with the rest of "
            f"the file wants {form.dtype}{list(form.shape)}: run popjax calibrate scout again"
        )
    if name.endswith("_scale") and not bool(np.all(np.isfinite(held) & (held >= 0))):
        raise checkpoints.CheckpointError(
            f"{path}: {name!r} has scales that are negative or not finite: run popjax calibrate "
            "scout again"
        )


__all__ = [
    "Scouts",
    "check_copied",
    "check_form",
    "check_model",
    "check_saved",
    "copied_layers",
    "digest",
    "held_form",
    "load_scouts",
    "make_scouts",
    "names",
    "needed",
    "save_scouts",
    "scout_bytes",
    "share_of",
    "with_scouts",
    "without_scouts",
]
