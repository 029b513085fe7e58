"""`popjax generate`: one prompt in, text out as it comes, then what the run kept, read and cost."""

from __future__ import annotations

import dataclasses
import json as json_format
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from popjax.cli import (
    cache_options,
    depth_options,
    gate_options,
    method_options,
    options,
    scout_options,
)
from popjax.cli.terminal import Status, command, stderr_console, write

if TYPE_CHECKING:
    from popjax.methods import Method
    from popjax.model import Generation, LanguageModel

Stop = Annotated[
    list[str] | None, typer.Option("--stop", help="End at this text; may be given several times.")
]
CompareDense = Annotated[
    bool,
    typer.Option("--compare-dense", help="Run dense too: speed, agreement of tokens, KL."),
]


@command
def generate(
    prompt: options.Prompt = None,
    prompt_file: options.PromptFile = None,
    model: options.Model = None,
    revision: options.Revision = None,
    dtype: options.Dtype = None,
    offline: options.Offline = False,
    check_tensors: options.CheckTensors = False,
    method: options.MethodName = None,
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
    kv_every: cache_options.KvEvery = None,
    prefill_chunk: cache_options.PrefillChunk = None,
    depth: depth_options.Depth = None,
    skip: depth_options.Skip = None,
    layer_scores: depth_options.LayerScores = None,
    max_new_tokens: options.MaxNewTokens = None,
    seed: options.Seed = 0,
    do_sample: options.DoSample = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.Penalty = None,
    stop: Stop = None,
    chat: options.Chat = False,
    compare_dense: CompareDense = False,
    json: options.Json = False,
) -> None:
    """Continue a prompt, and report what was kept, read and spent.

    Dense unless --ratio or --model-ratio asks for online pruning, or --method for something else;
    the whole prompt stays in the cache unless --kv, --kv-keep or --kv-tokens says otherwise.
    """
    from popjax.methods import method_name

    own = {"min_tokens": min_tokens, "unseen": unseen, "shared": shared, "ends": ends, "rest": rest}
    chosen = options.chosen_method(
        method,
        ratio=ratio,
        model_ratio=model_ratio,
        gamma=gamma,
        prefill=prefill,
        statistics=statistics,
        **own,
    )
    scout_options.check_scout([chosen], scout)
    eviction = cache_options.chosen_kv(kv, kv_keep, kv_tokens, kv_window)
    gate_options.check_gates(eviction, kv_gates)
    cache_options.check_pieces(eviction, chosen, kv_every, prefill_chunk)
    shallow = depth_options.chosen_depth(depth, skip, layer_scores)
    others = eviction is not None or shallow is not None
    if compare_dense and (method_name(chosen) == "dense" or others):
        raise typer.BadParameter(
            "it compares FFN pruning alone: give --ratio or --method, no --kv and no --depth",
            param_hint="--compare-dense",
        )
    sampling = options.chosen_sampling(
        do_sample=do_sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    text = options.read_prompt(prompt, prompt_file)
    loaded = options.ModelChoice(model, revision, dtype, offline, check_tensors).load()
    loaded = scout_options.with_scout(loaded, scout)
    chosen = scout_options.fitted(chosen, loaded)
    loaded = gate_options.with_gates(loaded, kv_gates)
    wanted = {
        **sampling,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "stop_strings": stop or None,
        "kv": eviction,
        "kv_every": kv_every,
        "prefill_chunk": prefill_chunk,
        "depth": shallow,
        # What thresholds let through is known by the masks alone.
        "record_masks": method_name(chosen) in ("teal", "chess"),
    }
    prompt_ids = loaded.encode(text, chat=chat)
    found = streamed(loaded, prompt_ids[0], chosen, wanted, quiet=json)
    if compare_dense:
        found = _compared(loaded, prompt_ids, found, chosen)
    if json:
        write(json_format.dumps(as_json(found, text), allow_nan=False) + "\n")
        return
    from popjax.cli.tables import report_tables

    stderr_console().print(report_tables(found.report, found.finish_reason[0]))


def streamed(
    model: LanguageModel,
    prompt_ids: list[int],
    method: Method,
    wanted: dict[str, Any],
    *,
    quiet: bool = False,
    also: Callable[[str], None] | None = None,
) -> Generation:
    """Generate for one prompt, writing text on stdout as it comes unless `quiet`.

    `also` hears every piece too. A line break follows text that lacks one, so that whatever comes
    next starts a line.
    """
    last = "\n"
    with Status() as status:
        status.say(f"Compiling, then reading {len(prompt_ids)} tokens")
        pieces = 0

        def on_text(piece: str) -> None:
            nonlocal last, pieces
            pieces += 1
            if quiet or not sys.stdout.isatty():
                status.say(f"Decoding, {pieces} pieces of text")
            else:
                status.clear()
            if also is not None:
                also(piece)
            if not quiet:
                write(piece)
                last = piece[-1]

        try:
            return model.generate(prompt_ids, method=method, streamer=on_text, **wanted)
        finally:
            if last != "\n":
                write("\n")


def _compared(
    model: LanguageModel, prompts: list[list[int]], found: Generation, method: Method
) -> Generation:
    """The same generation, its report completed by the comparison with dense."""
    from popjax.compare import compare_dense

    with Status() as status:
        status.say("Comparing with dense: warming up")
        comparison = compare_dense(
            model,
            prompts,
            found,
            method=method,
            on_round=lambda done: status.say(f"Comparing with dense: {done} rounds done"),
        )
    report = dataclasses.replace(found.report, comparison=comparison)
    return dataclasses.replace(found, report=report)


def as_json(found: Generation, prompt: str) -> dict[str, Any]:
    """The result of one prompt as plain JSON values."""
    return {
        "prompt": prompt,
        "text": found.text[0],
        "tokens": found.tokens[0],
        "finish_reason": found.finish_reason[0],
        "report": found.report.to_json(),
    }
