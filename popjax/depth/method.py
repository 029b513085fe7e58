"""The interface of a depth method: which layers prompt tokens run, and which exist at all.

A method is a frozen dataclass of plain values; what it decides is a `DepthPlan`, static under jit.
Every default does nothing, so the base class is the whole model. Leaves out running layers
(`nn/passing.py`) and what scores are measured by (`importance.py`).
"""

from __future__ import annotations

import dataclasses

from popjax.config import ModelConfig
from popjax.sparsity import Params

# What tokens before the boundary do at a layer: run it, leave keys and values, or leave nothing.
FULL, KV_ONLY, SKIPPED = "full", "kv-only", "skipped"
# Where the boundary token is, which runs every layer: the last column, in later tokens, nowhere.
LAST, LATER, NOWHERE = "last", "later", "nowhere"
# How an eviction treats layers that saw the boundary's query alone.
BUDGETS = ("shared", "uniform")


@dataclasses.dataclass(frozen=True)
class DepthPlan:
    """What the programs of a prefill know: a kind a layer, and where the boundary is.

    Logits are those of the last column where the boundary is LAST or NOWHERE; LATER has none.
    """

    layers: tuple[str, ...]
    boundary: str = LAST

    @property
    def empty_layers(self) -> tuple[int, ...]:
        """Layers in whose cache tokens before the boundary have no entry."""
        return tuple(i for i, kind in enumerate(self.layers) if kind == SKIPPED)


@dataclasses.dataclass(frozen=True)
class DepthMethod:
    """Every layer for every token: the base class of depth methods."""

    @property
    def boundary(self) -> bool:
        """Whether the last prompt token runs the layers that the others skip."""
        return True

    @property
    def budget(self) -> str:
        """One of BUDGETS: do skipped layers compete for an eviction's budget, or get their own."""
        return "shared"

    def for_model(self, config: ModelConfig, params: Params) -> DepthMethod:
        """This method with its layers named; ValueError or CheckpointError if it cannot apply."""
        return self

    def prefill_layers(self, config: ModelConfig) -> tuple[str, ...]:
        """FULL, KV_ONLY or SKIPPED for each layer, once `for_model` has settled the method."""
        return (FULL,) * config.num_layers

    def decode_layers(self, config: ModelConfig) -> tuple[int, ...]:
        """The layers that exist; others are dropped from prefill and decode alike."""
        return tuple(range(config.num_layers))

    def plan(self, config: ModelConfig, last: bool = True) -> DepthPlan | None:
        """The plan for a prompt, or for a chunk of it that is not the `last`; None for all FULL."""
        layers = self.prefill_layers(config)
        if all(kind == FULL for kind in layers):
            return None
        if not last:
            return DepthPlan(layers, LATER)
        return DepthPlan(layers, LAST if self.boundary else NOWHERE)


__all__ = [
    "BUDGETS",
    "FULL",
    "KV_ONLY",
    "LAST",
    "LATER",
    "NOWHERE",
    "SKIPPED",
    "DepthMethod",
    "DepthPlan",
]
