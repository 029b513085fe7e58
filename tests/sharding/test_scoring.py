"""Evaluation on a mesh: the scores of one device, and choices that share a context."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from popjax.config import ModelConfig
from popjax.evaluation.encoding import Pair
from popjax.evaluation.protocols import SINGLE_PASS, SPLIT, Case
from popjax.evaluation.scoring import Scorer
from tests.popjax.tiny_models import PROMPTS, logit_tolerance
from tests.sharding.meshes import PRUNING, case

PAIRS = [Pair(tuple(PROMPTS[0]), given) for given in ((4, 9, 33), (60, 2))]


def scored(params: Any, config: ModelConfig, which: Case, protocol: str) -> list[float]:
    found = dict(Scorer(params, config, which, protocol).scores(PAIRS))
    return [found[i].logprob for i in range(len(PAIRS))]


@pytest.mark.parametrize("protocol", [SINGLE_PASS, pytest.param(SPLIT, marks=pytest.mark.slow)])
def test_dense_scores_on_a_mesh_are_those_of_one_device(protocol: str) -> None:
    config, params, spread = case("llama", "model=2")
    alone, together = (scored(held, config, Case(), protocol) for held in (params, spread))
    # Sums of three differences of two logits each.
    tolerance = 6 * logit_tolerance(config, np.full(1, 10.0))
    np.testing.assert_allclose(together, alone, rtol=0, atol=tolerance)


@pytest.mark.slow
def test_choices_on_a_mesh_are_scored_after_one_prefill() -> None:
    config, _, spread = case("llama", "model=2")
    pruned = Case("online", PRUNING["online-pruning"])
    together = scored(spread, config, pruned, SPLIT)
    scorer = Scorer(spread, config, pruned, SPLIT, batch_size=1)
    alone = dict(scorer.scores(PAIRS))
    tolerance = 6 * logit_tolerance(config, np.full(1, 10.0))
    wanted = [alone[i].logprob for i in range(len(PAIRS))]
    np.testing.assert_allclose(together, wanted, rtol=0, atol=tolerance)
