"""The picture of an evicted cache: how much each layer and head keeps, and from where.

Needs the extra `plots` (matplotlib), imported only when drawing. Leaves out making the run: it
takes the entries that stayed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.atomic import new_file
from popjax.cache import Kept
from popjax.picture import printable, require_matplotlib

_MAX_BINS = 400
_DPI = 120
_LINE = 100


def draw(
    path: str | os.PathLike[str], kept: Kept, tokens: int, *, title: str, prompt: str = ""
) -> Path:
    """Write a PNG of what row 0 keeps of a prompt of so many tokens; returns its path.

    Left: share of entries kept, layers down, heads across. Right: where they lie in the prompt, one
    line a layer and head, darker where more of the neighbouring tokens stay. Raises ImportError
    without matplotlib.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    share, places = occupancy(kept, tokens)
    layers, heads = share.shape
    height = max(3.2, 0.9 + 0.045 * layers * heads)
    figure = Figure(figsize=(13.0, height + 0.9), layout="constrained")
    figure.suptitle(f"{title}\n{printable(prompt, _LINE)}", fontsize=10)
    left, right = figure.subplots(1, 2, width_ratios=(1, 4))
    _shares(figure, left, share)
    shown = right.imshow(
        places.reshape(layers * heads, -1),
        aspect="auto",
        cmap="Blues",
        vmin=0.0,
        vmax=1.0,
        interpolation="nearest",
        extent=(0, tokens, layers * heads, 0),
    )
    right.set_xlabel("position in the prompt")
    right.set_ylabel(f"layer ({heads} heads each)")
    step = max(1, layers // 10)
    right.set_yticks([i * heads for i in range(0, layers, step)], list(range(0, layers, step)))
    figure.colorbar(shown, ax=right, label="share of these tokens kept", pad=0.01)
    with new_file(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=_DPI)
    return Path(path)


def occupancy(kept: Kept, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Share kept [L, K], and share of every stretch of the prompt kept [L, K, bins], of row 0."""
    starts, lengths = (np.asarray(held)[:, 0] for held in (kept.starts, kept.lengths))
    positions, bins = np.asarray(kept.positions), min(tokens, _MAX_BINS)
    sizes = np.bincount(np.arange(tokens) * bins // tokens, minlength=bins)
    places = np.zeros((*starts.shape, bins))
    for i, k in np.ndindex(*starts.shape):
        held = positions[starts[i, k] : starts[i, k] + lengths[i, k]]
        places[i, k] = np.bincount(held.astype(np.int64) * bins // tokens, minlength=bins) / sizes
    return lengths / tokens, places


def _shares(figure: Any, axes: Any, share: np.ndarray) -> None:
    shown = axes.imshow(share, aspect="auto", cmap="Blues", vmin=0.0, interpolation="nearest")
    axes.set_xlabel("key/value head")
    axes.set_ylabel("layer")
    axes.set_xticks(range(share.shape[1]))
    figure.colorbar(shown, ax=axes, label="share of entries kept")
