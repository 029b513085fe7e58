"""What a model holds and whether it fits, from its config and tensor headers alone.

Reads no weight. Leaves out measuring: what a run really took is in its report.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import jax

import checkpoints
from popjax import axes
from popjax.config import ModelConfig
from popjax.families import FAMILIES
from popjax.loading import Source
from popjax.sparsity import channel_budget

_GROUPS = {
    "embed": "embedding",
    "positions": "embedding",
    "head": "output head",
    "attn": "attention",
    "mlp": "FFN",
    "shared": "FFN",
    "moe": "experts",
    "mlp_bias": "FFN",
}
_LAYER = re.compile(r"layer_\d+/")
# What a container may use at most: a number of bytes, or "max".
_CONTAINER_LIMIT = "/sys/fs/cgroup/memory.max"


@dataclasses.dataclass(frozen=True)
class ParameterRow:
    """One parameter, or the same one in `count` layers: path, axis letters, shape, bytes in all."""

    path: str
    letters: str
    shape: tuple[int, ...]
    count: int
    group: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class MemoryNeed:
    """Bytes held while decoding: all weights, packed FFN rows beside them, and the cache."""

    weights: int
    packed: int
    cache: int

    @property
    def total(self) -> int:
        return self.weights + self.packed + self.cache


@dataclasses.dataclass(frozen=True)
class Memory:
    """Free and total bytes of where arrays live, None where unknown, and what that place is."""

    free: int | None
    total: int | None
    where: str


def parameter_rows(config: ModelConfig, itemsize: int) -> tuple[ParameterRow, ...]:
    """The parameter table in order of use; layers that agree share a row, "layer_{i}/..."."""
    counts: collections.Counter[tuple[str, tuple[int, ...]]] = collections.Counter()
    for path, shape in axes.parameter_shapes(config).items():
        counts[_LAYER.sub("layer_{i}/", path), shape] += 1
    return tuple(
        ParameterRow(
            path=path,
            letters=axes.letters(path.replace("{i}", "0")),
            shape=shape,
            count=count,
            group=_group(path),
            bytes=count * math.prod(shape) * itemsize,
        )
        for (path, shape), count in counts.items()
    )


def _group(path: str) -> str:
    parts = path.split("/")
    return next((_GROUPS[part] for part in parts if part in _GROUPS), "norms")


def group_bytes(rows: tuple[ParameterRow, ...]) -> dict[str, int]:
    """Bytes of each group of parameters, the largest first."""
    totals: collections.Counter[str] = collections.Counter()
    for row in rows:
        totals[row.group] += row.bytes
    return dict(totals.most_common())


def stored_types(source: Source) -> dict[str, int]:
    """How many tensors the files store in each type, by their headers."""
    names = source.tensors.names()
    return dict(
        collections.Counter(source.tensors.info(name).dtype for name in names).most_common()
    )


def memory_need(
    config: ModelConfig,
    itemsize: int,
    *,
    ratio: float = 0.0,
    gamma: float = 0.1,
    context: int = 0,
    batch: int = 1,
) -> MemoryNeed:
    """What decoding `batch` rows of `context` tokens holds, with FFN rows packed at `ratio`.

    Packed are the rows of R u C of online pruning with band +-gamma/2; at ratio 0 nothing is.
    """
    packed = 0
    for layer in config.layers:
        budget = channel_budget(layer.mlp_dim, ratio, gamma / 2)
        evaluated = budget.retained + budget.candidate
        # Rows of experts are not packed: decoding reads them by index.
        if ratio and layer.moe is None and evaluated < layer.mlp_dim:
            packed += evaluated * config.channel_size * itemsize
    return MemoryNeed(
        weights=axes.parameter_count(config) * itemsize,
        packed=packed,
        cache=batch * context * cache_bytes_per_token(config, itemsize),
    )


def cache_bytes_per_token(config: ModelConfig, itemsize: int) -> int:
    """Bytes of keys, values and position (int32) that one token of one row adds to the cache."""
    heads = sum(layer.num_kv_heads * layer.head_dim for layer in config.layers)
    return 2 * heads * itemsize + 4


def longest_context(config: ModelConfig, need: MemoryNeed, itemsize: int, free: int) -> int:
    """Tokens of one row whose cache fits in `free` bytes beside the weights and packed rows."""
    room = free - need.weights - need.packed
    return max(0, min(config.max_positions, room // cache_bytes_per_token(config, itemsize)))


def free_memory() -> Memory:
    """The accelerator's free memory where there is one and it tells, else this machine's."""
    device = jax.local_devices()[0]
    # None on CPU and on some hosts of accelerators.
    stats = device.memory_stats() or {}
    limit = stats.get("bytes_limit")
    if limit is not None:
        return Memory(limit - stats.get("bytes_in_use", 0), limit, device.device_kind)
    if device.platform != "cpu":
        return Memory(None, None, device.device_kind)
    return machine_memory()


def machine_memory() -> Memory:
    """Free and total main memory; None where the system does not say.

    A container's limit bounds both; what its other processes use of it is not known.
    """
    total, free = _system_memory()
    limit = _number_in(_CONTAINER_LIMIT)
    if limit is not None:
        total = limit if total is None else min(total, limit)
        free = limit if free is None else min(free, limit)
    return Memory(free, total, "main memory")


def _system_memory() -> tuple[int | None, int | None]:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = (line.split() for line in file)
            # Stated in kB, which means KiB here.
            sizes = {words[0]: int(words[1]) * 1024 for words in lines}
        return sizes.get("MemTotal:"), sizes.get("MemAvailable:")
    except (OSError, ValueError, IndexError):
        return _pages("SC_PHYS_PAGES"), _pages("SC_AVPHYS_PAGES")


def _pages(name: str) -> int | None:
    """Bytes of a page count that sysconf knows; not every system knows every one, or sysconf."""
    if name not in getattr(os, "sysconf_names", {}):
        return None
    pages = os.sysconf(name)
    return pages * os.sysconf("SC_PAGE_SIZE") if pages > 0 else None


def _number_in(path: str) -> int | None:
    try:
        return int(Path(path).read_text(encoding="ascii"))
    except (OSError, ValueError):  # absent, or "max": no limit is stated there
        return None


def weight_files(source: Source) -> tuple[Path, ...]:
    """The files that hold the weights of an opened checkpoint."""
    location = Path(source.tensors.location)
    return tuple(sorted(location.glob("model*.safetensors"))) if location.is_dir() else (location,)


def checksums(source: Source) -> dict[str, str]:
    """SHA-256 of every weight file by its name. Raises CheckpointError where one is unreadable."""
    return {path.name: checkpoints.sha256(path) for path in weight_files(source)}


def family_facts() -> list[dict[str, Any]]:
    """What each family covers, from its own file: its description, names, and extra parameters."""
    facts = []
    for name, family in FAMILIES.items():
        targets = {path.rsplit("/", 1)[-1] for row in family.hf_rows for path in row.targets}
        extras = {
            "q_bias": "q/k/v biases",
            "o_bias": "o bias",
            "q_norm": "q/k norms",
            "q_all_norm": "q/k norms over all heads",
            "up_bias": "FFN biases",
            "router": "experts",
        }
        module = sys.modules[family.config.__module__]
        facts.append(
            {
                "family": name,
                "gguf_architecture": family.gguf_architecture,
                "extras": [text for part, text in extras.items() if part in targets],
                "about": (module.__doc__ or "").strip().splitlines()[0],
            }
        )
    return facts


def format_bytes(count: float) -> str:
    """Bytes in the largest binary unit that leaves a number of at least one, to three digits."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    unit = 0
    while abs(count) >= 999.5 and unit < len(units) - 1:
        count, unit = count / 1024, unit + 1
    decimals = 0 if unit == 0 or abs(count) >= 99.95 else 1 if abs(count) >= 9.995 else 2
    return f"{count:.{decimals}f} {units[unit]}"
