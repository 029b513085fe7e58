"""Results on disk: kept as they come, resumed, and refused where they are of another run."""

from __future__ import annotations

from pathlib import Path

import pytest

from popjax.evaluation.journal import Journal

SETTINGS = {"protocol": "split", "limit": 4, "cases": {"dense": "x"}}


def filled(path: Path) -> None:
    with Journal(SETTINGS, path) as journal:
        journal.put("dense|pets|0", [-1.5, -2.25])
        journal.put("dense|pets|1", [-3.0])


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    filled(path)
    with Journal(SETTINGS, path) as journal:
        assert journal.resumed == 2 and journal["dense|pets|0"] == [-1.5, -2.25]
        assert "dense|pets|2" not in journal
        journal.put("dense|pets|2", [-4.0])
    with Journal(SETTINGS, path) as journal:
        assert journal.resumed == 3


def test_values_are_on_disk_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with Journal(SETTINGS, path) as journal:
        journal.put("a", 1.0)
        assert path.read_bytes().endswith(b'{"key": "a", "value": 1.0}\n')


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "out.jsonl"
    filled(path)
    path.write_bytes(path.read_bytes()[:-cut])
    with Journal(SETTINGS, path) as journal:
        assert journal.resumed == 1
        journal.put("dense|pets|1", [-3.0])
    whole = path.read_bytes()
    filled(tmp_path / "again.jsonl")
    assert whole == (tmp_path / "again.jsonl").read_bytes()


def test_a_crash_in_the_first_line_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    filled(path)
    path.write_bytes(path.read_bytes()[:30])
    with Journal(SETTINGS, path) as journal:
        assert journal.resumed == 0
        journal.put("a", 1)
    with Journal(SETTINGS, path) as journal:
        assert journal["a"] == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({**SETTINGS, "limit": 9}, "with limit 4, and this run has 9: use the same settings"),
        ({"protocol": "split", "limit": 4}, r"with cases \{'dense': 'x'\}, and this run has None"),
        ({**SETTINGS, "chat": True}, "with chat None, and this run has True"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, settings: dict, words: str) -> None:
    path = tmp_path / "out.jsonl"
    filled(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=words):
        Journal(settings, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("held", [b"my thesis\n", b"my thesis", b'{"a": 1}\n', b"[1]\n", b"\xff\n"])
def test_a_file_of_something_else_is_not_touched(tmp_path: Path, held: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(held)
    with pytest.raises(ValueError, match="holds no results of an evaluation"):
        Journal(SETTINGS, path)
    assert path.read_bytes() == held


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    filled(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"{broken\n" + lines[2])
    with pytest.raises(ValueError, match="damaged at line 2"):
        Journal(SETTINGS, path)
    with pytest.raises(ValueError, match="is a folder"):
        Journal(SETTINGS, tmp_path)
