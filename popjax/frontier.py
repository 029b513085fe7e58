"""The frontier: what each method costs in quality against what it saves in bytes and in time.

Joins a benchmark (`bench.py`) with paired losses (`evaluation/paired.py`) of the same methods. A
picture needs the extra `plots` (matplotlib), imported only when drawing. Leaves out measuring.
"""

from __future__ import annotations

import dataclasses
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from checkpoints.atomic import new_file
from popjax.bench import DENSE, BenchResult, Spread
from popjax.evaluation.statistics import paired
from popjax.picture import require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito: told apart with any colour vision; the shapes also in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
SHAPES = "osD^vP*X<>ph"
_SIZE, _DPI = (13.0, 5.6), 120
_LINE = 150  # characters of the title that fit


@dataclasses.dataclass(frozen=True)
class Point:
    """One method: nats a token above dense, and shares of dense's bytes and time a decode step.

    loss_error: standard error of the paired difference over `windows` windows.
    """

    name: str
    loss: float
    loss_error: float
    windows: int
    bytes_share: float
    time_share: Spread

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**dataclasses.asdict(self), "time_share": self.time_share.to_json()}


def points(result: BenchResult, losses: Mapping[str, Sequence[float]]) -> tuple[Point, ...]:
    """A point a method of the benchmark, dense apart, from losses by window under the same names.

    Raises KeyError for a method without losses.
    """
    dense, made = losses[DENSE], []
    for method in result.methods:
        if method.name == DENSE:
            continue
        difference = paired(losses[method.name], dense)
        made.append(
            Point(
                name=method.name,
                loss=difference.mean,
                loss_error=difference.standard_error,
                windows=difference.n,
                bytes_share=method.read_bytes / result[DENSE].read_bytes,
                time_share=method.decode_step.over(result[DENSE].decode_step),
            )
        )
    return tuple(made)


def draw(path: str | os.PathLike[str], found: Sequence[Point], *, title: str) -> Path:
    """Draw the points into a file: left over bytes a token, right over time a step; its path.

    Bars are one standard error of the loss, and least to most of the rounds. Points of one kind of
    method (the words before its ratio) share colour and shape, and are joined. Raises ImportError
    without matplotlib, and ValueError as `picture_format`.
    """
    form = picture_format(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    figure.suptitle(textwrap.fill(title, _LINE), fontsize=10)
    left, right = figure.subplots(1, 2, sharey=True)
    kinds: dict[str, list[Point]] = {}
    for point in found:
        kinds.setdefault(point.name.rpartition(" ")[0] or point.name, []).append(point)
    for i, (kind, group) in enumerate(kinds.items()):
        look = {"color": COLOURS[i % len(COLOURS)], "marker": SHAPES[i % len(SHAPES)]}
        _line(left, group, [p.bytes_share for p in group], None, {**look, "label": kind})
        spread = [p.time_share for p in group]
        ends = [[y.median - y.low for y in spread], [y.high - y.median for y in spread]]
        _line(right, group, [y.median for y in spread], ends, look)
    _finish(left, "weights read a token, share of dense")
    _finish(right, "time of a decode step, share of dense")
    left.set_ylabel("loss above dense, nats a token")
    left.legend(fontsize=8)
    with new_file(Path(path)) as temporary:
        figure.savefig(temporary, format=form, dpi=_DPI)
    return Path(path)


def picture_format(path: str | os.PathLike[str]) -> str:
    """The format that a file's name asks for. Raises ValueError where matplotlib writes no such.

    Raises ImportError without matplotlib.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    known = sorted(Figure().canvas.get_supported_filetypes())
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in known:
        raise ValueError(
            f"{path} is no picture that matplotlib writes: give a name that ends in .png, or one "
            f"of {', '.join(known)}"
        )
    return kind


def _line(
    axes: Axes, group: Sequence[Point], x: list[float], ends: Any, look: dict[str, Any]
) -> None:
    order = np.argsort(x)
    x_ends = None if ends is None else np.asarray(ends)[:, order]
    axes.errorbar(
        np.asarray(x)[order],
        [group[i].loss for i in order],
        yerr=[group[i].loss_error for i in order],
        xerr=x_ends,
        linewidth=1,
        elinewidth=0.8,
        capsize=2,
        **look,
    )


def _finish(axes: Axes, label: str) -> None:
    # Dense: nothing lost, nothing saved.
    axes.plot([1.0], [0.0], "k+", markersize=12)
    axes.axvline(1.0, color="#999999", linewidth=0.6)
    axes.axhline(0.0, color="#999999", linewidth=0.6)
    axes.set_xlabel(label)
