"""Quality on windows of a text, paired: every method scores a window before the next one begins.

A window's prefix is prefilled and decides; what follows is decoded teacher-forced under each method
(`continuation.py`, the split protocol). Windows differ far more than methods do, so what a method
costs is the mean of its differences to dense. Leaves out text files and printing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from popjax.bench import Weights
from popjax.continuation import continuation_logprobs
from popjax.evaluation.protocols import DENSE, Case
from popjax.evaluation.statistics import standard_error
from popjax.evaluation.windows import cut_windows


@dataclasses.dataclass(frozen=True)
class Quality:
    """One method at one ratio: log-perplexity (nats a token) of each window, and its dense pair."""

    method: str
    ratio: float
    windows: tuple[float, ...]
    dense: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.windows))

    @property
    def standard_error(self) -> float:
        return standard_error(self.windows)

    @property
    def differences(self) -> tuple[float, ...]:
        return tuple(a - b for a, b in zip(self.windows, self.dense, strict=True))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: every window, means, standard errors, the paired difference."""
        return {
            **dataclasses.asdict(self),
            "mean": self.mean,
            "standard_error": self.standard_error,
            "difference": float(np.mean(self.differences)),
            "difference_standard_error": standard_error(self.differences),
        }

    def row(self) -> str:
        """A line of the markdown table."""
        name = self.method if self.method == DENSE else f"{self.method} | {self.ratio:g}"
        line = f"{self.mean:.3f} ± {self.standard_error:.3f} | {math.exp(self.mean):.2f}"
        if self.method == DENSE:
            return f"| {name} | 0 | {line} | |"
        difference, error = np.mean(self.differences), standard_error(self.differences)
        return f"| {name} | {line} | {difference:+.3f} ± {error:.3f} |"


def text_windows(model: Any, text: str, count: int, length: int) -> tuple[list[list[int]], int]:
    """`cut_windows` of a text as the model's tokenizer reads it, and the tokens it has in all."""
    ids = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return cut_windows(ids, model.tokenizer("")["input_ids"], count, length), len(ids)


def paired_losses(
    model: Weights,
    windows: Sequence[Sequence[int]],
    prefix: int,
    cases: Mapping[Any, Case],
    on_window: Callable[[int], None] | None = None,
) -> dict[Any, tuple[float, ...]]:
    """Log-perplexity, nats a token, of what follows the prefix of each window, under every case.

    `on_window` is told the number of finished windows. Raises ValueError for what the model cannot
    serve, and for a loss that is not finite.
    """
    found: dict[Any, list[float]] = {name: [] for name in cases}
    for done, window in enumerate(windows, 1):
        for name, case in cases.items():
            logprobs = continuation_logprobs(
                model.params,
                model.config,
                case.method,
                window[:prefix],
                window[prefix:],
                eviction=case.eviction,
                depth=case.depth,
            )
            loss = -float(np.mean(logprobs, dtype=np.float64))
            if not math.isfinite(loss):
                raise ValueError(
                    f"the log-perplexity of window {done} under {name} is {loss}: check the "
                    "weights for NaN (--check-tensors)"
                )
            found[name].append(loss)
        if on_window is not None:
            on_window(done)
    return {name: tuple(values) for name, values in found.items()}
