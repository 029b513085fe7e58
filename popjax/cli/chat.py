"""`popjax chat`: a conversation through the model's chat template, one turn at a time.

Every turn reads the whole conversation again; nothing of it is ever dropped unasked.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from popjax.cli import depth_options, method_options, options, scout_options
from popjax.cli.generate import streamed
from popjax.cli.terminal import command, say

if TYPE_CHECKING:
    from popjax.methods import Method
    from popjax.model import Generation, LanguageModel

HELP = "/reset starts anew, /exit ends, Ctrl-C stops a reply"
DEFAULT_REPLY = 512
System = Annotated[
    str | None, typer.Option("--system", help="Instructions that open every conversation.")
]


@command
def chat(
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
    depth: depth_options.Depth = None,
    skip: depth_options.Skip = None,
    layer_scores: depth_options.LayerScores = None,
    system: System = None,
    max_new_tokens: options.MaxNewTokens = DEFAULT_REPLY,
    seed: options.Seed = 0,
    do_sample: options.DoSample = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.Penalty = None,
) -> None:
    """Talk with a model that has a chat template. /reset starts anew, /exit or Ctrl-D ends."""
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
    shallow = depth_options.chosen_depth(depth, skip, layer_scores)
    sampling = options.chosen_sampling(
        do_sample=do_sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    loaded = options.ModelChoice(model, revision, dtype, offline, check_tensors).load()
    loaded = scout_options.with_scout(loaded, scout)
    chosen = scout_options.fitted(chosen, loaded)
    loaded.encode("hello", chat=True)  # fails now, not after the first message, without a template
    say(f"{loaded.name}: {HELP}")
    limit = DEFAULT_REPLY if max_new_tokens is None else max_new_tokens
    wanted = {**sampling, "seed": seed, "depth": shallow}
    Conversation(loaded, chosen, wanted, limit, system).run()


class Conversation:
    """The messages so far, and what to do with the next line that is typed."""

    def __init__(
        self,
        model: LanguageModel,
        method: Method,
        wanted: dict[str, Any],
        limit: int,
        system: str | None,
    ) -> None:
        self._model, self._method, self._wanted, self._limit = model, method, wanted, limit
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self._opening)

    def run(self) -> None:
        """Read and answer lines until /exit or the end of the input."""
        while (line := _next_line()) is not None:
            line = line.strip()
            if line == "/exit":
                return
            if line == "/reset":
                self.messages = list(self._opening)
                say("the conversation starts anew")
            elif line.startswith("/"):
                say(f"{line.split()[0]} is no command: {HELP}")
            elif line:
                self.answer(line)

    def answer(self, line: str) -> None:
        """Add a user's message and the model's reply to it, or say why there is none."""
        asked = [*self.messages, {"role": "user", "content": line}]
        prompt_ids = self._model.encode(asked)[0]
        room = self._model.config.max_positions - len(prompt_ids)
        if room < 1:
            say(
                f"the conversation would be {len(prompt_ids)} tokens and the model takes "
                f"{self._model.config.max_positions}: /reset starts anew, or write less"
            )
            return
        reply = _Heard()
        wanted = {**self._wanted, "max_new_tokens": min(room, self._limit)}
        try:
            found = streamed(self._model, prompt_ids, self._method, wanted, also=reply)
        except KeyboardInterrupt:
            kept = "what came of the reply stays" if reply.text else "your message was taken back"
            say(f"\nstopped: {kept}")
            found = None
        if found is not None or reply.text:
            self.messages = [*asked, {"role": "assistant", "content": reply.text}]
        if found is not None:
            self._remark(found, room)

    def _remark(self, found: Generation, room: int) -> None:
        report = found.report
        share = 100 * report.read_bytes_per_token / report.dense_bytes_per_token
        speed = report.tokens_per_second
        pace = "" if speed is None else f", {speed:.1f} tokens/s"
        read = "" if share == 100 else f", {share:.0f} % of the weights read"
        say(f"[{report.new_tokens} tokens{pace}{read}]")
        if found.finish_reason[0] != "length":
            return
        if room <= self._limit:
            say("the reply was cut: the context is full; /reset starts anew")
        else:
            say(f"the reply was cut at --max-new-tokens {self._limit}")


class _Heard:
    """Collects a reply, so that an interrupted one is not lost."""

    def __init__(self) -> None:
        self.text = ""

    def __call__(self, piece: str) -> None:
        self.text += piece


def _next_line() -> str | None:
    """The next line typed or piped in; None at the end of it."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return sys.stdin.readline() or None
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # its presence gives input() editing and recall
    try:
        # Only here, where stdout is the terminal: input() writes its prompt there.
        return input("> ")
    except EOFError:
        say("")
        return None
