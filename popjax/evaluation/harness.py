"""lm-eval's own tasks under several cases: its prompts, metrics and filters, our model class.

Needs the extra `eval`, and a task's data where lm-eval looks for it. Each case sees the same
requests, so that differences from dense are paired by document. What lm-eval cannot do is one
sentence here.
"""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from popjax.evaluation.protocols import Case
from popjax.evaluation.results import Row, differences
from popjax.evaluation.statistics import Mean, mean_of, ratio
from popjax.text import first_line

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from popjax.evaluation.lm import PopjaxLM


def check_installed(names: Sequence[str]) -> None:
    """Raise ImportError where lm-eval, which these tasks are of, is not installed."""
    if find_spec("lm_eval") is None:
        raise ImportError(
            f"the task {names[0]} is one of lm-eval, which is not installed: pip install "
            "'popjax[eval]', or give a .jsonl file"
        )


def task_manager(names: Sequence[str], include: Path | None = None) -> TaskManager:
    """lm-eval's list of tasks, those of the folder `include` too.

    Raises ImportError without lm-eval, and ValueError for a name that it does not have.
    """
    check_installed(names)
    if include is not None and not include.is_dir():
        raise ValueError(f"there is no folder {include} of tasks: give one with .yaml files")
    from lm_eval.tasks import TaskManager

    if include is not None:
        # Its own tasks are thousands of files, which take seconds to read.
        manager = TaskManager(include_path=str(include), include_defaults=False)
        if all(manager.match_tasks([name]) for name in names):
            return manager
    manager = TaskManager(include_path=None if include is None else str(include))
    for name in names:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"; the nearest is {near[0]!r}" if near else ""
            raise ValueError(
                f"task {name!r} is unknown to lm-eval, which has {len(manager.all_tasks)}{hint}: "
                "`lm-eval ls tasks` lists them; a file of your own ends in .jsonl"
            )
    return manager


def check_data(manager: TaskManager, names: Sequence[str]) -> None:
    """Raise ValueError naming the task whose data cannot be had."""
    for name in (each for asked in names for each in manager.match_tasks([asked])):
        try:
            manager.load([name])
        # Data comes through foreign code, which fails in ways of its own.
        except Exception as error:
            raise ValueError(
                f"the data of task {name!r} cannot be had here ({type(error).__name__}: "
                f"{first_line(error)}): run it once where there is a network, with the same "
                "HF_HOME, or give a .jsonl file"
            ) from error


def run_tasks(
    manager: TaskManager,
    names: Sequence[str],
    cases: Sequence[Case],
    model_of: Callable[[Case], PopjaxLM],
    **options: Any,
) -> tuple[list[Row], list[str]]:
    """A row a task, metric and case, and notes; options are those of `simple_evaluate`."""
    from lm_eval import simple_evaluate

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    specs = [each for name in names for each in manager.match_tasks([name])]
    found: dict[str, Any] = {}
    notes = []
    for case in cases:
        model = model_of(case)
        # Its decorator hides the signature from type checkers.
        found[case.name] = cast(Any, simple_evaluate)(
            model=model,
            tasks=list(specs),
            task_manager=manager,
            log_samples=True,
            # Its bootstrap forks processes, and jax has threads; `_value` has the errors.
            bootstrap_iters=0,
            **options,
        )
        if model.cut:
            notes.append(
                f"{case.name}: {model.cut} requests lost the left of their context, which is too "
                "long for the model"
            )
    return _rows(found), notes


def _rows(found: dict[str, Any]) -> list[Row]:
    first = next(iter(found.values()))
    rows = []
    for task, values in first["results"].items():
        for key in (key for key in values if "," in key and "_stderr," not in key):
            metric, kept = key.split(",", 1)
            held = {name: _samples(result, task, metric, kept) for name, result in found.items()}
            scalar = {name: v for name, v in held.items() if v and isinstance(v[0], float)}
            for name, result in found.items():
                value = _value(result["results"][task][key], held[name], result, task)
                # "none" is lm-eval's word for no filter.
                label = metric if kept == "none" else f"{metric}, {kept}"
                gap = differences(scalar, name) if name in scalar else None
                rows.append(Row(task, label, name, value, gap, from_harness=True))
    return rows


def _samples(result: dict[str, Any], task: str, metric: str, kept: str) -> list[Any]:
    """A metric of each document in order: numbers as float, pairs as they are; else nothing."""
    samples = [s for s in result.get("samples", {}).get(task, ()) if s.get("filter") == kept]
    values = [s.get(metric) for s in sorted(samples, key=lambda s: s["doc_id"])]
    if all(isinstance(v, bool | int | float) or hasattr(v, "dtype") for v in values):
        return [float(v) for v in values]  # type: ignore[arg-type]
    pairs = all(isinstance(v, tuple | list) and len(v) == 2 for v in values)
    return values if pairs else []


def _value(stated: Any, values: Sequence[Any], result: dict[str, Any], task: str) -> Mean:
    """lm-eval's number with its standard error where that follows from the documents, else NaN.

    A mean has the error of a mean; exp(-sum / weights), a perplexity, that of the ratio times
    itself.
    """
    stated = float(stated)
    if values and isinstance(values[0], float):
        mean = mean_of(values)
        known = math.isclose(mean.mean, stated, rel_tol=1e-6, abs_tol=1e-9)
        return Mean(stated, mean.standard_error if known else math.nan, mean.n)
    if values:
        rate = ratio([-float(a) for a, _ in values], [float(b) for _, b in values])
        known = math.isclose(math.exp(rate.mean), stated, rel_tol=1e-6)
        return Mean(stated, stated * rate.standard_error if known else math.nan, rate.n)
    count = result.get("n-samples", {}).get(task, {}).get("effective", 0)
    return Mean(stated, math.nan, int(count))


__all__ = ["check_data", "check_installed", "run_tasks", "task_manager"]
