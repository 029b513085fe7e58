"""`popjax bench`: dense against methods, in turns in one process, never a lone time."""

from __future__ import annotations

import json as json_format
from typing import TYPE_CHECKING, Annotated

import typer

from popjax.cli import depth_options, options
from popjax.cli.terminal import Status, command, stdout_console, write

if TYPE_CHECKING:
    from popjax.depth import DepthMethod
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
        help="online-pruning (default, without --depth), frozen, rescore-all or griffin; with "
        "--statistics wanda-sp, flap, probe-pruning, teal or chess; may be repeated.",
        rich_help_panel="Method",
    ),
]
PromptTokens = Annotated[
    int, typer.Option(min=1, help="Length of the built-in prompt, used where none is given.")
]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", min=2, help="Tokens to decode.")]
Rounds = Annotated[int, typer.Option(min=1, help="How often each is timed.")]


@command
def bench(
    prompt: options.Prompt = None,
    prompt_file: options.PromptFile = None,
    model: options.Model = None,
    revision: options.Revision = None,
    dtype: options.Dtype = None,
    offline: options.Offline = False,
    method: Methods = None,
    ratio: options.Ratio = None,
    model_ratio: options.ModelRatio = None,
    gamma: options.Gamma = None,
    prefill: options.Prefill = None,
    statistics: options.Statistics = None,
    depth: depth_options.Depth = None,
    skip: depth_options.Skip = None,
    layer_scores: depth_options.LayerScores = None,
    prompt_tokens: PromptTokens = 256,
    new_tokens: NewTokens = 64,
    rounds: Rounds = 5,
    json: options.Json = False,
) -> None:
    """Time dense decoding against one or more methods, interleaved, with the spread shown.

    Without --ratio, half of the FFN channels are pruned. --depth or --skip alone time just that;
    with --method or --ratio each of the two, and both together.
    """
    shallow = depth_options.chosen_depth(depth, skip, layer_scores)
    named = method or ([] if shallow and ratio is None and model_ratio is None else [None])
    given = (ratio, model_ratio, gamma, prefill, statistics)
    pruning = {name or "online-pruning": options.pruning_method(name, *given) for name in named}
    chosen, depths = _cases(pruning, shallow)
    text = None
    if prompt is not None or prompt_file is not None:
        text = options.read_prompt(prompt, prompt_file)
    loaded = options.ModelChoice(model, revision, dtype, offline).load()
    prompt_ids = loaded.encode(text)[0] if text is not None else _passage(loaded, prompt_tokens)
    _time(loaded, chosen, depths, prompt_ids, new_tokens, rounds, json)


def _cases(
    pruning: dict[str, Method], depth: DepthMethod | None
) -> tuple[dict[str, Method], dict[str, DepthMethod]]:
    """What is timed by name, and what skips layers: the depth method alone, and with each other."""
    if depth is None:
        return pruning, {}
    from popjax.depth import depth_method_name

    alone = depth_method_name(depth)
    both = {f"{name}, {alone}": method for name, method in pruning.items()}
    return {**pruning, **both}, dict.fromkeys([alone, *both], depth)


def _time(
    model: LanguageModel,
    methods: dict[str, Method],
    depths: dict[str, DepthMethod],
    prompt_ids: list[int],
    new_tokens: int,
    rounds: int,
    json: bool,
) -> None:
    from popjax.bench import bench as measure
    from popjax.cli.tables import bench_view

    with Status() as status:
        status.say("Warming up")
        result = measure(
            model,
            methods,
            depths=depths,
            prompt_ids=[prompt_ids],
            new_tokens=new_tokens,
            rounds=rounds,
            on_round=lambda done: status.say(f"Round {done} of {rounds} done"),
        )
    if json:
        write(json_format.dumps({"model": model.name, **result.to_json()}, allow_nan=False) + "\n")
    else:
        stdout_console().print(bench_view(result))


def _passage(model: LanguageModel, tokens: int) -> list[int]:
    """`tokens` ids of the built-in text, over and over."""
    once = model.encode(PASSAGE)[0]
    return (once * -(-tokens // len(once)))[:tokens]
