"""A comparison with dense, against the same numbers worked out step by step in float64."""

import dataclasses

import numpy as np
import pytest

from popjax.compare import compare_dense
from popjax.config import ModelConfig
from popjax.generate import Options
from popjax.methods import Frozen, Method, OnlinePruning
from popjax.report import Comparison
from popjax.run import Request, run
from popjax.sparsity import Params, Partitions
from tests.popjax.tiny_models import CONFIGS, PROMPTS, logit_tolerance, random_params


@dataclasses.dataclass(frozen=True)
class Tiny:
    config: ModelConfig
    params: Params


@dataclasses.dataclass(frozen=True)
class Made:
    tokens: list[list[int]]
    partition: Partitions | None
    logits: list[np.ndarray]


TINY = Tiny(CONFIGS["llama"], random_params(CONFIGS["llama"]))
ONLINE = OnlinePruning(ratio=0.5, gamma=0.3)
NEW = 10


def generate(
    method: Method, eos_ids: tuple[int, ...] = (), partition: Partitions | None = None
) -> Made:
    request = Request(
        PROMPTS,
        NEW,
        method=method,
        eos_ids=eos_ids,
        partition=partition,
        options=Options(logits=True),
    )
    result = run(TINY.params, TINY.config, request)
    assert result.logits is not None
    counts = result.counts.tolist()
    return Made(
        [row[:n].tolist() for row, n in zip(result.tokens, counts, strict=True)],
        result.partition,
        [row[:n] for row, n in zip(result.logits, counts, strict=True)],
    )


def compared(made: Made, method: Method) -> Comparison:
    return compare_dense(TINY, PROMPTS, made, method=method, rounds=2)


def dense_logits(prompt: list[int], tokens: list[int]) -> np.ndarray:
    """Dense logits before each of `tokens`, every one by a prefill of all that came before."""
    rows = []
    for i in range(len(tokens)):
        request = Request([prompt + tokens[:i]], 1, options=Options(logits=True))
        logits = run(TINY.params, TINY.config, request).logits
        assert logits is not None
        rows.append(logits[0, 0])
    return np.stack(rows).astype(np.float64)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def test_dense_differs_from_itself_in_nothing() -> None:
    found = compared(generate(Method()), Method())
    assert found.token_agreement == 1.0 and found.kl == 0.0
    assert found.first_difference == (NEW, NEW, NEW)
    assert found.decode_speedup == (1.0, 1.0)


@pytest.mark.parametrize("ending", [False, True])
def test_distance_is_that_of_every_step_on_the_generated_text(ending: bool) -> None:
    eos_ids = (generate(ONLINE).tokens[0][3],) if ending else ()
    made = generate(ONLINE, eos_ids)
    assert (len(made.tokens[0]) < NEW) == ending
    found = compared(made, ONLINE)
    kls, agreed = [], []
    for prompt, tokens, logits in zip(PROMPTS, made.tokens, made.logits, strict=True):
        dense = dense_logits(prompt, tokens)
        p, q = log_softmax(dense), log_softmax(logits.astype(np.float64))
        kls += list((np.exp(p) * (p - q)).sum(axis=-1))
        agreed += list(dense.argmax(axis=-1) == np.asarray(tokens))
    assert found.token_agreement == np.mean(agreed)
    assert 0 < found.token_agreement < 1, "the case must tell agreement from difference"
    # Both distributions move with their logits, and p - q is weighted by p, which sums to one.
    largest = logit_tolerance(TINY.config, np.concatenate(made.logits))
    assert found.kl == pytest.approx(np.mean(kls), abs=4 * largest)
    assert found.kl > 0.01


def test_first_difference_is_where_the_free_texts_part() -> None:
    pruned, dense = generate(ONLINE), generate(Method())
    expected = []
    for ours, theirs in zip(pruned.tokens, dense.tokens, strict=True):
        same = np.asarray(ours) == np.asarray(theirs)
        expected.append(NEW if same.all() else int(np.argmin(same)))
    assert compared(pruned, ONLINE).first_difference == tuple(expected)
    assert min(expected) < NEW


def test_a_partition_of_the_callers_is_the_one_compared() -> None:
    frozen = Frozen(0.5)
    everything = generate(Frozen(0.0)).partition
    made = generate(frozen, partition=everything)
    assert compared(made, frozen).kl == pytest.approx(
        0.0, abs=4 * logit_tolerance(TINY.config, np.concatenate(made.logits))
    )
    assert compared(dataclasses.replace(made, partition=None), frozen).kl > 0.01


def test_rounds_are_timed_and_told() -> None:
    told: list[int] = []
    found = compare_dense(
        TINY, PROMPTS, generate(ONLINE), method=ONLINE, rounds=3, on_round=told.append
    )
    assert told == [1, 2, 3]
    assert len(found.decode_speedup) == 3 and min(found.decode_speedup) > 0


@pytest.mark.parametrize("rows", [[[1]], [[1], [2], []]])
def test_rows_that_do_not_match_the_prompts_are_refused(rows: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="one row of tokens a prompt"):
        compared(Made(rows, None, []), Method())


def test_a_context_without_room_for_a_step_is_refused() -> None:
    prompt = [[3] * (TINY.config.max_positions - 1)]
    with pytest.raises(ValueError, match="new_tokens 1 is below 2"):
        compare_dense(TINY, prompt, Made([[1]], None, []), method=ONLINE)
