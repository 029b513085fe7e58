"""Needle heat map: is a number found at each context length and depth, dense and after eviction.

    python -m scripts.needle --text article.txt --kv laprox --keep 0.1 --figure needle.png

The prompts are those of `pass_key.py`, each prefilled once for both. The text is the caller's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import popjax
from checkpoints.atomic import new_file
from popjax.bench import DENSE
from popjax.picture import require_matplotlib
from scripts.kv_quality import UNTRAINED, evictions, retrieval
from scripts.pass_key import Haystacks
from scripts.quality import write_json


def shares(
    model: Any, haystacks: Haystacks, asked: argparse.Namespace
) -> dict[tuple[str, float], np.ndarray]:
    """Share [depths, lengths] of the prompts of a cell whose number was given back, by case."""
    cases = evictions([asked.kv], [asked.keep], model)
    shape = (len(asked.depths), len(asked.lengths))
    found = {case: np.zeros(shape) for case in cases}
    for column, length in enumerate(asked.lengths):
        prompts = [
            haystacks.prompt(length, depth, asked.seed + trial)
            for depth in asked.depths
            for trial in range(asked.trials)
        ]
        hits = retrieval(model, prompts, cases, asked.agnostic).prompts
        for case, values in hits.items():
            found[case][:, column] = np.reshape(values, (-1, asked.trials)).mean(axis=1)
    return found


def draw(
    path: Path,
    found: dict[tuple[str, float], np.ndarray],
    lengths: Sequence[int],
    depths: Sequence[float],
    title: str,
) -> None:
    """A PNG with one heat map a case, side by side, shares written into the cells."""
    require_matplotlib()
    from matplotlib.figure import Figure

    size = (2.6 + 2 * max(1.0 * len(lengths), 3), 2.2 + 0.5 * len(depths))
    figure = Figure(figsize=size, dpi=120, facecolor="white", layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    image = None
    for axes, ((name, keep), values) in zip(panels, found.items(), strict=True):
        image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_title(name if name == DENSE else f"{name}, {keep:.0%} of the cache kept")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_xlabel("context, tokens")
        for (row, column), value in np.ndenumerate(values):
            # Light on the dark end of the colour map, dark on its light end.
            colour = "white" if value < 0.6 else "black"
            axes.text(column, row, f"{value:.2g}", ha="center", va="center", color=colour)
    panels[0].set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    panels[0].set_ylabel("depth of the number")
    assert image is not None, "dense is always a case"
    figure.colorbar(image, ax=list(panels), label="share given back")
    figure.suptitle(title, fontsize=11, parse_math=False)
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to hide numbers in")
    parser.add_argument("--figure", type=Path, required=True, help="where the PNG goes")
    parser.add_argument("--model", help="folder, .gguf file or hub id (default: the default model)")
    parser.add_argument("--kv", choices=UNTRAINED, default="laprox")
    parser.add_argument("--keep", type=float, default=0.1)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--depths", type=float, nargs="+", default=[0, 0.25, 0.5, 0.75, 1])
    parser.add_argument("--trials", type=int, default=4, help="prompts a cell")
    parser.add_argument("--agnostic", action="store_true", help="evict before the question")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the shares here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and draw; see `--help`."""
    asked = _arguments(argv)
    require_matplotlib()
    model = popjax.load(asked.model)
    haystacks = Haystacks(model.tokenizer, asked.text.read_text(encoding="utf-8"))
    found = shares(model, haystacks, asked)
    question = "before" if asked.agnostic else "after"
    title = f"{model.name}: {asked.trials} pass keys a cell, evicted {question} the question"
    for (name, keep), values in found.items():
        print(f"{name}, kept {keep:g}: {values.mean():.2f} of all")
    if asked.json is not None:
        rows = [{"method": n, "keep": k, "shares": v.tolist()} for (n, k), v in found.items()]
        axes = {"lengths": asked.lengths, "depths": asked.depths, "trials": asked.trials}
        write_json(asked.json, {"protocol": title, **axes, "results": rows})
    draw(asked.figure, found, asked.lengths, asked.depths, title)


if __name__ == "__main__":
    main()
