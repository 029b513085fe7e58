"""ShortGPT (arXiv 2403.03853): layers that hardly turn the hidden state are dropped for good.

What prefill-only skipping is measured against: the same number of layers, gone from decode too.
Leaves out measuring block influence (`importance.py`).
"""

from __future__ import annotations

import dataclasses

from popjax.config import ModelConfig
from popjax.depth.artefact import given_path, load_scores
from popjax.depth.choosing import check_inside, check_layers, check_skip, layer_count, lowest
from popjax.depth.method import DepthMethod
from popjax.sparsity import Params


@dataclasses.dataclass(frozen=True)
class ShortGPT(DepthMethod):
    """Drop the share `skip` of the layers with the lowest block influence, 1 - cos(in, out).

    importance: the file that `popjax calibrate prefill-pruning` wrote, which holds influences too;
    or layers: the dropped ones by index. Raises ValueError for values outside their range.
    """

    skip: float | None = None
    importance: str | None = None
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_skip(self.skip)
        if (self.layers is None) == (self.importance is None):
            raise ValueError(
                "short-gpt needs either layers or importance: give indices, or the file that "
                "`popjax calibrate prefill-pruning` wrote"
            )
        if self.layers is not None:
            check_layers(self.layers)
            if self.skip is not None:
                raise ValueError(f"skip {self.skip} and layers {self.layers} were given: give one")
        if self.importance is not None:
            object.__setattr__(self, "importance", given_path(self.importance))

    def for_model(self, config: ModelConfig, params: Params) -> ShortGPT:
        dropped = self.layers
        if self.importance is not None:
            count = layer_count(1 / 4 if self.skip is None else self.skip, config.num_layers)
            influence = load_scores(self.importance, params, config)["influence"]
            dropped = lowest(influence.tolist(), count)
        assert dropped is not None, "one of the two is given"
        check_inside(dropped, config.num_layers)
        if len(dropped) == config.num_layers:
            raise ValueError(
                f"short-gpt would drop every layer of the model's {config.num_layers}: skip fewer, "
                "so that one is left"
            )
        return ShortGPT(layers=dropped)

    def decode_layers(self, config: ModelConfig) -> tuple[int, ...]:
        assert self.layers is not None, "for_model() names the layers"
        return tuple(i for i in range(config.num_layers) if i not in self.layers)


__all__ = ["ShortGPT"]
