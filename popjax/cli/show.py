"""`popjax show`: a picture of what one prompt keeps, and of what each step chose."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from popjax.cli import cache_options, gate_options, method_options, options, scout_options
from popjax.cli.terminal import Status, command, say, write

if TYPE_CHECKING:
    from popjax.eviction import KvMethod
    from popjax.methods import Method
    from popjax.model import Generation, LanguageModel

DEFAULT_STEPS = 32
Output = Annotated[
    Path, typer.Option("--output", "-o", dir_okay=False, help="Where to write the PNG.")
]
Layers = Annotated[
    list[int] | None,
    typer.Option(
        "--layer",
        min=0,
        help="A layer whose steps to show, up to four times; by default first, middle and last.",
    ),
]


@command
def show(
    prompt: options.Prompt = None,
    prompt_file: options.PromptFile = None,
    model: options.Model = None,
    revision: options.Revision = None,
    dtype: options.Dtype = None,
    offline: options.Offline = False,
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
    max_new_tokens: options.MaxNewTokens = DEFAULT_STEPS,
    chat: options.Chat = False,
    layer: Layers = None,
    kv: cache_options.Kv = None,
    kv_keep: cache_options.KvKeep = None,
    kv_tokens: cache_options.KvTokens = None,
    kv_window: cache_options.KvWindow = None,
    kv_gates: gate_options.GateFile = None,
    output: Output = Path("popjax-partition.png"),
) -> None:
    """Draw what a prompt keeps as a PNG: FFN channels and each step's choice, or cache entries.

    Online pruning of half of the channels, where nothing else is asked for; with --kv or its budget
    the cache entries that stay, by layer and head. Prints the file's name.
    """
    from popjax import picture

    eviction = cache_options.chosen_kv(kv, kv_keep, kv_tokens, kv_window)
    gate_options.check_gates(eviction, kv_gates)
    own = {"min_tokens": min_tokens, "unseen": unseen, "shared": shared, "ends": ends, "rest": rest}
    own |= {"gamma": gamma, "prefill": prefill, "statistics": statistics}
    chosen = None
    if eviction is None:
        chosen = options.pruning_method(method, ratio, model_ratio, **own)
    elif any(
        value is not None for value in (method, ratio, model_ratio, scout, layer, *own.values())
    ):
        raise typer.BadParameter(
            "a picture shows channels or cache entries: drop the options of one", param_hint="--kv"
        )
    scout_options.check_scout([] if chosen is None else [chosen], scout)
    if output.suffix.lower() != ".png" or not output.parent.is_dir():
        raise typer.BadParameter(
            f"{output} must be a .png file in a folder that exists", param_hint="--output"
        )
    if len(layer or ()) > picture.MAX_PANELS:
        raise typer.BadParameter(
            f"{len(layer or ())} layers do not fit in one picture: name {picture.MAX_PANELS}",
            param_hint="--layer",
        )
    text = options.read_prompt(prompt, prompt_file)
    picture.require_matplotlib()  # before the work, not after it
    loaded = options.ModelChoice(model, revision, dtype, offline).load()
    loaded = scout_options.with_scout(loaded, scout)
    chosen = None if chosen is None else scout_options.fitted(chosen, loaded)
    loaded = gate_options.with_gates(loaded, kv_gates)
    if eviction is None:
        picture.require_no_experts(loaded.config)
    with Status() as status:
        status.say("Compiling, reading the prompt, decoding")
        if chosen is None:
            _draw_cache(output, loaded, text, chat, eviction)
            write(f"{output}\n")
            return
        found = loaded.generate(
            text,
            chat=chat,
            method=chosen,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            record_masks=True,
        )
        status.say("Drawing")
        _draw(output, loaded, found, chosen, text, layer)
    say(f"{len(found.tokens[0])} tokens written by {loaded.name} went into the picture")
    write(f"{output}\n")


def _draw_cache(
    output: Path, model: LanguageModel, text: str, chat: bool, eviction: KvMethod | None
) -> None:
    from popjax import cache_picture
    from popjax.eviction import kv_method_name

    assert eviction is not None
    ids = model.encode(text, chat=chat)
    found = model.generate(ids, kv=eviction, max_new_tokens=1, do_sample=False)
    if found.kept is None:
        raise ValueError(
            f"every entry of the {len(ids[0])} prompt tokens stays, there is nothing to draw: give "
            "a smaller budget or a longer prompt"
        )
    budget = eviction.budget(len(ids[0]))
    title = f"{model.name} ({kv_method_name(eviction)}, {budget} of {len(ids[0])} entries a head)"
    cache_picture.draw(output, found.kept, len(ids[0]), title=title, prompt=text)


def _draw(
    output: Path,
    model: LanguageModel,
    found: Generation,
    method: Method,
    prompt: str,
    layers: list[int] | None,
) -> None:
    from popjax import picture
    from popjax.text import decode

    assert found.partition is not None, "only dense runs have none, and they are refused"
    written = [
        decode(model.tokenizer, [token], skip_special_tokens=False) for token in found.tokens[0]
    ]
    picture.draw(
        output,
        picture.Decided.of(model.config, found.partition, found.masks),
        title=f"{model.name} ({_described(method, found)})",
        prompt=prompt,
        written=written[1:],  # the prefill wrote the first
        layers=layers,
    )


def _described(method: Method, found: Generation) -> str:
    settings = dataclasses.asdict(method)
    named = {"ratio": "ratio", "model_ratio": "model ratio"}
    parts = [
        f"{words} {settings[name]:g}"
        for name, words in named.items()
        if settings.get(name) is not None
    ]
    return ", ".join([found.report.method, *parts])
