"""Scout: copies of gate and up in a few bits score all channels; exact rows are read of the best.

Ours, of no paper. What each token needs is known nearly exactly before a row of the weights is
read, and a prompt decides nothing. The copies are made once a model (`popjax.scouts`), held beside
the weights, and read whole at every step: those bytes count.
Left out: FFNs without a gate, mixtures of experts, and making the copies.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from kernels_pallas.masked_mlp import Selection
from popjax import scouts
from popjax.config import LayerConfig, ModelConfig
from popjax.methods.gate_first import ENDS
from popjax.methods.method import Method, check_share
from popjax.sparsity import (
    ChannelBudget,
    ChannelPartition,
    Params,
    Plan,
    rows_of_online_pruning,
    rows_with_dense_ends,
)


@dataclasses.dataclass(frozen=True)
class Scout(Method):
    """Prune as many bytes of a step as OnlinePruning at `ratio`, by what a scout foretells.

    A step evaluates every channel from the copies, ranks them by |h_i| ||Wd_i||, and evaluates the
    best K with gate, up and down as they are. K rows of each and the copies are what OnlinePruning
    reads (gamma 0.1), in weights of sixteen bits: see `scout_budget`. The prompt runs dense.
    Needs parameters with scouts: `popjax.scouts.with_scouts`.

    ends: "dense" leaves the first and the last layer whole and prunes the others more, at the same
      bytes in all, and needs no scout there; "pruned" treats all layers alike.
    bits, group: of the copies, as they were made. batch_shared: one choice for the batch.
    Raises ValueError for values outside their range.
    """

    ratio: float
    ends: str = "dense"
    bits: int = scouts.BITS
    group: int = scouts.GROUP
    batch_shared: bool = False

    def __post_init__(self) -> None:
        check_share("ratio", self.ratio)
        if self.ends not in ENDS:
            raise ValueError(f"ends {self.ends!r} is unknown: use one of {ENDS}")
        if self.bits not in (4, 8) or self.group < 32:
            raise ValueError(
                f"bits {self.bits!r} in groups of {self.group!r} make no scout: use 4 or 8, and a "
                "group from 32 on"
            )

    def for_model(self, config: ModelConfig) -> Scout:
        scouts.check_model(config)
        for i, budget in enumerate(self.budgets(config)):
            if budget.k_selected < 1:
                raise ValueError(
                    f"ratio {self.ratio} leaves layer {i} no bytes beside its scout: lower it"
                )
        return self

    def budgets(self, config: ModelConfig) -> tuple[ChannelBudget, ...]:
        """Counts of each layer. Raises ValueError where dense ends leave the others nothing."""
        widths = [layer.channels for layer in config.layers]
        rows = [rows_of_online_pruning(F, self.ratio) for F in widths]
        if self.ends == "dense":
            rows = rows_with_dense_ends(widths, rows)
        pairs = zip(widths, rows, strict=True)
        return tuple(scout_budget(F, n, self.bits, self.group) for F, n in pairs)

    def plan(self, config: ModelConfig, statistics: tuple[object, ...]) -> Plan:
        pairs = zip(config.layers, self.budgets(config), strict=True)
        return Plan(tuple(_partition(*pair) for pair in pairs))

    def selection(self, partition: ChannelPartition) -> Selection | None:
        return partition.selection(shared=self.batch_shared)


def scouts_for(method: Scout, params: Params, config: ModelConfig) -> scouts.Scouts:
    """The scouts that the method needs, as shapes, of parameters that may be shapes."""
    make = functools.partial(scouts.make_scouts, config=config, ends=method.ends == "pruned")
    return jax.eval_shape(functools.partial(make, bits=method.bits, group=method.group), params)


def scout_budget(mlp_dim: int, rows: int, bits: int, group: int) -> ChannelBudget:
    """How many of F channels are chosen so that their rows and the scout's are at most `rows`.

    A row of the scout is (bits + 16 / group) / 16 of a row, its scales having sixteen bits, and
    there are 2 F of them: at 4 bits in groups of 64 and 1.6 F rows, K = 0.356 F. All channels, and
    no scout, where `rows` are all 3 F; none where the scout alone is more.
    """
    if rows >= 3 * mlp_dim:
        return ChannelBudget(0, mlp_dim, mlp_dim)
    foretold = 2 * mlp_dim * (bits + 16 / group) / 16
    return ChannelBudget(0, mlp_dim, max(0, math.floor((rows - foretold) / 3)))


def _partition(layer: LayerConfig, budget: ChannelBudget) -> ChannelPartition:
    return ChannelPartition(
        retained=jnp.zeros((0,), jnp.int32),
        candidate=jnp.arange(layer.mlp_dim, dtype=jnp.int32),
        k_selected=budget.k_selected,
        point="scout",
    )
