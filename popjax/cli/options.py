"""What several commands take: the model and how to load it, the method and its ratio, the prompt.

Every check that needs no weights is made here, before any are read, and fails as wrong usage.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from popjax.cli.artefacts import check_artefact
from popjax.cli.terminal import Status, say

if TYPE_CHECKING:
    from popjax.loading import Source
    from popjax.methods import Method
    from popjax.model import LanguageModel

DEFAULT_RATIO = 0.5
_MODEL, _METHOD, _SAMPLING = "Model", "Method", "Sampling"

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="A local folder, a .gguf file or a hub id; without it SmolLM2-135M-Instruct.",
        rich_help_panel=_MODEL,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of a hub model.", rich_help_panel=_MODEL),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16 or float16; without it float32 on a CPU, bfloat16 elsewhere.",
        rich_help_panel=_MODEL,
    ),
]
Offline = Annotated[
    bool,
    typer.Option("--offline", help="Use only what is on this machine.", rich_help_panel=_MODEL),
]
CheckTensors = Annotated[
    bool,
    typer.Option(
        "--check-tensors", help="Refuse weights with NaN or infinities.", rich_help_panel=_MODEL
    ),
]
MethodName = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="dense, online-pruning, frozen, rescore-all, griffin or gate-first; with --scout "
        "scout; with --statistics wanda-sp, flap, probe-pruning, teal or chess.",
        rich_help_panel=_METHOD,
    ),
]
Ratio = Annotated[
    float | None,
    typer.Option(help="Share of FFN channels to prune, 0 to 1.", rich_help_panel=_METHOD),
]
ModelRatio = Annotated[
    float | None,
    typer.Option(
        help="Share of attention plus FFN parameters to prune, all of it in the FFN; instead of "
        "--ratio.",
        rich_help_panel=_METHOD,
    ),
]
Gamma = Annotated[
    float | None,
    typer.Option(
        help="Share of channels re-decided at every token (0.1).",
        rich_help_panel=_METHOD,
    ),
]
Prefill = Annotated[
    str | None,
    typer.Option(
        help="How the prompt itself runs: partition, dense or probe; dense or masked with teal "
        "and chess.",
        rich_help_panel=_METHOD,
    ),
]
Statistics = Annotated[
    Path | None,
    typer.Option(
        help="The file that `popjax calibrate channels` wrote, for methods that are calibrated.",
        rich_help_panel=_METHOD,
    ),
]
Prompt = Annotated[
    str | None,
    typer.Argument(help="The prompt; without it and --prompt-file, what is piped in."),
]
PromptFile = Annotated[
    Path | None,
    typer.Option(help='Read the prompt from a file, or from what is piped in for "-".'),
]
Chat = Annotated[
    bool, typer.Option("--chat", help="Put the prompt through the model's chat template.")
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")
]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="How many tokens to add at most.")]
DoSample = Annotated[
    bool | None,
    typer.Option(
        "--do-sample/--greedy",
        help="Draw tokens, or take the most likely; without it as the model's files say.",
        rich_help_panel=_SAMPLING,
        show_default=False,
    ),
]
Temperature = Annotated[
    float | None, typer.Option(help="Above 1 is bolder, below 1 safer.", rich_help_panel=_SAMPLING)
]
TopK = Annotated[
    int | None,
    typer.Option(min=0, help="Draw from this many best tokens.", rich_help_panel=_SAMPLING),
]
TopP = Annotated[
    float | None,
    typer.Option(
        help="Draw from the fewest tokens with this much probability.",
        rich_help_panel=_SAMPLING,
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(
        help="Drop tokens less likely than this share of the best.",
        rich_help_panel=_SAMPLING,
    ),
]
Penalty = Annotated[
    float | None,
    typer.Option(help="Above 1 makes repetition less likely.", rich_help_panel=_SAMPLING),
]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Where randomness starts.")]


@dataclasses.dataclass(frozen=True)
class ModelChoice:
    """The options that say which checkpoint, and how to read it."""

    name: str | None
    revision: str | None = None
    dtype: str | None = None
    offline: bool = False
    check_tensors: bool = False

    def open(self) -> Source:
        """The checkpoint with its config read, and no weight."""
        from popjax.loading import open_source, parse_dtype

        refuse_revision(self.name, self.revision)
        if self.dtype is not None:
            try:
                parse_dtype(self.dtype)
            except ValueError as error:
                raise typer.BadParameter(str(error), param_hint="--dtype") from error
        if not sys.stderr.isatty():
            from huggingface_hub.utils import disable_progress_bars

            disable_progress_bars()
        return open_source(self.name, revision=self.revision, local_files_only=self.offline)

    def load(self) -> LanguageModel:
        """The model, with a status line, and a warning where it looks too large to load."""
        with Status() as status:
            status.say("Starting")
            import popjax.model  # noqa: F401  (jax and the tokenizer library take a second)
        source = self.open()  # outside the status line: a download shows a bar of its own
        with Status() as status:
            status.say(f"Loading {source.name}")
            return self._read(source)

    def _read(self, source: Source) -> LanguageModel:
        from popjax.inspection import format_bytes, free_memory, memory_need
        from popjax.loading import parse_dtype, read_params
        from popjax.model import LanguageModel

        dtype = parse_dtype(self.dtype)
        weights, memory = memory_need(source.config, dtype.itemsize).weights, free_memory()
        if memory.free is not None and weights > memory.free:
            say(
                f"popjax: warning: the weights of {source.name} need {format_bytes(weights)} as "
                f"{dtype.name} and {format_bytes(memory.free)} are free in {memory.where}: use a "
                "smaller --model, or --dtype bfloat16"
            )
        params, seconds = read_params(source, dtype=dtype, check_tensors=self.check_tensors)
        return LanguageModel(source.name, source.config, params, source, seconds)


def refuse_revision(name: str | None, revision: str | None) -> None:
    """Wrong usage for a revision of a model that does not come from the hub."""
    from popjax.loading import check_revision

    try:
        check_revision(name, revision)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--revision") from error


def chosen_method(name: str | None, *, default: str = "dense", **given: Any) -> Method:
    """The method that the options describe; any of its own options alone means online pruning."""
    from popjax.methods import method_named

    if name is None:
        if given.get("statistics") is not None:
            raise typer.BadParameter(
                "statistics are for a method: give --method too", param_hint="--statistics"
            )
        asked = any(value is not None for value in given.values())
        name = "online-pruning" if asked else default
    try:
        method = method_named(name, **given)
    except ValueError as error:
        message = str(error)
        if "needs a ratio" in message:
            message += f", such as --ratio {DEFAULT_RATIO}"
        raise typer.BadParameter(message, param_hint=_blamed(message, given)) from error
    if method.calibration is not None:
        from popjax.calibration.statistics import FORM

        check_artefact(Path(method.calibration), "--statistics", FORM)
    return method


def _blamed(message: str, given: dict[str, Any]) -> str:
    if "exactly one of ratio" in message:
        return "--ratio / --model-ratio"
    return blamed(message, given, "--method")


def blamed(message: str, given: dict[str, Any], otherwise: str, prefix: str = "--") -> str:
    """The option that a complaint is about: the given one that it begins with, or `otherwise`."""
    name = message.partition(" ")[0]
    known = given.get(name) is not None
    return f"{prefix}{name.replace('_', '-')}" if known else otherwise


def pruning_method(
    name: str | None,
    ratio: float | None,
    model_ratio: float | None = None,
    **own: Any,
) -> Method:
    """As `chosen_method`, for commands about pruning: half of the channels where none is said."""
    if name == "dense":
        raise typer.BadParameter(
            "dense decoding prunes nothing: name another method", param_hint="--method"
        )
    if ratio is None and model_ratio is None:
        ratio = DEFAULT_RATIO
    return chosen_method(name or "online-pruning", ratio=ratio, model_ratio=model_ratio, **own)


def chosen_sampling(**values: Any) -> dict[str, Any]:
    """The sampling options as arguments of `generate`; wrong usage where one is out of range."""
    from popjax.sampling import SamplingConfig

    try:
        SamplingConfig(**{name: value for name, value in values.items() if value is not None})
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if values["do_sample"] is False and any(
        values[name] is not None for name in ("temperature", "top_k", "top_p", "min_p")
    ):
        raise typer.BadParameter(
            "temperature, top-k, top-p and min-p have no effect on greedy decoding: drop --greedy",
        )
    return values


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from the argument, the file or the pipe, less one final newline of the latter."""
    if prompt is not None:
        if file is not None:
            raise typer.BadParameter(
                "give either a prompt or --prompt-file, not both", param_hint="PROMPT"
            )
        if not prompt:
            raise typer.BadParameter("the prompt is empty", param_hint="PROMPT")
        return prompt
    if file is None and sys.stdin.isatty():
        raise typer.BadParameter(
            "no prompt was given: write one after the command, use --prompt-file, or pipe one in",
            param_hint="PROMPT",
        )
    text = read_text(file, "--prompt-file")
    text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise typer.BadParameter(
            f"no prompt was given, and {_named(file)} is empty: write one", param_hint="PROMPT"
        )
    return text


def read_text(file: Path | None, option: str) -> str:
    """The UTF-8 text of a file that `option` named, or of standard input for None and "-"."""
    if file is None or str(file) == "-":
        data = sys.stdin.buffer.read()
    elif file.is_file():
        data = file.read_bytes()
    else:
        raise typer.BadParameter(f"there is no file {file}", param_hint=option)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise typer.BadParameter(
            f"{_named(file)} is not UTF-8 at byte {error.start}: convert it", param_hint=option
        ) from error


def read_words(file: Path, option: str) -> str:
    """As `read_text`; wrong usage for a text without a word in it."""
    text = read_text(file, option)
    if not text.strip():
        raise typer.BadParameter(
            f"{_named(file)} is empty: give a text with words in it", param_hint=option
        )
    return text


def _named(file: Path | None) -> str:
    return "standard input" if file is None or str(file) == "-" else str(file)
