"""PrefillPruning (prefill-only pruning, arXiv 2602.03295): deep layers matter little to a prompt.

Prompt tokens skip the last third of the layers, which only get keys and values from the state that
passes them (Eq. 14, 15); the last prompt token, the boundary, runs every layer, and decoding runs
the whole model. Training-free; scores (Eq. 9-13, `importance.py`) justify the rule and may replace
it. No author code is public. Leaves out the running of it (`nn/passing.py`).
"""

from __future__ import annotations

import dataclasses

from popjax.config import ModelConfig
from popjax.depth.artefact import given_path, load_scores
from popjax.depth.choosing import (
    PLACES,
    by_place,
    check_inside,
    check_layers,
    check_skip,
    layer_count,
    lowest,
)
from popjax.depth.method import BUDGETS, FULL, KV_ONLY, SKIPPED, DepthMethod
from popjax.sparsity import Params

THIRD = 1 / 3


@dataclasses.dataclass(frozen=True)
class PrefillPruning(DepthMethod):
    """Let prompt tokens before the last skip a share `skip` of the layers (paper: a third).

    choose: the "last" layers (paper), or its ablations "first" and "every" (evenly spread); those
      of lowest "scores" in the file `importance`; or the layers themselves, a tuple of indices.
    handle_boundary: False lets the last prompt token pass too (ablation; logits come from the
      passing state). kv: False leaves no prompt entries in skipped layers (ablation).
    eviction: with an eviction method skipped layers were seen by one query, the boundary's; they
      compete with the others ("shared"), or keep an equal share each ("uniform") [inferred].
    A share of 1 is allowed: keys and values then come from the embeddings, and the definition sets
    no limit (the paper stops at 60 %). Raises ValueError for values outside their range.
    """

    skip: float | None = None
    choose: str | tuple[int, ...] = "last"
    importance: str | None = None
    handle_boundary: bool = True
    kv: bool = True
    eviction: str = "shared"

    def __post_init__(self) -> None:
        check_skip(self.skip)
        if isinstance(self.choose, tuple):
            check_layers(self.choose)
            if self.skip is not None:
                raise ValueError(f"skip {self.skip} and layers {self.choose} were given: give one")
        elif self.choose not in (*PLACES, "scores"):
            allowed = (*PLACES, "scores")
            raise ValueError(
                f"choose {self.choose!r} is unknown: use one of {allowed}, or a tuple of layers"
            )
        if (self.choose == "scores") != (self.importance is not None):
            raise ValueError(
                f"choose {self.choose!r} and importance {self.importance!r} do not go together: "
                "choose='scores' needs a file that `popjax calibrate prefill-pruning` wrote, and "
                "nothing else reads one"
            )
        if self.importance is not None:
            object.__setattr__(self, "importance", given_path(self.importance))
        for name in ("handle_boundary", "kv"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(
                    f"{name} {getattr(self, name)!r} is not a bool: give True or False"
                )
        if self.eviction not in BUDGETS:
            raise ValueError(f"eviction {self.eviction!r} is unknown: use one of {BUDGETS}")

    @property
    def boundary(self) -> bool:
        return self.handle_boundary

    @property
    def budget(self) -> str:
        return self.eviction

    def for_model(self, config: ModelConfig, params: Params) -> PrefillPruning:
        layers = self.choose
        if isinstance(layers, tuple):
            check_inside(layers, config.num_layers)
            return self
        count = layer_count(THIRD if self.skip is None else self.skip, config.num_layers)
        if self.importance is not None:
            scores = load_scores(self.importance, params, config)["prefill"]
            layers = lowest(scores.tolist(), count)
        else:
            layers = by_place(layers, count, config.num_layers)
        return dataclasses.replace(self, skip=None, choose=layers, importance=None)

    def prefill_layers(self, config: ModelConfig) -> tuple[str, ...]:
        assert isinstance(self.choose, tuple), "for_model() names the layers"
        skipped = KV_ONLY if self.kv else SKIPPED
        return tuple(skipped if i in self.choose else FULL for i in range(config.num_layers))


__all__ = ["PrefillPruning"]
