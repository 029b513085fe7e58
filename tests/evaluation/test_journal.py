"""Results on disk: kept as they come, resumed, and refused where they are of another run."""

from __future__ import annotations

from pathlib import Path

import pytest

from popjax.evaluation.journal import Journal, is_number

SETTINGS = {"protocol": "split", "limit": 4, "cases": {"dense": {"gamma": 0.1}}}


def filled(path: Path) -> None:
    with Journal(SETTINGS, path) as journal:
        journal.put("dense|pets|0", [-1.5, -2.25])
        journal.put("dense|pets|1", [-3.0])


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    filled(path)
    with Journal(SETTINGS, path) as journal:
        assert journal.resumed == 2 and journal["dense|pets|0"] == [-1.5, -2.25]
        assert not journal.holds("dense|pets|2", bool)
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
        ({**SETTINGS, "limit": 9}, r"of other settings \(limit 4, now 9\): use the same settings"),
        ({"protocol": "split", "limit": 4}, r"\(cases given, now none\)"),
        ({**SETTINGS, "chat": True}, r"\(chat none, now True\)"),
        ({**SETTINGS, "cases": {}}, r"\(cases: dense given, now none\)"),
        (
            {**SETTINGS, "limit": 1, "cases": {"dense": {"gamma": 0.2, "ratio": "y" * 90}}},
            r"\(limit 4, now 1; cases: dense: gamma 0\.1, now 0\.2; "
            r"cases: dense: ratio none, now y{37}\.\.\.\)",
        ),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, settings: dict, words: str) -> None:
    path = tmp_path / "out.jsonl"
    filled(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=words):
        Journal(settings, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "held",
    [
        *(b"my thesis\n", b"my thesis", b'{"a": 1}\n', b"[1]\n", b"\xff\n"),
        *(b'{"popjax-evaluation": "x"}\n', b"[" * 9000 + b"\n"),
    ],
)
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
    for bad in (b"{broken\n", b'{"key": "a", "value": NaN}\n', b"[" * 9000 + b"\n"):
        path.write_bytes(lines[0] + bad + lines[2])
        with pytest.raises(ValueError, match="damaged at line 2"):
            Journal(SETTINGS, path)
    with pytest.raises(ValueError, match="is a folder"):
        Journal(SETTINGS, tmp_path)


def test_a_value_of_another_kind_is_named(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    filled(path)
    with Journal(SETTINGS, path) as journal:
        journal.put("a", "words")
        assert journal.holds("a", lambda value: isinstance(value, str))
        words = "out.jsonl is damaged: the value of 'a' is words, no result of its kind: remove"
        with pytest.raises(ValueError, match=words):
            journal.holds("a", is_number)
    assert [is_number(value) for value in (1, -2.5, True, "1", None)] == [True, True, *[False] * 3]


def test_places_that_take_no_file(tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to(tmp_path / "no" / "where")
    for place in (tmp_path / "no" / "out.jsonl", tmp_path / "gone", tmp_path / ("n" * 300)):
        with pytest.raises(ValueError, match=r"cannot be opened \(.*\): give --out another name"):
            Journal(SETTINGS, place)
    with pytest.raises(ValueError, match="/dev/null is a device: give --out the name of a file"):
        Journal(SETTINGS, Path("/dev/null"))
