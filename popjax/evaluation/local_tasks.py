"""Multiple-choice tasks of files scored under several cases, each item against its dense twin.

Accuracy is counted as lm-eval counts it: the choice of greatest summed log-likelihood (`acc`), or
of greatest log-likelihood a character (`acc_norm`). Results are kept item by item (`journal.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from popjax.evaluation.encoding import Encoder, Pair
from popjax.evaluation.journal import Journal, is_number
from popjax.evaluation.protocols import DENSE, Case
from popjax.evaluation.results import Row, differences
from popjax.evaluation.scoring import Scorer
from popjax.evaluation.statistics import mean_of
from popjax.evaluation.task_files import Item, Task

METRICS = ("acc", "acc_norm", "answer_logprob")


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A task with the pairs of each item; cut: items whose context lost tokens, bare: had none."""

    task: Task
    pairs: tuple[tuple[Pair, ...], ...]

    @property
    def cut(self) -> int:
        return sum(any(pair.cut for pair in row) for row in self.pairs)

    @property
    def bare(self) -> int:
        return sum(not item.context for item in self.task.items)


def encoded(task: Task, encoder: Encoder, chat: bool = False) -> Encoded:
    """The task as tokens; with `chat` each context is a user's turn, and its choices the reply.

    Raises ValueError naming item and choice for what cannot be scored.
    """
    rows = []
    for i, item in enumerate(task.items):
        context, choices = item.context, item.choices
        if chat:
            context = encoder.chat([{"role": "user", "content": context}])
            choices = tuple(choice.lstrip() for choice in choices)
        pairs = (encoder.pair(context, c, task.where(i, j)) for j, c in enumerate(choices))
        rows.append(tuple(pairs))
    return Encoded(task, tuple(rows))


def score(
    tasks: Sequence[Encoded],
    scorers: Sequence[Scorer],
    journal: Journal,
    on_done: Callable[[int], object] = lambda items: None,
) -> list[Row]:
    """A row for each task, case and metric; the journal gets every item as soon as it is scored.

    on_done hears of items as they are done, or were in an earlier run. Raises ValueError for
    scores that are not finite.
    """
    rows: list[Row] = []
    for each in tasks:
        found = {s.case.name: _scored(each, s, journal, on_done) for s in scorers}
        rows += _rows(each, found)
    return rows


def _scored(
    each: Encoded, scorer: Scorer, journal: Journal, on_done: Callable[[int], object]
) -> list[list[float]]:
    """Log-likelihoods of the choices of every item."""
    keys = [f"{scorer.case.name}|{each.task.name}|{i}" for i in range(len(each.pairs))]
    left = [i for i, key in enumerate(keys) if not journal.holds(key, _numbers(each.pairs[i]))]
    on_done(len(keys) - len(left))
    places = [(i, j) for i in left for j in range(len(each.pairs[i]))]
    held: dict[int, dict[int, float]] = {i: {} for i in left}
    for index, result in scorer.scores([each.pairs[i][j] for i, j in places]):
        i, j = places[index]
        held[i][j] = result.logprob
        if len(held[i]) == len(each.pairs[i]):
            choices = range(len(each.pairs[i]))
            journal.put(keys[i], [held[i][j] for j in choices])
            on_done(1)
    return [journal[key] for key in keys]


def _numbers(pairs: Sequence[Pair]) -> Callable[[Any], bool]:
    """Whether a value is a number for each of these pairs."""
    return lambda value: (
        isinstance(value, list) and len(value) == len(pairs) and all(map(is_number, value))
    )


def measured(item: Item, logprobs: Sequence[float]) -> dict[str, float]:
    """The metrics of one item; ties go to the first choice."""
    lengths = [len(choice) for choice in item.choices]
    best = int(np.argmax(logprobs))
    normed = int(np.argmax([p / n for p, n in zip(logprobs, lengths, strict=True)]))
    values = (best == item.answer, normed == item.answer, logprobs[item.answer])
    return dict(zip(METRICS, map(float, values), strict=True))


def _rows(each: Encoded, found: dict[str, list[list[float]]]) -> list[Row]:
    values: dict[str, dict[str, list[float]]] = {}
    for name, items in found.items():
        pairs = zip(each.task.items, items, strict=True)
        measures = [measured(item, logprobs) for item, logprobs in pairs]
        values[name] = {metric: [m[metric] for m in measures] for metric in METRICS}
    rows = []
    for metric in METRICS:
        by_case = {name: held[metric] for name, held in values.items()}
        for name, held in by_case.items():
            rows.append(
                Row(
                    each.task.name,
                    metric,
                    name,
                    mean_of(held),
                    differences(by_case, name),
                )
            )
    return rows


def notes(each: Encoded, cases: Sequence[Case]) -> list[str]:
    """What a reader of the task's numbers has to know, in sentences."""
    said = [f"{each.task.name}: guessing gets {each.task.chance:.3f} right"]
    if each.cut:
        said.append(
            f"{each.task.name}: {each.cut} of {len(each.pairs)} items lost the left of their "
            "context, which is too long for the model"
        )
    if each.bare and any(not case.dense for case in cases):
        said.append(
            f"{each.task.name}: {each.bare} of {len(each.pairs)} contexts are empty, so that the "
            "start token alone decides what is pruned"
        )
    return said


__all__ = ["DENSE", "Encoded", "encoded", "measured", "notes", "score"]
