"""Which form of a product is expected to be faster: a line of seconds a weight over vectors.

Reading weights costs the same for one vector or many, arithmetic grows with them, and XLA's matrix
products pay a share of their own as soon as there are two. So a form is two numbers, its seconds a
weight for one vector (in XLA's case for two) and for sixteen. The numbers here were measured on two
AVX-512 cores at about 30 GB/s; `popjax doctor` measures them anew and keeps them in the cache
folder. A choice never depends on timing in a run, so runs repeat bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kernels_pallas.native.cache import cache_folder

OPERATIONS = ("expand", "contract")
FORMS = ("xla", "native")
DTYPES = ("float32", "bfloat16")
FEW, MANY = 2, 16
# Beyond, the lines say nothing: the kernels are made for few vectors.
_MOST = 64


@dataclasses.dataclass(frozen=True)
class Line:
    """Seconds a weight with one vector, with FEW and with MANY; between and beyond, a line."""

    one: float
    few: float
    many: float

    def at(self, vectors: int) -> float:
        if vectors <= 1:
            return self.one
        return self.few + (self.many - self.few) * (vectors - FEW) / (MANY - FEW)


Costs = Mapping[tuple[str, str, str], Line]

MEASURED: Costs = {
    ("expand", "xla", "float32"): Line(1.39e-10, 3.57e-10, 4.49e-10),
    ("expand", "native", "float32"): Line(1.35e-10, 1.67e-10, 2.99e-10),
    ("contract", "xla", "float32"): Line(1.85e-10, 2.45e-10, 3.39e-10),
    ("contract", "native", "float32"): Line(1.54e-10, 1.74e-10, 4.72e-10),
    ("expand", "xla", "bfloat16"): Line(1.21e-9, 1.72e-9, 1.91e-9),
    ("expand", "native", "bfloat16"): Line(0.85e-10, 1.79e-10, 3.14e-10),
    ("contract", "xla", "bfloat16"): Line(1.25e-9, 1.67e-9, 1.80e-9),
    ("contract", "native", "bfloat16"): Line(0.83e-10, 1.57e-10, 6.30e-10),
}


def costs_file() -> Path:
    """Where this machine's own numbers are kept."""
    return cache_folder() / "cpu_costs.json"


def keep(costs: Costs) -> None:
    """Use `costs` from the next process on; OSError where the cache cannot be written."""
    path = costs_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [[*key, line.one, line.few, line.many] for key, line in costs.items()]
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(rows) + "\n")
    os.replace(partial, path)


@functools.cache
def costs() -> Costs:
    """This machine's numbers, or those that popjax comes with.

    Raises ValueError for a file that does not hold them.
    """
    path = costs_file()
    if not path.is_file():
        return MEASURED
    try:
        rows = json.loads(path.read_text())
        found = {(op, form, dtype): Line(*map(float, line)) for op, form, dtype, *line in rows}
        if found.keys() != MEASURED.keys():
            raise ValueError("other operations")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} does not hold costs ({error}): delete it") from None
    return found


def prefers_native(operation: str, vectors: int, dtype: Any) -> bool:
    """Whether the CPU kernels are expected to be faster at this product than XLA.

    operation: one of OPERATIONS, or "mlp" for two expansions and one contraction.
    """
    if str(dtype) not in DTYPES or vectors > _MOST:
        return False
    parts = ("expand", "expand", "contract") if operation == "mlp" else (operation,)

    def seconds(form: str) -> float:
        return sum(costs()[part, form, str(dtype)].at(vectors) for part in parts)

    return seconds("native") <= seconds("xla")
