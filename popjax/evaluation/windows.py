"""Cutting a text into windows: what is context, what is scored, and every token at most once.

Leaves out scores (`scoring.py`) and sums over them (`perplexity.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence


def cut_windows(
    ids: Sequence[int], special: Sequence[int], count: int, length: int
) -> list[list[int]]:
    """`count` windows of `length` tokens, evenly spread over ids from first to last.

    Each starts with `special`, the tokens that the tokenizer puts before a text. Raises ValueError
    for a text too short to hold the windows without overlap.
    """
    body = length - len(special)
    if count < 1 or count * body > len(ids):
        raise ValueError(
            f"{count} windows of {length} tokens do not fit a text of {len(ids)} tokens: "
            "give a longer text, or fewer or shorter windows"
        )
    gap = (len(ids) - body) / max(count - 1, 1)
    starts = [math.floor(i * gap) for i in range(count)]
    return [[*special, *ids[start : start + body]] for start in starts]


def rolling(
    ids: Sequence[int], prefix: int, length: int, context: int = 1
) -> Iterator[tuple[list[int], list[int]]]:
    """(context, scored) windows of at most `length` inputs in which each token is scored once.

    As lm-eval's: the first follows the token `prefix`; later ones have at least `context` tokens
    before those scored, the last one as many as fit. `length` inputs predict `length` tokens, of
    which the last is never an input.
    """
    if not 1 <= context <= length:
        raise ValueError(f"context {context} is outside 1..{length}, the window: make it fit")
    done = min(length, len(ids))
    if done:
        yield [prefix], list(ids[:done])
    while done < len(ids):
        scored = min(len(ids) - done, length - context + 1)
        end = done + scored
        yield list(ids[end - length - 1 : done]), list(ids[done:end])
        done = end


def stepped(
    ids: Sequence[int], prefix: int, length: int, context: int
) -> tuple[tuple[list[int], list[int]], list[tuple[list[int], list[int]]]]:
    """The first `context` tokens after `prefix`, then windows of at most `length` tokens in all.

    Each later window has exactly `context` tokens before those scored, so that all of them are
    decided alike. For texts that are scored under the split protocol.
    """
    if not 1 <= context < length:
        raise ValueError(f"context {context} is outside 1..{length - 1}: leave room to score")
    starts = range(context, len(ids), length - context)
    later = [(list(ids[s - context : s]), list(ids[s : s + length - context])) for s in starts]
    return ([prefix], list(ids[:context])), later


__all__ = ["cut_windows", "rolling", "stepped"]
