"""What a depth method spared: which layers the prompt ran, and what it multiplied."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from popjax.config import ModelConfig
from popjax.depth.cost import prefill_flops
from popjax.depth.method import FULL, LAST, DepthPlan


@dataclasses.dataclass(frozen=True)
class DepthReport:
    """Layers that prompt tokens passed by, layers dropped altogether, and FLOPs of the prefill.

    layers: of the model. A prompt of one token passes none where its boundary is handled. flops and
    dense_flops count two a product, no pads, causal attention; their ratio is what skipping can
    gain at most where time is multiplications.
    """

    layers: int
    skipped: tuple[int, ...]
    dropped: tuple[int, ...]
    flops: int
    dense_flops: int


def depth_report(
    config: ModelConfig,
    ran: tuple[int, ...],
    plan: DepthPlan | None,
    lengths: Sequence[int],
    before: int,
) -> DepthReport | None:
    """The report of a run of the layers `ran`; None where every prompt token ran every layer."""
    if plan is None and len(ran) == config.num_layers:
        return None
    # The boundary runs every layer, and a prompt of one token is nothing else.
    passing = plan is not None and (plan.boundary != LAST or max(lengths) > 1)
    narrow = dataclasses.replace(config, layers=tuple(config.layers[i] for i in ran))
    kinds = plan.layers if plan is not None and passing else (FULL,) * len(ran)
    return DepthReport(
        layers=config.num_layers,
        skipped=tuple(i for i, kind in zip(ran, kinds, strict=True) if kind != FULL),
        dropped=tuple(i for i in range(config.num_layers) if i not in ran),
        flops=prefill_flops(narrow, lengths, plan, before),
        dense_flops=prefill_flops(config, lengths, None, before),
    )


__all__ = ["DepthReport", "depth_report"]
