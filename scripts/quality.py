"""Continuation perplexity on a text: what decode-time pruning costs, each window against dense.

    python -m scripts.quality --text article.txt --json quality.json

Each window's prefix is prefilled and decides the partition; the tokens after it are scored as
decode steps under each method (`popjax.continuation`). Prints a markdown table. The text is the
caller's: none is shipped, and none of these methods is calibrated on it. Methods that are
calibrated take part with --statistics, the file that `popjax calibrate channels` wrote from another
text; --methods names those to run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import popjax
from popjax.continuation import continuation_logprobs
from popjax.methods import (
    CHESS,
    FLAP,
    TEAL,
    Frozen,
    Griffin,
    Method,
    OnlinePruning,
    ProbePruning,
    RescoreAll,
    WandaSP,
)

DENSE = "dense"
METHODS: dict[str, Callable[[float], Method]] = {
    "griffin": lambda ratio: Griffin(ratio),
    "frozen": lambda ratio: Frozen(ratio),
    "online-pruning": lambda ratio: OnlinePruning(ratio=ratio),
    "online-pruning, dense prefill": lambda ratio: OnlinePruning(ratio=ratio, prefill="dense"),
    "rescore-all": lambda ratio: RescoreAll(ratio),
}
# By ratio and the file of statistics.
CALIBRATED: dict[str, Callable[[float, str], Method]] = {
    "wanda-sp": WandaSP,
    "flap": FLAP,
    "probe-pruning": ProbePruning,
    "teal": TEAL,
    "teal, FFN alone": lambda ratio, file: TEAL(ratio, file, attention=False),
    "teal, masked prefill": lambda ratio, file: TEAL(ratio, file, prefill="masked"),
    "chess": CHESS,
    "chess, FFN alone": lambda ratio, file: CHESS(ratio, file, attention=False),
    "chess, dense prefill": lambda ratio, file: CHESS(ratio, file, prefill="dense"),
}


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


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of independent values; NaN for fewer than two."""
    if len(values) < 2:
        return math.nan
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


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


def chosen_methods(
    names: Sequence[str] | None, statistics: Path | None
) -> dict[str, Callable[[float], Method]]:
    """The methods to run by name: those named, or all that need no file that was not given.

    Raises ValueError for an unknown name, and for a calibrated method without statistics.
    """
    known = dict(METHODS)
    if statistics is not None:
        file = str(statistics)
        known |= {
            name: lambda ratio, make=make: make(ratio, file) for name, make in CALIBRATED.items()
        }
    for name in names or ():
        if name not in known:
            needs = " needs --statistics" if name in CALIBRATED else f" is none of {list(known)}"
            raise ValueError(f"method {name!r}{needs}")
    return known if names is None else {name: known[name] for name in names}


def measure(
    model: Any,
    windows: Sequence[Sequence[int]],
    prefix: int,
    ratios: Sequence[float],
    methods: Mapping[str, Callable[[float], Method]] = METHODS,
) -> list[Quality]:
    """Quality of every method at every ratio; all methods see a window before the next begins."""
    cases = [(DENSE, 0.0, Method())]
    cases += [(name, ratio, make(ratio)) for ratio in ratios for name, make in methods.items()]
    found: dict[tuple[str, float], list[float]] = {case[:2]: [] for case in cases}
    started = time.perf_counter()
    for i, window in enumerate(windows):
        for name, ratio, method in cases:
            logprobs = continuation_logprobs(
                model.params, model.config, method, window[:prefix], window[prefix:]
            )
            found[name, ratio].append(-float(np.mean(logprobs, dtype=np.float64)))
        spent = time.perf_counter() - started
        print(f"window {i + 1}/{len(windows)}, {spent:.0f} s", file=sys.stderr, flush=True)
    dense = tuple(found[DENSE, 0.0])
    return [Quality(name, ratio, tuple(values), dense) for (name, ratio), values in found.items()]


def table(results: Sequence[Quality]) -> str:
    """The markdown table; ± is one standard error over windows, paired in the last column."""
    head = "| method | ratio | log-perplexity | perplexity | above dense |\n|---|---|---|---|---|"
    return "\n".join([head, *(result.row() for result in results)])


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write JSON whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(partial, path)


def window_parser(about: str | None, windows: int, prefix: str) -> argparse.ArgumentParser:
    """Options of a script that scores windows of a text; what the prefix does, in words."""
    parser = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to score")
    parser.add_argument("--model", help="folder, .gguf file or hub id (default: the default model)")
    parser.add_argument("--windows", type=int, default=windows)
    parser.add_argument("--prefix", type=int, default=512, help=f"tokens that {prefix}")
    parser.add_argument("--scored", type=int, default=256, help="tokens scored after the prefix")
    parser.add_argument("--json", type=Path, help="also write every window's numbers here")
    return parser


def loaded_windows(asked: argparse.Namespace) -> tuple[Any, list[list[int]], int]:
    """The model, the windows asked for, and how many tokens they are spread over."""
    text = asked.text.read_text(encoding="utf-8")
    model = popjax.load(asked.model)
    ids = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    special = model.tokenizer("")["input_ids"]
    windows = cut_windows(ids, special, asked.windows, asked.prefix + asked.scored)
    return model, windows, len(ids)


def publish(results: Sequence[Quality], protocol: str, path: Path | None) -> None:
    """Print the protocol and the table, and write them as JSON where a path was given."""
    print(f"{protocol}\n\n{table(results)}")
    if path is not None:
        values = {"protocol": protocol, "results": [result.to_json() for result in results]}
        write_json(path, values)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = window_parser(__doc__, 24, "decide the partition")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--methods", nargs="+", help="by name, as the table has them")
    parser.add_argument("--statistics", type=Path, help="for methods that are calibrated")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; see `--help`."""
    asked = _arguments(argv)
    methods = chosen_methods(asked.methods, asked.statistics)
    model, windows, count = loaded_windows(asked)
    results = measure(model, windows, asked.prefix, asked.ratios, methods)
    protocol = (
        f"{model.name}, {asked.windows} windows spread over {count} tokens: prefix of "
        f"{asked.prefix} decides, next {asked.scored} scored as decode steps; ± one standard error"
    )
    publish(results, protocol, asked.json)


if __name__ == "__main__":
    main()
