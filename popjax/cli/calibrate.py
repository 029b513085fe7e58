"""`popjax calibrate`: what a method measures of a model once, on text, written to a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from popjax.cli import options
from popjax.cli.scout_options import calibrate_scout
from popjax.cli.terminal import Status, command, stdout_console, write

if TYPE_CHECKING:
    from popjax.model import LanguageModel

KINDS = ("prefill-pruning", "channels", "scout")
What = Annotated[
    str,
    typer.Argument(
        help="prefill-pruning: how much each layer matters to prompt and reply. channels: what FFN "
        "channels do on a text, for --statistics. scout: copies of gate and up in four bits, for "
        "--method scout; needs no text."
    ),
]
Text = Annotated[Path | None, typer.Option("--text", help="UTF-8 text that prompts are cut from.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="New safetensors file to write.")]
Samples = Annotated[int, typer.Option(min=1, help="Prompts, spread over the text.")]
PromptTokens = Annotated[int, typer.Option(min=2, help="Tokens of a prompt.")]
NewTokens = Annotated[
    int,
    typer.Option("--max-new-tokens", min=1, help="Tokens the model adds to each; prefill-pruning."),
]


@command
def calibrate(
    what: What,
    out: Out,
    text: Text = None,
    model: options.Model = None,
    revision: options.Revision = None,
    dtype: options.Dtype = None,
    offline: options.Offline = False,
    check_tensors: options.CheckTensors = False,
    samples: Samples = 200,
    prompt_tokens: PromptTokens = 256,
    new_tokens: NewTokens = 32,
    seed: options.Seed = 0,
) -> None:
    """Measure a model on text, for `--layer-scores` (prefill-pruning) or `--statistics` (channels).

    Prompts are cut from the text; for prefill-pruning the model continues them. Or write a scout.
    """
    if what not in KINDS:
        raise typer.BadParameter(
            f"{what!r} measures nothing of a model: use {', '.join(KINDS[:-1])} or {KINDS[-1]}",
            param_hint="WHAT",
        )
    if out.exists():
        raise typer.BadParameter(f"{out} exists: choose another name", param_hint="--out")
    choice = options.ModelChoice(model, revision, dtype, offline, check_tensors)
    if what == "scout":
        calibrate_scout(choice.load(), out)
        return
    if text is None:
        raise typer.BadParameter("prompts are cut from one: give --text", param_hint="--text")
    if not text.is_file():
        raise typer.BadParameter(f"there is no file {text}", param_hint="--text")
    words = options.read_text(text, "--text")
    if not words.strip():
        raise typer.BadParameter(f"{text} is empty: give one to cut from", param_hint="--text")
    loaded = choice.load()
    prompts = cut(loaded.encode(words)[0], samples, prompt_tokens)
    about = f"{samples} prompts of {prompt_tokens} tokens of {text.name}"
    if what == "channels":
        path = _channels(loaded, prompts, out, about)
    else:
        path = _layers(loaded, prompts, new_tokens, seed, out, f"{about}, {new_tokens} new each")
    write(f"{path}\n")


def _layers(
    loaded: LanguageModel,
    prompts: list[list[int]],
    new_tokens: int,
    seed: int,
    out: Path,
    about: str,
) -> Path:
    """Scores of layers in a new file, shown as a table too."""
    from popjax.cli.tables import layer_table
    from popjax.depth.artefact import save_scores
    from popjax.depth.importance import measure

    with Status() as status:
        status.say("Compiling")
        scores = measure(
            loaded.params,
            loaded.config,
            prompts,
            new_tokens,
            seed,
            lambda done: status.say(f"Prompt {done} of {len(prompts)} done"),
        )
    path = save_scores(out, scores, loaded.params, loaded.config, about)
    stdout_console().print(layer_table(scores, about))
    return path


def _channels(loaded: LanguageModel, prompts: list[list[int]], out: Path, about: str) -> Path:
    """Statistics of FFN channels in a new file."""
    from popjax.calibration.measuring import measure
    from popjax.calibration.statistics import save_statistics

    runs = 2 * len(prompts)  # once for moments, once for magnitudes
    with Status() as status:
        status.say("Compiling")
        found = measure(
            loaded.params,
            loaded.config,
            prompts,
            lambda done: status.say(f"Run {done} of {runs} done"),
        )
    return save_statistics(out, found, loaded.params, loaded.config, about)


def cut(ids: list[int], count: int, length: int) -> list[list[int]]:
    """`count` runs of `length` tokens spread over ids from first to last; they may overlap."""
    spare = len(ids) - length
    if spare < 0:
        raise ValueError(
            f"the text has {len(ids)} tokens and a prompt {length}: give a longer text, or a "
            "smaller --prompt-tokens"
        )
    starts = [spare * i // max(count - 1, 1) for i in range(count)]
    return [ids[start : start + length] for start in starts]
