"""`popjax doctor`: it says what runs and why, and keeps what it measured."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kernels_pallas import native
from kernels_pallas.native import cost, measure
from popjax.cli import app


@pytest.fixture
def doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    assert native.available(), native.status().reason  # found before the cache moves
    monkeypatch.setenv("POPJAX_CACHE", str(tmp_path / "cache"))
    for name, size in (("_MATRICES", 1), ("_ROWS", 64), ("_WIDTH", 64), ("_READ", 2**16)):
        monkeypatch.setattr(measure, name, size)
    return lambda *arguments: CliRunner().invoke(app, ["doctor", *arguments])


def test_it_measures_and_keeps_the_costs(doctor: Any) -> None:
    result = doctor("--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["cpu_kernels"]["available"] and facts["cpu_kernels"]["instruction_set"]
    measured = facts["measured"]
    assert measured["kept"] == str(cost.costs_file())
    rows = {(row["operation"], row["form"], row["dtype"]) for row in measured["products"]}
    assert rows == set(cost.MEASURED)
    assert all(row["bandwidth"] > 0 for row in measured["products"])
    kept = {tuple(row[:3]) for row in json.loads(cost.costs_file().read_text())}
    assert kept == rows


def test_quick_measures_and_keeps_nothing(doctor: Any) -> None:
    result = doctor("--quick")
    assert result.exit_code == 0, result.output
    assert native.status().reason in result.stdout.replace("\n", " ")
    assert "GB/s" not in result.stdout
    assert not cost.costs_file().exists()


def test_a_cache_that_cannot_be_written_is_said(
    doctor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("POPJAX_CACHE", str(tmp_path / "file" / "cache"))
    result = doctor("--json")
    assert result.exit_code == 0, result.output
    assert "not kept: " in json.loads(result.stdout)["measured"]["kept"]


def test_without_kernels_it_says_why(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = native.library.Status(False, "no C++17 compiler on PATH: install one, or set CXX")
    monkeypatch.setattr(native, "status", lambda: missing)
    result = doctor()
    assert result.exit_code == 0, result.output
    assert "XLA only (no C++17 compiler on PATH" in result.stdout.replace("\n", " ")
