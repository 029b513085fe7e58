"""`popjax doctor`: what runs on this machine and why, and how near to its memory speed.

Measures for a few seconds, and keeps the measured costs for later runs to choose by.
"""

from __future__ import annotations

import json as json_format
from typing import TYPE_CHECKING, Annotated, Any

import typer

from popjax.cli import options
from popjax.cli.terminal import Status, command, stdout_console, write

if TYPE_CHECKING:
    from rich.console import RenderableType

Quick = Annotated[bool, typer.Option("--quick", help="Say what runs; measure and keep nothing.")]


@command
def doctor(quick: Quick = False, json: options.Json = False) -> None:
    """Show what decode steps run on here, why, and the measured bandwidth."""
    with Status() as status:
        status.say("Looking at the machine")
        facts = machine_facts()
        if not quick and facts["cpu_kernels"]["available"]:
            status.say("Measuring memory bandwidth and products")
            facts["measured"] = measured_facts()
    if json:
        write(json_format.dumps(facts, allow_nan=False) + "\n")
    else:
        stdout_console().print(_view(facts))


def machine_facts() -> dict[str, Any]:
    """Versions, devices and the state of the CPU kernels as plain JSON values."""
    import os
    import platform
    from importlib.metadata import version

    import jax

    from kernels_pallas import native

    kernels = native.status()
    return {
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "transformers")},
        "devices": [f"{device.platform}: {device.device_kind}" for device in jax.devices()],
        "cores": os.cpu_count(),
        "cpu_kernels": {
            "available": kernels.available,
            "reason": kernels.reason,
            "path": str(kernels.path) if kernels.path else None,
            "instruction_set": kernels.instruction_set,
        },
    }


def measured_facts() -> dict[str, Any]:
    """Bandwidth in bytes a second: plain reading, and each product with one vector.

    Keeps the measured costs; where the cache cannot be written, says so under "kept".
    """
    from kernels_pallas.native import cost, measure

    bandwidth = measure.read_bandwidth()
    found = measure.measured_costs()
    itemsize = {"float32": 4, "bfloat16": 2}
    try:
        cost.keep(found)
        kept = str(cost.costs_file())
    except OSError as error:
        kept = f"not kept: {cost.costs_file()}: {error.strerror}"
    return {
        "read_bandwidth": bandwidth,
        "scattered_rows": measure.scattered_bandwidth(),
        "products": [
            {
                "operation": operation,
                "form": form,
                "dtype": dtype,
                "bandwidth": itemsize[dtype] / line.one,
                "seconds_a_weight": [line.one, line.few, line.many],
            }
            for (operation, form, dtype), line in found.items()
        ],
        "kept": kept,
    }


def _view(facts: dict[str, Any]) -> RenderableType:
    from rich.console import Group

    kernels = facts["cpu_kernels"]
    runs = f"C++ kernels with {kernels['instruction_set']}" if kernels["available"] else "XLA only"
    lines = [
        f"Python {facts['python']}, "
        + ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        f"Devices: {', '.join(facts['devices'])}; {facts['cores']} cores",
        f"CPU products: {runs} ({kernels['reason']})",
    ]
    if kernels["path"]:
        lines.append(f"Library: {kernels['path']}")
    if "measured" in facts:
        return Group(*lines, "", *_measured_view(facts["measured"]))
    return Group(*lines)


def _measured_view(measured: dict[str, Any]) -> list[RenderableType]:
    from rich.table import Table

    best = measured["read_bandwidth"]
    table = Table("product, one vector", "GB/s", "of reading", title_justify="left")
    for row in measured["products"]:
        _add(table, f"{row['operation']}, {row['dtype']}, {row['form']}", row["bandwidth"], best)
    for operation, bandwidth in measured["scattered_rows"].items():
        _add(table, f"{operation}, float32, 40 % of the rows by index", bandwidth, best)
    kept = measured["kept"]
    return [f"Plain reading: {best / 1e9:.1f} GB/s", table, f"Costs to choose by: {kept}"]


def _add(table: Any, name: str, bandwidth: float, best: float) -> None:
    table.add_row(name, f"{bandwidth / 1e9:.1f}", f"{bandwidth / best:.2f}")
