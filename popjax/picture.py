"""The picture of a pruned run: which channels a prompt kept, which candidates each step chose.

Needs the extra `plots` (matplotlib), imported only when drawing. Leaves out making the run: it
takes a finished generation's partition and masks.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from checkpoints.atomic import new_file
from popjax.config import ModelConfig
from popjax.generate import Masks
from popjax.sparsity import ChannelPartition, ChannelPartitions, Partitions, keeps_order

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# From the palette of Okabe and Ito: told apart with any colour vision, and in grey.
RETAINED, CANDIDATE, PRUNED = "#0072B2", "#E69F00", "#D2D2D2"
CHOSEN, REFUSED = "#E69F00", "#FFFFFF"
# A cell is two pixels wide and four tall, or more, so that none is lost to rounding.
MAX_COLUMNS = 512
MAX_CELLS_TALL = 4
MAX_STEP_COLUMNS = 600  # of all panels together
MAX_STEPS = 48
MAX_PANELS = 4
# Inches, but for the last.
_WIDTH, _LEFT, _RIGHT = 13.0, 1.35, 0.35
_HEAD, _BETWEEN, _FOOT = 2.32, 1.5, 0.85
_LAYER, _STEP = 0.165, 0.16
_DPI = 120
# Characters that fit where they are written: not if most of them are W.
_LINE, _TOKEN = 84, 10


@dataclasses.dataclass(frozen=True)
class Decided:
    """What a run decided: partition over the F channels, masks [steps, B, R+C] a layer or None."""

    config: ModelConfig
    partition: ChannelPartitions
    masks: Masks | None

    @classmethod
    def of(cls, config: ModelConfig, partition: Partitions, masks: Masks | None) -> Decided:
        """What a run decided. Raises ValueError for a model with experts, which has no picture."""
        require_no_experts(config)
        parts = tuple(part for part in partition if isinstance(part, ChannelPartition))
        return cls(config, parts, masks)

    @property
    def counts(self) -> tuple[int, int, int]:
        """Channels retained, candidate and pruned in all layers."""
        retained = sum(part.num_retained for part in self.partition)
        candidate = sum(part.num_candidate for part in self.partition)
        total = sum(layer.mlp_dim for layer in self.config.layers)
        return retained, candidate, total - retained - candidate

    def chosen(self, i: int) -> np.ndarray:
        """Bool [steps, C]: which candidates of layer i each step of row 0 switched on."""
        assert self.masks is not None, "the run must record its masks"
        mask, part = np.asarray(self.masks[i])[:, 0, :], self.partition[i]
        if keeps_order(part, self.config.layers[i].mlp_dim):
            return mask[:, np.asarray(part.candidate)]
        return mask[:, part.num_retained :]

    def choosing_layers(self, asked: Sequence[int] | None) -> list[int]:
        """The layers whose steps are shown: those asked for, or first, middle and last.

        Raises ValueError for too many, or for one that is not there or has nothing to choose.
        """
        steps = 0 if self.masks is None else np.asarray(self.masks[0]).shape[0]
        able = [i for i, part in enumerate(self.partition) if steps and part.num_candidate]
        if not asked:
            return sorted({able[0], able[len(able) // 2], able[-1]}) if able else []
        if len(asked) > MAX_PANELS:
            raise ValueError(f"{len(asked)} layers do not fit in one picture: ask for {MAX_PANELS}")
        for i in asked:
            if i not in able:
                why = "has no candidates" if 0 <= i < len(self.partition) else "is not in the model"
                raise ValueError(
                    f"layer {i} {why}: choose of 0 to {len(self.partition) - 1}, with a method "
                    "and a ratio that leave candidates"
                )
        return sorted(set(asked))


def draw(
    path: str | os.PathLike[str],
    decided: Decided,
    *,
    title: str,
    prompt: str,
    written: Sequence[str] = (),
    layers: Sequence[int] | None = None,
) -> None:
    """Write the picture as a PNG at `path`, whole or not at all.

    title: model and method; written: the text of the token that each step wrote; layers: see
    `Decided.choosing_layers`. Raises ValueError for a bad layer and ImportError without matplotlib.
    """
    shown = decided.choosing_layers(layers)
    steps = min(decided.chosen(shown[0]).shape[0], MAX_STEPS) if shown else 0
    map_height = min(max(_LAYER * decided.config.num_layers, 1.2), 6.0)
    steps_height = max(_STEP * steps, 1.2) if shown else 0.0
    height = _HEAD + map_height + _FOOT + (_BETWEEN + steps_height if shown else 0.0)
    figure = _figure_class()(figsize=(_WIDTH, height), dpi=_DPI, facecolor="white")
    _head(figure, height, decided, title, prompt)
    across = (_LEFT, _WIDTH - _RIGHT)
    _draw_map(_axes(figure, height, across, _HEAD, map_height), decided)
    top = _HEAD + map_height + _BETWEEN
    room = (across[1] - across[0] + 0.3) / max(len(shown), 1)
    for n, i in enumerate(shown):
        span = (_LEFT + n * room, _LEFT + (n + 1) * room - 0.3)
        axes = _axes(figure, height, span, top, steps_height)
        labels = written if n == 0 else None
        _draw_steps(axes, decided, i, labels, MAX_STEP_COLUMNS // len(shown))
    if shown:
        _steps_head(figure, height, top, steps)
    with new_file(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=_DPI)


def require_matplotlib() -> None:
    """Raise ImportError, saying what to install, where matplotlib is not."""
    _figure_class()


def require_no_experts(config: ModelConfig) -> None:
    """Raise ValueError for a model that has experts."""
    if any(layer.moe is not None for layer in config.layers):
        raise ValueError(
            "a mixture of experts has partitions for each expert, which no picture shows: draw a "
            "model without experts"
        )


def _figure_class() -> type[Figure]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'drawing needs matplotlib, which is not installed: pip install "popjax[plots]"'
        ) from error
    return Figure


def _axes(
    figure: Figure, height: float, across: tuple[float, float], top: float, tall: float
) -> Axes:
    """Axes at inches from the left and from the top."""
    left, right = across
    box = (left / _WIDTH, 1 - (top + tall) / height, (right - left) / _WIDTH, tall / height)
    axes = figure.add_axes(box)
    axes.tick_params(labelsize=10, length=3)
    return axes


def _head(figure: Figure, height: float, decided: Decided, title: str, prompt: str) -> None:
    from matplotlib.patches import Patch

    def line(inches: float, text: str, **style: Any) -> None:
        # parse_math: a prompt may hold dollar signs.
        figure.text(_LEFT / _WIDTH, 1 - inches / height, text, va="top", parse_math=False, **style)

    line(0.2, "What one prompt keeps of a model", fontsize=16, weight="bold")
    line(0.56, printable(title, _LINE), fontsize=12)
    line(0.82, f"prompt: “{printable(' '.join(prompt.split()), _LINE)}”", fontsize=12)
    retained, candidate, pruned = decided.counts
    total = retained + candidate + pruned
    meanings = (
        (RETAINED, "retained: on for every token", retained),
        (CANDIDATE, "candidate: chosen anew at every token", candidate),
        (PRUNED, "pruned: not read while decoding", pruned),
    )
    figure.legend(
        handles=[
            Patch(facecolor=colour, edgecolor="#777777", linewidth=0.6) for colour, _, _ in meanings
        ],
        labels=[
            f"{text}\n{count:,} channels ({100 * count / total:.1f} %)"
            for _, text, count in meanings
        ],
        loc="upper left",
        bbox_to_anchor=(_LEFT / _WIDTH, 1 - 1.22 / height),
        ncols=3,
        frameon=False,
        fontsize=11,
        borderaxespad=0,
        borderpad=0,
        columnspacing=3,
        handlelength=1.6,
        handleheight=1.6,
    )
    line(1.94, "FFN channels of every layer", fontsize=13, weight="bold")


def _draw_map(axes: Axes, decided: Decided) -> None:
    width = max(layer.mlp_dim for layer in decided.config.layers)
    tall = min(-(-width // MAX_COLUMNS), MAX_CELLS_TALL)
    mixed = -(-width // (MAX_COLUMNS * tall))
    columns = -(-width // (tall * mixed))
    pairs = zip(decided.partition, decided.config.layers, strict=True)
    rows = [_layer_cells(part, layer.mlp_dim, tall, columns, mixed) for part, layer in pairs]
    count = len(rows)
    axes.imshow(
        np.concatenate(rows),
        aspect="auto",
        interpolation="nearest",
        extent=(0, columns * tall * mixed, count - 0.5, -0.5),
    )
    # White lines part the rows, or neighbouring layers read as one texture.
    axes.hlines(np.arange(1, count) - 0.5, 0, width, color="white", linewidth=2.5)
    axes.set_ylabel("layer", fontsize=11)
    axes.set_yticks(range(0, count, max(1, -(-count // 16))))
    order = f"; {tall} stand in a column, read downwards" if tall > 1 else ""
    mix = f"; a cell mixes the colours of {mixed} neighbours" if mixed > 1 else ""
    axes.set_xlabel(f"channel, by its number in the model{order}{mix}", fontsize=11)
    axes.spines[:].set_visible(False)


def _layer_cells(
    part: ChannelPartition, channels: int, tall: int, columns: int, mixed: int
) -> np.ndarray:
    """RGB [tall, columns, 3] of one layer, down then right; white past its last channel."""
    from matplotlib.colors import to_rgb

    kinds = np.tile(to_rgb(PRUNED), (channels, 1))
    kinds[np.asarray(part.retained)] = to_rgb(RETAINED)
    kinds[np.asarray(part.candidate)] = to_rgb(CANDIDATE)
    cells = np.ones((columns * tall, 3))
    filled = binned(kinds.T, mixed).T
    cells[: len(filled)] = filled
    return cells.reshape(columns, tall, 3).swapaxes(0, 1)


def binned(values: np.ndarray, each: int) -> np.ndarray:
    """Means [..., bins] over runs of `each` along the last axis; the last run may be shorter."""
    starts = np.arange(0, values.shape[-1], each)
    lengths = np.diff(starts, append=values.shape[-1])
    return np.add.reduceat(values, starts, axis=-1) / lengths


def _draw_steps(
    axes: Axes, decided: Decided, i: int, written: Sequence[str] | None, columns: int
) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    chosen = decided.chosen(i)[:MAX_STEPS]
    # The busiest first: what every step wants stands left, what none wants right.
    order = np.argsort(-chosen.sum(axis=0), kind="stable")
    steps, candidates = chosen.shape
    mixed = -(-candidates // columns)
    shares = binned(chosen[:, order].astype(float), mixed)
    colours = LinearSegmentedColormap.from_list("chosen", [REFUSED, CHOSEN])
    axes.imshow(
        shares,
        aspect="auto",
        interpolation="nearest",
        cmap=colours,
        vmin=0,
        vmax=1,
        extent=(0, shares.shape[1] * mixed, steps - 0.5, -0.5),
    )
    axes.set_xlim(0, candidates)
    axes.set_title(
        f"layer {i}: {decided.partition[i].k_selected} of {candidates} a step", fontsize=11
    )
    mix = f"; a column mixes {mixed}" if mixed > 1 else ""
    axes.set_xlabel(f"candidates, the most often\nchosen first{mix}", fontsize=10)
    axes.spines[:].set_color("#999999")
    axes.spines[:].set_linewidth(0.6)
    if written is None:
        axes.set_yticks([])
        return
    labels = [printable(text, _TOKEN) for text in written[:steps]]
    axes.set_yticks(range(len(labels)), labels, fontsize=9, parse_math=False)
    axes.set_ylabel("token written", fontsize=11)


def _steps_head(figure: Figure, height: float, top: float, steps: int) -> None:
    figure.text(
        _LEFT / _WIDTH,
        1 - (top - 0.62) / height,
        f"Candidates that each of the {'first ' if steps == MAX_STEPS else ''}{steps} steps chose "
        "(orange) or left off (white)",
        va="top",
        fontsize=13,
        weight="bold",
    )


def printable(text: str, longest: int) -> str:
    """Text on one line of at most `longest` characters, with marks for what has no glyph."""
    shown = text.replace("\n", "⏎").replace("\t", "→")
    if len(shown) > longest:
        shown = shown[: longest - 1] + "…"
    return "".join(c if c in "⏎→…" or (c.isprintable() and ord(c) < 0x250) else "·" for c in shown)
