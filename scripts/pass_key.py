"""Pass-key prompts: a number stated once in a long text, among other numbers, and asked for.

The haystack is the caller's text, whole sentences of it. Leaves out running a model.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

DIGITS = 5
# Sentences that look like the one asked for, one every so many tokens: finding a number is not
# enough, it must be the right one.
DISTRACTOR_EVERY = 256
THINGS = (
    "ticket",
    "invoice",
    "locker",
    "order",
    "flight",
    "account",
    "platform",
    "licence",
    "parcel",
    "meter",
)
STATED = " The {what} is {number}."
# No words around it: small models answer these less often.
QUESTION = "\n\nThe pass key is"
PASS_KEY = "pass key"


@dataclasses.dataclass(frozen=True)
class PassKey:
    """Token ids: the context, the question that follows it, and the answer expected then."""

    context: tuple[int, ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]


class Haystacks:
    """Makes pass-key prompts from the sentences of a text."""

    def __init__(self, tokenizer: Any, text: str) -> None:
        self.tokenizer = tokenizer
        self.sentences = [s for s in re.split(r"(?<=[.!?])\s+", text) if s]
        self.start = tuple(tokenizer("")["input_ids"])

    def prompt(self, length: int, depth: float, seed: int) -> PassKey:
        """A prompt of at most `length` tokens, question included, its number at a depth of 0 to 1.

        Filler and numbers follow from the seed. Raises ValueError for a length that holds nothing
        but what must be said, and for a text too short to fill it.
        """
        rng = np.random.default_rng(seed)
        numbers = rng.choice(9 * 10 ** (DIGITS - 1), 1 + length // DISTRACTOR_EVERY, replace=False)
        numbers += 10 ** (DIGITS - 1)
        stated = self._ids(STATED.format(what=PASS_KEY, number=numbers[0]))
        others = [
            self._ids(STATED.format(what=f"{rng.choice(THINGS)} number", number=number))
            for number in numbers[1:]
        ]
        question, answer = self._ids(QUESTION), self._ids(f" {numbers[0]}")
        said = len(self.start) + len(stated) + sum(map(len, others)) + len(question)
        filler = self._filler(length - said, rng)
        for other in others:
            filler.insert(int(rng.integers(len(filler) + 1)), other)
        filler.insert(_at(depth, filler), stated)
        context = (*self.start, *(token for sentence in filler for token in sentence))
        return PassKey(context, question, answer)

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _filler(self, room: int, rng: np.random.Generator) -> list[tuple[int, ...]]:
        """Consecutive sentences from a random one on, in at most `room` tokens, cut at the last."""
        found: list[tuple[int, ...]] = []
        first = int(rng.integers(len(self.sentences)))
        for sentence in (*self.sentences[first:], *self.sentences[:first]):
            if room <= 0:
                break
            found.append(self._ids(f" {sentence}")[:room])
            room -= len(found[-1])
        if room or not found:
            raise ValueError(
                f"the text lacks {room} tokens to fill the prompt: give a longer text or a shorter "
                "length"
                if room > 0
                else f"the length is {1 - room} tokens too short for a pass key with a question: "
                "ask for more"
            )
        return found


def _at(depth: float, sentences: Sequence[Sequence[int]]) -> int:
    """The place between sentences that is nearest to a share `depth` of their tokens."""
    ends = np.cumsum([0, *map(len, sentences)])
    return int(np.argmin(np.abs(ends - depth * ends[-1])))


__all__ = ["Haystacks", "PassKey"]
