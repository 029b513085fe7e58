"""Targets by name, and what is said where their compiler is missing."""

import importlib.util

import pytest

from popjax.targets import CHIPS, devices, parse_target


def test_a_target_is_a_chip_and_its_topology() -> None:
    target = parse_target(" V5P:2x2x4 ")
    assert (str(target), target.chip, target.chips) == ("v5p:2x2x4", CHIPS["v5p"], 16)
    assert str(parse_target("v6e")) == "v6e:1x1"
    assert [str(other) for other in parse_target("v5e:8x8").larger()] == ["v5e:8x16", "v5e:16x16"]
    assert [str(other) for other in parse_target("v4:2x2x2").smaller()] == ["v4:2x2x1", "v4:1x1x1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v9:2x2", r"target 'v9:2x2' names no known chip: use one of v4, v5e, v5p, v6e"),
        ("", "names no known chip"),
        ("v5e:3x3", "names no listed topology of v5e: use one of 1x1, 2x2, 2x4"),
        ("v5e:", "names no listed topology"),
        ("v5e:2x2:1", "names no listed topology"),
        ("v5p:2x2", "names no listed topology of v5p: use one of 1x1x1"),
    ],
)
def test_other_targets_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_target(text)


def test_chips_are_listed_smallest_first_and_lose_little_memory() -> None:
    for chip in CHIPS.values():
        counts = [parse_target(f"{chip.name}:{topology}").chips for topology in chip.topologies]
        assert counts == sorted(set(counts)) and counts[0] == 1
        assert 0.9 * chip.hbm < chip.usable < 1.01 * chip.hbm
        assert chip.described in chip.topologies


def test_a_missing_compiler_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'v5e:2x2 needs .*: pip install "popjax\[aot\]"'):
        devices(parse_target("v5e:2x2"))
