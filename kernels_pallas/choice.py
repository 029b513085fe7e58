"""Which implementation a run uses: what was asked for, or the best that its arrays allow."""

from __future__ import annotations

from typing import Any

import jax

from kernels_pallas import native
from kernels_pallas.masked_mlp import IMPLEMENTATIONS
from kernels_pallas.native.cost import DTYPES


def implementation_for(asked: str | None, arrays: Any) -> str:
    """The name of masked_mlp.IMPLEMENTATIONS that `asked` stands for on these arrays (a pytree).

    None means `auto` where all arrays lie on one CPU in dtypes of the CPU kernels and these run,
    else `xla`. Raises ValueError for an unknown name, and for the kernels where they cannot run,
    with the reason.
    """
    if asked is not None and asked not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {asked!r} is unknown: use one of {IMPLEMENTATIONS}")
    if asked in ("xla", "xla_gathered"):
        return asked
    obstacle = _obstacle(jax.tree.leaves(arrays))
    if obstacle is None:
        return asked or "auto"
    if asked is None:
        return "xla"
    raise ValueError(
        f"implementation {asked!r} needs the CPU kernels and one CPU, but {obstacle}: use 'xla'"
    )


def _obstacle(leaves: list[jax.Array]) -> str | None:
    """Why the CPU kernels cannot serve these arrays; None where they can."""
    devices = {device for leaf in leaves for device in leaf.devices()}
    if len(devices) != 1 or next(iter(devices)).platform != "cpu":
        return f"the weights lie on {len(devices)} device(s)"
    foreign = sorted({str(leaf.dtype) for leaf in leaves} - set(DTYPES))
    if foreign:
        return f"the weights are {foreign[0]}, which they do not read"
    return None if native.available() else native.status().reason
