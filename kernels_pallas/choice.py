"""Which implementation a run uses: what was asked for, or the best that its arrays allow."""

from __future__ import annotations

from typing import Any

import jax

from kernels_pallas import native
from kernels_pallas.masked_mlp import IMPLEMENTATIONS


def implementation_for(asked: str | None, arrays: Any) -> str:
    """The name of masked_mlp.IMPLEMENTATIONS that `asked` stands for on these arrays (a pytree).

    None means `auto` where all arrays lie on one CPU and the CPU kernels run, else `xla`. Raises
    ValueError for an unknown name, and for the kernels where they cannot run, with the reason.
    """
    if asked is not None and asked not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {asked!r} is unknown: use one of {IMPLEMENTATIONS}")
    if asked in ("xla", "xla_gathered"):
        return asked
    devices = {device for leaf in jax.tree.leaves(arrays) for device in leaf.devices()}
    one_cpu = len(devices) == 1 and next(iter(devices)).platform == "cpu"
    if one_cpu and native.available():
        return asked or "auto"
    if asked is None:
        return "xla"
    reason = native.status().reason if one_cpu else f"the weights lie on {len(devices)} device(s)"
    raise ValueError(
        f"implementation {asked!r} needs the CPU kernels and one CPU, but {reason}: use 'xla'"
    )
