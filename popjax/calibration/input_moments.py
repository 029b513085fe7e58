"""Second moments of what each layer's feed-forward part reads, over a calibration text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from popjax.calibration.measuring import counting, means_over_prompts
from popjax.config import ModelConfig
from popjax.eviction.method import KvMethod
from popjax.methods import Method
from popjax.methods.method import LayerActs
from popjax.sparsity import Params


@dataclasses.dataclass(frozen=True)
class InputMoments(Method):
    """The sum [D, D] of x x^T over the tokens of a prompt, x being the input of the FFN."""

    def observe(self, params: Params, acts: LayerActs) -> Any:
        x = jnp.where(acts.valid[:, :, None], acts.x.astype(jnp.float32), 0.0)
        return jnp.einsum("btd,bte->de", x, x)


def input_moments(
    params: Params,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    on_sample: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, ...]:
    """Of every layer the second moments [D, D] of its FFN's input, summed over a prompt's tokens.

    Means over prompts, in float64. `on_sample` is told how many were run. Raises ValueError for no
    prompts and for values that are not finite.
    """
    if not prompts:
        raise ValueError("second moments are over prompts, and there is none: give at least one")
    static = {"config": config, "method": InputMoments(), "eviction": KvMethod()}
    found = means_over_prompts(params, prompts, static, counting(on_sample))
    return tuple(moments for moments, _ in found)


__all__ = ["InputMoments", "input_moments"]
