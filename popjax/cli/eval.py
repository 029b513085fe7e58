"""`popjax eval`: tasks of files and of lm-eval under dense and any number of methods, paired."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from popjax.cli import (
    cache_options,
    depth_options,
    evaluation_options,
    gate_options,
    method_options,
    options,
    scout_options,
)
from popjax.cli.out_files import check_writable
from popjax.cli.terminal import Status, command

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

Tasks = Annotated[
    list[str],
    typer.Option(
        "--tasks",
        "-t",
        help="Names that lm-eval has, or .jsonl files with context, choices and answer; with "
        "commas between them, or repeated.",
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Score the first items of each task.")]
Shots = Annotated[
    int | None,
    typer.Option("--num-fewshot", min=0, help="Examples before each question (lm-eval's tasks)."),
]
Include = Annotated[
    Path | None, typer.Option("--include-path", help="Folder with more tasks for lm-eval.")
]


@command
def evaluate(
    tasks: Tasks,
    model: options.Model = None,
    revision: options.Revision = None,
    dtype: options.Dtype = None,
    offline: options.Offline = False,
    method: evaluation_options.Methods = None,
    ratio: options.Ratio = None,
    model_ratio: options.ModelRatio = None,
    gamma: options.Gamma = None,
    prefill: options.Prefill = None,
    statistics: options.Statistics = None,
    min_tokens: method_options.MinTokens = None,
    unseen: method_options.Unseen = None,
    shared: method_options.Shared = None,
    ends: method_options.Ends = None,
    rest: method_options.Rest = None,
    scout: scout_options.ScoutFile = None,
    kv: cache_options.Kv = None,
    kv_keep: cache_options.KvKeep = None,
    kv_tokens: cache_options.KvTokens = None,
    kv_window: cache_options.KvWindow = None,
    kv_gates: gate_options.GateFile = None,
    depth: depth_options.Depth = None,
    skip: depth_options.Skip = None,
    layer_scores: depth_options.LayerScores = None,
    protocol: evaluation_options.Protocol = "split",
    dense: evaluation_options.Dense = True,
    limit: Limit = None,
    num_fewshot: Shots = None,
    chat: options.Chat = False,
    batch_size: evaluation_options.BatchSize = 16,
    max_length: evaluation_options.MaxLength = None,
    include_path: Include = None,
    out: evaluation_options.Out = None,
    json: options.Json = False,
) -> None:
    """Score tasks, and what each method loses to dense on the very same items.

    Every number is of one protocol, which is printed with it, and carries its standard error;
    differences are paired. Files need nothing but popjax; names need `popjax[eval]`.
    """
    check_writable(out, "--out")
    eviction = cache_options.chosen_kv(kv, kv_keep, kv_tokens, kv_window)
    gate_options.check_gates(eviction, kv_gates)
    own = {"min_tokens": min_tokens, "unseen": unseen, "shared": shared, "ends": ends, "rest": rest}
    given = {"ratio": ratio, "model_ratio": model_ratio, "gamma": gamma, "prefill": prefill}
    cases = evaluation_options.asked_cases(
        method,
        {**given, **own, "statistics": statistics},
        eviction,
        depth_options.chosen_depth(depth, skip, layer_scores),
        dense=dense,
        protocol=protocol,
        scout=scout,
    )
    names = [name for each in tasks for name in each.split(",") if name]
    if not names:
        raise typer.BadParameter("no task is named: give one", param_hint="--tasks")
    files = [Path(name) for name in names if name.endswith(".jsonl")]
    named = [name for name in names if not name.endswith(".jsonl")]
    _check_harness(named, {"--num-fewshot": num_fewshot, "--include-path": include_path})
    from popjax.evaluation.run import How, evaluate_tasks
    from popjax.evaluation.task_files import load_tasks

    try:
        read = load_tasks(files, limit)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--tasks") from error
    manager = _manager(named, include_path, offline) if named else None
    loaded = options.ModelChoice(model, revision, dtype, offline).load()
    loaded = scout_options.with_scout(loaded, scout)
    cases = [replace(case, method=scout_options.fitted(case.method, loaded)) for case in cases]
    loaded = gate_options.with_gates(loaded, kv_gates)
    how = How(protocol, batch_size, max_length, limit, num_fewshot, chat)
    items = sum(len(task.items) for task in read) * len(cases) if manager is None else None
    with evaluation_options.Bar("Scoring", items) as bar:
        asked = read, named, manager
        found = evaluate_tasks(loaded, cases, *asked, how, out, bar.done)
    evaluation_options.show(found, json)


def _check_harness(named: list[str], given: dict[str, Any]) -> None:
    """Wrong usage for an option of lm-eval's tasks where none of them is named."""
    for option, value in given.items():
        if value is not None and not named:
            raise typer.BadParameter(
                "it is of tasks that lm-eval has, and only files are named: leave it out",
                param_hint=option,
            )
        if isinstance(value, Path) and not value.is_dir():
            raise typer.BadParameter(f"there is no folder {value}", param_hint=option)


def _manager(names: list[str], include: Path | None, offline: bool) -> TaskManager:
    """lm-eval's tasks, those named checked to have data here."""
    if offline:
        os.environ["HF_DATASETS_OFFLINE"] = "1"  # read when lm-eval imports datasets
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"
    from popjax.evaluation.harness import check_data, task_manager

    with Status() as status:
        status.say("Reading lm-eval's tasks")
        try:
            manager = task_manager(names, include)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--tasks") from error
        status.say(f"Loading the data of {', '.join(names)}")
        check_data(manager, names)
    return manager
