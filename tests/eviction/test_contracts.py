"""What every eviction method promises on every family, alone and beside FFN pruning.

One reference run a pair, looked at from all sides, as `tests/popjax/test_contracts.py` does for
channels. The yardstick of a compacted cache is the dense one with everything else masked out. What
an eviction does to rows, chunks and streams does not depend on what the newer families add, so
there one method speaks for all; each kind of method is held to that yardstick and to equality with
dense.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popjax.buckets import bucket
from popjax.config import ModelConfig
from popjax.eviction import KV_METHODS, KvMethod
from popjax.eviction.gates import init_gates, with_gates
from popjax.eviction.method import budgeted, reach, seen_later
from popjax.generate import PROGRAMS, Options
from popjax.methods import Method, OnlinePruning
from popjax.run import Request, RunResult, run
from tests.popjax.same_runs import assert_same, logits_of
from tests.popjax.tiny_models import (
    CONFIGS,
    NEWER,
    PROMPTS,
    VOCAB,
    logit_tolerance,
    random_params,
)

NEW, TOKENS = 9, 9
NEVER = (VOCAB,)
ONLINE = OnlinePruning(ratio=0.5, gamma=0.3, prefill="dense")
# Each kind of observation: last queries, all queries, none, a second pass, the attention's input.
KINDS = ("laprox", "h2o", "streaming-llm", "kvzip", "fast-kvzip")


LATER = ("qwen2_moe", *NEWER)


def pairs(
    quick: tuple[str, ...],
    newer: tuple[str, ...] = (),
    later: bool = False,
    others: tuple[str, ...] = (),
) -> list[Any]:
    """All methods on all families; slow ones repeat what quick ones show of another family.

    quick: what is quick on llama; others: on the families beside it; newer: on the later ones.
    later: on these one of each kind of observation, not one alone.
    """
    found = []
    for family in ("llama", "mistral", "qwen2", "qwen3", *LATER):
        for name in KV_METHODS:
            if family in LATER and name not in (KINDS if later else ("laprox",)):
                continue
            swift = newer if family in LATER else quick if family == "llama" else others
            slow = name not in swift
            found.append(pytest.param(family, name, marks=[pytest.mark.slow] if slow else []))
    return found


FEW = pairs(KINDS)
PAIRS = pairs(tuple(KV_METHODS), others=("laprox",))
WIDE, MASKED = (pairs(tuple(KV_METHODS), newer, later=True) for newer in ((), ("laprox",)))


def config_of(family: str) -> ModelConfig:
    """Two layers, which compete for a budget."""
    return CONFIGS[family]


@functools.cache
def params_of(family: str) -> Any:
    config = config_of(family)
    gates = init_gates(config, jax.random.key(1))
    return with_gates(random_params(config), gates)


def method_of(name: str, **changes: Any) -> KvMethod:
    kind = KV_METHODS[name]
    fields = {field.name for field in dataclasses.fields(kind)}
    settings = {"tokens": TOKENS, "window": 3, "sinks": 2, "pooling": 3}
    if name == "streaming-llm":
        settings["window"] = 0
    chosen = {key: value for key, value in settings.items() if key in fields} | changes
    return kind(**chosen)


def request(name: str | None, **changes: Any) -> Request:
    eviction = None if name is None else method_of(name)
    base = Request(PROMPTS, NEW, eos_ids=NEVER, options=Options(logits=True), eviction=eviction)
    return dataclasses.replace(base, **changes)


def ran(family: str, asked: Request) -> RunResult:
    return run(params_of(family), config_of(family), asked)


@functools.cache
def reference(family: str, name: str | None) -> RunResult:
    return ran(family, request(name))


def assert_same_run(family: str, result: RunResult, wanted: RunResult, rows: Any = ...) -> None:
    assert_same(config_of(family), result, wanted, rows)


def places(result: RunResult, row: int) -> list[list[list[int]]]:
    """Positions that stayed of a row, a list a layer and head."""
    kept = result.kept
    assert kept is not None
    starts, lengths, positions = (
        np.asarray(held) for held in (kept.starts, kept.lengths, kept.positions)
    )
    return [
        [
            positions[starts[i, row, k] : starts[i, row, k] + lengths[i, row, k]].tolist()
            for k in range(starts.shape[2])
        ]
        for i in range(starts.shape[0])
    ]


@pytest.mark.parametrize(("family", "name"), WIDE)
def test_keeping_everything_is_dense_bit_for_bit(family: str, name: str) -> None:
    changes = {"tokens": None, "keep": 1.0}
    result = ran(family, request(name, eviction=method_of(name, **changes)))
    dense = reference(family, None)
    assert (logits_of(result) == logits_of(dense)).all()
    assert (result.tokens == dense.tokens).all()
    assert result.kept is None


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_exactly_the_budget_stays_and_the_bytes_go(family: str, name: str) -> None:
    result, dense = reference(family, name), reference(family, None)
    config = config_of(family)
    shared = budgeted(config)
    for row, prompt in enumerate(PROMPTS):
        found = places(result, row)
        pairs = zip(found, shared, strict=True)
        total = sum(len(head) for layer, yes in pairs if yes for head in layer)
        heads = sum(y.num_kv_heads for y, yes in zip(config.layers, shared, strict=True) if yes)
        assert total == heads * min(TOKENS, seen_later(reach(config), len(prompt)))
        for layer, held, yes in zip(config.layers, found, shared, strict=True):
            for head in held:
                assert head == sorted(set(head))
                assert set(head) <= set(range(len(prompt)))
                if not yes:
                    first = len(prompt) - seen_later(layer.window, len(prompt))
                    assert head == list(range(first, len(prompt)))
    assert result.cache_bytes < dense.cache_bytes
    kept = result.kept
    assert kept is not None
    held = int(np.asarray(kept.lengths).sum())
    assert kept.entries.shape[0] <= max(16, 1.07 * held + 1)


@pytest.mark.parametrize(("family", "name"), MASKED)
def test_the_compacted_cache_answers_as_the_masked_one(family: str, name: str) -> None:
    """Entries that went are hidden from the dense cache, by a position that nobody sees."""
    from popjax.buckets import left_padded
    from popjax.nn.transformer import Inputs, Transformer

    result, config, params = reference(family, name), config_of(family), params_of(family)
    row = 1
    inputs = left_padded([PROMPTS[row]])
    T, room = inputs.tokens.shape[1], bucket(NEW)
    outputs = PROGRAMS.prefill(params, inputs, None, config=config, method=Method(), capacity=T)
    tokens = jnp.asarray(result.tokens[row : row + 1, : NEW - 1])
    steps = inputs.positions[:, -1:] + 1 + jnp.arange(NEW - 1, dtype=jnp.int32)[None, :]
    cache = _masked(outputs.cache, places(result, row), T, room)
    model = Transformer(config, Method())
    found: Any = model.apply(
        {"params": params}, Inputs(tokens, steps), cache, None, None, True, method="decode"
    )
    expected = logits_of(result)[row, 1:]
    tolerance = logit_tolerance(config, expected)
    np.testing.assert_allclose(np.asarray(found.logits)[0], expected, rtol=0, atol=tolerance)


def _masked(cache: Any, held: list[list[list[int]]], T: int, room: int) -> Any:
    """The dense cache as a pool that names every slot, those that went without a position."""
    from popjax.cache import Cache, Kept, LayerCache

    layers, heads, size = len(held), len(held[0]), cache.layers[0].k.shape[-1]
    slot_positions = np.asarray(cache.positions)[0]
    entries, positions = [], []
    for layer, kept in zip(cache.layers, held, strict=True):
        for k in range(heads):
            entries.append(jnp.concatenate([layer.k[0, k], layer.v[0, k]], axis=-1))
            positions.append(np.where(np.isin(slot_positions, kept[k]), slot_positions, -1))
    starts = jnp.arange(layers * heads, dtype=jnp.int32).reshape(layers, 1, heads) * T
    pool = Kept(
        jnp.concatenate(entries),
        jnp.asarray(np.concatenate(positions), jnp.int32),
        starts,
        jnp.full_like(starts, T),
    )
    empty = jnp.zeros((1, heads, room, size), jnp.float32)
    tails = tuple(LayerCache(empty, empty) for _ in range(layers))
    return Cache(tails, jnp.full((1, room), -1, jnp.int32), jnp.zeros((), jnp.int32), pool)


@pytest.mark.parametrize(("family", "name"), FEW)
def test_a_row_alone_is_the_row_of_the_batch(family: str, name: str) -> None:
    """Rows alone fit smaller buckets, so this is padded against unpadded too."""
    wanted = reference(family, name)
    for row in (0, 2):
        alone = ran(family, request(name, prompts=[PROMPTS[row]]))
        assert_same_run(family, alone, wanted, rows=[row])
        if alone.kept is not None:
            assert places(alone, 0) == places(wanted, row)


@pytest.mark.parametrize(("family", "name"), FEW)
def test_streamed_is_unstreamed(family: str, name: str) -> None:
    wanted = reference(family, name)
    result = ran(family, request(name, chunk=4, on_chunk=lambda _, done: np.zeros_like(done)))
    assert (logits_of(result) == logits_of(wanted)).all()


@pytest.mark.parametrize(("family", "name"), FEW)
def test_a_second_prompt_of_a_bucket_compiles_nothing(family: str, name: str) -> None:
    reference(family, name)
    before = PROGRAMS.compilations
    prompts = [[3] * 11, list(range(40, 60)), [44, 2, 9]]
    result = ran(family, request(name, prompts=prompts, seed=5))
    assert (PROGRAMS.compilations, result.compilations) == (before, 0)


@pytest.mark.parametrize(("family", "name"), FEW)
def test_chunks_change_nothing(family: str, name: str) -> None:
    wanted = reference(family, name)
    result = ran(family, request(name, prefill_chunk=8))
    assert [places(result, row) for row in range(3)] == [places(wanted, row) for row in range(3)]
    assert_same_run(family, result, wanted)


@pytest.mark.parametrize(("family", "name"), FEW)
def test_it_composes_with_channel_pruning(family: str, name: str) -> None:
    """The prompt runs dense, so the same entries stay; the masks recorded replay the run."""
    options = Options(logits=True, record_masks=True)
    both = ran(family, request(name, method=ONLINE, options=options))
    alone = reference(family, name)
    assert [places(both, row) for row in range(3)] == [places(alone, row) for row in range(3)]
    assert both.partition is not None and both.masks is not None
    again = request(
        name, method=ONLINE, options=options, partition=both.partition, masks=both.masks
    )
    assert_same_run(family, ran(family, again), both)
    assert (logits_of(both)[:, 1:] != logits_of(alone)[:, 1:]).any()
