"""Sizes, memory and checksums from configs and headers, against the arrays themselves."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from popjax import LanguageModel, OnlinePruning, axes, cache, inspection
from popjax.loading import open_source
from tests.popjax.tiny_models import CONFIGS


@pytest.mark.parametrize("family", CONFIGS)
def test_rows_cover_every_parameter(family: str) -> None:
    config = CONFIGS[family]
    rows = inspection.parameter_rows(config, itemsize=4)
    assert sum(row.bytes for row in rows) == 4 * axes.parameter_count(config)
    assert sum(row.count for row in rows) == len(axes.parameter_paths(config))
    groups = inspection.group_bytes(rows)
    assert sum(groups.values()) == 4 * axes.parameter_count(config)
    # The tiny layers differ in width, so that each has FFN rows of its own.
    paths = ("layer_{i}/mlp/up", "layer_{i}/shared/up")
    assert [row.shape for row in rows if row.path in paths] == [(48, 32), (40, 32)]
    ffn = sum(layer.mlp_dim * config.channel_size * 4 for layer in config.layers)
    ffn += config.mlp_bias * config.num_layers * config.embed_dim * 4
    assert groups["FFN"] == ffn
    assert ("output head" in groups) is not config.tie_embeddings


def test_memory_need_is_what_a_run_holds(tiny_model: LanguageModel) -> None:
    report = tiny_model.generate(
        "The quick", method=OnlinePruning(ratio=0.5), max_new_tokens=8
    ).report
    held = cache.empty(tiny_model.config, batch=2, capacity=10, dtype=jnp.float32)
    need = inspection.memory_need(tiny_model.config, 4, ratio=0.5, context=10, batch=2)
    assert need.weights == report.weight_bytes
    assert need.packed == report.packed_bytes
    assert need.cache == cache.bytes_held(held) - held.length.nbytes
    assert need.total == need.weights + need.packed + need.cache


@pytest.mark.parametrize("ratio", [0.0, 0.04])
def test_nothing_is_packed_where_every_channel_is_evaluated(ratio: float) -> None:
    assert inspection.memory_need(CONFIGS["llama"], 4, ratio=ratio).packed == 0


def test_longest_context_is_the_last_that_fits() -> None:
    config = CONFIGS["llama"]
    bare = inspection.memory_need(config, 4, ratio=0.5)
    free = bare.total + 20 * inspection.cache_bytes_per_token(config, 4) + 1
    assert inspection.longest_context(config, bare, 4, free) == 20
    assert inspection.longest_context(config, bare, 4, bare.total - 1) == 0
    assert inspection.longest_context(config, bare, 4, 2**40) == config.max_positions


def test_free_memory_of_this_machine() -> None:
    memory = inspection.free_memory()
    assert memory.where == "main memory"
    assert memory.free is not None and memory.total is not None
    assert 0 < memory.free <= memory.total


@dataclasses.dataclass
class FakeDevice:
    """An accelerator that says, or does not say, what it has."""

    stats: dict[str, int] | None
    platform: str = "tpu"
    device_kind: str = "TPU v5e"

    def memory_stats(self) -> dict[str, int] | None:
        return self.stats


@pytest.mark.parametrize(
    ("stats", "expected"),
    [
        ({"bytes_limit": 100, "bytes_in_use": 30}, (70, 100)),
        ({"bytes_in_use": 30}, (None, None)),
        (None, (None, None)),
    ],
)
def test_free_memory_of_an_accelerator(
    stats: Any, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "local_devices", lambda: [FakeDevice(stats)])
    memory = inspection.free_memory()
    assert (memory.free, memory.total) == expected
    assert memory.where == "TPU v5e"


def test_a_container_limit_bounds_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(inspection, "_CONTAINER_LIMIT", str(limit))
    limit.write_text("max\n")
    unlimited = inspection.machine_memory()
    assert unlimited.total is not None and unlimited.total > 12_345
    limit.write_text("12345\n")
    limited = inspection.machine_memory()
    assert (limited.free, limited.total) == (12_345, 12_345)


def test_checksums_are_those_of_the_files(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, folder)
    weights = folder / "model.safetensors"
    found = inspection.checksums(open_source(str(folder)))
    assert found == {"model.safetensors": hashlib.sha256(weights.read_bytes()).hexdigest()}


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.98 KiB"),
        (1024, "1.00 KiB"),
        (10 * 1024, "10.0 KiB"),
        (500 * 1024**2, "500 MiB"),
        (1023 * 1024**2, "1.00 GiB"),
        (5 * 1024**5, "5120 TiB"),
    ],
)
def test_format_bytes(count: int, text: str) -> None:
    assert inspection.format_bytes(count) == text
