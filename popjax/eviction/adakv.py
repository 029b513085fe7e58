"""AdaKV (arXiv 2407.11550): SnapKV's scores, for whose budget the heads of a layer compete.

Every head is sure of a share of what it would get alone, the window apart, as in the authors' code;
the paper's printed formula gives that number another role. kvpress counts the window into it.
"""

from __future__ import annotations

import dataclasses

from popjax.eviction.allocation import Candidates, per_layer
from popjax.eviction.method import Scores
from popjax.eviction.snapkv import SnapKV


@dataclasses.dataclass(frozen=True)
class AdaKV(SnapKV):
    """Keep the best entries of each layer; a head is sure of the share `floor` (paper: 0.2).

    Raises ValueError for values outside their range.
    """

    floor: float = 0.2

    def __post_init__(self) -> None:
        check_share("floor", self.floor)
        super().__post_init__()

    def allocate(self, scores: Scores, candidates: Candidates) -> Scores:
        return per_layer(self.pooled(scores, candidates), candidates, self.floor)


def check_share(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name} {value!r} is outside 0..1: give a share")


__all__ = ["AdaKV", "check_share"]
