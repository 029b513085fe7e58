"""What Google Cloud calls the chips of a target: machine types, accelerator types, images.

Names as in Google's pages "TPU machines" (Compute Engine) and "TPU software versions" (the older
TPU API). Leaves out commands: those are in `clouds.py`.
"""

from __future__ import annotations

import dataclasses
import re

from popjax.targets import Target

# Of all targets that Compute Engine offers: Ubuntu 22.04 with the TPU drivers.
IMAGE_FAMILY = "ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e"
IMAGE_PROJECT = "ubuntu-os-accelerator-images"
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
_ZONE = re.compile(r"[a-z]+-[a-z]+[0-9]+-[a-z]")
_WHEEL = re.compile(r"popjax-[A-Za-z0-9.+_-]+\.whl")
_PROJECT = re.compile(r"[a-z][-a-z0-9:.]{4,61}[a-z0-9]")


@dataclasses.dataclass(frozen=True)
class Chips:
    """One kind of chip: its Compute Engine machines by chips each, and its older API's names.

    `units`: what the older API counts a chip as in the name of an accelerator type.
    """

    machines: dict[int, str]
    accelerator: str
    units: int
    runtime: str


CHIPS: dict[str, Chips] = {
    "v4": Chips({}, "v4", 2, "tpu-ubuntu2204-base"),
    "v5e": Chips(
        {n: f"ct5lp-hightpu-{n}t" for n in (1, 4, 8)}, "v5litepod", 1, "v2-alpha-tpuv5-lite"
    ),
    "v5p": Chips({4: "ct5p-hightpu-4t"}, "v5p", 2, "v2-alpha-tpuv5"),
    "v6e": Chips({n: f"ct6e-standard-{n}t" for n in (1, 4, 8)}, "v6e", 1, "v2-alpha-tpuv6e"),
}


def accelerator_type(target: Target) -> str:
    """The older API's name of a target, such as v5litepod-16 for v5e:4x4."""
    chips = CHIPS[target.chip.name]
    return f"{chips.accelerator}-{chips.units * target.chips}"


def machine(target: Target) -> tuple[str, int]:
    """Compute Engine's machine type for a target, and how many of them it takes.

    Raises ValueError for a target that no machines make up.
    """
    machines = CHIPS[target.chip.name].machines
    if not machines:
        raise ValueError(f"Compute Engine has no {target.chip.name} machines: use --api tpu-vm")
    if target.chips in machines:
        return machines[target.chips], 1
    # Slices of several hosts are made of the machines with four chips.
    hosts, rest = divmod(target.chips, 4)
    if rest:
        sizes = ", ".join(str(size) for size in machines)
        chips = "1 chip" if target.chips == 1 else f"{target.chips} chips"
        raise ValueError(f"no {target.chip.name} machine has {chips}: take one with {sizes}")
    return machines[4], hosts


def checked(kind: str, text: str) -> str:
    """`text` if it is a plain name, zone, project or wheel. Raises ValueError with what is allowed.

    Strict on purpose: these words end up in commands of other machines.
    """
    patterns = {
        "name": (_NAME, "lower-case letters, digits and dashes, at most 40, a letter first"),
        "zone": (_ZONE, "a zone such as us-central1-a"),
        "wheel": (_WHEEL, "the file name of a popjax wheel"),
        "project": (_PROJECT, "a project id such as my-project-1"),
    }
    pattern, allowed = patterns[kind]
    if not pattern.fullmatch(text):
        raise ValueError(f"{kind} {text!r} is not {allowed}")
    return text
