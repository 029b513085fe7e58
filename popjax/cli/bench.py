"""`popjax bench`: dense against methods, in turns in one process, never a lone time."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from popjax.cli import (
    cache_options,
    depth_options,
    frontier_options,
    gate_options,
    method_options,
    options,
    scout_options,
)
from popjax.cli.out_files import check_writable
from popjax.cli.repeated import of_several, once
from popjax.cli.terminal import Status, command, stdout_console, write

if TYPE_CHECKING:
    from popjax.bench import BenchResult
    from popjax.depth import DepthMethod
    from popjax.evaluation.protocols import Case
    from popjax.eviction import KvMethod
    from popjax.methods import Method
    from popjax.model import LanguageModel

# Repeated up to --prompt-tokens: timing depends on how many tokens there are, not on which.
PASSAGE = (
    "The river rises in the hills above the town, where rain falls on most days of the year, and "
    "runs through fields of barley before it meets the sea. In spring the water is high and brown; "
    "by late summer children cross it on stones. "
)
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        help="online-pruning (default, without --depth or --kv), frozen, rescore-all, griffin, "
        "gate-first; with --scout scout; with --statistics wanda-sp, flap, probe-pruning, teal or "
        "chess; may be repeated.",
        rich_help_panel="Method",
    ),
]
Ratios = Annotated[
    list[float] | None,
    typer.Option(
        "--ratio",
        help="Share of FFN channels to prune, 0 to 1; may be repeated.",
        rich_help_panel="Method",
    ),
]
Batches = Annotated[
    list[int] | None, typer.Option("--batch", min=1, help="Rows at once (1); may be repeated.")
]
PromptTokens = Annotated[
    list[int] | None,
    typer.Option(
        min=1,
        help="Length of the built-in prompt, used where none is given (256); may be repeated.",
    ),
]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", min=2, help="Tokens to decode.")]
Rounds = Annotated[int, typer.Option(min=1, help="How often each is timed.")]
Csv = Annotated[
    Path | None, typer.Option(help="Also write every number of every point to this file.")
]


@command
def bench(
    prompt: options.Prompt = None,
    prompt_file: options.PromptFile = None,
    model: options.Model = None,
    revision: options.Revision = None,
    dtype: options.Dtype = None,
    offline: options.Offline = False,
    method: Methods = None,
    ratio: Ratios = None,
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
    depth: depth_options.Depth = None,
    skip: depth_options.Skip = None,
    layer_scores: depth_options.LayerScores = None,
    kv: cache_options.Kv = None,
    kv_keep: cache_options.KvKeep = None,
    kv_tokens: cache_options.KvTokens = None,
    kv_window: cache_options.KvWindow = None,
    kv_gates: gate_options.GateFile = None,
    batch: Batches = None,
    prompt_tokens: PromptTokens = None,
    new_tokens: NewTokens = 64,
    rounds: Rounds = 5,
    csv: Csv = None,
    text: frontier_options.Text = None,
    figure: frontier_options.Figure = None,
    windows: frontier_options.Windows = None,
    prefix: frontier_options.Prefix = None,
    scored: frontier_options.Scored = None,
    json: options.Json = False,
) -> None:
    """Time dense decoding against one or more methods, interleaved, with the spread shown.

    Without --ratio, half of the FFN channels are pruned. --depth or --kv alone time just those;
    with --method or --ratio each of them, and all together. Every --batch is timed with every
    --prompt-tokens. With --text each method's loss against dense is measured too.
    """
    shallow = depth_options.chosen_depth(depth, skip, layer_scores)
    eviction = cache_options.chosen_kv(kv, kv_keep, kv_tokens, kv_window)
    gate_options.check_gates(eviction, kv_gates)
    alone = (shallow or eviction) and not (method or ratio or model_ratio)
    own = {"min_tokens": min_tokens, "unseen": unseen, "shared": shared, "ends": ends, "rest": rest}
    own |= {
        "model_ratio": model_ratio,
        "gamma": gamma,
        "prefill": prefill,
        "statistics": statistics,
    }
    pruning = {} if alone else _pruning(method, ratio, own)
    scout_options.check_scout(list(pruning.values()), scout)
    scoring = frontier_options.chosen(text, figure, windows, prefix, scored)
    for file, option in ((csv, "--csv"), (figure, "--figure")):
        check_writable(file, option, new=True)
    once(batch, "--batch")
    once(prompt_tokens, "--prompt-tokens")
    given = _given(prompt, prompt_file, prompt_tokens)
    loaded = options.ModelChoice(model, revision, dtype, offline).load()
    loaded = scout_options.with_scout(loaded, scout)
    pruning = {name: scout_options.fitted(one, loaded) for name, one in pruning.items()}
    cases = _cases(pruning, shallow, eviction)
    loaded = gate_options.with_gates(loaded, kv_gates)
    ids = loaded.encode(PASSAGE if given is None else given)[0]
    lengths = prompt_tokens or [256 if given is None else len(ids)]
    # A text too short is refused before anything is timed.
    windows_of_text = None if scoring is None else frontier_options.cut(loaded, scoring)
    points = [(rows, length) for length in lengths for rows in batch or [1]]
    results = _timed(loaded, cases, ids, points, new_tokens, rounds)
    found: dict[str, Any] = {
        "model": loaded.name,
        "points": [result.to_json() for result in results],
    }
    if scoring is not None and windows_of_text is not None:
        asked = (results[0], scoring, windows_of_text)
        found["quality"] = frontier_options.measured(loaded, cases, *asked)
    _publish(results, found, csv, json)


def _pruning(
    names: list[str] | None, ratios: list[float] | None, given: dict[str, Any]
) -> dict[str, Method]:
    """Every method at every ratio, by name: with the ratio where there are several."""
    named = names or ["online-pruning"]
    once(names, "--method")
    once(ratios, "--ratio")
    found = {}
    for name, own in zip(named, of_several(named, given), strict=True):
        for ratio in ratios or [None]:
            label = name if len(ratios or []) < 2 else f"{name} {ratio:g}"
            found[label] = options.pruning_method(name, ratio, **own)
    return found


def _cases(
    pruning: dict[str, Method], depth: DepthMethod | None, eviction: KvMethod | None
) -> dict[str, Case]:
    """What is timed by name: channels, layers and entries alone, then all that was asked for."""
    from popjax.depth import depth_method_name
    from popjax.evaluation.protocols import Case
    from popjax.eviction import kv_method_name

    cases = {name: Case(name, method) for name, method in pruning.items()}
    others = {}
    if depth is not None:
        others[depth_method_name(depth)] = Case(depth=depth)
    if eviction is not None:
        others[kv_method_name(eviction)] = Case(eviction=eviction)
    every = ", ".join(others)
    if len(others) > 1:
        others[every] = Case(depth=depth, eviction=eviction)
    both = {
        f"{name}, {every}": Case(name, m, eviction, depth) for name, m in pruning.items() if others
    }
    return {**cases, **others, **both}


def _given(prompt: str | None, file: Path | None, tokens: list[int] | None) -> str | None:
    if prompt is None and file is None:
        return None
    if tokens:
        raise typer.BadParameter(
            "the prompt that was given has a length of its own: drop one of the two",
            param_hint="--prompt-tokens",
        )
    return options.read_prompt(prompt, file)


def _timed(
    model: LanguageModel,
    cases: dict[str, Case],
    ids: list[int],
    points: list[tuple[int, int]],
    new_tokens: int,
    rounds: int,
) -> list[BenchResult]:
    """The benchmark at every point, a batch size and a prompt length."""
    from popjax.bench import bench as measure
    from popjax.sweep import prompt_rows

    results = []
    with Status() as status:
        for batch, length in points:
            where = f"{batch} x {length} tokens"
            status.say(f"{where}: warming up")
            result = measure(
                model,
                {name: case.method for name, case in cases.items()},
                depths={k: case.depth for k, case in cases.items() if case.depth},
                evictions={k: case.eviction for k, case in cases.items() if case.eviction},
                prompt_ids=prompt_rows(ids, batch, length),
                new_tokens=new_tokens,
                rounds=rounds,
                on_round=lambda done, at=where: status.say(f"{at}: round {done} of {rounds} done"),
            )
            results.append(result)
    return results


def _publish(
    results: list[BenchResult], found: dict[str, Any], csv: Path | None, json: bool
) -> None:
    from popjax.cli.tables import bench_view, frontier_view
    from popjax.sweep import write_csv

    if csv is not None:
        write_csv(csv, results)
    if json:
        write(json_format.dumps(found, allow_nan=False) + "\n")
        return
    for result in results:
        stdout_console().print(bench_view(result))
    if "quality" in found:
        stdout_console().print(frontier_view(found["quality"]))
