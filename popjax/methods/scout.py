"""Scout: copies of gate and up in a few bits score all channels; exact rows are read of the best.

Ours, of no paper. What each token needs is known nearly exactly before a row of the weights is
read, and a prompt decides nothing. The copies are made once a model (`popjax.scouts`), held beside
the weights, and read whole at every step: those bytes count. And what they foretold of the next
best channels is good enough to be used as it is, at a third of the bytes: a row of down. Where few
bytes are saved, copies of six bits in some of the layers lose less than copies of four in all.
Left out: FFNs without a gate, mixtures of experts, and making the copies.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.masked_mlp import Selection
from kernels_pallas.row_products import STORED_BITS
from popjax import scouts
from popjax.config import LayerConfig, ModelConfig
from popjax.methods.method import LayerActs, Method, check_share
from popjax.methods.row_budgets import ENDS, rows_of_online_pruning, rows_with_dense_ends
from popjax.methods.scores import gain_factors
from popjax.sparsity import (
    ChannelPartition,
    Params,
    Plan,
)

RESTS = ("foretold", "off")


@dataclasses.dataclass(frozen=True)
class ScoutBudget:
    """Channels of a layer that are on for a token, and how many are evaluated from the weights.

    Of a layer without copies all are, before some of them are chosen.
    """

    on: int
    exact: int


@dataclasses.dataclass(frozen=True)
class Scout(Method):
    """Prune as many bytes of a step as OnlinePruning at `ratio`, by what a scout foretells.

    A step evaluates every channel from the copies and ranks them by |h_i| ||Wd_i||, Wd_i times the
    gain of a norm that follows. Against copies of four and six bits its input is rounded to eight
    (`kernels_pallas.row_products.rounded`), so that a CPU works in integers. The best few are
    evaluated anew with gate and up as they are; they and the next best, as foretold, go on to
    down. Copies and rows are what OnlinePruning reads (gamma 0.1), in weights of sixteen bits: see
    `scout_budget`. The prompt runs dense.
    Needs parameters with scouts: `popjax.scouts.with_scouts`.

    ends: "dense" leaves the first and the last layer whole and prunes the others more, at the same
      bytes in all, and needs no scout there; "pruned" treats all layers alike. Where a depth method
      skips layers, first and last are of those that run the prompt: the others decode whole anyway.
    rest: "foretold" as above; "off" lets nothing but exact channels go on, so fewer.
    bits, group: of the copies, as they were made; a run refuses others.
    copied: below 1, only that share of the pruned layers has copies, spread evenly
      (`popjax.scouts.copied_layers`); in the others gate and up of all channels are read, and rows
      of down of the best by the product, as many as in layers with copies. All that copies foretell
      is used as it is then, which takes six bits or eight. See `mixed_budgets`.
    Raises ValueError for values outside their range.
    """

    ratio: float
    ends: str = "dense"
    rest: str = "foretold"
    bits: int = scouts.BITS
    group: int = scouts.GROUP
    copied: float = 1.0

    def __post_init__(self) -> None:
        check_share("ratio", self.ratio)
        if self.ends not in ENDS:
            raise ValueError(f"ends {self.ends!r} is unknown: use one of {ENDS}")
        if self.rest not in RESTS:
            raise ValueError(f"rest {self.rest!r} is unknown: use one of {RESTS}")
        if type(self.bits) is not int or self.bits not in STORED_BITS:
            raise ValueError(f"bits {self.bits!r} make no scout: use 4, 6 or 8")
        group = self.group
        if type(group) is not int or group < 32 or group & group - 1:
            raise ValueError(f"group {group!r} makes no scout: use a power of two from 32 on")
        scouts.check_copied(self.copied)
        if self.copied < 1 and self.rest == "off":
            raise ValueError(
                f"rest 'off' lets exact channels on alone, and with copied {self.copied:.3g} "
                "layers that have copies evaluate few: leave one of the two out"
            )

    def for_model(self, config: ModelConfig) -> Scout:
        scouts.check_model(config)
        for i, budget in enumerate(self.budgets(config)):
            if budget.exact < 1:
                raise ValueError(
                    f"ratio {self.ratio} leaves layer {i} no bytes beside its scout: lower it"
                )
        return self

    def budgets(self, config: ModelConfig) -> tuple[ScoutBudget, ...]:
        """Counts of each layer. Raises ValueError where dense ends leave the others nothing."""
        widths = [layer.channels for layer in config.layers]
        rows = [rows_of_online_pruning(F, self.ratio) for F in widths]
        if self.ends == "dense":
            rows = rows_with_dense_ends(widths, rows)
        copy = (self.bits + 16 / self.group) / 16
        if self.copied < 1:
            held = scouts.copied_layers(len(widths), self.ends == "pruned", self.copied)
            try:
                return mixed_budgets(widths, rows, copy, held)
            except ValueError as error:
                raise ValueError(f"ratio {self.ratio} with {error}") from None
        pairs = zip(widths, rows, strict=True)
        return tuple(scout_budget(F, n, copy, self.rest == "foretold") for F, n in pairs)

    def observe(self, params: Params, acts: LayerActs) -> Any:
        """The gain factors [F] of a norm that follows, which no prompt changes; () without one."""
        scouts.check_form(params, self.bits, self.group)
        factors = gain_factors(params, acts)
        return () if factors is None else factors

    def combine(self, before: Any, now: Any) -> Any:
        return now

    def plan(self, config: ModelConfig, statistics: tuple[Any, ...]) -> Plan:
        triples = zip(config.layers, self.budgets(config), statistics, strict=True)
        return Plan(tuple(_partition(*each) for each in triples))

    def selection(self, partition: ChannelPartition) -> Selection | None:
        return partition.selection()


def scouts_for(method: Scout, params: Params, config: ModelConfig) -> scouts.Scouts:
    """The scouts that the method needs, as shapes, of parameters that may be shapes."""
    make = functools.partial(
        scouts.make_scouts,
        config=config,
        bits=method.bits,
        group=method.group,
        ends=method.ends == "pruned",
        copied=method.copied,
    )
    return jax.eval_shape(make, params)


def mixed_budgets(
    widths: Sequence[int], rows: Sequence[int], copy: float, held: Sequence[int]
) -> tuple[ScoutBudget, ...]:
    """How the rows of all layers are spent where those in `held` alone have copies.

    A row of a copy is the share `copy` of a row. First come 2 F of these, or gate and up of layers
    without, and one exact channel of layers with copies; what is left is rows of down, as many of F
    channels in every layer, and above all F exact channels. Layers that `rows` leave whole stay so.
    Raises ValueError, which begins as the end of a sentence, where too little is left.
    """
    pruned = [i for i, F in enumerate(widths) if rows[i] < 3 * F]
    channels = sum(widths[i] for i in pruned)
    copied = sum(widths[i] for i in held)
    left = sum(rows[i] for i in pruned) - 2 * (channels - copied) - 2 * (copied * copy + len(held))
    share = min(1.0, left / max(1, channels))
    if pruned and min(math.floor(share * widths[i]) for i in pruned) < 1:
        raise ValueError(
            f"copies in {len(held)} of {len(pruned)} pruned layers leaves no rows of down, since "
            "the others read gate and up whole: lower the ratio, or copy all (copied=1.0)"
        )
    more = max(0.0, left - channels) / (2 * max(1, copied))
    budgets = []
    for i, F in enumerate(widths):
        on = math.floor(share * F) if i in pruned else F
        exact = min(F, 1 + math.floor(more * F)) if i in held and i in pruned else F
        budgets.append(ScoutBudget(on, min(on, exact) if i in held else F))
    return tuple(budgets)


def scout_budget(mlp_dim: int, rows: int, copy: float, foretold: bool) -> ScoutBudget:
    """How `rows` of F channels are spent, where a row of a scout is the share `copy` of a row.

    2 F of them come first. Of what is left three quarters are rows of down, of K channels, and one
    is of gate and up, of X: so K = 6 X, but no more than 0.9 F, since what is foretold of the last
    ones does more harm than good. At 1.6 F rows and 4 bits in groups of 64, K = 0.801 F and
    X = 0.133 F; without `foretold` K = X = 0.356 F. All channels, and no scout, where `rows` are
    all 3 F; none where the scout alone is more.
    """
    if rows >= 3 * mlp_dim:
        return ScoutBudget(mlp_dim, mlp_dim)
    left = max(0.0, rows - 2 * mlp_dim * copy)
    alike = math.floor(left / 3)
    on = max(alike, math.floor(min(0.9 * mlp_dim, left * 3 / 4)))
    exact = min(on, math.floor((left - on) / 2))
    return ScoutBudget(on, exact) if foretold else ScoutBudget(alike, alike)


def _partition(layer: LayerConfig, budget: ScoutBudget, factors: Any) -> ChannelPartition:
    return ChannelPartition(
        retained=jnp.zeros((0,), jnp.int32),
        candidate=jnp.arange(layer.mlp_dim, dtype=jnp.int32),
        candidate_factor=factors if isinstance(factors, jax.Array) else None,
        k_selected=budget.on,
        exact=None if budget.exact >= budget.on else budget.exact,
        # Without copies all are evaluated, and chosen from by what they are.
        point="scout" if budget.exact <= budget.on else "product",
    )
