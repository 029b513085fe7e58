"""KVzip: its score against NumPy, its passes against one long prompt, budgets, compiles, errors."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popjax.cache import Kept, empty
from popjax.config import ModelConfig
from popjax.eviction import KVzip
from popjax.eviction.evict import choose
from popjax.eviction.kvzip import CONTINUATION, INSTRUCTION, QUERY_BLOCK, strongest
from popjax.eviction.method import AttentionActs, KvMethod, ShadowPass
from popjax.generate import PROGRAMS
from popjax.methods import Method
from popjax.nn.transformer import Inputs, Transformer
from popjax.prefilling import Prefill, after_eviction, after_listening, prefilled
from popjax.request import Request
from popjax.run import run
from tests.popjax.tiny_models import CONFIGS, logit_tolerance, random_params

EPS = float(np.finfo(np.float32).eps)
CONFIG = dataclasses.replace(CONFIGS["qwen3"], max_positions=256)
PARAMS = random_params(CONFIG)
LENGTHS = (21, 17, 5)
WORDS = {"instruction_ids": (3, 4), "continuation_ids": (5,), "postfix_ids": (6, 7)}
METHOD = KVzip(tokens=7, sinks=2, piece=8, pointer=3, **WORDS)


def prompts(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(8, CONFIG.vocab_size, n).tolist() for n in lengths]


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_the_strongest_attention_is_that_of_capped_scores(softcap: float | None) -> None:
    rng = np.random.default_rng(3)
    q, k = rng.standard_normal((1, 5, 4, 8)), rng.standard_normal((1, 2, 9, 8))
    places = jnp.arange(9, dtype=jnp.int32)[None, :]
    arrays = (jnp.asarray(q, jnp.float32), jnp.asarray(k, jnp.float32), places[:, 4:], places)
    found = strongest(*arrays, None, (0, 4), softcap)
    scores = np.einsum("tkgh,ksh->kgts", q[0].reshape(5, 2, 2, 8), k[0]) / np.sqrt(8)
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    seen = np.arange(9)[None, :] <= np.arange(4, 9)[:, None]
    weights = softmax(np.where(seen, scores, -np.inf))[..., :4]
    np.testing.assert_allclose(found[0], weights.max(axis=(1, 2)), rtol=1e-5)


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def oracle(q: np.ndarray, k: np.ndarray, sinks: int, first: int, end: int, n: int) -> np.ndarray:
    """KVzip's scores [K, end - first] of one row in float64, one query at a time.

    q [T, N, H]: queries of the pass's tokens, at positions n, n + 1, ...; k [n + T, K, H]: keys of
    the prompt of n tokens and of the pass.
    """
    T, N, H = q.shape
    K = k.shape[1]
    found = np.zeros((K, end - first))
    for t in range(T):
        seen = [*range(min(sinks, n)), *range(first, end), *range(n, n + t + 1)]
        places = [seen.index(position) for position in range(first, end)]
        for head in range(N):
            group = head // (N // K)
            weights = softmax(k[seen, group].astype(np.float64) @ q[t, head] / np.sqrt(H))
            found[group] = np.maximum(found[group], weights[places])
    return found


def listened(rows: Sequence[Sequence[int]]) -> tuple[Any, list[np.ndarray]]:
    """Outputs after the shadow passes and, a layer, scores [B, K, S]."""
    asked = Prefill(rows, CONFIG, Method(), METHOD)
    before = prefilled(PARAMS, asked, asked.inputs(), None)
    outputs = after_listening(PARAMS, asked, before)
    return outputs, [np.asarray(scores) for scores in outputs.seen]


@dataclasses.dataclass(frozen=True)
class Seen(KvMethod):
    """Observes queries and keys."""

    def observe(self, params: Any, layer: Any, acts: AttentionActs) -> Any:
        return acts.q, acts.k


@jax.jit
def plain(inputs: Inputs) -> Any:
    """What `Seen` observes of each layer for one plain prompt."""
    cache = empty(CONFIG, 1, inputs.tokens.shape[1], jnp.dtype("float32"))
    model = Transformer(CONFIG, Method(), eviction=Seen())
    out: Any = model.apply({"params": PARAMS}, inputs, cache, None, method="prefill")
    return out.seen


def projected(tokens: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Queries [T, N, H] and keys [T, K, H] of each layer for one plain prompt."""
    n = len(tokens)
    padded = np.zeros((1, 48), np.int32)
    padded[0, :n] = tokens
    places = np.where(np.arange(48) < n, np.arange(48), -1)[None].astype(np.int32)
    seen = plain(Inputs(jnp.asarray(padded), jnp.asarray(places)))
    return [(np.asarray(q[0, :n]), np.asarray(k[0, :, :n]).swapaxes(0, 1)) for q, k in seen]


def test_passes_score_as_one_long_prompt_would() -> None:
    method, sinks, rows = METHOD, METHOD.sinks, prompts()
    outputs, scores = listened(rows)
    T = int(outputs.cache.length)
    tolerance = 4 * logit_tolerance(CONFIG, np.ones(1))
    for row, prompt in enumerate(rows):
        n = len(prompt)
        for first in range(sinks, n, 8):
            end = min(first + 8, n)
            asked = list(method.instruction_ids)
            if first > sinks:
                asked = [*method.continuation_ids, *prompt[first - 3 : first]]
            said = [*asked, *method.postfix_ids, *prompt[first:end]]
            for layer, (q, k) in enumerate(projected([*prompt, *said])):
                want = oracle(q[n:], k, sinks, first, end, n)
                found = scores[layer][row, :, T - n + first : T - n + end]
                np.testing.assert_allclose(found, want, rtol=tolerance, atol=tolerance)
        spread = scores[0][row, :, T - n + sinks : T]
        assert spread.max() > 2 * spread.min()
    # What no piece covers scores nothing: pads, sinks, and the slots of the passes themselves.
    for layer in scores:
        assert not layer[:, :, T:].any()
        for row, prompt in enumerate(rows):
            assert not layer[row, :, : T - len(prompt) + sinks].any()


def test_passes_leave_the_cache_of_the_prompt_untouched() -> None:
    asked = Prefill(prompts(), CONFIG, Method(), METHOD)
    before = prefilled(PARAMS, asked, asked.inputs(), None)
    held = jax.tree.map(np.asarray, before.cache)
    after = after_listening(PARAMS, asked, before).cache
    T = int(held.length)
    assert int(after.length) == T
    np.testing.assert_array_equal(after.positions, held.positions)
    assert (np.asarray(after.positions)[:, T:] == -1).all()
    for old, new in zip(held.layers, after.layers, strict=True):
        np.testing.assert_array_equal(new.k[:, :, :T], old.k[:, :, :T])
        np.testing.assert_array_equal(new.v[:, :, :T], old.v[:, :, :T])


def random_acts(T: int, S: int, slot: int, length: int, seed: int) -> AttentionActs:
    """One row: a prompt of `length` before `slot`, then T queries of which two are pads."""
    rng = np.random.default_rng(seed)
    q, k = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((1, T, 4, 8), (1, 2, S, 8)))
    queries = np.where(np.arange(T) < 2, -1, length + np.arange(T) - 2).astype(np.int32)
    keys = np.full(S, -1, np.int32)
    keys[slot - length : slot] = np.arange(length)
    keys[slot : slot + T] = queries
    places = jnp.asarray(queries[None]), jnp.asarray(keys[None])
    return AttentionActs(jnp.zeros((1, T, 32)), q, k, k, *places, jnp.int32(slot))


def listen(method: KVzip, acts: AttentionActs, first: int, end: int) -> np.ndarray:
    span = (jnp.asarray([first], jnp.int32), jnp.asarray([end], jnp.int32))
    asked = ShadowPass(jnp.zeros_like(acts.query_positions), acts.query_positions, *span)
    return np.asarray(jax.jit(method.listen, static_argnums=(0, 1))(None, LAYER, acts, asked))


LAYER = CONFIG.layers[0]


@pytest.mark.parametrize("first, end", [(3, 13), (13, 16), (16, 16)])
def test_score_is_the_largest_weight_of_any_query_and_head(first: int, end: int) -> None:
    method = KVzip(sinks=3, piece=10, pointer=0, instruction_ids=(1, 2))
    acts = random_acts(T=14, S=40, slot=20, length=16, seed=1)
    found = listen(method, acts, first, end)[0]
    q, k = np.asarray(acts.q)[0, 2:], np.asarray(acts.k)[0].swapaxes(0, 1)
    # The row's keys in order of position: prompt, then the pass without its pads.
    keys = np.concatenate([k[4:20], k[22:34]])
    want = np.zeros_like(found)
    want[:, 4 + first : 4 + end] = oracle(q, keys, 3, first, end, 16)
    # Sums of H products and of at most 29 powers, each a few roundings.
    np.testing.assert_allclose(found, want, rtol=64 * EPS, atol=64 * EPS)


def test_a_key_that_no_token_attends_to_scores_nothing_and_a_sought_one_everything() -> None:
    acts = random_acts(T=14, S=40, slot=20, length=16, seed=2)
    q = jnp.abs(acts.q)
    k = acts.k.at[0, :, 9].set(-40.0).at[0, 0, 11].set(40.0)
    method = KVzip(sinks=0, piece=14, pointer=0)
    found = listen(method, dataclasses.replace(acts, q=q, k=k), 0, 14)[0]
    slots = found[:, 4:18]
    assert (slots[:, 5] < 1e-6).all()
    assert slots[0, 7] > 1 - 1e-6
    others = np.delete(slots[1], 5)
    assert (others > 1e-3).all()


def test_many_queries_are_blocked_and_give_the_same() -> None:
    T, S = QUERY_BLOCK + 37, 50
    rng = np.random.default_rng(3)
    q = jnp.asarray(rng.standard_normal((2, T, 4, 8)), jnp.float32)
    k = jnp.asarray(rng.standard_normal((2, 2, S, 8)), jnp.float32)
    places = jnp.broadcast_to(jnp.arange(S)[None] * 3, (2, S)).at[1, :9].set(-1)
    queries = jnp.broadcast_to(jnp.arange(T)[None], (2, T))
    found = np.asarray(strongest(q, k, queries, places, 60, (5, 45)))
    grouped = np.asarray(q).reshape(2, T, 2, 2, 8)
    scores = np.einsum("BTKGH,BKSH->BKGTS", grouped, np.asarray(k), dtype=np.float64) / np.sqrt(8)
    distance = np.asarray(queries)[:, :, None] - np.asarray(places)[:, None]
    seen = (distance >= 0) & (distance < 60) & (np.asarray(places) >= 0)[:, None]
    powers = np.where(seen[:, None, None], np.exp(scores), 0.0)
    totals = powers.sum(axis=-1, keepdims=True)
    weights = np.divide(powers, totals, out=np.zeros_like(powers), where=totals > 0)
    np.testing.assert_allclose(found, weights.max(axis=(2, 3))[..., 5:45], rtol=64 * EPS, atol=EPS)


def test_a_pass_holds_no_more_than_a_block_of_attention() -> None:
    T, S, N = 2048, 4100, 8
    shapes = ((1, T, N, 64), jnp.bfloat16), ((1, 2, S, 64), jnp.bfloat16)
    arrays = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    arrays += [jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (T, S)]
    run = jax.jit(strongest, static_argnums=(4, 5)).lower(*arrays, None, (4, 2004)).compile()
    block = N * QUERY_BLOCK * S * 4
    memory = run.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 3 * block < N * T * S * 4 / 2


@pytest.mark.parametrize("scope", ["global", "layer", "head"])
def test_exactly_the_budget_stays(scope: str) -> None:
    lengths, S = np.asarray((21, 17), np.int32), 24
    method = KVzip(tokens=6, scope=scope)
    places = np.maximum(np.arange(S)[None] - (S - lengths)[:, None], -1).astype(np.int32)
    rng = np.random.default_rng(6)
    # Of different sizes in each layer and head, with many ties.
    scores = [rng.integers(0, 4, (2, 2, S)) * rng.random((2, 2, 1)) for _ in CONFIG.layers]
    given = tuple(jnp.asarray(layer, jnp.float32) for layer in scores), jnp.asarray(places)
    static = {"method": method, "config": CONFIG, "align": 1}
    chosen = jax.jit(choose, static_argnames=tuple(static))
    for tokens in range(4, 22):
        budgets = np.minimum(tokens, lengths)
        counts = jnp.asarray(lengths), jnp.asarray(budgets, jnp.int32)
        keep, _, kept, _ = chosen(*given, *counts, **static)
        kept = np.asarray(kept)
        np.testing.assert_array_equal(kept.sum(axis=(0, 2)), 4 * budgets)
        if scope == "layer":
            np.testing.assert_array_equal(kept.sum(axis=2), np.tile(2 * budgets, (2, 1)))
            assert (kept >= 4 + (budgets - 4)[:, None] // 5).all()
        if scope == "head":
            np.testing.assert_array_equal(kept, np.broadcast_to(budgets[:, None], kept.shape))
        for layer in keep:
            held, sinks = np.asarray(layer), (places >= 0) & (places < 4)
            assert held.swapaxes(1, 2)[sinks].all()
            assert not held.swapaxes(1, 2)[places < 0].any()


def test_one_program_serves_all_pieces_and_prompts_and_chunks_change_nothing() -> None:
    before = PROGRAMS.evict.listen.compilations
    whole = stays(prompts())
    assert whole.lengths.sum(axis=(0, 2)).tolist() == [28, 28, 20]
    assert PROGRAMS.evict.listen.compilations <= before + 1
    total = PROGRAMS.compilations
    stays(prompts((19, 20, 5), seed=4))
    assert PROGRAMS.compilations == total
    chunked = stays(prompts(), chunk=8)
    np.testing.assert_array_equal(whole.lengths, chunked.lengths)
    np.testing.assert_array_equal(whole.positions, chunked.positions)


def stays(rows: Sequence[Sequence[int]], chunk: int | None = None) -> Kept:
    """What stays of prompts."""
    asked = Prefill(rows, CONFIG, Method(), METHOD, chunk=chunk)
    outputs = prefilled(PARAMS, asked, asked.inputs(), None)
    _, kept = after_eviction(PARAMS, asked, outputs)
    assert kept is not None
    return jax.tree.map(np.asarray, kept)


def test_everything_kept_runs_no_pass() -> None:
    asked = Prefill(prompts(), CONFIG, Method(), KVzip(keep=1.0, piece=9))
    assert asked.plan is None
    pooled = dataclasses.replace(asked, pooled=True).plan
    assert pooled is not None and pooled.shadow_slots(24) == 0


def test_words_become_ids() -> None:
    said: list[str] = []

    def encode(text: str) -> list[int]:
        said.append(text)
        return [len(text), 1]

    method = KVzip(keep=0.3).worded(encode, "<answer>")
    assert said == [INSTRUCTION, CONTINUATION, "<answer>"]
    assert method.keep == 0.3
    assert method.instruction_ids == (len(INSTRUCTION), 1)
    assert method.continuation_ids == (len(CONTINUATION), 1)
    assert method.postfix_ids == (8, 1)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"piece": 0}, "piece 0"),
        ({"sinks": -1}, "sinks -1"),
        ({"pointer": 1.5}, "pointer 1.5"),
        ({"scope": "all"}, "scope 'all'"),
        ({"floor": 1.5}, "floor 1.5"),
        ({"floor": float("nan")}, "floor nan"),
        ({"instruction_ids": [1]}, "instruction_ids"),
        ({"postfix_ids": (-1,)}, "postfix_ids"),
        ({"tokens": 3}, "tokens 3 is below the 4"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        KVzip(**options)


def test_what_the_model_cannot_serve_is_refused_before_compiling() -> None:
    foreign = KVzip(tokens=6, instruction_ids=(CONFIG.vocab_size,))
    short: ModelConfig = dataclasses.replace(CONFIG, max_positions=40)
    before = PROGRAMS.compilations
    with pytest.raises(ValueError, match="token id 97 outside 0..96"):
        run(PARAMS, CONFIG, Request(prompts(), 2, eviction=foreign))
    with pytest.raises(ValueError, match="21 tokens after the prompt of 21.*length of 40"):
        run(PARAMS, short, Request(prompts(), 2, eviction=KVzip(tokens=6, **WORDS)))
    assert PROGRAMS.compilations == before
