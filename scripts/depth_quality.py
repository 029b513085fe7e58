"""What skipping layers in prefill costs: continuation perplexity above dense, with ablations.

    python -m scripts.depth_quality --text article.txt --json depth.json

Each window's prefix is prefilled with layers skipped; the tokens after it are scored as decode
steps of the whole model (`popjax.continuation`). ShortGPT's block influences are those of the
prefixes themselves, which favours it. Prints a markdown table. The text is the caller's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from popjax.bench import DENSE
from popjax.depth import PrefillPruning, ShortGPT
from popjax.depth.choosing import layer_count, lowest
from popjax.depth.importance import influences
from popjax.evaluation.paired import Quality, paired_losses
from popjax.evaluation.protocols import Case
from popjax.eviction import LaProx
from scripts.quality import loaded_windows, progress, publish, window_parser


def cases(skip: float, dropped: tuple[int, ...], keep: float | None) -> dict[str, Case]:
    """The last layers, other sets, what goes without each part, and evictions beside it."""
    depths = {
        "last": PrefillPruning(skip=skip),
        "first": PrefillPruning(skip=skip, choose="first"),
        "every": PrefillPruning(skip=skip, choose="every"),
        "last, no boundary": PrefillPruning(skip=skip, handle_boundary=False),
        "last, no entries": PrefillPruning(skip=skip, kv=False),
        "short-gpt": ShortGPT(layers=dropped),
    }
    found = {name: Case(depth=depth) for name, depth in depths.items()}
    if keep is not None:
        kv = LaProx(keep=keep)
        found[f"laprox {keep:g} alone"] = Case(eviction=kv)
        for budget in ("shared", "uniform"):
            depth = PrefillPruning(skip=skip, eviction=budget)
            found[f"last, laprox {keep:g} {budget}"] = Case(eviction=kv, depth=depth)
    return found


def block_influence(model: Any, prefixes: Sequence[Sequence[int]]) -> list[float]:
    """Mean block influence of every layer over the prefixes."""
    one = jax.jit(influences, static_argnames="config")
    found = [
        np.asarray(one(model.params, jnp.asarray(prefix, jnp.int32), config=model.config))
        for prefix in prefixes
    ]
    return np.mean(found, axis=0).tolist()


def measure(
    model: Any, windows: Sequence[Sequence[int]], prefix: int, skip: float, keep: float | None
) -> list[Quality]:
    """Quality of every case; all see a window before the next begins."""
    count = layer_count(skip, model.config.num_layers)
    dropped = lowest(block_influence(model, [window[:prefix] for window in windows]), count)
    print(f"short-gpt drops layers {dropped}", file=sys.stderr)
    listed: dict[str, Case] = {DENSE: Case(), **cases(skip, dropped, keep)}
    losses = paired_losses(model, windows, prefix, listed, progress(len(windows)))
    return [Quality(name, round(skip, 3), y, losses[DENSE]) for name, y in losses.items()]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = window_parser(__doc__, 8, "skip layers")
    parser.add_argument("--skip", type=float, default=1 / 3, help="share of the layers")
    parser.add_argument("--kv-keep", type=float, help="also beside laprox of this budget")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; see `--help`."""
    asked = _arguments(argv)
    model, windows, count = loaded_windows(asked)
    results = measure(model, windows, asked.prefix, asked.skip, asked.kv_keep)
    protocol = (
        f"{model.name}, {asked.windows} windows spread over {count} tokens: prefix of "
        f"{asked.prefix} skips layers, next {asked.scored} scored as decode steps; ± one standard "
        "error; ratio: share of the layers"
    )
    publish(results, protocol, asked.json)


if __name__ == "__main__":
    main()
