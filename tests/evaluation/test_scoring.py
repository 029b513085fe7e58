"""Scores: of both protocols against direct computation, and no row sways another."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popjax import Griffin, LaProx, OnlinePruning, PrefillPruning
from popjax import cache as kv
from popjax.buckets import left_padded
from popjax.continuation import continuation_logprobs
from popjax.evaluation import single_pass
from popjax.evaluation.encoding import Pair
from popjax.evaluation.protocols import SINGLE_PASS, SPLIT, Case
from popjax.evaluation.scoring import Score, Scorer
from popjax.evaluation.single_pass import PREFILL_SCORES
from popjax.generate import PROGRAMS
from popjax.methods import Method
from popjax.nn.transformer import Inputs, Transformer
from tests.popjax.tiny_models import CONFIGS, PROMPTS, logit_tolerance, random_params

CONFIG = CONFIGS["llama"]
PARAMS = random_params(CONFIG)
DENSE = Case()
ONLINE = Case("online", OnlinePruning(ratio=0.5, gamma=0.3))
PAIRS = [
    Pair(tuple(PROMPTS[0]), (4, 9, 33)),
    Pair(tuple(PROMPTS[1][:13]), (60, 2)),
    Pair(tuple(PROMPTS[0]), (8, 1)),
    Pair(tuple(PROMPTS[2]), (1, 2, 3, 4, 5)),
    Pair(tuple(PROMPTS[0]), (7, 7, 7, 7)),
]


@functools.cache
def every(case: Case, protocol: str) -> list[Score]:
    """The scores of PAIRS, in one call."""
    return scored(case, protocol, PAIRS)


def scored(case: Case, protocol: str, pairs: list[Pair], rows: int = 16) -> list[Score]:
    found = dict(Scorer(PARAMS, CONFIG, case, protocol, rows).scores(pairs))
    return [found[i] for i in range(len(pairs))]


def tolerance(tokens: int) -> float:
    """Each term moves as two logits do, and their sum as tokens of them."""
    logits = np.full(1, 10.0)
    return 2 * tokens * logit_tolerance(CONFIG, logits)


def assert_same(found: list[Score], wanted: list[Score]) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=tolerance(ours.tokens))
        assert (ours.tokens, ours.greedy) == (theirs.tokens, theirs.greedy)


@jax.jit
def all_logits(inputs: Inputs) -> jax.Array:
    cache = kv.empty(CONFIG, 1, 16, jnp.dtype("float32"))
    given = ({"params": PARAMS}, inputs, cache, None, True)
    return Transformer(CONFIG, Method()).apply(*given, method="prefill").logits  # type: ignore[union-attr]


def direct(pair: Pair) -> Score:
    """From the logits of all tokens, in float64."""
    n = len(pair.continuation)
    logits = all_logits(left_padded([(*pair.context, *pair.continuation[:-1])], 16))
    exact = np.asarray(logits)[0, -n:].astype(np.float64)
    chosen = exact[np.arange(n), list(pair.continuation)]
    total = float((chosen - np.log(np.exp(exact).sum(axis=-1))).sum())
    return Score(total, n, exact.argmax(axis=-1).tolist() == list(pair.continuation))


@pytest.mark.parametrize("protocol", [SPLIT, SINGLE_PASS])
def test_dense_scores_are_those_of_all_logits(protocol: str) -> None:
    assert_same(every(DENSE, protocol), [direct(pair) for pair in PAIRS])
    likely = np.asarray(all_logits(left_padded([PROMPTS[0]], 16)))[0, -1].argmax()
    short = [Pair(tuple(PROMPTS[0]), (token,)) for token in (int(likely), 5)]
    found = scored(DENSE, protocol, short)
    assert_same(found, [direct(pair) for pair in short])
    assert [score.greedy for score in found] == [True, False]


@pytest.mark.parametrize("case", [DENSE, ONLINE], ids=lambda case: case.name)
@pytest.mark.parametrize("protocol", [SPLIT, SINGLE_PASS])
def test_a_row_is_the_same_alone_and_in_company(case: Case, protocol: str) -> None:
    alone = [scored(case, protocol, [pair], 1)[0] for pair in PAIRS]
    assert_same(every(case, protocol), alone)


EVICTING = Case("evicting", eviction=LaProx(keep=0.5, window=4))
SHALLOW = Case("shallow", OnlinePruning(ratio=0.5), depth=PrefillPruning(skip=0.5))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[] if case is ONLINE else pytest.mark.slow)
        for case in (ONLINE, EVICTING, SHALLOW)
    ],
)
def test_choices_that_share_a_context_are_each_scored_after_it(case: Case) -> None:
    pairs = [PAIRS[0], PAIRS[2], PAIRS[4]]
    place = PARAMS, CONFIG, case.method
    for found, pair in zip(scored(case, SPLIT, pairs), pairs, strict=True):
        alone = continuation_logprobs(
            *place, pair.context, pair.continuation, eviction=case.eviction, depth=case.depth
        )
        assert found.logprob == pytest.approx(float(alone.sum()), abs=tolerance(found.tokens))


def test_only_split_shows_what_decoding_prunes() -> None:
    griffin = Case("griffin", Griffin(0.5))
    assert_same(*(scored(case, SINGLE_PASS, PAIRS[:1]) for case in (griffin, DENSE)))
    pruned, dense = (scored(case, SPLIT, PAIRS[:1])[0] for case in (griffin, DENSE))
    assert abs(pruned.logprob - dense.logprob) > 0.01


def test_logits_made_in_pieces_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = every(DENSE, SINGLE_PASS)
    PREFILL_SCORES.clear()
    monkeypatch.setattr(single_pass, "_LOGITS", CONFIG.vocab_size * 8)
    assert_same(scored(DENSE, SINGLE_PASS, PAIRS), wanted)
    PREFILL_SCORES.clear()


def test_pairs_of_the_same_buckets_compile_nothing() -> None:
    for protocol in (SPLIT, SINGLE_PASS):
        scored(ONLINE, protocol, PAIRS[:1])
        before = PROGRAMS.compilations + PREFILL_SCORES.compilations
        scored(ONLINE, protocol, [Pair((5, 6, 7), (8, 9, 10, 11))])
        assert PROGRAMS.compilations + PREFILL_SCORES.compilations == before


@pytest.mark.parametrize("protocol", [SPLIT, SINGLE_PASS])
def test_scores_that_are_not_finite_are_an_error(protocol: str) -> None:
    params: dict[str, Any] = jax.tree.map(lambda leaf: leaf, PARAMS)
    params["final_norm"] = {"scale": PARAMS["final_norm"]["scale"] * np.float32(np.nan)}
    scorer = Scorer(params, CONFIG, DENSE, protocol)
    with pytest.raises(ValueError, match="a log-likelihood under dense is nan"):
        list(scorer.scores(PAIRS))


def test_what_a_protocol_cannot_show_is_refused() -> None:
    evicting = Case("evicting", eviction=LaProx(keep=0.5))
    with pytest.raises(ValueError, match="use the protocol split"):
        Scorer(PARAMS, CONFIG, evicting, SINGLE_PASS)
    with pytest.raises(ValueError, match="protocol 'spilt' is unknown: use one of single-pass"):
        Scorer(PARAMS, CONFIG, DENSE, "spilt")
    with pytest.raises(ValueError, match="batch_size 0 is below 1"):
        dataclasses.replace(Scorer(PARAMS, CONFIG), batch_size=0)


def test_rows_that_fit_alone_are_not_batched_beyond_the_context_length() -> None:
    config = dataclasses.replace(CONFIG, max_positions=20)
    long, short = tuple(PROMPTS[0][:3]), tuple(range(1, 17))
    pairs = [Pair(short, (4, 9)), Pair(long, tuple(range(1, 16)))]
    found = dict(Scorer(PARAMS, config, DENSE, SPLIT, 4).scores(pairs))
    assert [found[i].tokens for i in (0, 1)] == [2, 15]
