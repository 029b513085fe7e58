"""Channels of layers that saw no prompt: dense, while the method plans the others.

A ratio then counts over the layers that ran the prompt alone. [inferred] Of the ways open (a
partition from the boundary and the first new tokens, or from weight norms) the one without a guess.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from popjax.config import ModelConfig
from popjax.methods import Method
from popjax.sparsity import Plan, whole_partition


def planned(method: Method, config: ModelConfig, statistics: tuple[Any, ...]) -> Plan:
    """The method's plan for the layers that ran the prompt; others, None, keep every channel."""
    ran = [i for i, statistic in enumerate(statistics) if statistic is not None]
    if len(ran) == config.num_layers:
        return method.plan(config, statistics)
    if not ran:
        return Plan()
    narrow = dataclasses.replace(config, layers=tuple(config.layers[i] for i in ran))
    channels = method.plan(narrow, tuple(statistics[i] for i in ran)).channels
    if channels is None:
        return Plan()
    parts = [whole_partition(layer) for layer in config.layers]
    for i, part in zip(ran, channels, strict=True):
        parts[i] = part
    return Plan(tuple(parts))


__all__ = ["planned"]
