"""The picture of a pruned run: the right counts and masks, and a page on which nothing overlaps."""

from __future__ import annotations

import dataclasses
import itertools
import struct
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from popjax import Frozen, LanguageModel, OnlinePruning, RescoreAll
from popjax.cli import app, options
from popjax.config import LayerConfig, ModelConfig
from popjax.picture import CANDIDATE, PRUNED, RETAINED, Decided, binned, draw, printable
from popjax.sparsity import ChannelPartition, channel_budget
from tests.popjax.test_cli import flat
from tests.popjax.tiny_models import tiny


def decided(model: LanguageModel, method: Any) -> Decided:
    """What a short run of the tiny model decided."""
    found = model.generate("The quick", method=method, max_new_tokens=6, record_masks=True)
    assert found.partition is not None
    return Decided.of(model.config, found.partition, found.masks)


def large(steps: int = 60, layers: int = 32, channels: int = 14_336) -> Decided:
    """Random decisions of the size of an 8B model's."""
    rng = np.random.default_rng(0)
    layer = LayerConfig(num_heads=8, num_kv_heads=8, head_dim=64, mlp_dim=channels)
    config = ModelConfig("llama", 1000, 512, (layer,) * layers, max_positions=1024)
    budget = channel_budget(channels, 0.5, 0.05)
    parts, masks = [], []
    for _ in range(layers):
        order = rng.permutation(channels)
        split = budget.retained + budget.candidate
        parts.append(
            ChannelPartition(
                jnp.asarray(np.sort(order[: budget.retained])),
                jnp.asarray(np.sort(order[budget.retained : split])),
                k_selected=budget.k_selected,
            )
        )
        masks.append(jnp.asarray(rng.random((steps, 1, split)) < 0.5))
    return Decided(config, tuple(parts), tuple(masks))


def png_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels, from the first chunk of a PNG."""
    return struct.unpack(">II", path.read_bytes()[16:24])


def test_counts_are_the_partition(tiny_model: LanguageModel) -> None:
    assert decided(tiny_model, OnlinePruning(ratio=0.5)).counts == (44, 8, 44)
    assert decided(tiny_model, Frozen(ratio=0.25)).counts == (72, 0, 24)


@pytest.mark.parametrize("method", [OnlinePruning(ratio=0.5), RescoreAll(ratio=0.5)])
def test_chosen_are_the_candidates_switched_on(tiny_model: LanguageModel, method: Any) -> None:
    """Also where every channel is a candidate, whose masks come in another order."""
    run = decided(tiny_model, method)
    for i, part in enumerate(run.partition):
        chosen = run.chosen(i)
        assert chosen.shape == (5, part.num_candidate)
        np.testing.assert_array_equal(chosen.sum(axis=1), part.k_selected)


def test_layers_shown_have_something_to_choose() -> None:
    run = large(steps=3, layers=5, channels=64)
    assert run.choosing_layers(None) == [0, 2, 4]
    assert run.choosing_layers([3, 1, 3]) == [1, 3]
    with pytest.raises(ValueError, match="layer 5 is not in the model"):
        run.choosing_layers([5])
    with pytest.raises(ValueError, match="5 layers do not fit"):
        run.choosing_layers([0, 1, 2, 3, 4])
    none = dataclasses.replace(run, masks=None)
    assert none.choosing_layers(None) == []
    with pytest.raises(ValueError, match="layer 0 has no candidates"):
        none.choosing_layers([0])


def test_binned_means_every_value_once() -> None:
    values = np.arange(10.0)
    np.testing.assert_allclose(binned(values, 1), values)
    np.testing.assert_allclose(binned(values, 4), [1.5, 5.5, 8.5])
    np.testing.assert_allclose(binned(np.stack([values, -values]), 10), [[4.5], [-4.5]])


def test_printable_keeps_to_the_font() -> None:
    assert printable(" the\n", 5) == " the⏎"
    assert printable("naïve $x$", 20) == "naïve $x$"
    assert printable("你好\x1b", 20) == "···"
    assert printable("unbelievably", 8) == "unbelie…"


def test_every_channel_has_its_colour(
    tiny_model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pixels of the map, counted: as many of each colour as there are channels of each set."""
    from matplotlib.axes import Axes
    from matplotlib.colors import to_rgb

    run = decided(tiny_model, OnlinePruning(ratio=0.5))
    images: list[np.ndarray] = []
    plain = Axes.imshow

    def imshow(self: Axes, image: np.ndarray, **settings: Any) -> Any:
        images.append(image)
        return plain(self, image, **settings)

    monkeypatch.setattr(Axes, "imshow", imshow)
    draw(tmp_path / "map.png", run, title="tiny", prompt="hi")
    image = images[0].reshape(-1, 3)
    found = [int(np.sum(np.all(image == to_rgb(c), axis=1))) for c in (RETAINED, CANDIDATE, PRUNED)]
    assert tuple(found) == run.counts


@pytest.mark.parametrize(
    ("run", "layers"),
    [
        (large(), None),
        (large(), [0, 1, 2, 3]),
        (large(steps=1, layers=2, channels=48), None),
        (dataclasses.replace(large(layers=4), masks=None), None),
    ],
    ids=["8B", "four panels", "tiny", "no candidates"],
)
def test_nothing_overlaps_and_nothing_is_cut(
    run: Decided, layers: list[int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    plain = Figure.savefig

    def savefig(self: Figure, *arguments: Any, **settings: Any) -> None:
        drawn.append(self)
        plain(self, *arguments, **settings)

    monkeypatch.setattr(Figure, "savefig", savefig)
    written = [" unbelievably", "\n", "你好" * 10] * 20
    path = tmp_path / "picture.png"
    draw(
        path,
        run,
        title="/Some/Folder/Model-8B" * 9,
        prompt="你" * 200 + "$x$",
        written=written,
        layers=layers,
    )
    width, height = png_size(path)
    assert 1200 <= width <= 2400 and 400 <= height <= 3000
    figure = drawn[0]
    boxes = _text_boxes(figure)
    for text, box in boxes:
        inside = figure.bbox.padded(1)
        assert inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1), text
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        assert not a.padded(-1).overlaps(b.padded(-1)), (one, other)


def _text_boxes(figure: Any) -> list[tuple[str, Any]]:
    """Every text that a drawn figure shows and the pixels it covers."""
    texts = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for axes in figure.axes:
        texts += [axes.title, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
            texts += [label for place, label in ticks if low <= place <= high]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    return [(text, box) for text, box in boxes if box.width and box.height]


def test_nothing_is_written_when_drawing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    def fail(self: Figure, *arguments: Any, **settings: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        draw(tmp_path / "x.png", large(2, 2, 48), title="tiny", prompt="hi")
    assert not list(tmp_path.iterdir())


def test_mixtures_are_refused_before_the_work(
    tiny_model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = dataclasses.replace(tiny_model, config=tiny("mixtral"))
    monkeypatch.setattr(options.ModelChoice, "load", lambda self: mixed)
    monkeypatch.setattr(LanguageModel, "generate", lambda *_, **__: pytest.fail("it ran"))
    result = CliRunner().invoke(app, ["show", "a prompt", "-o", str(tmp_path / "a.png")])
    assert result.exit_code == 1 and "a mixture of experts" in flat(result.stderr)
