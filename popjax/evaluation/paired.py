"""Quality on windows of a text, paired: every method scores a window before the next one begins.

A window's prefix is prefilled and decides; what follows is decoded teacher-forced under each method
(`scoring.py`, the split protocol). Windows differ far more than methods do, so what a method
costs is the mean of its differences to dense. Leaves out text files and printing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from popjax.bench import Weights
from popjax.evaluation.encoding import Pair
from popjax.evaluation.protocols import DENSE, Case
from popjax.evaluation.scoring import Scorer
from popjax.evaluation.statistics import Mean, paired, standard_error
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
    def difference(self) -> Mean:
        """From dense, paired by window."""
        return paired(self.windows, self.dense)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: every window, means, standard errors, the paired difference."""
        return {
            **dataclasses.asdict(self),
            "mean": self.mean,
            "standard_error": self.standard_error,
            "difference": self.difference.mean,
            "difference_standard_error": self.difference.standard_error,
        }

    def row(self) -> str:
        """A line of the markdown table."""
        name = self.method if self.method == DENSE else f"{self.method} | {self.ratio:g}"
        line = f"{self.mean:.3f} ± {self.standard_error:.3f} | {math.exp(self.mean):.2f}"
        if self.method == DENSE:
            return f"| {name} | 0 | {line} | |"
        return f"| {name} | {line} | {self.difference.words(sign=True)} |"


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
    scorers = {
        name: Scorer(model.params, model.config, dataclasses.replace(case, name=str(name)))
        for name, case in cases.items()
    }
    found: dict[Any, list[float]] = {name: [] for name in cases}
    for done, window in enumerate(windows, 1):
        pair = Pair(tuple(window[:prefix]), tuple(window[prefix:]))
        for name, scorer in scorers.items():
            ((_, score),) = scorer.scores([pair])
            found[name].append(-score.logprob / score.tokens)
        if on_window is not None:
            on_window(done)
    return {name: tuple(values) for name, values in found.items()}
