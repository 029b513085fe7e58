"""Choosing by cost: lines over vectors, this machine's own numbers, and the measurement of them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kernels_pallas import native
from kernels_pallas.native import cost, measure
from kernels_pallas.native.cost import FEW, MANY, MEASURED, Line, prefers_native


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    assert native.available(), native.status().reason  # found before the cache moves
    monkeypatch.setenv("POPJAX_CACHE", str(tmp_path))
    cost.costs.cache_clear()
    yield
    cost.costs.cache_clear()


def test_a_line_passes_through_what_was_measured() -> None:
    line = Line(1.0, 2.0, 9.0)
    assert [line.at(n) for n in (1, FEW, MANY)] == [1.0, 2.0, 9.0]
    assert line.at((FEW + MANY) // 2) == 5.5
    assert line.at(2 * MANY - FEW) == 16.0


def test_few_vectors_are_for_the_kernels_and_many_for_xla() -> None:
    for operation in ("expand", "contract", "mlp"):
        for dtype in cost.DTYPES:
            assert prefers_native(operation, 1, dtype)
            assert not prefers_native(operation, 4096, dtype)
    assert not prefers_native("mlp", 1, "float16")


def test_own_numbers_replace_those_that_come_with_popjax() -> None:
    slow = {key: Line(9.0, 9.0, 9.0) if "native" in key else line for key, line in MEASURED.items()}
    assert cost.costs() == MEASURED
    cost.keep(slow)
    assert cost.costs() == MEASURED  # a choice does not change within a process
    cost.costs.cache_clear()
    assert cost.costs() == slow
    assert not prefers_native("mlp", 1, "float32")


@pytest.mark.parametrize("text", ["", "{", "[]", '[["expand", "xla", "float32", 1, 2]]', "[1]"])
def test_a_damaged_file_is_named(text: str) -> None:
    cost.costs_file().write_text(text)
    with pytest.raises(ValueError, match=r"cpu_costs\.json does not hold costs .*: delete it"):
        prefers_native("mlp", 1, "float32")


def test_the_measurement_covers_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("_MATRICES", 1), ("_ROWS", 64), ("_WIDTH", 64)):
        monkeypatch.setattr(measure, name, size)
    found = measure.measured_costs(rounds=1)
    assert found.keys() == MEASURED.keys()
    assert all(0 < seconds < 1 for line in found.values() for seconds in (line.one, line.many))
    assert set(measure.scattered_bandwidth(rounds=1)) == {"expand", "contract", "read"}
    assert measure.read_bandwidth(rounds=1) > 1e8
