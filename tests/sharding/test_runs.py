"""A run on a mesh gives the tokens of a run on one device, dense and pruned."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from popjax.buckets import left_padded
from popjax.config import ModelConfig
from popjax.continuation import continuation_logits
from popjax.generate import PROGRAMS, Options
from popjax.methods import Method
from popjax.run import Request, RunResult, run
from popjax.sampling import SamplingConfig
from popjax.sharding import placed_params
from tests.popjax.tiny_models import PROMPTS, WINDOW, logit_tolerance
from tests.sharding.meshes import FAMILIES, PRUNING, SHAPES, case, mesh_of_shape, pairs

# Of two lengths, so that one row is padded, and longer than mistral's window.
BATCH = [PROMPTS[0], PROMPTS[2]]
assert min(map(len, BATCH)) < WINDOW < max(map(len, BATCH))
NEW = 10
RECORDED = Options(record_masks=True)
PRUNED = PRUNING["online-pruning"]


@pytest.mark.parametrize(("family", "name"), pairs(FAMILIES, SHAPES, known=FAMILIES[1:]))
def test_dense_on_a_mesh_is_dense_on_one_device(family: str, name: str) -> None:
    config, params, spread = case(family, name)
    request = Request(BATCH, NEW, options=Options(logits=True, logprobs=True))
    alone, together = run(params, config, request), run(spread, config, request)
    np.testing.assert_array_equal(together.tokens, alone.tokens)
    assert together.logits is not None and alone.logits is not None
    tolerance = logit_tolerance(config, alone.logits)
    np.testing.assert_allclose(together.logits, alone.logits, rtol=0, atol=tolerance)
    assert together.cache_bytes == alone.cache_bytes


@pytest.mark.parametrize(
    ("family", "name"),
    [
        # A norm over heads that lie on several devices, of which two hold the same keys.
        ("olmo2", "model=2,group=2"),
        # Biases: of channels, which are split, and of the sum, which is not.
        ("opt", "model=2"),
        pytest.param("gpt_neox", "model=4", marks=pytest.mark.slow),
        pytest.param("gemma2", "model=2,group=2", marks=pytest.mark.slow),
        pytest.param("gemma3_text", "model=2", marks=pytest.mark.slow),
        pytest.param("phi3", "model=2", marks=pytest.mark.slow),
    ],
)
def test_later_families_on_a_mesh(family: str, name: str) -> None:
    config, params, spread = case(family, name)
    request = Request(BATCH, 4, method=PRUNED, options=Options(logits=True, record_masks=True))
    together = run(spread, config, request)
    replay = dataclasses.replace(request, partition=together.partition, masks=together.masks)
    alone = run(params, config, replay)
    np.testing.assert_array_equal(together.tokens, alone.tokens)
    assert together.logits is not None and alone.logits is not None
    tolerance = logit_tolerance(config, alone.logits)
    np.testing.assert_allclose(together.logits, alone.logits, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("method", "name"), pairs(PRUNING, ["model=4", "model=2,group=2"], known=("frozen", "griffin"))
)
def test_a_pruned_mesh_run_replays_on_one_device(method: str, name: str) -> None:
    config, params, spread = case("qwen2", name)
    request = Request(BATCH, NEW, method=PRUNING[method], options=RECORDED)
    together = run(spread, config, request)
    replay = dataclasses.replace(request, partition=together.partition, masks=together.masks)
    alone = run(params, config, replay)
    np.testing.assert_array_equal(together.tokens, alone.tokens)
    for mine, other in zip(together.masks or (), alone.masks or (), strict=True):
        np.testing.assert_array_equal(mine, other)
    check_equal_counts(together, config, math.prod(SHAPES[name].values()))


def check_equal_counts(result: RunResult, config: ModelConfig, shards: int) -> None:
    """Every shard of F keeps as many channels, and every step chooses as many of each."""
    assert result.partition is not None and result.masks is not None
    for part, masks, layer in zip(result.partition, result.masks, config.layers, strict=True):
        width = layer.mlp_dim // shards
        for indices in (np.asarray(part.retained), np.asarray(part.candidate)):
            assert np.all(np.diff(indices) > 0)
            assert np.unique(np.bincount(indices // width, minlength=shards)).size == 1
        whole = part.evaluated == layer.mlp_dim
        order = np.concatenate([part.retained, part.candidate])
        channels = np.arange(layer.mlp_dim) if whole else order
        counts = [np.asarray(masks)[..., channels // width == s].sum(-1) for s in range(shards)]
        assert np.all(np.asarray(counts) == part.active // shards)


def test_each_shard_ranks_its_own_channels() -> None:
    config, params, spread = case("llama", "model=4")
    method = PRUNING["griffin"]
    result = run(spread, config, Request(BATCH, 2, method=method))
    static: dict[str, Any] = {"config": config, "method": method, "capacity": 32}
    scores = PROGRAMS.prefill(params, left_padded(BATCH), None, **static).statistics
    assert result.partition is not None
    for part, score in zip(result.partition, scores, strict=True):
        by_shard = np.asarray(score).reshape(4, -1)
        best = np.argsort(-by_shard, axis=1)[:, : by_shard.shape[1] // 2]
        expected = np.sort(best, axis=1) + np.arange(4)[:, None] * by_shard.shape[1]
        np.testing.assert_array_equal(part.retained, expected.ravel())


def test_a_partition_of_a_mesh_run_serves_the_next_one() -> None:
    config, _, spread = case("llama", "model=2,group=2")
    request = Request(BATCH, NEW, method=PRUNED, options=RECORDED)
    first = run(spread, config, request)
    again = run(spread, config, dataclasses.replace(request, partition=first.partition))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    replay = dataclasses.replace(request, partition=first.partition, masks=first.masks)
    replayed = run(spread, config, replay)
    np.testing.assert_array_equal(first.tokens, replayed.tokens)
    for mine, other in zip(first.masks or (), replayed.masks or (), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_sampled_tokens_are_those_of_one_device() -> None:
    config, params, spread = case("qwen3", "model=2,group=2")
    sampling = SamplingConfig(
        do_sample=True, temperature=0.9, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.2
    )
    request = Request(BATCH, NEW, sampling=sampling, seed=7)
    alone, together = run(params, config, request), run(spread, config, request)
    np.testing.assert_array_equal(together.tokens, alone.tokens)
    other = run(spread, config, dataclasses.replace(request, seed=8))
    assert np.any(other.tokens != together.tokens)


def test_padding_changes_nothing() -> None:
    config, _, spread = case("mistral", "model=4")
    both = run(spread, config, Request(BATCH, NEW))
    for row, prompt in enumerate(BATCH):
        alone = run(spread, config, Request([prompt], NEW))
        np.testing.assert_array_equal(both.tokens[row], alone.tokens[0])


def test_streamed_equals_unstreamed_and_compiles_no_more() -> None:
    config, _, spread = case("llama", "model=4")
    request = Request(BATCH, NEW, method=PRUNED)
    whole = run(spread, config, request)
    heard: list[np.ndarray] = []

    def listen(tokens: np.ndarray, done: np.ndarray) -> np.ndarray:
        heard.append(tokens)
        return np.zeros(done.shape, bool)

    streamed = run(spread, config, dataclasses.replace(request, on_chunk=listen, chunk=3))
    np.testing.assert_array_equal(streamed.tokens, whole.tokens)
    assert [tokens.shape[1] for tokens in heard] == [1, 4, 7, 10]
    assert streamed.compilations == 0


def test_rows_that_end_early_stay_ended() -> None:
    config, params, spread = case("llama", "model=4")
    free = run(params, config, Request(BATCH, NEW)).tokens
    request = Request(BATCH, NEW, eos_ids=(int(free[0, 3]),))
    alone, together = run(params, config, request), run(spread, config, request)
    np.testing.assert_array_equal(together.tokens, alone.tokens)
    np.testing.assert_array_equal(together.counts, alone.counts)
    assert together.stopped[0]


@pytest.mark.parametrize("method", [Method(), PRUNED], ids=["dense", "online-pruning"])
def test_a_second_prompt_of_a_bucket_compiles_nothing(method: Method) -> None:
    config, _, spread = case("llama", "model=2")
    run(spread, config, Request(BATCH, NEW, method=method, options=RECORDED))
    other = [[9] * 13, [7] * 2]
    second = run(spread, config, Request(other, NEW + 3, method=method, options=RECORDED))
    assert second.compilations == 0


def test_a_continuation_scores_as_on_one_device() -> None:
    config, params, spread = case("qwen3", "model=2")
    given = [[3, 1, 4, 1, 5], [9, 2, 6]]
    alone = np.asarray(continuation_logits(params, config, Method(), BATCH, given))
    together = np.asarray(continuation_logits(spread, config, Method(), BATCH, given))
    tolerance = logit_tolerance(config, alone)
    for row, tokens in enumerate(given):
        mine, other = together[row, : len(tokens)], alone[row, : len(tokens)]
        np.testing.assert_allclose(mine, other, rtol=0, atol=tolerance)


def test_scores_that_are_not_finite_on_one_shard_only_are_refused() -> None:
    config, params, _ = case("llama", "model=2")
    mlp = params["layer_1"]["mlp"]
    down = mlp["down"].at[-1, 0].set(np.inf)
    layer = {**params["layer_1"], "mlp": {**mlp, "down": down}}
    mesh = mesh_of_shape(SHAPES["model=2"])
    spread = placed_params({**params, "layer_1": layer}, config, mesh)
    with pytest.raises(ValueError, match=r"channel scores of layers \[1\] are not finite"):
        run(spread, config, Request(BATCH, NEW, method=PRUNED))
