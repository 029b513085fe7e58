"""The frontier: losses joined with bytes and times by name, paired by window, and its picture."""

from __future__ import annotations

from pathlib import Path

import pytest

from popjax.bench import BenchResult, MethodBench, Spread
from popjax.frontier import draw, points

LOSSES = {"dense": (1.0, 5.0), "fast 0.25": (1.5, 5.5), "fast 0.5": (2.0, 7.0)}


def result() -> BenchResult:
    def method(name: str, step: tuple[float, ...], read: int) -> MethodBench:
        spread = Spread(step)
        return MethodBench(name, spread, spread, spread, spread, spread, 0.0, read, 1, 0, 1)

    rows = (
        method("dense", (4.0, 4.0), 10),
        method("fast 0.25", (3.0, 2.0), 8),
        method("fast 0.5", (2.0, 1.0), 5),
    )
    return BenchResult(1, 8, 4, rows)


def test_points_are_differences_and_shares_of_dense() -> None:
    quarter, half = points(result(), LOSSES)
    assert (quarter.name, quarter.loss, quarter.loss_error) == ("fast 0.25", 0.5, 0.0)
    assert (half.loss, half.loss_error, half.windows) == (1.5, 0.5, 2)
    assert (half.bytes_share, half.time_share.rounds) == (0.5, (0.5, 0.25))
    assert half.to_json()["time_share"]["median"] == 0.375
    with pytest.raises(KeyError):
        points(result(), {"dense": (1.0, 5.0)})


def test_the_picture_shows_every_kind_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig

    def kept(figure: Figure, *args: object, **options: object) -> None:
        drawn.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", kept)
    path = draw(tmp_path / "frontier.png", points(result(), LOSSES), title="two ratios")
    assert path.read_bytes().startswith(b"\x89PNG") and list(tmp_path.iterdir()) == [path]
    drawing = draw(tmp_path / "frontier.SVG", points(result(), LOSSES), title="two ratios")
    assert b"<svg" in drawing.read_bytes()
    left, right = drawn[0].axes
    legend = left.get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == ["fast"]
    assert "share of dense" in left.get_xlabel() and "time" in right.get_xlabel()
