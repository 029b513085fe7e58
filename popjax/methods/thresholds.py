"""What methods share that prune by magnitude: thresholds of attention's inputs, and their plans."""

from __future__ import annotations

from typing import Any

import numpy as np

from popjax.calibration.statistics import ChannelStatistics
from popjax.config import ModelConfig
from popjax.sparsity import Plan, thresholded_partition, whole_partition

PREFILLS = ("dense", "masked")


def check_prefill(prefill: str, attention: bool) -> None:
    """Raise ValueError unless prefill is one of PREFILLS and attention a bool."""
    if prefill not in PREFILLS:
        raise ValueError(f"prefill {prefill!r} is unknown: use one of {PREFILLS}")
    if not isinstance(attention, bool):
        raise ValueError(f"attention {attention!r} is not a bool: give True or False")


def attention_thresholds(statistics: ChannelStatistics, ratio: float) -> dict[str, Any]:
    """Scalars by path that inputs of q and of o must exceed; k and v read whole inputs."""
    return {
        f"layer_{i}/attn/{name}_threshold": np.float32(layer.threshold(site, ratio))
        for i, layer in enumerate(statistics)
        for name, site in (("q", "attention"), ("o", "output"))
    }


def thresholded_plan(
    config: ModelConfig, statistics: tuple[Any, ...], point: str = "product"
) -> Plan:
    """Every channel a candidate with its threshold [F]; dense where there is none."""
    if all(isinstance(statistic, tuple) for statistic in statistics):
        return Plan()
    pairs = zip(statistics, config.layers, strict=True)
    return Plan(
        tuple(
            whole_partition(layer) if isinstance(t, tuple) else thresholded_partition(t, point)
            for t, layer in pairs
        )
    )
