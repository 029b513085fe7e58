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
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import popjax
from popjax.bench import DENSE
from popjax.evaluation.paired import Quality, paired_losses, text_windows
from popjax.evaluation.protocols import Case
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
    """Quality of every method at every ratio."""
    cases = {(DENSE, 0.0): Case()}
    cases |= {(k, r): Case(method=make(r)) for r in ratios for k, make in methods.items()}
    losses = paired_losses(model, windows, prefix, cases, progress(len(windows)))
    dense = losses[DENSE, 0.0]
    return [Quality(name, r, values, dense) for (name, r), values in losses.items()]


def progress(count: int, what: str = "window") -> Callable[[int], None]:
    """Says on stderr how many of `count` windows, or others, are done, and after how long."""
    started = time.perf_counter()

    def say(done: int) -> None:
        spent = time.perf_counter() - started
        print(f"{what} {done}/{count}, {spent:.0f} s", file=sys.stderr, flush=True)

    return say


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
    return model, *text_windows(model, text, asked.windows, asked.prefix + asked.scored)


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
