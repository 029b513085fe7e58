"""`popjax calibrate`: what a method measures of a model once, on text, written to a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from popjax.cli import method_options, options
from popjax.cli.out_files import check_writable
from popjax.cli.scout_options import calibrate_scout, scout_form
from popjax.cli.terminal import Status, command, stdout_console, write

if TYPE_CHECKING:
    from popjax.model import LanguageModel

# What is calibrated, and the options that it has beside those of the model.
KINDS = {
    "prefill-pruning": ("text", "samples", "prompt_tokens", "max_new_tokens", "seed"),
    "channels": ("text", "samples", "prompt_tokens"),
    "scout": ("text", "samples", "prompt_tokens", "ends", "bits", "copied"),
}
SAMPLES, PROMPT_TOKENS, NEW_TOKENS = 200, 256, 32
What = Annotated[
    str,
    typer.Argument(
        help="prefill-pruning: how much each layer matters to prompt and reply. channels: what FFN "
        "channels do on a text, for --statistics. scout: copies of gate and up in few bits, for "
        "--method scout, rounded by a text where one is given, and better for it."
    ),
]
Text = Annotated[Path | None, typer.Option("--text", help="UTF-8 text that prompts are cut from.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="New safetensors file to write.")]
Samples = Annotated[
    int | None, typer.Option(min=1, help=f"Prompts, spread over the text ({SAMPLES}).")
]
PromptTokens = Annotated[int | None, typer.Option(min=2, help=f"Tokens of one ({PROMPT_TOKENS}).")]
NewTokens = Annotated[
    int | None,
    typer.Option(min=1, help=f"Tokens the model adds to each ({NEW_TOKENS}); prefill-pruning."),
]
Seed = Annotated[
    int | None,
    typer.Option(min=0, max=2**32 - 1, help="Where randomness starts (0); prefill-pruning."),
]
Ends = Annotated[
    str | None,
    typer.Option(
        help="dense or pruned (dense): with pruned also the first and the last layer have copies, "
        "which a run with --ends pruned needs; scout.",
        rich_help_panel="Method",
    ),
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
    samples: Samples = None,
    prompt_tokens: PromptTokens = None,
    max_new_tokens: NewTokens = None,
    seed: Seed = None,
    ends: Ends = None,
    bits: method_options.Bits = None,
    copied: method_options.Copied = None,
) -> None:
    """Measure a model on text, for `--layer-scores` (prefill-pruning) or `--statistics` (channels).

    Prompts are cut from the text; for prefill-pruning the model continues them. Or write a scout,
    which needs no text and loses less with one.
    """
    given: dict[str, Any] = {"text": text, "samples": samples, "prompt_tokens": prompt_tokens}
    given |= {"max_new_tokens": max_new_tokens, "seed": seed, "ends": ends}
    given |= {"bits": bits, "copied": copied}
    _check_kind(what, given)
    check_writable(out, "--out", new=True)
    choice = options.ModelChoice(model, revision, dtype, offline, check_tensors)
    form = scout_form(ends, bits, copied)
    if what == "scout" and text is None and samples is None and prompt_tokens is None:
        calibrate_scout(choice.load(), out, form)
        return
    if text is None:
        raise typer.BadParameter("prompts are cut from one: give --text", param_hint="--text")
    words = options.read_words(text, "--text")
    loaded = choice.load()
    samples, length = samples or SAMPLES, prompt_tokens or PROMPT_TOKENS
    new = (max_new_tokens or NEW_TOKENS) if what == "prefill-pruning" else 0
    check_room(loaded.config.max_positions, length, new)
    prompts = cut(loaded.encode(words)[0], samples, length)
    about = f"{samples} prompts of {length} tokens of {text.name}"
    if what == "scout":
        calibrate_scout(loaded, out, form, prompts, about)
    elif what == "channels":
        write(f"{_channels(loaded, prompts, out, about)}\n")
    else:
        path = _layers(loaded, prompts, new, seed or 0, out, f"{about}, {new} new each")
        write(f"{path}\n")


def _check_kind(what: str, given: dict[str, Any]) -> None:
    """Wrong usage for an unknown kind, and for an option that it has no use for."""
    if what not in KINDS:
        *others, last = KINDS
        raise typer.BadParameter(
            f"{what!r} measures nothing of a model: use {', '.join(others)} or {last}",
            param_hint="WHAT",
        )
    for name, value in given.items():
        if value is not None and name not in KINDS[what]:
            raise typer.BadParameter(
                f"calibrate {what} has no use for it: leave it out",
                param_hint=f"--{name.replace('_', '-')}",
            )


def check_room(most: int, length: int, new: int) -> None:
    """Raise ValueError where prompts and what is added to them are above the model's context."""
    if length + new > most:
        added = f" and {new} new ones (--max-new-tokens)" if new else ""
        room = most - new
        remedy = f"--prompt-tokens {room} or fewer" if room > 1 else "fewer --max-new-tokens"
        raise ValueError(
            f"prompts of {length} tokens{added} are longer than the model's context of {most}: "
            f"give {remedy}"
        )


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
    """`count` different runs of `length` tokens spread over ids from first to last.

    They may overlap. Raises ValueError where the ids do not give so many.
    """
    spare = len(ids) - length
    if spare < 0:
        raise ValueError(
            f"the text has {len(ids)} tokens and a prompt {length}: give a longer text, or a "
            "smaller --prompt-tokens"
        )
    if count > spare + 1:
        raise ValueError(
            f"the text has {len(ids)} tokens, which give {spare + 1} different prompts of "
            f"{length}: give --samples {spare + 1} or fewer, or a longer text"
        )
    starts = [spare * i // max(count - 1, 1) for i in range(count)]
    return [ids[start : start + length] for start in starts]
