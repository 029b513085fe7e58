"""Teacher-forced scoring is generation run again: the same partitions, masks and logits."""

import dataclasses

import jax
import numpy as np
import pytest

from popjax.continuation import continuation_logits, continuation_logprobs
from popjax.generate import PROGRAMS, Options
from popjax.methods import Frozen, Griffin, Method, OnlinePruning, RescoreAll
from popjax.run import Request, RunResult, run
from tests.popjax.tiny_models import CONFIGS, PROMPTS, VOCAB, logit_tolerance, random_params

METHODS = {
    "dense": Method(),
    "online": OnlinePruning(ratio=0.5, gamma=0.3),
    "online-model-ratio": OnlinePruning(model_ratio=0.3, gamma=0.3),
    "online-dense": OnlinePruning(ratio=0.5, gamma=0.3, prefill="dense"),
    "frozen": Frozen(0.5),
    "rescore": RescoreAll(0.5),
    "griffin": Griffin(0.5),
}
CONFIG = CONFIGS["llama"]
PARAMS = random_params(CONFIG)
NEW = 9


def generated(method: Method, family: str = "llama", eos_ids: tuple[int, ...] = ()) -> RunResult:
    options = Options(logprobs=True, logits=True)
    request = Request(PROMPTS, NEW, method=method, options=options, eos_ids=eos_ids)
    return run(random_params(CONFIGS[family]), CONFIGS[family], request)


def rows_of(result: RunResult) -> list[list[int]]:
    return [row[:n].tolist() for row, n in zip(result.tokens, result.counts, strict=True)]


def assert_same(scored: jax.Array, result: RunResult) -> None:
    assert result.logits is not None
    close = logit_tolerance(CONFIG, result.logits)
    for row, count in enumerate(result.counts):
        ours, theirs = np.asarray(scored)[row, :count], result.logits[row, :count]
        np.testing.assert_allclose(ours, theirs, atol=close, rtol=0)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if known else [])
        for name in METHODS
        # Their scores are compared in test_contracts.py too.
        for known in [name in ("online-dense", "frozen", "griffin")]
    ],
)
def test_scoring_equals_single_step_decoding(name: str) -> None:
    result = generated(METHODS[name])
    logits = continuation_logits(PARAMS, CONFIG, METHODS[name], PROMPTS, rows_of(result))
    assert_same(logits, result)


def test_scoring_equals_decoding_behind_a_sliding_window() -> None:
    config, method = CONFIGS["mistral"], METHODS["online"]
    result = generated(method, "mistral")
    params = random_params(config)
    assert_same(continuation_logits(params, config, method, PROMPTS, rows_of(result)), result)


def test_rows_that_end_early_do_not_sway_masks_shared_by_the_batch() -> None:
    method = OnlinePruning(ratio=0.5, gamma=0.3, batch_shared=True)
    free = generated(method).tokens
    ending = int(free[0, 3])
    result = generated(method, eos_ids=(ending,))
    assert len(set(result.counts.tolist())) > 1, "the rows must have different lengths"
    logits = continuation_logits(PARAMS, CONFIG, method, PROMPTS, rows_of(result))
    assert_same(logits, result)


@pytest.mark.parametrize("name", ["dense", "online"])
def test_logprobs_are_those_of_the_run(name: str) -> None:
    method, prompt = METHODS[name], PROMPTS[1]
    request = Request([prompt], NEW, method=method, options=Options(logprobs=True, logits=True))
    result = run(PARAMS, CONFIG, request)
    assert result.logits is not None and result.logprobs is not None
    tokens = result.tokens[0].tolist()
    scored = continuation_logprobs(PARAMS, CONFIG, method, prompt, tokens)
    assert scored.shape == (NEW,) and scored.dtype == np.float32
    # A difference of two values that each move with the logits.
    close = 2 * logit_tolerance(CONFIG, result.logits)
    np.testing.assert_allclose(scored, result.logprobs[0], atol=close, rtol=0)


def test_any_text_is_scored_not_only_what_the_model_would_say() -> None:
    prefix, given = PROMPTS[0], [VOCAB - 1, 0, 4, 4, 50]
    scored = continuation_logprobs(PARAMS, CONFIG, Method(), prefix, given)
    whole = prefix + given
    for i, token in enumerate(given):
        request = Request([whole[: len(prefix) + i]], 1, options=Options(logits=True))
        logits = run(PARAMS, CONFIG, request).logits
        assert logits is not None
        exact = logits[0, 0].astype(np.float64)
        expected = exact[token] - np.log(np.sum(np.exp(exact)))
        assert abs(scored[i] - expected) <= 2 * logit_tolerance(CONFIG, logits)


def test_one_token_comes_from_the_prefill_and_decodes_nothing() -> None:
    before = PROGRAMS.score.compilations
    scored = continuation_logprobs(PARAMS, CONFIG, METHODS["online"], [1, 2, 3], [4])
    assert scored.shape == (1,) and PROGRAMS.score.compilations == before
    longer = continuation_logprobs(PARAMS, CONFIG, METHODS["online"], [1, 2, 3], [4, 5])
    # The caches differ in capacity, which may reorder the sums over their slots.
    logits = np.asarray(continuation_logits(PARAMS, CONFIG, METHODS["online"], [[1, 2, 3]], [[4]]))
    close = 2 * logit_tolerance(CONFIG, logits)
    np.testing.assert_allclose(longer[0], scored[0], atol=close, rtol=0)


def test_a_second_text_of_the_bucket_compiles_nothing() -> None:
    continuation_logprobs(PARAMS, CONFIG, METHODS["frozen"], PROMPTS[0], [1, 2, 3, 4])
    before = PROGRAMS.compilations
    continuation_logprobs(PARAMS, CONFIG, METHODS["frozen"], PROMPTS[2], [9, 8, 7, 6, 5])
    assert PROGRAMS.compilations == before


def test_a_given_partition_replaces_the_prefix_own() -> None:
    method = METHODS["online-dense"]
    first, second = PROMPTS[:2]
    other = run(PARAMS, CONFIG, Request([second], 2, method=method)).partition
    result = run(
        PARAMS,
        CONFIG,
        Request([first], NEW, method=method, partition=other, options=Options(logits=True)),
    )
    rows = result.tokens.tolist()
    given = continuation_logits(PARAMS, CONFIG, method, [first], rows, partition=other)
    assert_same(given, result)
    own = continuation_logits(PARAMS, CONFIG, method, [first], rows)
    assert not np.allclose(own[0, 1:NEW], given[0, 1:NEW], atol=0.01)


def test_it_fits_up_to_the_last_position_of_the_context() -> None:
    prefix = [3] * (CONFIG.max_positions - 4)
    assert continuation_logprobs(PARAMS, CONFIG, Method(), prefix, [1, 2, 3, 4]).shape == (4,)
    with pytest.raises(ValueError, match="maximum context length of 64"):
        continuation_logprobs(PARAMS, CONFIG, Method(), prefix, [1, 2, 3, 4, 5])


@pytest.mark.parametrize(
    ("prefix", "given", "message"),
    [
        ([1, 2], [], "continuation 0 has no tokens"),
        ([], [1], "prompt 0 has no tokens"),
        ([1, 2], [VOCAB], f"continuation 0 has a token id outside 0..{VOCAB - 1}"),
        ([1, -1], [1], "prompt 0 has a token id outside"),
    ],
)
def test_unusable_tokens_are_named(prefix: list[int], given: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        continuation_logprobs(PARAMS, CONFIG, Method(), prefix, given)


def test_prefixes_and_continuations_come_in_pairs() -> None:
    with pytest.raises(ValueError, match="2 prefixes for 1 continuations"):
        continuation_logits(PARAMS, CONFIG, Method(), [[1], [2]], [[3]])


def test_scores_that_are_not_finite_are_an_error() -> None:
    params = jax.tree.map(lambda leaf: leaf, PARAMS)
    params["layer_0"]["mlp"]["up"] = params["layer_0"]["mlp"]["up"] * np.float32(1e38)
    frozen = dataclasses.replace(METHODS["frozen"])
    with pytest.raises(ValueError, match="layers \\[0"):
        continuation_logprobs(params, CONFIG, frozen, PROMPTS[0], [1, 2])
