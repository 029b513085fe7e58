"""`popjax perplexity`: a text file under dense and any number of methods, paired by window."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

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
from popjax.cli.terminal import command

Text = Annotated[Path, typer.Option("--text", help="UTF-8 text to score.")]
Windows = Annotated[
    int | None,
    typer.Option(min=1, help="Windows, spread over the text (24; single-pass: all there are)."),
]
PREFIX, SCORED = 512, 256
Prefix = Annotated[
    int | None,
    typer.Option(
        min=1, help=f"Tokens of a window that are prefilled and decide ({PREFIX}; split)."
    ),
]
Scored = Annotated[
    int | None, typer.Option(min=1, help=f"Tokens scored after them ({SCORED}; split).")
]


@command
def perplexity(
    text: Text,
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
    windows: Windows = None,
    prefix: Prefix = None,
    scored: Scored = None,
    max_length: evaluation_options.MaxLength = None,
    out: evaluation_options.Out = None,
    json: options.Json = False,
) -> None:
    """Log-perplexity of a text, and how far each method is above dense on the same windows.

    split scores what is decoded after a prefix; single-pass rolls over the text as lm-eval does.
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
    for option, value in (("--prefix", prefix), ("--scored", scored)):
        if protocol != "split" and value is not None:
            raise typer.BadParameter(
                f"{protocol} scores every token in windows of --max-length: leave it out",
                param_hint=option,
            )
    words = options.read_words(text, "--text")
    loaded = options.ModelChoice(model, revision, dtype, offline).load()
    loaded = scout_options.with_scout(loaded, scout)
    cases = [replace(case, method=scout_options.fitted(case.method, loaded)) for case in cases]
    loaded = gate_options.with_gates(loaded, kv_gates)
    from popjax.evaluation.perplexity import windows_of
    from popjax.evaluation.run import How, evaluate_text

    how = How(protocol, max_length=max_length)
    cut = windows_of(words, how.encoder(loaded), prefix or PREFIX, scored or SCORED, windows)
    with evaluation_options.Bar("Scoring", len(cut.pairs)) as bar:
        found = evaluate_text(loaded, cases, words, text.stem, how, cut, out, bar.done)
    evaluation_options.show(found, json)
