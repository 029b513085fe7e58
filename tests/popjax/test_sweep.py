"""Sweeps: what is timed at each point, and every number of it in a CSV file."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from popjax.bench import BenchResult, MethodBench, Spread
from popjax.sweep import csv_rows, prompt_rows, write_csv


def result(batch: int) -> BenchResult:
    def method(name: str, step: tuple[float, ...], read: int) -> MethodBench:
        spread = Spread(step)
        return MethodBench(name, spread, spread, spread, spread, spread, 0.5, read, 7, 3, 2)

    rows = (method("dense", (4.0, 2.0, 3.0), 10), method("fast", (2.0, 2.0, 1.0), 5))
    return BenchResult(batch, 8, 4, rows)


def test_rows_of_a_prompt_begin_at_different_places() -> None:
    assert prompt_rows(range(4), 2, 6) == [[0, 1, 2, 3, 0, 1], [2, 3, 0, 1, 2, 3]]
    assert prompt_rows(range(4), 1, 3) == [[0, 1, 2]]
    with pytest.raises(ValueError, match="no tokens to repeat"):
        prompt_rows([], 1, 3)


def test_a_row_holds_medians_with_their_spread_and_bytes() -> None:
    dense, fast = csv_rows([result(2)])
    assert (dense["batch"], dense["prompt_tokens"], dense["rounds"]) == (2, 8, 3)
    step = [dense[f"decode_step_seconds{end}"] for end in ("", "_min", "_max")]
    assert step == [3.0, 2.0, 4.0]
    assert (fast["read_bytes"], fast["weight_bytes"], fast["packed_bytes"]) == (5, 7, 3)
    assert fast["dense_over_method"] == 2.0 and fast["bytes_ratio"] == 2.0
    assert "contains 1" in fast["speedup"] and dense["speedup"] == ""


def test_the_file_holds_a_row_a_method_and_point(tmp_path: Path) -> None:
    path = tmp_path / "bench.csv"
    write_csv(path, [result(1), result(4)])
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["batch"]) for row in rows] == [
        ("dense", "1"),
        ("fast", "1"),
        ("dense", "4"),
        ("fast", "4"),
    ]
    assert list(tmp_path.iterdir()) == [path]
