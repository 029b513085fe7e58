"""The chips that popjax can compile for without having one: their memory, speed and topologies.

Figures are per chip, as their makers publish them: Google's system architecture pages of TPU v4,
v5e, v5p and v6e, NVIDIA's H100 SXM data sheet. Leaves out compiling, which is
`ahead_of_time.py`, and every figure of arithmetic: decoding is bound by memory.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from typing import Any

GIB = 2**30
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBIC = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator chip.

    hbm: bytes of memory; usable: what is left of them for programs and arrays, as the compiler
    states it when it refuses one; bandwidth: bytes a second. topologies: those listed, smallest
    first; described: the smallest that the compiler describes, of which fewer chips are a part.
    """

    name: str
    hbm: int
    usable: int
    bandwidth: float
    topologies: tuple[str, ...]
    described: str


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * GIB, int(30.75 * GIB), 1228e9, _CUBIC, "2x2x1"),
        Chip("v5e", 16 * GIB, int(15.75 * GIB), 819e9, _FLAT, "2x2"),
        Chip("v5p", 95 * GIB, int(95.73 * GIB), 2765e9, _CUBIC, "2x2x1"),
        Chip("v6e", 32 * GIB, int(31.24 * GIB), 1640e9, _FLAT, "2x2"),
    )
}


@dataclasses.dataclass(frozen=True)
class Target:
    """Chips of one kind, wired as `topology`, such as v5e:2x2."""

    chip: Chip
    topology: str

    @property
    def chips(self) -> int:
        return math.prod(int(size) for size in self.topology.split("x"))

    def __str__(self) -> str:
        return f"{self.chip.name}:{self.topology}"

    def larger(self) -> tuple[Target, ...]:
        """The listed topologies of the same chip with more chips, smallest first."""
        return tuple(target for target in self._listed() if target.chips > self.chips)

    def smaller(self) -> tuple[Target, ...]:
        """The listed topologies of the same chip with fewer chips, largest first."""
        return tuple(target for target in self._listed()[::-1] if target.chips < self.chips)

    def _listed(self) -> tuple[Target, ...]:
        return tuple(Target(self.chip, topology) for topology in self.chip.topologies)


def parse_target(text: str) -> Target:
    """The target that a text such as "v5e:2x2" names; a chip alone means one of it.

    Raises ValueError with the chips or topologies there are.
    """
    name, colon, topology = text.strip().lower().partition(":")
    if name not in CHIPS:
        raise ValueError(
            f"target {text!r} names no known chip: use one of {', '.join(CHIPS)}, such as v5e:2x2"
        )
    chip = CHIPS[name]
    if not colon:
        topology = chip.topologies[0]
    if topology not in chip.topologies:
        raise ValueError(
            f"target {text!r} names no listed topology of {name}: "
            f"use one of {', '.join(chip.topologies)}"
        )
    return Target(chip, topology)


def devices(target: Target) -> list[Any]:
    """Descriptions of the target's chips, good for compiling and for nothing else.

    Needs TPU_SKIP_MDS_QUERY=1 in the environment before jax is imported. Raises ImportError where
    the compiler is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            f"compiling for {target} needs the TPU compiler, which is not installed: "
            'pip install "popjax[aot]"'
        )
    from jax.experimental import topologies

    small = target.chips < Target(target.chip, target.chip.described).chips
    topology = target.chip.described if small else target.topology
    # By default each of the two cores of a v4 is a device of its own; of a v5p they are one.
    options = {"chip_config_name": "megacore"} if target.chip.name == "v4" else {}
    described = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{target.chip.name}:{topology}", **options
    )
    return described.devices[: target.chips]
