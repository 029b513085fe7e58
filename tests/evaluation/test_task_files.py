"""Task files: what is read, and one sentence for each thing that can be wrong with a line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from popjax.evaluation.task_files import load_task, load_tasks
from tests.evaluation.conftest import ITEMS

GOOD = ITEMS[0]


def test_items_are_read_in_order_up_to_the_limit(task_file: Callable[..., Path]) -> None:
    task = load_task(task_file([ITEMS[0], "", ITEMS[1]]))
    assert task.name == "pets" and task.items[1].choices == (" barks.", " purrs.", " is a fish.")
    assert task.chance == pytest.approx((1 / 2 + 1 / 3) / 2)
    limited = load_task(task_file(ITEMS), 2)
    ends = {"context": "a\u2028b\x85c", "choices": ["x", "y"], "answer": 1}
    raw = [json.dumps(ends, ensure_ascii=False) + "\r", ITEMS[0]]
    assert load_task(task_file(raw)).items[0].context == ends["context"]
    assert len(limited.items) == 2 and limited.digest == load_task(task_file(ITEMS)).digest


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", r"line 2 of .*pets.jsonl is not JSON"),
        ("[1]", "is no JSON object"),
        ({"context": "a", "choices": ["b", "c"]}, "has no 'answer'"),
        ({**GOOD, "context": 5}, "has the context 5: write a string"),
        ({**GOOD, "choices": ["one"]}, r"has the choices \['one'\]: write two or more"),
        ({**GOOD, "choices": ["one", ""]}, "write two or more strings"),
        ({**GOOD, "choices": "ab"}, "write two or more strings"),
        ({**GOOD, "answer": 2}, r"has the answer 2: write 0\.\.1"),
        ({**GOOD, "answer": True}, "has the answer True"),
        ({**GOOD, "answer": "0"}, "has the answer '0'"),
        (
            {**GOOD, "answer": 10**4000},
            r"line 2 of .*pets.jsonl has the answer 10{39}: write 0\.\.1$",
        ),
        (
            f'{{"answer": {"1" * 5000}}}',
            "line 2 of .*pets.jsonl has a number of too many digits: w",
        ),
        ("[" * 99999, "line 2 of .*pets.jsonl is nested too deeply: write one flat object a line"),
        (
            {**GOOD, "context": "a\ud83d"},
            r"line 2 of .*has half of a surrogate pair, '\\ud83d', in",
        ),
        ({**GOOD, "choices": ["b", "\udc00"]}, "half of a surrogate pair"),
    ],
)
def test_bad_lines_are_named(task_file: Callable[..., Path], line: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_task(task_file([GOOD, line]))


def test_files_that_are_no_tasks_are_named(task_file: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no task file .*nothing\.jsonl"):
        load_task(tmp_path / "nothing.jsonl")
    for lines in ([], ["", "  "]):
        with pytest.raises(ValueError, match="is empty: write one JSON object a line"):
            load_task(task_file(lines))
    (tmp_path / "latin.jsonl").write_bytes(b'{"context": "\xe9"}')
    with pytest.raises(ValueError, match="is not UTF-8 at byte 13"):
        load_task(tmp_path / "latin.jsonl")
    path = task_file()
    with pytest.raises(ValueError, match="two task files are called pets"):
        load_tasks([path, path])
