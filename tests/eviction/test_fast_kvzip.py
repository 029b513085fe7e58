"""Fast KVzip: the gate against its equations, the window, and what stays."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popjax.eviction import FastKVzip
from popjax.eviction.gates import with_gates
from popjax.generate import PROGRAMS, Options
from popjax.methods import Method
from popjax.prefilling import Prefill, after_eviction, prefilled
from popjax.request import Request
from popjax.run import run
from tests.eviction.tiny_gates import CONFIG, EPS, GATES, PARAMS, D, G, K, oracle, scored
from tests.popjax.tiny_models import PROMPTS

XLA = Options(implementation="xla")
GATED = with_gates(PARAMS, GATES)
METHOD = FastKVzip(tokens=6)


@pytest.mark.parametrize("twice", [False, True])
def test_gate_follows_its_equations(twice: bool) -> None:
    x = np.random.default_rng(1).standard_normal((3, 9, D)).astype(np.float32)
    found = np.asarray(scored(GATES[0], jnp.asarray(x), twice))
    want = np.stack([oracle(GATES[0], row, 1 + twice) for row in x]).swapaxes(1, 2)
    # Sums of D products, then of A, each with its roundings; logits of a few units.
    np.testing.assert_allclose(found, want, rtol=32 * math.sqrt(D) * EPS)
    assert want.max() > 2 * want.min()


@pytest.mark.parametrize("bias, score", [(60.0, 1.0), (-60.0, 0.0)])
def test_a_large_bias_decides_alone(bias: float, score: float) -> None:
    gate = GATES[0] | {"bias": jnp.full((K, G), bias)}
    x = jnp.asarray(np.random.default_rng(2).standard_normal((5, D)), jnp.float32)
    np.testing.assert_allclose(scored(gate, x), score, atol=1e-6)


def test_low_precision_inputs_meet_gates_of_another_dtype() -> None:
    x = jnp.asarray(np.random.default_rng(3).standard_normal((7, D)), jnp.bfloat16)
    rounded = scored(GATES[0], x)
    assert rounded.dtype == jnp.float32
    want = oracle(GATES[0], np.asarray(x.astype(jnp.float32))).T
    np.testing.assert_allclose(rounded, want, rtol=32 * math.sqrt(D) * EPS)


def test_prefill_scores_every_token_from_the_normed_input_in_chunks_or_whole() -> None:
    whole = Prefill(PROMPTS, CONFIG, Method(), METHOD)
    seen = prefilled(GATED, whole, whole.inputs(), None).seen
    embedded = np.asarray(PARAMS["embed"]["table"])[np.asarray(PROMPTS[1])]
    mean = (embedded.astype(np.float64) ** 2).mean(axis=-1, keepdims=True)
    x = embedded / np.sqrt(mean + CONFIG.norm_eps)
    x = (x * np.asarray(PARAMS["layer_0"]["attn_norm"]["scale"])).astype(np.float32)
    first = np.asarray(seen[0])[1, :, -len(x) :]
    np.testing.assert_allclose(first, oracle(GATES[0], x), rtol=64 * math.sqrt(D) * EPS)
    chunked = dataclasses.replace(whole, chunk=8)
    again = prefilled(GATED, chunked, chunked.inputs(), None).seen
    for one, other in zip(seen, again, strict=True):
        for row, prompt in enumerate(PROMPTS):
            pair = (np.asarray(x)[row, :, -len(prompt) :] for x in (one, other))
            np.testing.assert_allclose(*pair, rtol=1e3 * EPS)


@pytest.mark.parametrize(
    "window, length, recent",
    [(0, 40, 0), (0, 149, 2), (0, 15_999, 319), (0, 16_000, 4096), (7, 40, 7), (7, 16_000, 7)],
)
def test_window_follows_the_length(window: int, length: int, recent: int) -> None:
    method = FastKVzip(keep=1e-6, window=window)
    assert method.recent(length) == recent
    assert method.budget(length) == 4 + recent
    half = FastKVzip(keep=0.5, window=window).budget(length)
    assert half == max(math.floor(length / 2 + 0.5), 4 + recent)
    places = np.maximum(np.arange(-5, 16_000), -1)[None].astype(np.int32)
    protected = jax.jit(lambda *given: FastKVzip.protected(method, *given))
    kept = protected(jnp.asarray(places), jnp.asarray([length], jnp.int32))
    real = np.asarray(kept)[0, 5 : 5 + length]
    assert real.sum() == 4 + recent
    assert real[:4].all() and real[length - recent :].all()


def test_tokens_below_what_always_stays_are_refused() -> None:
    with pytest.raises(ValueError, match="tokens 256 is below the 4100 entries"):
        FastKVzip(tokens=256).budget(20_000)
    with pytest.raises(ValueError, match="tokens 3 is below the 4 entries"):
        FastKVzip(tokens=3)
    assert FastKVzip(tokens=256).budget(5_000) == 256
    assert FastKVzip(tokens=256).budget(3) == 3


def test_exactly_the_budget_stays_and_lengths_compile_nothing() -> None:
    lengths, positions, starts = stays(PROMPTS)
    assert lengths.sum(axis=(0, 2)).tolist() == [24, 24, 12]
    for start, length in zip(starts.flat, lengths.flat, strict=True):
        assert positions[start : start + min(length, 4)].tolist() == [0, 1, 2, 3][:length]
    compiled = PROGRAMS.compilations
    lengths, _, _ = stays([PROMPTS[1][:-1], (PROMPTS[0] * 2)[:20], PROMPTS[2]])
    assert lengths.sum(axis=(0, 2)).tolist() == [24, 24, 12]
    assert PROGRAMS.compilations == compiled


def stays(prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lengths, positions and starts of what stays of prompts."""
    asked = Prefill(prompts, CONFIG, Method(), METHOD)
    _, kept = after_eviction(GATED, asked, prefilled(GATED, asked, asked.inputs(), None))
    assert kept is not None
    return np.asarray(kept.lengths), np.asarray(kept.positions), np.asarray(kept.starts)


def test_the_entries_that_stay_are_those_with_the_highest_scores() -> None:
    asked = Prefill(PROMPTS, CONFIG, Method(), METHOD)
    outputs = prefilled(GATED, asked, asked.inputs(), None)
    n = len(PROMPTS[1])
    scores = np.stack([np.asarray(layer)[1, :, -n:] for layer in outputs.seen])
    _, kept = after_eviction(GATED, asked, outputs)
    assert kept is not None
    scores[:, :, :4] = np.inf
    order = np.argsort(-scores.reshape(-1), kind="stable")[: 6 * 4]
    want = np.zeros(scores.size, bool)
    want[order] = True
    places, starts = np.asarray(kept.positions), np.asarray(kept.starts)
    for (layer, head), chosen in zip(np.ndindex(2, K), want.reshape(-1, n), strict=True):
        first = starts[layer, 1, head]
        found = places[first : first + int(kept.lengths[layer, 1, head])]
        np.testing.assert_array_equal(np.sort(found), np.flatnonzero(chosen))


def test_parameters_without_gates_are_refused() -> None:
    with pytest.raises(ValueError, match="fast-kvzip needs gates.*with_gates"):
        run(PARAMS, CONFIG, Request(PROMPTS, 2, eviction=FastKVzip(tokens=6), options=XLA))
    with pytest.raises(ValueError, match="gates of 1 layers were given for a model of 2"):
        with_gates(PARAMS, GATES[:1])
