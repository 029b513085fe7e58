"""Hearing a run as it goes: stop strings and streamers, over the chunks of tokens that arrive.

One `Listener` serves all rows of a run. It decides nothing about sampling; it only says which rows
have met a stop string, and at which token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from popjax.text import TextStream


class Listener:
    """Follows the new tokens of every row: detokenises, finds stop strings, feeds a streamer.

    Called with tokens [B, n] so far and done [B]; returns the rows [B] that met a stop string.
    """

    def __init__(self, streams: list[TextStream], eos_ids: tuple[int, ...], sink: Sink) -> None:
        self._streams = streams
        self._eos = eos_ids
        self._sink = sink
        self._heard = [0] * len(streams)
        self._ended = [False] * len(streams)
        self.texts = [""] * len(streams)
        self.stopped = [False] * len(streams)

    @classmethod
    def for_rows(
        cls,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        stop_strings: Sequence[str],
        streamer: Any,
        eos_ids: tuple[int, ...],
    ) -> Listener:
        """A listener for the rows of `prompts`; ValueError for a streamer with several rows."""
        if streamer is not None and len(prompts) > 1:
            raise ValueError(
                f"a streamer follows one row, {len(prompts)} were asked for: "
                "generate them one by one"
            )
        streams = [TextStream(tokenizer, stop_strings=stop_strings) for _ in prompts]
        return cls(streams, eos_ids, Sink(streamer, prompts[0]))

    def __call__(self, tokens: np.ndarray, done: np.ndarray) -> np.ndarray:
        for row in range(len(self._streams)):
            self._hear(row, tokens[row])
        return np.asarray(self.stopped)

    def finish(self, tokens: np.ndarray) -> None:
        """Hear the last tokens and release what was held back."""
        for row, stream in enumerate(self._streams):
            self._hear(row, tokens[row])
            if not self._ended[row]:
                self._release(row, None, stream.finish())
                self.stopped[row] = stream.stopped
        self._sink.end()

    def count(self, row: int) -> int:
        """Tokens of the row up to its end token or the one that completed a stop string."""
        return self._heard[row]

    def _hear(self, row: int, tokens: np.ndarray) -> None:
        stream = self._streams[row]
        for token in tokens[self._heard[row] :].tolist():
            if self._ended[row]:
                return
            self._heard[row] += 1
            self._release(row, token, stream.push([token]))
            if stream.stopped:
                self._ended[row] = self.stopped[row] = True
            elif token in self._eos:
                self._release(row, None, stream.finish())
                self._ended[row] = True

    def _release(self, row: int, token: int | None, piece: str) -> None:
        self.texts[row] += piece
        self._sink.put(token, piece)


class Sink:
    """Where one row's output goes: nowhere, a callable taking text, or put(ids) and end()."""

    _streamer: Any

    def __init__(self, streamer: Any, prompt: Sequence[int]) -> None:
        self._takes_ids = hasattr(streamer, "put")
        if streamer is not None and not self._takes_ids and not callable(streamer):
            raise ValueError(
                f"streamer {streamer!r} can take nothing: pass a callable, or put(ids) and end()"
            )
        self._streamer = streamer
        # As in transformers, the prompt comes first: such streamers have a switch to skip it.
        self._prompt: Sequence[int] | None = prompt

    def put(self, token: int | None, piece: str) -> None:
        if self._takes_ids and self._prompt is not None:
            self._streamer.put(np.asarray(self._prompt))
            self._prompt = None
        if self._takes_ids and token is not None:
            self._streamer.put(np.asarray([token]))
        elif self._streamer is not None and not self._takes_ids and piece:
            self._streamer(piece)

    def end(self) -> None:
        if self._takes_ids:
            self._streamer.end()
