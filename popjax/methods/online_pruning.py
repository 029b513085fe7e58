"""Partition-guided Online Pruning (arXiv 2602.06822), for dense FFNs and mixtures of experts.

The prompt ranks each layer's channels; the extremes are frozen for this prompt (retained R, pruned
P) and only the band between them (candidate C) is re-decided from the activations of every new
token. Decoding evaluates gate and up on R u C, and projects down from R and the chosen candidates.
Of a mixture each expert is partitioned for itself, and the masks of a step are of a token's own
experts. Not here: any refresh of R, C, P while generating (the paper has none).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from kernels_pallas.masked_mlp import Selection
from popjax.config import LayerConfig, ModelConfig
from popjax.methods.experts import ExpertActs, ExpertRules, expert_scores, partition_of
from popjax.methods.method import LayerActs, Method, check_share
from popjax.methods.probe import probe_acts
from popjax.methods.scores import SCORES, channel_scores
from popjax.sparsity import (
    ChannelBudget,
    ChannelPartition,
    Params,
    Partition,
    Plan,
    channel_budget,
    ffn_ratio,
    partition_by_rank,
    warn_of_rounding,
)

PREFILLS = ("partition", "dense", "probe")
BANDS = ("half", "full")
BESIDE = ("dense", "pruned")


@dataclasses.dataclass(frozen=True)
class OnlinePruning(Method):
    """Prune `ratio` of the FFN channels per token, guided by a partition made from the prompt.

    ratio: share of FFN channels removed; or model_ratio: share of attention plus FFN parameters,
      turned into an FFN ratio by r = PR (A + F) / F (derived from Table 8).
    gamma: share of channels in the candidate band (paper: 0.1). band "half" takes delta = gamma/2
      [inferred], "full" takes delta = gamma.
    prefill: "partition" lets only R u C reach each layer's output [inferred], in one pass, "dense"
      runs the prompt unpruned, "probe" scores a part of the prompt and evaluates only R u C.
    score: "down" (default), "gate-up" or "activation": see `methods.scores`.
    batch_shared: one step mask for the batch, the paper's protocol; per row by default.
    Of mixtures: expert_weighting lets a token count in an expert's scores by its router weight;
      experts with fewer than min_tokens prompt tokens are ranked by their weights alone, or left
      whole, as `unseen` says (`methods.experts`, all [inferred]). shared: the FFN that every token
      uses beside them stays "dense", as the paper's ratios imply, or is "pruned" as any other.
    The partition is always shared by the batch, since packed weights are: it is computed from the
    non-pad tokens of all rows. Raises ValueError for values outside their range.
    """

    ratio: float | None = None
    model_ratio: float | None = None
    gamma: float = 0.1
    band: str = "half"
    prefill: str = "partition"
    score: str = "down"
    batch_shared: bool = False
    granularity: int = 1
    expert_weighting: bool = False
    min_tokens: int = 1
    unseen: str = "weights"
    shared: str = "dense"

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.model_ratio is None):
            raise ValueError(
                f"give exactly one of ratio (FFN) and model_ratio (whole model), "
                f"got ratio={self.ratio} and model_ratio={self.model_ratio}"
            )
        check_share("ratio", self.ratio if self.ratio is not None else 0.0)
        check_share("model_ratio", self.model_ratio if self.model_ratio is not None else 0.0)
        check_share("gamma", self.gamma)
        whole = isinstance(self.granularity, int) and not isinstance(self.granularity, bool)
        if not whole or self.granularity < 1:
            raise ValueError(
                f"granularity {self.granularity!r} is not a whole number above 0: use 1, or 128 "
                "for lanes"
            )
        kinds = {"prefill": PREFILLS, "score": SCORES, "band": BANDS, "shared": BESIDE}
        for name, allowed in kinds.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown: use one of {allowed}")
        ExpertRules(self.min_tokens, self.unseen)

    @property
    def _rules(self) -> ExpertRules:
        return ExpertRules(self.min_tokens, self.unseen)

    @property
    def delta(self) -> float:
        return self.gamma / 2 if self.band == "half" else self.gamma

    def for_model(self, config: ModelConfig) -> OnlinePruning:
        if self.model_ratio is not None:
            ratio = ffn_ratio(config, self.model_ratio, shared=self.shared == "pruned")
            return dataclasses.replace(self, ratio=ratio, model_ratio=None).for_model(config)
        assert self.ratio is not None, "one of the two is given"
        if self.prefill == "probe" and any(layer.moe for layer in config.layers):
            raise ValueError(
                "online-pruning with prefill='probe' scores a part of the prompt, which leaves "
                "most experts of a mixture without tokens: use prefill='partition' or 'dense'"
            )
        self._check_rules(config)
        if self.shared == "pruned":
            self._check_beside(config)
        if self.granularity > 1:
            warn_of_rounding(config, self.ratio, self.delta, self.granularity)
        return self

    def _check_rules(self, config: ModelConfig) -> None:
        for name, usual in (("min_tokens", 1), ("unseen", "weights")):
            given = getattr(self, name)
            if given != usual and not any(layer.moe for layer in config.layers):
                raise ValueError(
                    f"{name} {given!r} is of experts, and this {config.family} model has none: "
                    f"leave {name}={usual!r}"
                )

    def _check_beside(self, config: ModelConfig) -> None:
        widths = {i: y.mlp_dim for i, y in enumerate(config.layers) if y.moe and y.mlp_dim}
        if not widths:
            raise ValueError(
                f"shared 'pruned' is of an FFN that every token uses beside experts, and this "
                f"{config.family} model has none: leave shared='dense'"
            )
        empty = [i for i, width in widths.items() if not self.budget(width).evaluated]
        if empty:
            raise ValueError(
                f"{self} leaves no channel of the {widths[empty[0]]} that every token uses in "
                f"layer {empty[0]}: lower the ratio"
            )

    def budget(self, mlp_dim: int) -> ChannelBudget:
        assert self.ratio is not None, "for_model() resolves model_ratio"
        return channel_budget(mlp_dim, self.ratio, self.delta, self.granularity)

    @property
    def whole_prompt(self) -> bool:
        return self.prefill != "dense"

    def evaluated(self, mlp_dim: int) -> int:
        return self.budget(mlp_dim).evaluated

    def observe(self, params: Params, acts: LayerActs | ExpertActs) -> Any:
        if isinstance(acts, ExpertActs):
            return expert_scores(params, acts, self.score, self.expert_weighting, self._rules)
        if self.prefill == "probe":
            acts = probe_acts(params, acts)
        return channel_scores(params, acts, self.score)

    def prefill_partition(self, statistic: Any, layer: LayerConfig, given: Any) -> Any:
        if self.prefill == "dense":
            return None
        return self._partition(statistic, layer) if given is None else given

    def plan(self, config: ModelConfig, statistics: tuple[Any, ...]) -> Plan:
        pairs = zip(statistics, config.layers, strict=True)
        return Plan(tuple(self._partition(statistic, layer) for statistic, layer in pairs))

    def _partition(self, statistic: Any, layer: LayerConfig) -> Partition:
        part = partition_of(statistic, layer, self.budget(layer.channels), self._rules)
        if isinstance(part, ChannelPartition) or not jax.tree.leaves(statistic.shared):
            return part
        beside = partition_by_rank(statistic.shared, self.budget(layer.mlp_dim))
        return dataclasses.replace(part, shared=beside)

    def beside(self) -> Method:
        return self if self.shared == "pruned" else Method()

    def selection(self, partition: ChannelPartition) -> Selection | None:
        return partition.selection(weighted=self.score != "activation", shared=self.batch_shared)

    def expert_selection(self) -> dict[str, bool]:
        return {"weighted": self.score != "activation", "shared": self.batch_shared}
