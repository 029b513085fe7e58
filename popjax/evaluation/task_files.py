"""Multiple-choice tasks in files: a JSON object a line with context, choices and answer.

Every line is checked before anything is scored. Leaves out scoring (`local_tasks.py`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Item:
    """A question: which of the choices follows the context."""

    context: str
    choices: tuple[str, ...]
    answer: int


@dataclasses.dataclass(frozen=True)
class Task:
    """Items under a name, and a digest of the file that they are of."""

    name: str
    items: tuple[Item, ...]
    digest: str

    @property
    def chance(self) -> float:
        """The share that guessing gets right."""
        return sum(1 / len(item.choices) for item in self.items) / len(self.items)

    def where(self, item: int, choice: int) -> str:
        """What a complaint about a choice calls it; lines count from 1."""
        return f"choice {choice} of item {item + 1} of {self.name}"


def load_task(path: Path, limit: int | None = None) -> Task:
    """The task of a .jsonl file, its first `limit` items where one is given.

    Raises ValueError naming file and line for what is not a task.
    """
    if not path.is_file():
        raise ValueError(f"there is no task file {path}: give a .jsonl file or a name lm-eval has")
    data = path.read_bytes()
    try:
        # Not splitlines(): strings of JSON may hold the other ends of lines that it knows.
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}: convert it") from error
    items = [_item(path, n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not items:
        raise ValueError(f"{path} is empty: write one JSON object a line")
    digest = hashlib.sha256(data).hexdigest()[:16]
    return Task(path.stem, tuple(items[:limit]), digest)


def load_tasks(paths: Sequence[Path], limit: int | None = None) -> list[Task]:
    """The tasks of several files. Raises ValueError as `load_task`, and for two of one name."""
    tasks = [load_task(path, limit) for path in paths]
    names = [task.name for task in tasks]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"two task files are called {twice[0]}: rename one, or give it once")
    return tasks


def _item(path: Path, number: int, line: str) -> Item:
    where = f"line {number} of {path}"
    try:
        held = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error.msg}): write one object a line") from error
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply: write one flat object a line") from error
    except ValueError as error:  # the one that Python raises for more digits than it reads
        raise ValueError(
            f"{where} has a number of too many digits: write the answer as the place of a choice"
        ) from error
    if not isinstance(held, dict):
        raise ValueError(f"{where} is no JSON object: write context, choices and answer")
    missing = [name for name in ("context", "choices", "answer") if name not in held]
    if missing:
        raise ValueError(f"{where} has no {missing[0]!r}: write context, choices and answer")
    _check(where, held["context"], held["choices"], held["answer"])
    return Item(held["context"], tuple(held["choices"]), held["answer"])


def _check(where: str, context: Any, choices: Any, answer: Any) -> None:
    if not isinstance(context, str):
        raise ValueError(f"{where} has the context {context!r:.40}: write a string, maybe empty")
    several = isinstance(choices, list) and len(choices) > 1
    if not several or not all(isinstance(choice, str) and choice for choice in choices):
        raise ValueError(f"{where} has the choices {choices!r:.60}: write two or more strings")
    for text in (context, *choices):
        _check_text(where, text)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"{where} has the answer {answer!r:.40}: write 0..{len(choices) - 1}")


def _check_text(where: str, text: str) -> None:
    """Raise ValueError for half of a surrogate pair, which JSON can escape and no text has."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} has half of a surrogate pair, {ascii(text[error.start])}, in a string: "
            "write the whole character"
        ) from error


__all__ = ["Item", "Task", "load_task", "load_tasks"]
