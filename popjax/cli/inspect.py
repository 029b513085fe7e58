"""`popjax inspect`: the families that run, or one model's sizes, parameters, and what fits here.

Reads the config and the headers of the weight files, never a weight.
"""

from __future__ import annotations

import json as json_format
from typing import TYPE_CHECKING, Annotated, Any

import typer

from popjax.cli import options
from popjax.cli.terminal import Status, command, stdout_console, write

if TYPE_CHECKING:
    from rich.console import RenderableType

    from popjax.config import ModelConfig
    from popjax.loading import Source

# What --model takes elsewhere is the subject here, so it may also come without the option.
ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help='A local folder, a .gguf file, a hub id, or "default"; without it, the families.',
    ),
]
Named = Annotated[
    str | None,
    typer.Option("--model", "-m", help="MODEL, as the other commands take it."),
]
Ratio = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="FFN ratio whose packed rows are counted.")
]
Context = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens of cache to count; without it the model's longest context."),
]
Checksum = Annotated[bool, typer.Option("--checksum", help="Add the SHA-256 of each weight file.")]


@command
def inspect(
    model: ModelArgument = None,
    named: Named = None,
    revision: options.Revision = None,
    dtype: options.Dtype = None,
    offline: options.Offline = False,
    ratio: Ratio = options.DEFAULT_RATIO,
    context: Context = None,
    checksum: Checksum = False,
    json: options.Json = False,
) -> None:
    """Show the families that popjax runs; with a model, its sizes and whether it fits."""
    if model is not None and named is not None:
        raise typer.BadParameter("give the model once: MODEL or --model", param_hint="MODEL")
    name = model or named
    if name is None:
        of_a_model = {"--revision": revision, "--dtype": dtype, "--context": context}
        unused = [option for option, value in of_a_model.items() if value is not None]
        if unused or checksum:
            raise typer.BadParameter(
                "it is of a model: name one", param_hint=(unused or ["--checksum"])[0]
            )
        facts = families()
        _print(facts, json, _families_view)
        return
    choice = options.ModelChoice(None if name == "default" else name, revision, dtype, offline)
    source = choice.open()
    with Status() as status:
        status.say("Reading the files" if checksum else "Reading headers")
        facts = model_facts(source, dtype, ratio, context, checksum)
    _print(facts, json, _model_view)


def _print(facts: dict[str, Any], json: bool, view: Any) -> None:
    if json:
        write(json_format.dumps(facts, allow_nan=False) + "\n")
    else:
        stdout_console().print(view(facts))


def families() -> dict[str, Any]:
    """The families and methods of this version as plain JSON values."""
    from popjax.inspection import family_facts
    from popjax.methods import METHODS

    abouts = {name: (kind.__doc__ or "").splitlines()[0] for name, kind in METHODS.items()}
    return {"families": family_facts(), "methods": abouts}


def model_facts(
    source: Source, dtype: str | None, ratio: float, context: int | None, checksum: bool
) -> dict[str, Any]:
    """Everything `popjax inspect MODEL` says, as plain JSON values."""
    import dataclasses

    from popjax import axes, inspection
    from popjax.loading import parse_dtype

    kind = parse_dtype(dtype)
    rows = inspection.parameter_rows(source.config, kind.itemsize)
    facts: dict[str, Any] = {
        "model": source.name,
        "files": source.tensors.location,
        "stored_types": inspection.stored_types(source),
        "dtype": kind.name,
        "sizes": _sizes(source.config),
        "parameter_count": axes.parameter_count(source.config),
        "parameters": [dataclasses.asdict(row) for row in rows],
        "group_bytes": inspection.group_bytes(rows),
        "fit": _fit(source.config, kind.itemsize, ratio, context),
    }
    if checksum:
        facts["sha256"] = inspection.checksums(source)
    return facts


def _sizes(config: ModelConfig) -> dict[str, Any]:
    def of_layers(name: str) -> Any:
        values = list(dict.fromkeys(getattr(layer, name) for layer in config.layers))
        return values[0] if len(values) == 1 else values

    names = ("num_heads", "num_kv_heads", "head_dim", "mlp_dim", "window")
    return {
        "family": config.family,
        "layers": config.num_layers,
        "embed_dim": config.embed_dim,
        **{name: of_layers(name) for name in names},
        **_experts(config),
        "vocab_size": config.vocab_size,
        "max_positions": config.max_positions,
        "activation": config.activation,
        "tie_embeddings": config.tie_embeddings,
        "rope": ", ".join(dict.fromkeys(_rope(layer.rope) for layer in config.layers)),
    }


def _experts(config: ModelConfig) -> dict[str, Any]:
    """Sizes of the experts, of which all layers that have any have as many; none: nothing."""
    found = [layer.moe for layer in config.layers if layer.moe is not None]
    if not found:
        return {}
    names = ("num_experts", "top_k", "expert_dim")
    return {"expert_layers": len(found), **{name: getattr(found[0], name) for name in names}}


def _rope(rope: Any) -> str:
    if rope is None:
        return "none"
    scaled = "" if rope.kind == "default" else f", {rope.kind} scaling by {rope.factor:g}"
    share = "" if rope.share == 1 else f" on {rope.share:g} of a head"
    return f"theta {rope.theta:g}{share}{scaled}"


def _fit(config: ModelConfig, itemsize: int, ratio: float, context: int | None) -> dict[str, Any]:
    from popjax import inspection

    tokens = config.max_positions if context is None else context
    need = inspection.memory_need(config, itemsize, ratio=ratio, context=tokens)
    memory = inspection.free_memory()
    longest = None
    if memory.free is not None:
        longest = inspection.longest_context(config, need, itemsize, memory.free)
    return {
        "ratio": ratio,
        "context": tokens,
        "weight_bytes": need.weights,
        "packed_bytes": need.packed,
        "cache_bytes": need.cache,
        "cache_bytes_per_token": inspection.cache_bytes_per_token(config, itemsize),
        "total_bytes": need.total,
        "free_bytes": memory.free,
        "memory_bytes": memory.total,
        "memory": memory.where,
        "fits": None if memory.free is None else need.total <= memory.free,
        "longest_context": longest,
    }


def _families_view(facts: dict[str, Any]) -> RenderableType:
    from rich.console import Group

    from popjax.cli.tables import facts as pairs
    from popjax.cli.tables import heading

    rows = []
    for family in facts["families"]:
        extras = ", ".join(family["extras"]) or "none"
        arch = family["gguf_architecture"]
        rows.append(
            (
                family["family"],
                f"{family['about']}\n"
                f"safetensors{f', GGUF ({arch})' if arch else ''}; parameters beyond the plain "
                f"decoder: {extras}",
            )
        )
    return Group(
        heading("Families (model_type), each with every method"),
        pairs(rows),
        heading("Methods (--method)"),
        pairs(facts["methods"].items()),
    )


def _model_view(facts: dict[str, Any]) -> RenderableType:
    from rich.console import Group

    from popjax.cli.tables import facts as pairs
    from popjax.cli.tables import heading

    stored = ", ".join(f"{count} {kind}" for kind, count in facts["stored_types"].items())
    sizes = {name.replace("_", " "): str(value) for name, value in facts["sizes"].items()}
    parts: list[RenderableType] = [
        pairs([("model", facts["model"]), ("files", facts["files"]), ("stored", stored)]),
        heading("Sizes"),
        pairs(sizes.items()),
        heading(f"Parameters: {facts['parameter_count']:,}, here as {facts['dtype']}"),
        _parameters(facts),
        heading("Memory"),
        pairs(_fit_lines(facts["fit"])),
    ]
    if "sha256" in facts:
        parts += [heading("SHA-256"), pairs(facts["sha256"].items())]
    return Group(*parts)


def _parameters(facts: dict[str, Any]) -> RenderableType:
    from popjax.cli.tables import share, table
    from popjax.inspection import format_bytes

    total = sum(facts["group_bytes"].values())
    rows = [
        (
            row["path"],
            row["group"],
            row["letters"],
            " x ".join(map(str, row["shape"])),
            str(row["count"]),
            format_bytes(row["bytes"]),
        )
        for row in facts["parameters"]
    ]
    made = table("parameter", "group", "axes", "shape", "times", "bytes", rows=rows, words=3)
    made.add_section()
    for group, size in facts["group_bytes"].items():
        made.add_row("all", group, "", "", share(size, total), format_bytes(size))
    return made


def _fit_lines(fit: dict[str, Any]) -> list[tuple[str, str]]:
    from popjax.inspection import format_bytes

    per_token = format_bytes(fit["cache_bytes_per_token"])
    lines = [
        ("weights", format_bytes(fit["weight_bytes"])),
        (f"packed at {fit['ratio']:g}", format_bytes(fit["packed_bytes"])),
        (
            "cache",
            f"{format_bytes(fit['cache_bytes'])} for {fit['context']} tokens, {per_token} each",
        ),
        ("together", format_bytes(fit["total_bytes"])),
    ]
    if fit["free_bytes"] is None:
        return [*lines, ("fits", f"unknown: {fit['memory']} does not say what is free")]
    free = f"{format_bytes(fit['free_bytes'])} of {format_bytes(fit['memory_bytes'])} are free"
    lines.append((fit["memory"], free))
    if fit["fits"]:
        return [*lines, ("fits", "yes")]
    short = format_bytes(fit["total_bytes"] - fit["free_bytes"])
    if fit["longest_context"]:
        return [*lines, ("fits", f"no, {short} short: up to {fit['longest_context']} tokens do")]
    return [*lines, ("fits", f"no, {short} short even without a cache: use --dtype bfloat16")]
