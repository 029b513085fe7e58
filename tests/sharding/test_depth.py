"""Layers skipped in prefill on a mesh: tokens as on one device, channels pruned or not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from popjax.depth import PrefillPruning, ShortGPT
from popjax.generate import Options
from popjax.run import Request, run
from tests.popjax.tiny_models import PROMPTS, logit_tolerance
from tests.sharding.meshes import PRUNING, case

BATCH = [PROMPTS[0], PROMPTS[2]]
HALF = PrefillPruning(skip=0.5)


@pytest.mark.parametrize(
    "depth", [HALF, pytest.param(ShortGPT(layers=(1,)), marks=pytest.mark.slow)]
)
def test_skipping_on_a_mesh_is_skipping_on_one_device(depth: PrefillPruning | ShortGPT) -> None:
    config, params, spread = case("qwen3", "model=2")
    request = Request(BATCH, 5, options=Options(logits=True), depth=depth)
    alone, together = run(params, config, request), run(spread, config, request)
    assert together.logits is not None and alone.logits is not None
    tolerance = logit_tolerance(config, alone.logits)
    np.testing.assert_allclose(together.logits, alone.logits, rtol=0, atol=tolerance)


def test_a_pruned_mesh_run_keeps_skipped_layers_dense_and_replays() -> None:
    config, params, spread = case("qwen2", "model=2")
    options = Options(record_masks=True)
    request = Request(BATCH, 5, PRUNING["online-pruning"], options=options, depth=HALF)
    together = run(spread, config, request)
    assert together.partition is not None
    kept = together.partition[1]
    assert np.asarray(kept.retained).tolist() == list(range(config.layers[1].mlp_dim))
    replay = dataclasses.replace(request, partition=together.partition, masks=together.masks)
    np.testing.assert_array_equal(together.tokens, run(params, config, replay).tokens)


def test_layers_without_entries_want_one_device() -> None:
    config, _, spread = case("qwen3", "model=2")
    depth = PrefillPruning(skip=0.5, kv=False)
    with pytest.raises(ValueError, match="on one device"):
        run(spread, config, Request(BATCH, 2, depth=depth))
