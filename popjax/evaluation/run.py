"""A whole evaluation: files and lm-eval's tasks, or a text, under several cases, resumable.

Leaves out options and tables (`cli/eval.py`, `cli/perplexity.py`).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from popjax import scouts
from popjax.evaluation import local_tasks, perplexity
from popjax.evaluation.encoding import Encoder
from popjax.evaluation.journal import Journal
from popjax.evaluation.protocols import SPLIT, Case
from popjax.evaluation.results import Evaluation, Row
from popjax.evaluation.scoring import Scorer
from popjax.evaluation.task_files import Task
from popjax.eviction import gates
from popjax.methods import check_evaluated
from popjax.model import LanguageModel

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


@dataclasses.dataclass(frozen=True)
class How:
    """How everything is scored: max_length tokens at once (None: the model's), limit items a task.

    num_fewshot is lm-eval's. Raises ValueError for a length that the model does not have.
    """

    protocol: str = SPLIT
    batch_size: int = 16
    max_length: int | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    chat: bool = False

    def encoder(self, model: LanguageModel) -> Encoder:
        """The model's tokenizer within the length asked for."""
        most = model.config.max_positions
        length = most if self.max_length is None else self.max_length
        if not 2 <= length <= most:
            raise ValueError(
                f"max_length {length} is outside 2..{most}, which the model takes: choose another"
            )
        return Encoder(model.tokenizer, length, self.protocol)

    def scorers(self, model: LanguageModel, cases: Sequence[Case]) -> list[Scorer]:
        """A scorer for each case."""
        for case in cases:
            # Refused before a file of results is begun.
            check_evaluated(case.method.for_model(model.config), model.config)
        place = model.params, model.config
        return [Scorer(*place, case, self.protocol, self.batch_size) for case in cases]

    def settings(self, model: LanguageModel, cases: Sequence[Case], **more: Any) -> dict[str, Any]:
        """All that decides the numbers. Not batch_size: rows do not sway each other."""
        return {
            "model": model.name,
            "fingerprint": model.fingerprint,
            "dtype": model.params["embed"]["table"].dtype.name,
            "protocol": self.protocol,
            "max_length": self.encoder(model).max_length,
            "limit": self.limit,
            "num_fewshot": self.num_fewshot,
            "chat": self.chat,
            "cases": {case.name: case.settings() for case in cases},
            "scout": scouts.digest(model.params),
            "gates": gates.digest(model.params),
            **more,
        }


def worded(model: LanguageModel, cases: Sequence[Case]) -> list[Case]:
    """The cases with eviction methods that ask the model in words given these as tokens."""
    return [
        dataclasses.replace(case, eviction=model.eviction_method(case.eviction, None, None))
        for case in cases
    ]


def evaluate_tasks(
    model: LanguageModel,
    cases: Sequence[Case],
    files: Sequence[Task],
    names: Sequence[str],
    manager: TaskManager | None,
    how: How,
    out: Path | None = None,
    on_done: Callable[[int], object] = lambda items: None,
) -> Evaluation:
    """Rows of the tasks of files and then of lm-eval's, which `manager` has.

    on_done hears how many more items (of files) or requests (of lm-eval) are done. Raises
    ValueError for what cannot be scored, before anything is, and for scores that are not finite,
    after those before them were kept in `out`.
    """
    cases, encoder = worded(model, cases), how.encoder(model)
    ready = [local_tasks.encoded(task, encoder, how.chat) for task in files]
    digests = {task.name: task.digest for task in files}
    settings = how.settings(model, cases, tasks={**digests, **dict.fromkeys(names, "lm-eval")})
    scorers = how.scorers(model, cases)
    with Journal(settings, out) as journal:
        rows = local_tasks.score(ready, scorers, journal, on_done)
        notes = [note for each in ready for note in local_tasks.notes(each, cases)]
        if manager is not None:
            found = _harness(model, cases, names, manager, how, journal, on_done)
            rows, notes = rows + found[0], notes + found[1]
    return Evaluation(model.name, how.protocol, tuple(rows), settings, tuple(notes))


def _harness(
    model: LanguageModel,
    cases: Sequence[Case],
    names: Sequence[str],
    manager: TaskManager,
    how: How,
    journal: Journal,
    on_done: Callable[[int], object],
) -> tuple[list[Row], list[str]]:
    from popjax.evaluation.harness import run_tasks
    from popjax.evaluation.lm import PopjaxLM

    def model_of(case: Case) -> PopjaxLM:
        return PopjaxLM(
            model,
            case=case,
            protocol=how.protocol,
            batch_size=how.batch_size,
            max_length=how.max_length,
            journal=journal,
            on_done=on_done,
        )

    options = {
        "limit": how.limit,
        "num_fewshot": how.num_fewshot,
        "apply_chat_template": how.chat,
    }
    return run_tasks(manager, names, cases, model_of, **options)


def evaluate_text(
    model: LanguageModel,
    cases: Sequence[Case],
    text: str,
    name: str,
    how: How,
    windows: perplexity.Windows,
    out: Path | None = None,
    on_done: Callable[[int], object] = lambda windows: None,
) -> Evaluation:
    """Log-perplexity of the windows of a text; raises ValueError as `evaluate_tasks`."""
    cases = worded(model, cases)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    more = {"text": digest, **perplexity.settings_of(windows)}
    settings = how.settings(model, cases, **more)
    scorers = how.scorers(model, cases)
    with Journal(settings, out) as journal:
        rows = perplexity.measure(windows, scorers, journal, name, on_done)
    return Evaluation(
        model.name, how.protocol, tuple(rows), settings, tuple(perplexity.notes(windows, rows))
    )


__all__ = ["How", "evaluate_tasks", "evaluate_text", "worded"]
