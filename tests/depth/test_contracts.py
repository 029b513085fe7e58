"""What skipping layers in prefill promises on every family, alone and beside other methods."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from popjax.depth import DepthMethod, PrefillPruning, ShortGPT
from popjax.depth.applied import without_others
from popjax.eviction import H2O, KvMethod, KVzip, LaProx, SnapKV
from popjax.generate import PROGRAMS, Options
from popjax.methods import Frozen, Griffin, Method, OnlinePruning
from popjax.prefilling import make_context
from popjax.run import Request, RunResult, run
from tests.depth.shallow import (
    HALF,
    MIXED,
    assert_same_run,
    config_of,
    params_of,
    ran,
    reference,
    request,
)
from tests.popjax.same_runs import logits_of
from tests.popjax.tiny_models import PROMPTS

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ABLATIONS: tuple[DepthMethod, ...] = (
    PrefillPruning(skip=0.5, handle_boundary=False),
    PrefillPruning(skip=0.5, kv=False),
    PrefillPruning(skip=0.5, handle_boundary=False, kv=False),
)
LAPROX = LaProx(tokens=8, window=3, pooling=3)
slow = pytest.mark.slow


def pairs(*depths: DepthMethod) -> list[Any]:
    """Each on qwen3, and on the other families as slow repetitions."""
    ablations = (*ABLATIONS, PrefillPruning(skip=1.0))
    return [
        pytest.param(family, depth, marks=[slow] if family != "qwen3" or depth in ablations else [])
        for family in FAMILIES
        for depth in depths
    ]


@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_skipping_nothing_is_the_whole_model_bit_for_bit(family: str) -> None:
    whole = reference(family, None)
    for nothing in (PrefillPruning(skip=0.0), PrefillPruning(choose=())):
        result = ran(family, request(nothing))
        assert (logits_of(result) == logits_of(whole)).all()
        assert result.compilations == 0 and result.depth is None


@pytest.mark.parametrize(("family", "depth"), pairs(HALF, MIXED, PrefillPruning(skip=1.0)))
def test_a_prompt_of_one_token_runs_the_whole_model(family: str, depth: DepthMethod) -> None:
    whole = ran(family, request(None, prompts=[[7]]))
    assert_same_run(family, ran(family, request(depth, prompts=[[7]])), whole)


@pytest.mark.parametrize(("family", "depth"), pairs(HALF, MIXED, *ABLATIONS))
def test_rows_chunks_and_streams_change_nothing(family: str, depth: DepthMethod) -> None:
    """A row alone fits a smaller bucket, so this is padded against unpadded too."""
    wanted = reference(family, depth)
    assert (logits_of(wanted) != logits_of(reference(family, None))).any()
    assert_same_run(family, ran(family, request(depth, prompts=PROMPTS[:1])), wanted, rows=[0])
    assert_same_run(family, ran(family, request(depth, prompts=PROMPTS[2:])), wanted, rows=[2])
    assert_same_run(family, ran(family, request(depth, prefill_chunk=8)), wanted)
    streamed = request(depth, chunk=2, on_chunk=lambda _, done: np.zeros_like(done))
    assert (logits_of(ran(family, streamed)) == logits_of(wanted)).all()


@pytest.mark.parametrize(("family", "depth"), pairs(HALF, MIXED))
def test_a_second_prompt_of_a_bucket_compiles_nothing(family: str, depth: DepthMethod) -> None:
    reference(family, depth)
    before = PROGRAMS.compilations
    prompts = [[3] * 11, list(range(40, 60)), [44, 2, 9]]
    result = ran(family, request(depth, prompts=prompts, seed=5))
    assert (PROGRAMS.compilations, result.compilations) == (before, 0)


METHODS = (
    OnlinePruning(ratio=0.5, gamma=0.3),
    pytest.param(OnlinePruning(ratio=0.5, gamma=0.3, prefill="dense"), marks=slow),
    pytest.param(Frozen(0.5), marks=slow),
    pytest.param(Griffin(0.5), marks=slow),
)


@pytest.mark.parametrize("method", METHODS)
def test_skipped_layers_stay_dense_in_decode(method: Method) -> None:
    """And the ratio, a half, is that of the others; what was recorded replays the run."""
    options = Options(logits=True, record_masks=True)
    result = ran("qwen3", request(MIXED, method=method, options=options))
    assert result.partition is not None and result.masks is not None
    layers = config_of("qwen3").layers
    for i, (part, layer) in enumerate(zip(result.partition, layers, strict=True)):
        if i in (0, 2):
            assert part.retained.tolist() == list(range(layer.mlp_dim))
            assert (part.num_candidate, part.active) == (0, layer.mlp_dim)
        else:
            assert part.active == layer.mlp_dim // 2
    again = request(
        MIXED, method=method, options=options, partition=result.partition, masks=result.masks
    )
    assert_same_run("qwen3", ran("qwen3", again), result)


def test_a_ratio_of_nothing_beside_skipping_is_skipping_bit_for_bit() -> None:
    result = ran("qwen3", request(HALF, method=OnlinePruning(ratio=0.0, gamma=0.0)))
    assert (logits_of(result) == logits_of(reference("qwen3", HALF))).all()


def lengths(result: RunResult) -> np.ndarray:
    """Entries [L, B, K] that stayed."""
    assert result.kept is not None
    return np.asarray(result.kept.lengths)


KINDS = (
    LAPROX,
    pytest.param(SnapKV(tokens=8, window=3, pooling=3), marks=slow),
    pytest.param(H2O(tokens=8, window=3), marks=slow),
    pytest.param(KVzip(tokens=8, window=3, sinks=2), marks=slow),
)


@pytest.mark.parametrize("eviction", KINDS)
def test_evictions_keep_their_budget_whole_or_in_chunks(eviction: KvMethod) -> None:
    result = ran("qwen3", request(HALF, eviction=eviction))
    budgets = [min(8, len(prompt)) for prompt in PROMPTS]
    heads = config_of("qwen3").num_layers * 2
    assert lengths(result).sum(axis=(0, 2)).tolist() == [heads * n for n in budgets]
    chunked = ran("qwen3", request(HALF, eviction=eviction, prefill_chunk=8))
    assert_same_run("qwen3", chunked, result)
    whole = ran("qwen3", request(HALF, eviction=type(eviction)(keep=1.0)))
    assert (logits_of(whole) == logits_of(reference("qwen3", HALF))).all()


def test_equal_shares_are_those_of_layers_that_were_not_seen() -> None:
    equal = PrefillPruning(skip=0.5, eviction="uniform")
    found = lengths(ran("qwen3", request(equal, eviction=LAPROX))).sum(axis=2)
    assert found[2:].tolist() == [[2 * min(8, len(prompt)) for prompt in PROMPTS]] * 2
    shared = lengths(ran("qwen3", request(HALF, eviction=LAPROX))).sum(axis=2)
    assert found.sum(axis=0).tolist() == shared.sum(axis=0).tolist()
    assert shared[2:].tolist() != found[2:].tolist()


def test_eviction_goes_on_while_decoding() -> None:
    result = ran("qwen3", request(HALF, eviction=LAPROX, evict_every=3, max_new_tokens=8))
    assert np.isfinite(logits_of(result)).all()


def test_a_turn_after_a_context_is_a_prefill_again() -> None:
    """Tokens of the turn but its last skip; the context's last one was a boundary in its time."""
    config, params = config_of("qwen3"), params_of("qwen3")
    context = make_context(params, config, Request([PROMPTS[1][:12]], 1, depth=HALF))
    asked = request(HALF, prompts=[PROMPTS[1][12:]], context=context)
    result = ran("qwen3", asked)
    assert_same_run("qwen3", ran("qwen3", request(HALF, prompts=asked.prompts, context=context,
                                                  prefill_chunk=4)), result)  # fmt: skip
    dense = ran("qwen3", request(None, prompts=asked.prompts, context=context))
    assert (logits_of(dense) != logits_of(result)).any()
    one = [PROMPTS[1][-1:]]
    alone = ran("qwen3", request(HALF, prompts=one, context=context))
    assert_same_run("qwen3", alone, ran("qwen3", request(None, prompts=one, context=context)))


def test_dropped_layers_are_a_smaller_model() -> None:
    config, params = config_of("qwen3"), params_of("qwen3")
    result = ran("qwen3", request(ShortGPT(layers=(1, 2))))
    fewer, narrow = without_others(params, config, (0, 3))
    asked = request(None)
    assert (logits_of(run(fewer, narrow, asked)) == logits_of(result)).all()
    assert result.layers == (0, 3)
