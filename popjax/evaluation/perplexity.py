"""Perplexity of a text under several cases, each window against its dense twin.

split: windows spread over the text; the first tokens of each are prefilled and decide, the next
are decoded. single-pass: windows that roll over the text as lm-eval's do, each token once, with
all the context that fits.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from popjax.evaluation.encoding import Encoder, Pair
from popjax.evaluation.journal import Journal, is_number
from popjax.evaluation.protocols import DENSE, SPLIT
from popjax.evaluation.results import Row
from popjax.evaluation.scoring import Scorer
from popjax.evaluation.statistics import Mean, ratio
from popjax.evaluation.windows import cut_windows, rolling

METRIC = "log-perplexity"


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows of a text of so many tokens and words; whole: together they score all of it."""

    pairs: tuple[Pair, ...]
    tokens: int
    words: int
    whole: bool

    @property
    def scored(self) -> int:
        return sum(len(pair.continuation) for pair in self.pairs)


def windows_of(
    text: str, encoder: Encoder, prefix: int = 512, scored: int = 256, count: int | None = None
) -> Windows:
    """The windows of a text under the protocol of the encoder.

    split: `count` (24) windows of `prefix` + `scored` tokens; single-pass: windows of the encoder's
    max_length, of which `count` are taken, evenly spread, or all. Raises ValueError for a text that
    is empty or too short.
    """
    if not text.strip():
        raise ValueError("the text is empty: give one with something to score")
    if encoder.protocol == SPLIT:
        return _spread(text, encoder, prefix, scored, 24 if count is None else count)
    ids = encoder.encode(text)
    found = list(rolling(ids, encoder.prefix_token, encoder.max_length))
    if count is not None and not 1 <= count <= len(found):
        raise ValueError(
            f"{count} windows of {encoder.max_length} tokens were asked for, and a text of "
            f"{len(ids)} tokens has {len(found)}: give a longer text, or fewer or shorter windows"
        )
    whole = count is None or count == len(found)
    if count is not None:
        found = [found[i * (len(found) - 1) // max(count - 1, 1)] for i in range(count)]
    pairs = tuple(Pair(tuple(context), tuple(ids)) for context, ids in found)
    return Windows(pairs, len(ids), _words(text), whole)


def _spread(text: str, encoder: Encoder, prefix: int, scored: int, count: int) -> Windows:
    if prefix < 1 or scored < 1 or prefix + scored > encoder.max_length:
        raise ValueError(
            f"a prefix of {prefix} tokens and {scored} scored do not fit the model's maximum "
            f"context length of {encoder.max_length}, or are below 1: choose others"
        )
    ids, special = encoder.encode(text, special=False), encoder.encode("")
    found = cut_windows(ids, special, count, prefix + scored)
    pairs = tuple(Pair(tuple(ids[:prefix]), tuple(ids[prefix:])) for ids in found)
    return Windows(pairs, len(ids), _words(text), False)


def _words(text: str) -> int:
    """As lm-eval counts them."""
    return len(re.split(r"\s+", text))


def measure(
    windows: Windows,
    scorers: Sequence[Scorer],
    journal: Journal,
    name: str,
    on_done: Callable[[int], object] = lambda windows: None,
) -> list[Row]:
    """Log-perplexity (nats a token) under each case; all see a window before the next begins.

    Raises ValueError for scores that are not finite, after those before them were kept.
    """
    cases = [scorer.case.name for scorer in scorers]
    found: dict[str, list[float]] = {case: [] for case in cases}
    for i, pair in enumerate(windows.pairs):
        for scorer in scorers:
            key = f"{scorer.case.name}|{i}"
            if not journal.holds(key, is_number):
                ((_, score),) = scorer.scores([pair])
                journal.put(key, score.logprob)
            found[scorer.case.name].append(-journal[key])
        on_done(1)
    sizes = [float(len(pair.continuation)) for pair in windows.pairs]
    rows = []
    for case in cases:
        difference = None
        if case != DENSE and DENSE in found:
            gaps = [a - b for a, b in zip(found[case], found[DENSE], strict=True)]
            difference = ratio(gaps, sizes)
        rows.append(Row(name, METRIC, case, ratio(found[case], sizes), difference))
    return rows


def word_perplexity(value: Mean, windows: Windows) -> float | None:
    """exp(nats of the whole text / its words), as lm-eval's; None where not all was scored."""
    return math.exp(value.mean * windows.scored / windows.words) if windows.whole else None


def notes(windows: Windows, rows: Sequence[Row]) -> list[str]:
    """What was scored, and the perplexities that the rows stand for."""
    lengths = sorted({len(pair.continuation) for pair in windows.pairs})
    sizes = str(lengths[0]) if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
    contexts = sorted({len(pair.context) for pair in windows.pairs})
    before = str(contexts[0]) if len(contexts) == 1 else f"{contexts[0]} to {contexts[-1]}"
    said = [
        f"nats a token; {len(windows.pairs)} windows, each {before} tokens of context and {sizes} "
        f"scored, {windows.scored} of {windows.tokens} tokens in all; errors are over windows, "
        "taken as independent"
    ]
    for row in rows:
        words = word_perplexity(row.value, windows)
        by_word = "" if words is None else f", {words:.4g} a word"
        said.append(f"{row.case}: perplexity {math.exp(row.value.mean):.4g}{by_word}")
    return said


def settings_of(windows: Windows) -> dict[str, Any]:
    """What tells these windows from others."""
    first = windows.pairs[0]
    shape = [len(windows.pairs), len(first.context), len(first.continuation), windows.scored]
    return {"windows, context, scored, in all": shape, "text tokens": windows.tokens}


__all__ = ["METRIC", "Windows", "measure", "notes", "settings_of", "windows_of", "word_perplexity"]
