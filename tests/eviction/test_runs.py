"""Contexts, chunks, bad input and reports of runs that evict, on tiny models."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import checkpoints
from popjax.buckets import left_padded
from popjax.context import VERSION, Context, load_context
from popjax.eviction import H2O, LaProx, SnapKV, StreamingLLM, kv_method_named
from popjax.fingerprint import fingerprint
from popjax.generate import PROGRAMS, Options
from popjax.methods import Frozen, Method, OnlinePruning
from popjax.nn.transformer import Inputs
from popjax.prefilling import make_context
from popjax.report import cache_reports
from popjax.run import Request, RunResult, run
from tests.popjax.tiny_models import CONFIGS, PROMPTS, VOCAB, logit_tolerance, random_params

CONFIG = CONFIGS["llama"]
PARAMS = random_params(CONFIG)
DOCUMENT, QUESTIONS = PROMPTS[1], [[5, 6, 7], [9, 1]]
EVICTION = LaProx(tokens=8, window=4)
NEW = 7


def ran(prompts: Any, **changes: Any) -> RunResult:
    asked = Request(prompts, NEW, eos_ids=(VOCAB,), options=Options(logits=True))
    return run(PARAMS, CONFIG, dataclasses.replace(asked, **changes))


def context(**changes: Any) -> Context:
    return make_context(PARAMS, CONFIG, Request([DOCUMENT], 1, **changes))


def assert_close(result: RunResult, wanted: RunResult) -> None:
    assert result.logits is not None and wanted.logits is not None
    tolerance = logit_tolerance(CONFIG, wanted.logits)
    np.testing.assert_allclose(result.logits, wanted.logits, rtol=0, atol=tolerance)
    assert result.tokens.tolist() == wanted.tokens.tolist()


def test_a_whole_context_answers_as_the_whole_prompt() -> None:
    wanted = ran([DOCUMENT + question for question in QUESTIONS])
    assert_close(ran(QUESTIONS, context=context()), wanted)


def test_one_context_serves_many_questions_and_is_held_once() -> None:
    held = context(eviction=EVICTION)
    together = ran(QUESTIONS, context=held)
    for row, question in enumerate(QUESTIONS):
        alone = ran([question], context=held)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
    assert together.kept is not None
    assert together.kept.entries is held.kept.entries
    found = cache_reports(together.kept, CONFIG, len(DOCUMENT))
    assert found is not None
    assert sum(layer.entries for layer in found) == 2 * 2 * 8  # layers, heads, tokens: not rows
    assert [layer.dense_entries for layer in found] == [2 * len(DOCUMENT)] * 2


def test_a_context_in_chunks_is_the_context() -> None:
    wanted = ran(QUESTIONS, context=context(eviction=EVICTION))
    assert_close(ran(QUESTIONS, context=context(eviction=EVICTION, prefill_chunk=8)), wanted)


def test_a_question_after_a_context_may_be_pruned_and_run_in_chunks() -> None:
    held, method = context(eviction=EVICTION), OnlinePruning(ratio=0.5, gamma=0.3, prefill="dense")
    long = [list(range(3, 33))]
    wanted = ran(long, context=held, method=method)
    assert wanted.partition is not None
    assert_close(ran(long, context=held, method=method, prefill_chunk=8), wanted)


def test_a_saved_context_answers_bit_for_bit(tmp_path: Path) -> None:
    held = context(eviction=EVICTION)
    path = held.save(tmp_path / "c.safetensors")
    again = load_context(path, CONFIG, fingerprint(PARAMS, CONFIG), jnp.dtype("float32"))
    assert (again.tokens, again.method) == (tuple(DOCUMENT), repr(EVICTION))
    first, second = (ran(QUESTIONS, context=each) for each in (held, again))
    assert first.logits is not None and second.logits is not None
    assert (first.logits == second.logits).all()
    with pytest.raises(checkpoints.CheckpointError, match="exists"):
        held.save(path)


def damaged(tmp_path: Path, how: str) -> Path:
    """A saved context with something wrong."""
    path, held = tmp_path / "c.safetensors", context(eviction=EVICTION)
    if how == "version":
        arrays = {"tokens": np.zeros(1, np.int32)}
        return checkpoints.save_bundle(path, "context", VERSION + "0", arrays, {})
    if how == "kind":
        return checkpoints.save_bundle(path, "gates", VERSION, {"a": np.zeros(1)}, {})
    if how == "range":
        lengths = held.kept.lengths.at[0, 0, 0].set(10_000)
        held = dataclasses.replace(held, kept=dataclasses.replace(held.kept, lengths=lengths))
    if how == "overflow":
        starts = held.kept.starts.at[0, 0, 0].set(2**31 - 16)
        lengths = held.kept.lengths.at[0, 0, 0].set(2**31 - 1)
        kept = dataclasses.replace(held.kept, starts=starts, lengths=lengths)
        held = dataclasses.replace(held, kept=kept)
    if how == "nan":
        entries = held.kept.entries.at[0, 0].set(jnp.nan)
        held = dataclasses.replace(held, kept=dataclasses.replace(held.kept, entries=entries))
    if how == "model":
        held = dataclasses.replace(held, fingerprint="0" * 32)
    if how == "arrays":
        about = {"fingerprint": held.fingerprint}
        arrays = {"tokens": np.zeros(1, np.int32)}
        return checkpoints.save_bundle(path, "context", VERSION, arrays, about)
    held.save(path)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    if how == "empty":
        path.write_bytes(b"")
    return path


@pytest.mark.parametrize(
    ("how", "words"),
    {
        "version": f"version '{VERSION}0'",
        "kind": "not a context",
        "range": "damaged",
        "overflow": "damaged",
        "nan": "not finite",
        "model": "another model",
        "arrays": "holds arrays",
        "truncated": "truncated",
        "empty": "empty",
        "missing": "not a file",
    }.items(),
)
def test_a_file_that_is_no_context_of_this_model(tmp_path: Path, how: str, words: str) -> None:
    path = tmp_path / "none" if how == "missing" else damaged(tmp_path, how)
    with pytest.raises(checkpoints.CheckpointError, match=words) as raised:
        load_context(path, CONFIG, fingerprint(PARAMS, CONFIG), jnp.dtype("float32"))
    assert "\n" not in str(raised.value)


def test_a_context_of_another_dtype_is_refused(tmp_path: Path) -> None:
    path = context(eviction=EVICTION).save(tmp_path / "c.safetensors")
    with pytest.raises(checkpoints.CheckpointError, match="bfloat16"):
        load_context(path, CONFIG, fingerprint(PARAMS, CONFIG), jnp.dtype("bfloat16"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tokens": 8}, "below the 32 entries"),
        ({"tokens": 0}, "whole number above 0"),
        ({"tokens": -5}, "whole number above 0"),
        ({"tokens": True}, "whole number above 0"),
        ({"tokens": 2.5}, "whole number above 0"),
        ({"keep": 0.0}, "outside 0..1"),
        ({"keep": -0.1}, "outside 0..1"),
        ({"keep": 1.01}, "outside 0..1"),
        ({"keep": float("nan")}, "outside 0..1"),
        ({"keep": "half"}, "outside 0..1"),
        ({"keep": 0.5, "tokens": 64}, "one of keep and tokens"),
        ({"keep": 0.5, "window": 0}, "window"),
        ({"tokens": np.float32(8)}, "whole number above 0"),
        ({"keep": 0.5, "pooling": 4}, "even"),
        ({"keep": 0.5, "values": "some"}, "unknown"),
        ({"keep": 0.5, "scope": "house"}, "unknown"),
    ],
)
def test_bad_settings_are_one_sentence(settings: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as raised:
        LaProx(**settings)
    assert "\n" not in str(raised.value)


def test_budgets_may_come_from_numpy() -> None:
    cases: list[tuple[dict[str, Any], int]] = [
        ({"tokens": np.int64(8)}, 8),
        ({"keep": np.float32(0.5)}, len(DOCUMENT) // 2),
    ]
    for budget, entries in cases:
        kept = ran([DOCUMENT], eviction=SnapKV(window=4, **budget)).kept
        assert kept is not None and (np.asarray(kept.lengths) == entries).all()


def test_a_budget_above_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="exceeds the model's context of 64"):
        ran([DOCUMENT], eviction=LaProx(tokens=65, window=4))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prefill_chunk": 0}, "prefill_chunk 0"),
        ({"prefill_chunk": 2, "eviction": EVICTION}, "below the window of 4"),
        ({"prefill_chunk": 8, "method": Frozen(0.5)}, "in one piece"),
        ({"prefill_chunk": 8, "method": OnlinePruning(ratio=0.5)}, "in one piece"),
        ({"eviction": "laprox"}, "not a KvMethod"),
    ],
)
def test_what_cannot_be_done_is_refused(changes: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ran([DOCUMENT], **changes)


def test_a_context_is_not_evicted_again() -> None:
    with pytest.raises(ValueError, match="has been evicted"):
        ran(QUESTIONS, context=context(eviction=EVICTION), eviction=EVICTION)


def test_a_context_counts_towards_the_models_length() -> None:
    long = Request([DOCUMENT], 1)
    held = make_context(PARAMS, CONFIG, long)
    with pytest.raises(ValueError, match="maximum context length of 64"):
        ran([[1] * 38], context=held)


def test_layers_of_other_shapes_cannot_share_a_pool() -> None:
    other = dataclasses.replace(CONFIG.layers[0], num_kv_heads=4)
    config = dataclasses.replace(CONFIG, layers=(CONFIG.layers[0], other))
    with pytest.raises(ValueError, match="one pair for all"):
        run(random_params(config), config, Request([DOCUMENT], 2, eviction=EVICTION))


def test_scores_that_are_not_finite_are_named() -> None:
    params = {**PARAMS, "layer_1": {**PARAMS["layer_1"]}}
    attn = params["layer_1"]["attn"]
    params["layer_1"]["attn"] = {**attn, "v": attn["v"] * jnp.float32(jnp.inf)}
    with pytest.raises(ValueError, match="layers \\[1\\] are not finite"):
        run(params, CONFIG, Request([DOCUMENT], 2, eviction=EVICTION))


def test_a_row_within_the_budget_stays_whole_beside_one_that_is_cut() -> None:
    result = ran([DOCUMENT, DOCUMENT[:6]], eviction=SnapKV(tokens=8, window=4))
    assert result.kept is not None
    assert np.asarray(result.kept.lengths)[:, 1].tolist() == [[6, 6], [6, 6]]


def test_streaming_keeps_the_first_and_the_last() -> None:
    result = ran([DOCUMENT], eviction=StreamingLLM(tokens=8))
    kept = result.kept
    assert kept is not None
    n = len(DOCUMENT)
    start = int(kept.starts[0, 0, 0])
    assert np.asarray(kept.positions)[start : start + 8].tolist() == [
        0, 1, 2, 3, n - 4, n - 3, n - 2, n - 1,
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["laprox", "streaming-llm", "criticalkv"])
def test_a_cache_is_cut_again_while_decoding(name: str) -> None:
    """Longer than the prompt's own eviction alone would allow, and never above the budget."""
    window = 0 if name == "streaming-llm" else 4
    method = kv_method_named(name, tokens=8, window=window)
    prompts, new = [DOCUMENT, DOCUMENT[:11]], 30
    options = Options(logits=True)
    asked = Request(prompts, new, eos_ids=(VOCAB,), options=options, eviction=method)
    result = run(PARAMS, CONFIG, dataclasses.replace(asked, evict_every=6))
    kept = result.kept
    assert kept is not None
    lengths, positions = np.asarray(kept.lengths), np.asarray(kept.positions)
    assert (lengths.sum(axis=(0, 2)) == 2 * 2 * 8).all()
    # 29 tokens were fed, the last cut came after 24 of them: entries of new tokens are among them.
    start = int(kept.starts[0, 0, 0])
    held = positions[start : start + lengths[0, 0, 0]]
    assert held.max() == len(DOCUMENT) + 23
    once = run(PARAMS, CONFIG, asked)
    assert result.tokens[:, :7].tolist() == once.tokens[:, :7].tolist()
    assert result.tokens.tolist() != once.tokens.tolist()
    streamed = dataclasses.replace(asked, evict_every=6, chunk=4)
    heard = dataclasses.replace(streamed, on_chunk=lambda _, done: np.zeros_like(done))
    assert run(PARAMS, CONFIG, heard).tokens.tolist() == result.tokens.tolist()


def test_a_budget_that_nothing_exceeds_changes_nothing_while_decoding() -> None:
    """Entries move to a pool and lose nothing: logits are those of the dense run."""
    dense = ran([DOCUMENT], max_new_tokens=20)
    moved = ran([DOCUMENT], max_new_tokens=20, eviction=LaProx(tokens=60, window=4), evict_every=6)
    assert moved.kept is not None
    assert_close(moved, dense)


@pytest.mark.parametrize("tokens", [8, 14])
def test_entries_are_counted_against_all_that_competed(tokens: int) -> None:
    """Tokens decoded before the last cut may be among what stays, so they are counted too."""
    prompts, new = [DOCUMENT[:11], DOCUMENT[:2]], 30
    asked = Request(prompts, new, eos_ids=(VOCAB,), eviction=SnapKV(tokens=tokens, window=4))
    result = run(PARAMS, CONFIG, dataclasses.replace(asked, evict_every=6))
    assert result.pooled_tokens == 11 + 2 + 2 * 24
    found = cache_reports(result.kept, CONFIG, result.pooled_tokens)
    assert found is not None
    assert all(layer.entries == 2 * 2 * tokens < layer.dense_entries for layer in found)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"evict_every": 0, "eviction": EVICTION}, "kv_every 0"),
        ({"evict_every": 2, "eviction": EVICTION}, "below the window"),
        ({"evict_every": 8, "eviction": LaProx(keep=0.5, window=4)}, "budget in tokens"),
        ({"evict_every": 8}, "budget in tokens"),
        ({"evict_every": 8, "eviction": H2O(tokens=8, window=4)}, "cannot evict while decoding"),
    ],
)
def test_what_cannot_be_repeated_is_refused(changes: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ran([DOCUMENT], **changes)


def test_a_chunk_holds_less_than_the_whole_prompt() -> None:
    """Beside the cache a chunk holds its own activations, not the prompt's."""
    config = dataclasses.replace(CONFIG, max_positions=1024)
    params, static = random_params(config), {"config": config, "method": Method()}
    whole = left_padded([[3] * 512])
    first = Inputs(whole.tokens[:, :64], whole.positions[:, :64])
    begun = PROGRAMS.prefill(params, first, None, **static, capacity=512)
    piece = PROGRAMS.extend.compiled(begun, params, first, None, None, **static)
    at_once = PROGRAMS.prefill.compiled(params, whole, None, **static, capacity=512)
    sizes = [program.memory_analysis().temp_size_in_bytes for program in (piece, at_once)]
    assert sizes[0] <= sizes[1] / 4
