"""A model that has lost FFN channels for good: static pruning as an ordinary, narrower checkpoint.

What a method decided for some text becomes the weights themselves, so that any tool that loads the
family loads the result. Leaves out what changes while decoding: one width, one set of channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from popjax.given_partition import checked_partitions
from popjax.methods import Method, WandaSP
from popjax.packing import pack
from popjax.run import Request, run
from popjax.scouts import check_saved
from popjax.sparsity import Partitions
from popjax.tiles import as_matrices

if TYPE_CHECKING:
    from popjax.model import LanguageModel


def calibrated_partition(
    model: LanguageModel, windows: Sequence[Sequence[int]], method: Method
) -> Partitions:
    """The partition that `method` makes of token windows run together, all tokens counting alike.

    That of wanda-sp is made of its statistics: any window does. Raises ValueError for a method that
    prunes no channels, leaves some to every step or is calibrated for more than the choice of
    channels, and for a mixture of experts.
    """
    _check_no_experts(model)
    check_calibration(method)
    found = run(model.params, model.config, Request(windows, 1, method=method)).partition
    if found is None:
        raise ValueError(f"{method} prunes no FFN channels: name another method, such as frozen")
    _check_final(found)
    return found


def statically_pruned(model: LanguageModel, partition: Partitions) -> LanguageModel:
    """The model with only the channels of `partition`, of one width in all layers, to be saved.

    Its other weights are shared with `model`, not copied. Raises ValueError for a partition that
    does not fit, that leaves a choice to every step, or whose layers differ in width, and for a
    model on several devices, with experts or with a scout.
    """
    _check_no_experts(model)
    check_saved(model.params)
    partition = checked_partitions(partition, model.config)
    _check_final(partition)
    if model.mesh is not None:
        raise ValueError(
            f"a model on {model.mesh.size} devices cannot be pruned for good: load it without mesh="
        )
    widths = {part.evaluated for part in partition}
    if len(widths) > 1:
        raise ValueError(
            f"layers keep {min(widths)} to {max(widths)} channels, and a checkpoint states one "
            "width for all: give every layer as many"
        )
    (width,) = widths
    matrices = as_matrices(model.params)
    params, config, _ = pack(matrices, model.config, partition)
    raw = {**model.source.raw, model.source.family.width_key: width}
    source = dataclasses.replace(model.source, raw=raw, config=config)
    name = f"{model.name}-ffn{width}"
    return dataclasses.replace(model, name=name, config=config, params=params, source=source)


def check_calibration(method: Method) -> None:
    """Raise ValueError for a method that is calibrated for more than the choice of channels."""
    if method.calibration is not None and not isinstance(method, WandaSP):
        raise ValueError(
            f"{method} is calibrated by a file, and may bring a bias or thresholds that no plain "
            "checkpoint holds: use frozen, griffin or wanda-sp"
        )


def _check_no_experts(model: LanguageModel) -> None:
    """Raise ValueError for a mixture of experts, whose rows packing leaves where they are."""
    if any(layer.moe is not None for layer in model.config.layers):
        raise ValueError(
            f"{model.name} is a mixture of experts, each of which keeps channels of its own, and "
            "no FFN channel of it is removed for good: export a model without experts"
        )


def _check_final(partition: Partitions) -> None:
    """Raise ValueError where candidates are left that every step would choose among."""
    for i, part in enumerate(partition):
        if not part.decided:
            raise ValueError(
                f"the partition of layer {i} leaves {part.k_selected} of {part.num_candidate} "
                "candidates to be chosen at every step, which no plain checkpoint can do: use "
                "frozen or griffin"
            )
