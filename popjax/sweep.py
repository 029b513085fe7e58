"""Benchmarks at several batch sizes and prompt lengths, and their numbers as rows of a CSV file.

Methods are compared within one point only: points follow each other, and a machine's speed drifts.
Leaves out what is timed (`bench.py`) and pictures (`frontier.py`).
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoints.atomic import new_file
from popjax.bench import DENSE, BenchResult, MethodBench, Spread

# Seconds, each as its median with the least and the most of all rounds.
SECONDS = ("prefill", "evict", "plan", "pack", "decode_step")
BYTES = ("read_bytes", "weight_bytes", "packed_bytes", "cache_bytes")


def prompt_rows(ids: Sequence[int], batch: int, tokens: int) -> list[list[int]]:
    """`batch` rows of `tokens` ids each: `ids` over and over, every row from another place.

    Raises ValueError for no ids.
    """
    if not ids:
        raise ValueError("the prompt has no tokens to repeat: give a longer one")
    starts = [row * len(ids) // batch for row in range(batch)]
    return [list(itertools.islice(itertools.cycle(ids), s, s + tokens)) for s in starts]


def csv_rows(results: Sequence[BenchResult]) -> list[dict[str, Any]]:
    """One flat row a method and point: seconds, bytes held and read, and ratios to dense."""
    return [_row(result, method) for result in results for method in result.methods]


def _row(result: BenchResult, method: MethodBench) -> dict[str, Any]:
    row: dict[str, Any] = {
        "method": method.name,
        "batch": result.batch,
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": result.new_tokens,
        "rounds": len(method.decode_step.rounds),
    }
    for name in SECONDS:
        row |= _columns(f"{name}_seconds", getattr(method, name))
    row["compile_seconds"] = method.compile
    row |= {name: getattr(method, name) for name in BYTES}
    ratio = Spread((1.0,)) if method.name == DENSE else result.ratio(method.name)
    row |= _columns("dense_over_method", ratio)
    row["bytes_ratio"] = result.bytes_ratio(method.name)
    row["speedup"] = "" if method.name == DENSE else result.speedup(method.name)
    return row


def _columns(name: str, spread: Spread) -> dict[str, float]:
    return {name: spread.median, f"{name}_min": spread.low, f"{name}_max": spread.high}


def write_csv(path: Path, results: Sequence[BenchResult]) -> None:
    """The rows of `csv_rows` as a file, whole or not at all."""
    rows = csv_rows(results)
    with new_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
