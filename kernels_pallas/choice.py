"""Which implementation a run uses: what was asked for, or the best that its arrays allow."""

from __future__ import annotations

import logging
from typing import Any

import jax

from kernels_pallas import native
from kernels_pallas.masked_mlp import IMPLEMENTATIONS, NATIVE, PALLAS, pallas_obstacle
from kernels_pallas.native.cost import DTYPES

_LOG = logging.getLogger(__name__)
# Tried in this order where nothing is asked for; `xla` runs everywhere.
_PREFERRED = ("auto", "pallas_tpu", "pallas_gpu")
_PLATFORMS = {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}
_PALLAS_DTYPES = ("float32", "bfloat16")


def implementation_for(
    asked: str | None, arrays: Any, matrix: jax.Array | None = None, vectors: int = 1
) -> str:
    """The name of masked_mlp.IMPLEMENTATIONS that `asked` stands for on these arrays (a pytree).

    None means `auto` where all arrays lie on one CPU in dtypes of the CPU kernels and these run,
    `pallas_tpu` or `pallas_gpu` where they lie on such chips and the kernels serve `matrix` [F, D],
    one of the feed-forward layers, for so many vectors; else `xla`. One log line says which, and
    why not another. Raises ValueError for an unknown name, and for kernels where they cannot run,
    with the reason.
    """
    if asked is not None and asked not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {asked!r} is unknown: use one of {IMPLEMENTATIONS}")
    leaves = jax.tree.leaves(arrays)
    if asked is not None:
        obstacle = _obstacle(asked, leaves, matrix, vectors)
        if obstacle is None:
            return asked
        raise ValueError(f"implementation {asked!r} needs {obstacle}: use 'xla'")
    reasons = []
    for name in _PREFERRED:
        obstacle = _obstacle(name, leaves, matrix, vectors)
        if obstacle is None:
            break
        reasons.append(f"{name} needs {obstacle}")
    else:
        name = "xla"
    _LOG.info("decode steps run on %s%s", name, "".join(f"; {reason}" for reason in reasons))
    return name


def _obstacle(
    name: str, leaves: list[jax.Array], matrix: jax.Array | None, vectors: int
) -> str | None:
    """What `name` needs and why it lacks it on these arrays; None where it can run."""
    if name in NATIVE:
        reason = _cpu_obstacle(leaves)
        return None if reason is None else f"the CPU kernels and one CPU, but {reason}"
    if name not in PALLAS:
        return None
    platforms = sorted({device.platform for leaf in leaves for device in leaf.devices()})
    if name in _PLATFORMS and platforms != [_PLATFORMS[name]]:
        return f"a {_PLATFORMS[name].upper()}, but the weights lie on {', '.join(platforms)}"
    foreign = _foreign(leaves, _PALLAS_DTYPES)
    if foreign:
        return f"weights in {' or '.join(_PALLAS_DTYPES)}, but they are {foreign}"
    reason = None if matrix is None else pallas_obstacle(name, matrix, vectors)
    return reason and f"what its kernels serve, but {reason}"


def _cpu_obstacle(leaves: list[jax.Array]) -> str | None:
    devices = {device for leaf in leaves for device in leaf.devices()}
    if len(devices) != 1 or next(iter(devices)).platform != "cpu":
        return f"the weights lie on {len(devices)} device(s)"
    foreign = _foreign(leaves, DTYPES)
    if foreign:
        return f"the weights are {foreign}, which they do not read"
    return None if native.available() else native.status().reason


def _foreign(leaves: list[jax.Array], known: tuple[str, ...]) -> str | None:
    """A dtype of these arrays that is not among the known ones."""
    return next(iter(sorted({str(leaf.dtype) for leaf in leaves} - set(known))), None)
