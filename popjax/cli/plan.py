"""`popjax plan`: whether a model would fit chips that are not here, and what bounds its speed.

The compiler of the target says so, from the config alone: no weight is read, nothing runs.
"""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from popjax.cli import method_options, options
from popjax.cli.terminal import Status, command, stdout_console, write

if TYPE_CHECKING:
    from rich.console import RenderableType

    from popjax.config import ModelConfig

DEFAULT_CONTEXT = 8192
DEFAULT_NEW_TOKENS = 256
Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help='A config.json, a folder with one, a .gguf file, a hub id, or "default".',
    ),
]
TargetName = Annotated[
    str, typer.Option("--target", help="Chips and their topology, such as v5e:2x2 or v5p:2x2x1.")
]
Context = Annotated[
    int | None,
    typer.Option(
        min=2,
        help=f"Tokens of a row, prompt and new ones; without it {DEFAULT_CONTEXT}, or the "
        "model's longest if that is less.",
    ),
]
Batch = Annotated[int, typer.Option(min=1, help="Rows that decode together.")]
NewTokens = Annotated[
    int | None,
    typer.Option(min=1, help=f"How many of them are new; without it at most {DEFAULT_NEW_TOKENS}."),
]
Dtype = Annotated[str, typer.Option(help="bfloat16, float32 or float16.")]


@command
def plan(
    model: Model,
    target: TargetName,
    method: options.MethodName = None,
    ratio: options.Ratio = None,
    model_ratio: options.ModelRatio = None,
    gamma: options.Gamma = None,
    prefill: options.Prefill = None,
    min_tokens: method_options.MinTokens = None,
    unseen: method_options.Unseen = None,
    shared: method_options.Shared = None,
    ends: method_options.Ends = None,
    rest: method_options.Rest = None,
    bits: method_options.Bits = None,
    copied: method_options.Copied = None,
    context: Context = None,
    batch: Batch = 1,
    new_tokens: NewTokens = None,
    dtype: Dtype = "bfloat16",
    revision: options.Revision = None,
    offline: options.Offline = False,
    json: options.Json = False,
) -> None:
    """Compile for chips that are not here: what fits, bytes by kind, and the roofline.

    Online pruning of half of the channels beside dense decoding, where nothing else is asked for.
    Exits with 1 where the request does not fit, and names the nearest one that does.
    """
    own = {"min_tokens": min_tokens, "unseen": unseen, "shared": shared, "ends": ends, "rest": rest}
    own |= {"bits": bits, "copied": copied, "gamma": gamma, "prefill": prefill}
    chosen = _method(method, ratio, model_ratio, own)
    target = _whole_target(target)
    _check_sizes(dtype, context, new_tokens)
    with Status() as status:
        status.say("Reading the config")
        name, config = model_config(model, revision, offline)
    request = _request(config, chosen, target, context, batch, new_tokens, dtype)
    with Status() as status:
        from popjax.planning import ask

        facts = ask(request, status.say)
    facts = _named(name, config, request, facts)
    if json:
        write(json_format.dumps(facts, allow_nan=False) + "\n")
    else:
        stdout_console().print(view(facts))
    if not facts["fits"]:
        raise ValueError(refusal(facts))


def _method(
    name: str | None, ratio: float | None, model_ratio: float | None, own: dict[str, Any]
) -> Any:
    from popjax.methods import takes

    if takes(name, "statistics"):
        raise typer.BadParameter(
            f"a plan reads no weights, and what {name} prunes follows from statistics of them: "
            "plan another method, such as frozen",
            param_hint="--method",
        )
    if name == "dense":
        return options.chosen_method(name, ratio=ratio, model_ratio=model_ratio, **own)
    return options.pruning_method(name, ratio, model_ratio, **own)


def _whole_target(text: str) -> str:
    """The target with its topology, where only the chip was named too."""
    from popjax.targets import parse_target

    try:
        return str(parse_target(text))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--target") from error


def model_config(model: str, revision: str | None, offline: bool) -> tuple[str, ModelConfig]:
    """A model's name and config, from its config.json alone where it has one."""
    import checkpoints
    from popjax.families import model_config as parsed
    from popjax.loading import open_source

    options.refuse_revision(None if model == "default" else model, revision)
    path = Path(model).expanduser()
    if model == "default" or path.suffix == ".gguf":
        source = open_source(None if model == "default" else model, local_files_only=offline)
        return source.name, source.config
    name = path.resolve().name if path.is_dir() else model
    if path.suffix == ".json":
        name = path.parent.name if path.name == "config.json" and path.parent.name else path.stem
    else:
        path = checkpoints.fetch_folder(
            model, revision=revision, local_files_only=offline, patterns=("config.json",)
        )
        path = path / "config.json"
    return name, parsed(checkpoints.read_json_object(path))


def _check_sizes(dtype: str, context: int | None, new_tokens: int | None) -> None:
    """Wrong usage for an unknown dtype, and for a context without room for a prompt."""
    from popjax.loading import parse_dtype

    try:
        parse_dtype(dtype)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--dtype") from error
    if context is not None and new_tokens is not None and new_tokens >= context:
        raise typer.BadParameter(
            f"a context of {context} tokens has no room for a prompt beside {new_tokens} new ones: "
            "give fewer",
            param_hint="--new-tokens",
        )


def _request(
    config: ModelConfig,
    method: Any,
    target: str,
    context: int | None,
    batch: int,
    new_tokens: int | None,
    dtype: str,
) -> dict[str, Any]:
    """What `planning.ask` takes."""
    import dataclasses

    from popjax.config import to_json
    from popjax.methods import method_name

    context = min(DEFAULT_CONTEXT, config.max_positions) if context is None else context
    return {
        "config": to_json(config),
        "method": method_name(method),
        "options": dataclasses.asdict(method),
        "target": target,
        "context": context,
        "batch": batch,
        "new_tokens": new_tokens or min(DEFAULT_NEW_TOKENS, context // 2),
        "dtype": dtype,
    }


def _named(
    name: str, config: ModelConfig, request: dict[str, Any], facts: dict[str, Any]
) -> dict[str, Any]:
    """The whole answer: what was asked, then what the compiler says."""
    from popjax.axes import parameter_count

    asked = {key: value for key, value in request.items() if key != "config"}
    return {"model": name, "parameter_count": parameter_count(config), **asked, **facts}


def refusal(facts: dict[str, Any]) -> str:
    """One sentence: what does not fit, by how much, and the nearest request that does."""
    from popjax.inspection import format_bytes

    asked = facts["forecasts"][-1]
    over = asked["peak"] - asked["usable"]
    short = f", {format_bytes(over)} a chip short" if over > 0 else ""
    said = f"{facts['model']} does not fit {_wording(facts)}{short}"
    nearest = facts["nearest"]
    if nearest is None:
        return f"{said}; neither does a shorter context, a smaller batch or a larger topology"
    changes = [
        f"--{key.replace('_', '-')} {value}"
        for key, value in nearest.items()
        if value != facts[key]
    ]
    return f"{said}; the nearest that fits: {' '.join(changes)}"


def _wording(facts: dict[str, Any]) -> str:
    return f"{facts['target']} with batch {facts['batch']} and context {facts['context']}"


def view(facts: dict[str, Any]) -> RenderableType:
    """The plan for people."""
    from rich.console import Group

    from popjax.cli.tables import facts as pairs
    from popjax.cli.tables import heading

    return Group(
        pairs(_asked(facts)),
        heading("Bytes a chip, from the compiler"),
        _held_table(facts),
        heading("Roofline of decoding: computed from bytes and bandwidth, not measured"),
        _roofline_table(facts),
        verdict(facts),
    )


def _asked(facts: dict[str, Any]) -> list[tuple[str, str]]:
    from popjax.inspection import format_bytes

    chip, mesh = facts["chip"], facts["forecasts"][-1]["mesh"]
    split = ", split " + " x ".join(f"{axis} {size}" for axis, size in mesh.items()) if mesh else ""
    chips = "1 chip" if facts["chips"] == 1 else f"{facts['chips']} chips"
    return [
        ("model", f"{facts['model']}, {facts['parameter_count']:,} parameters as {facts['dtype']}"),
        (
            "target",
            f"{facts['target']}: {chips} of {format_bytes(chip['usable'])} usable memory and "
            f"{chip['bandwidth'] / 1e9:,.0f} GB/s{split}",
        ),
        (
            "request",
            f"batch {facts['batch']}, context {facts['context']} tokens of which "
            f"{facts['new_tokens']} new ({facts['slots']} cache slots)",
        ),
        ("method", _method_text(facts)),
    ]


def _method_text(facts: dict[str, Any]) -> str:
    ratio = facts["options"].get("ratio")
    model_ratio = facts["options"].get("model_ratio")
    if ratio is not None:
        return f"{facts['method']}, {ratio:g} of the FFN channels removed"
    if model_ratio is not None:
        return f"{facts['method']}, {model_ratio:g} of attention and FFN removed"
    return facts["method"]


def _held_table(facts: dict[str, Any]) -> RenderableType:
    from popjax.cli.tables import table
    from popjax.inspection import format_bytes

    columns: list[str] = []
    held: list[dict[str, int]] = []
    for forecast in facts["forecasts"]:
        for phase in ("prefill", "decode"):
            columns.append(f"{forecast['method']}, {phase}")
            held.append({**forecast[f"{phase}_held"], "together": forecast["held_bytes"][phase]})
    names = {"packed": "packed rows", "program": "program code", "other": "other arrays"}
    kinds: list[str] = [kind for kind in held[0] if kind != "together"]
    rows = [
        (names.get(kind, kind), *(format_bytes(one[kind]) if one[kind] else "-" for one in held))
        for kind in kinds
    ]
    made = table("", *columns, rows=rows)
    made.add_section()
    made.add_row("together", *(format_bytes(one["together"]) for one in held))
    return made


def _roofline_table(facts: dict[str, Any]) -> RenderableType:
    from popjax.cli.tables import table
    from popjax.inspection import format_bytes

    rows = [
        (
            forecast["method"],
            format_bytes(forecast["read_weights"]),
            format_bytes(forecast["read_cache"]),
            f"{forecast['tokens_per_second']:,.4g}",
        )
        for forecast in facts["forecasts"]
    ]
    return table("", "weights read a step", "cache read a step", "tokens/s at most", rows=rows)


def verdict(facts: dict[str, Any]) -> str:
    """One line that says it all."""
    from popjax.inspection import format_bytes

    asked = facts["forecasts"][-1]
    held = f"{format_bytes(asked['peak'])} of {format_bytes(asked['usable'])} a chip"
    if not facts["fits"]:
        return f"Does not fit: {held}."
    speed = asked["tokens_per_second"]
    gain = speed / facts["forecasts"][0]["tokens_per_second"]
    times = f", {gain:.2f} times dense" if len(facts["forecasts"]) > 1 else ""
    return f"Fits: {held} at most; roofline {speed:,.4g} tokens/s{times} (computed, not measured)."
