"""Experts on a mesh: each device holds some of them, whole, and pruning is that of one device."""

import dataclasses

import numpy as np
import pytest

from popjax import sharding
from popjax.expert_partition import ExpertPartition
from popjax.generate import Options
from popjax.methods import OnlinePruning
from popjax.run import Request, run
from popjax.sparsity import channel_budget
from tests.popjax.tiny_models import PROMPTS, logit_tolerance
from tests.sharding.meshes import case, config_of, mesh_of_shape

BATCH = [PROMPTS[0], PROMPTS[2]]
NEW = 10
ONLINE = OnlinePruning(0.5, gamma=0.5)
WHOLE = OnlinePruning(0.5, gamma=0.5, unseen="dense", min_tokens=3, batch_shared=True)
RECORDED = Options(record_masks=True, logits=True, implementation="xla")


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param("qwen2_moe", "model=4", marks=pytest.mark.slow),
        ("olmoe", "model=2,group=2"),
    ],
)
def test_dense_on_a_mesh_is_dense_on_one_device(family: str, name: str) -> None:
    config, params, spread = case(family, name)
    request = Request(BATCH, NEW, options=Options(logits=True))
    alone, together = run(params, config, request), run(spread, config, request)
    np.testing.assert_array_equal(together.tokens, alone.tokens)
    assert together.logits is not None and alone.logits is not None
    tolerance = logit_tolerance(config, alone.logits)
    np.testing.assert_allclose(together.logits, alone.logits, rtol=0, atol=tolerance)
    held = spread["layer_0"]["moe"]
    assert held["up"].addressable_shards[0].data.shape[0] == 8 // 4
    assert held["router"].addressable_shards[0].data.shape[0] == 8


@pytest.mark.parametrize("method", [ONLINE, pytest.param(WHOLE, marks=pytest.mark.slow)])
def test_pruned_on_a_mesh_is_pruned_on_one_device(method: OnlinePruning) -> None:
    """Experts are ranked whole, so unlike channels that are split they need no replay."""
    config, params, spread = case("olmoe", "model=2,group=2")
    request = Request(BATCH, NEW, method=method, options=RECORDED)
    alone, together = run(params, config, request), run(spread, config, request)
    np.testing.assert_array_equal(together.tokens, alone.tokens)
    for mine, other in zip(together.partition or (), alone.partition or (), strict=True):
        np.testing.assert_array_equal(mine.retained, other.retained)
        np.testing.assert_array_equal(mine.candidate, other.candidate)
    for mine, other in zip(together.masks or (), alone.masks or (), strict=True):
        np.testing.assert_array_equal(mine, other)
    replay = dataclasses.replace(request, partition=alone.partition, masks=alone.masks)
    replayed = run(spread, config, replay)
    np.testing.assert_array_equal(replayed.tokens, alone.tokens)


def test_experts_that_the_devices_do_not_divide_are_refused() -> None:
    config = config_of("olmoe", "model=4")
    layers = tuple(
        dataclasses.replace(layer, moe=dataclasses.replace(layer.moe, num_experts=6))
        for layer in config.layers
        if layer.moe is not None
    )
    with pytest.raises(ValueError, match=r"E = 6 \(experts of layer 0\) is not a multiple of 4"):
        mesh = mesh_of_shape({"model": 4})
        sharding.validate(dataclasses.replace(config, layers=layers), mesh)


def test_what_every_token_uses_is_split_and_pruned_by_shard() -> None:
    config, params, spread = case("qwen2_moe", "model=2")
    method = dataclasses.replace(ONLINE, shared="pruned")
    request = Request(BATCH, NEW, method=method, options=RECORDED)
    together = run(spread, config, request)
    partition, masks = together.partition, together.masks
    assert partition is not None and masks is not None
    part = partition[0]
    assert isinstance(part, ExpertPartition) and part.shared is not None
    F = config.layers[0].mlp_dim
    half = channel_budget(F // 2, 0.5, 0.25)
    assert (part.shared.evaluated, part.shared.k_selected) == (
        2 * half.evaluated,
        2 * half.k_selected,
    )
    assert masks[0].shape[-1] == part.evaluated == part.routed + part.shared.evaluated
    for shard in (0, 1):
        there = np.asarray(part.shared.retained) // (F // 2) == shard
        assert there.sum() == half.retained
    replay = dataclasses.replace(request, partition=partition, masks=masks)
    for held in (params, spread):
        replayed = run(held, config, replay)
        np.testing.assert_array_equal(replayed.tokens, together.tokens)
        for mine, other in zip(replayed.masks or (), masks, strict=True):
            np.testing.assert_array_equal(mine, other)
        logits = np.asarray(together.logits)
        tolerance = logit_tolerance(config, logits)
        np.testing.assert_allclose(np.asarray(replayed.logits), logits, rtol=0, atol=tolerance)
