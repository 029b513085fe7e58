"""How many layers a share is, and which: by their place, or by scores.

Counts round to the nearest whole number of layers, halves up, which gives the published ones: the
last 10 of 32 at 31.25 %, 12 of 36 and 16 of 48 at a third (arXiv 2602.03295, Table 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from popjax.methods.method import check_share
from popjax.sparsity import rounded

PLACES = ("last", "first", "every")


def layer_count(share: float, layers: int) -> int:
    """How many of `layers` the share is, rounded to the nearest, halves up.

    Raises ValueError for a share above 0 that comes to none.
    """
    count = rounded(share * layers)
    if share > 0 and not count:
        raise ValueError(
            f"skip {share:.3g} of the model's {layers} layers rounds to none: give "
            f"{1 / layers:.3g} for one layer, or 0 for none"
        )
    return count


def by_place(place: str, count: int, layers: int) -> tuple[int, ...]:
    """`count` layers: the "last", the "first", or the last of each of `count` equal parts."""
    if place == "last":
        return tuple(range(layers - count, layers))
    if place == "first":
        return tuple(range(count))
    return tuple((i + 1) * layers // count - 1 for i in range(count))


def lowest(scores: Sequence[float], count: int) -> tuple[int, ...]:
    """The `count` layers of least score, ascending; equal scores go to the later layer."""
    ranked = sorted(range(len(scores)), key=lambda i: (scores[i], -i))
    return tuple(sorted(ranked[:count]))


def check_skip(skip: Any) -> None:
    """Raise ValueError unless `skip` is None or a share of layers within 0..1."""
    check_share("skip", 0.0 if skip is None else skip)


def check_layers(layers: Any) -> None:
    """Raise ValueError unless `layers` is a tuple of distinct whole numbers, none negative."""
    if not isinstance(layers, tuple):
        raise ValueError(f"layers {layers!r} are not a tuple of indices: give one, such as (1, 2)")
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
            raise ValueError(f"layer {layer!r} is not a whole number of at least 0: give indices")
    if len(set(layers)) != len(layers):
        raise ValueError(f"layers {layers} name one twice: name each once")


def check_inside(layers: tuple[int, ...], count: int) -> None:
    """Raise ValueError unless all layers exist in a model of `count`."""
    if layers and max(layers) >= count:
        raise ValueError(f"layer {max(layers)} is outside 0..{count - 1}, the model's layers")


__all__ = ["PLACES", "by_place", "check_inside", "check_layers", "check_skip", "layer_count",
           "lowest"]  # fmt: skip
