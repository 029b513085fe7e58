"""The core from tokens to tokens: buckets, padding, cached against uncached, ends, bad requests."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from popjax import cache as kv
from popjax.buckets import bucket, left_padded
from popjax.generate import PROGRAMS, Options
from popjax.methods import Frozen, Griffin, Method, OnlinePruning, RescoreAll
from popjax.nn.transformer import Transformer
from popjax.run import Request, run
from popjax.sampling import SamplingConfig
from popjax.sparsity import ChannelPartition
from tests.popjax.tiny_models import CONFIGS, PROMPTS, VOCAB, logit_tolerance, random_params

CONFIG = CONFIGS["llama"]
PARAMS = random_params(CONFIG)
FULL = Options(logprobs=True, logits=True)


@given(st.integers(1, 10**9))
def test_bucket_holds_its_length_with_little_to_spare(length: int) -> None:
    size = bucket(length)
    assert size >= length
    assert size == 16 or size < 1.5 * length
    assert bucket(size) == size
    power = 2 ** round(math.log2(size))
    assert size in (power, 3 * power // 4, 3 * power // 2)


def test_buckets_in_order() -> None:
    sizes = sorted({bucket(length) for length in range(1, 260)})
    assert sizes == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384]


PROMPT = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40)


@given(prompts=st.lists(PROMPT, min_size=1, max_size=4))
def test_padding_is_on_the_left_and_has_no_position(prompts: list[list[int]]) -> None:
    inputs = left_padded(prompts)
    tokens, positions = np.asarray(inputs.tokens), np.asarray(inputs.positions)
    assert tokens.shape == positions.shape == (len(prompts), bucket(max(map(len, prompts))))
    for row, prompt in enumerate(prompts):
        assert tokens[row, -len(prompt) :].tolist() == prompt
        assert positions[row, -len(prompt) :].tolist() == list(range(len(prompt)))
        assert (positions[row, : -len(prompt)] == -1).all()


@pytest.mark.parametrize(("prompts", "row"), [([], 0), ([[]], 0), ([[1], [], [2]], 1)])
def test_a_prompt_without_tokens_is_refused(prompts: list[list[int]], row: int) -> None:
    with pytest.raises(ValueError, match=f"prompt {row} has no tokens"):
        left_padded(prompts)


def uncached(family: str, rows: list[list[int]]) -> np.ndarray:
    """Logits [B, T, V] of whole rows in one pass, without pads."""
    config, params = CONFIGS[family], random_params(CONFIGS[family])
    inputs = left_padded(rows, len(rows[0]))
    cache = kv.empty(config, len(rows), len(rows[0]), jnp.dtype("float32"))
    model = Transformer(config, Method())

    def forward(params: Any) -> jax.Array:
        return model.apply({"params": params}, inputs, cache, None, True, method="prefill").logits

    return np.asarray(jax.jit(forward)(params))


@pytest.mark.parametrize("family", CONFIGS)
def test_cached_decoding_is_the_whole_sequence_in_one_pass(family: str) -> None:
    config = CONFIGS[family]
    result = run(random_params(config), config, Request(PROMPTS[:1], 12, options=FULL))
    text = PROMPTS[0] + result.tokens[0].tolist()
    whole = uncached(family, [text[:-1]])[0, len(PROMPTS[0]) - 1 :]
    assert result.logits is not None
    tolerance = logit_tolerance(config, whole)
    np.testing.assert_allclose(result.logits[0], whole, rtol=0, atol=tolerance)
    assert whole.argmax(axis=-1).tolist() == result.tokens[0].tolist()


def test_a_window_forgets_what_lies_before_it() -> None:
    """Two layers of window 5 see 8 positions back, so changing what lies before changes nothing."""
    changed = [[(token + 1) % VOCAB for token in PROMPTS[1][:11]] + PROMPTS[1][11:]]
    for family, forgets in (("mistral", True), ("llama", False)):
        one, other = uncached(family, PROMPTS[1:2]), uncached(family, changed)
        assert (one[0, -1] == other[0, -1]).all() == forgets


def test_logprobs_are_those_of_the_chosen_tokens_before_any_filter() -> None:
    sampling = SamplingConfig(do_sample=True, temperature=3.0, top_k=5, repetition_penalty=1.3)
    result = run(PARAMS, CONFIG, Request(PROMPTS, 8, sampling=sampling, options=FULL))
    assert result.logits is not None and result.logprobs is not None
    raw = result.logits.astype(np.float64)
    raw -= np.log(np.exp(raw).sum(axis=-1, keepdims=True))
    wanted = np.take_along_axis(raw, result.tokens[:, :, None], axis=-1)[:, :, 0]
    tolerance = logit_tolerance(CONFIG, result.logits)
    np.testing.assert_allclose(result.logprobs, wanted, rtol=0, atol=tolerance)


def test_a_row_ends_at_its_first_end_token_unless_it_is_too_short() -> None:
    free = run(PARAMS, CONFIG, Request(PROMPTS[:1], 12)).tokens[0].tolist()
    ends = (free[3], free[6])
    stopped = run(PARAMS, CONFIG, Request(PROMPTS[:1], 12, eos_ids=ends))
    first = min(free.index(end) for end in ends)
    assert stopped.tokens[0].tolist() == free[: first + 1]
    assert (stopped.counts.tolist(), stopped.stopped.tolist()) == ([first + 1], [True])
    assert stopped.steps == first + 1
    sampling = SamplingConfig(min_new_tokens=9)
    longer = run(PARAMS, CONFIG, Request(PROMPTS[:1], 12, eos_ids=ends, sampling=sampling))
    assert longer.counts[0] >= 10 or not longer.stopped[0]
    assert not set(ends) & set(longer.tokens[0, :9].tolist())


def test_a_penalty_counts_the_prompt_and_the_new_tokens() -> None:
    sampling = SamplingConfig(repetition_penalty=1e6)
    tokens = run(PARAMS, CONFIG, Request(PROMPTS[:1], 12, sampling=sampling)).tokens[0].tolist()
    assert len({*tokens, *PROMPTS[0]}) == len(tokens) + len(PROMPTS[0])


def test_a_listener_can_stop_rows() -> None:
    def stop_first(tokens: np.ndarray, done: np.ndarray) -> np.ndarray:
        return np.array([tokens.shape[1] >= 4, False, False])

    free = run(PARAMS, CONFIG, Request(PROMPTS, 12))
    result = run(PARAMS, CONFIG, Request(PROMPTS, 12, chunk=3, on_chunk=stop_first))
    assert (result.tokens[1:] == free.tokens[1:]).all()
    assert (result.tokens[0, :4] == free.tokens[0, :4]).all()


def test_one_token_needs_no_decode_step() -> None:
    wanted = run(PARAMS, CONFIG, Request(PROMPTS, 12)).tokens[:, :1]
    before = PROGRAMS.decode.compilations
    method = OnlinePruning(ratio=0.5, gamma=0.3, prefill="dense")
    options = Options(record_masks=True)
    result = run(PARAMS, CONFIG, Request(PROMPTS, 1, method=method, options=options))
    assert PROGRAMS.decode.compilations == before
    assert (result.tokens == wanted).all()
    assert result.masks is not None
    assert [mask.shape[0] for mask in result.masks] == [0, 0]


def test_phases_are_timed_apart() -> None:
    result = run(PARAMS, CONFIG, Request(PROMPTS, 12))
    assert set(result.seconds) == {"compile", "prefill", "evict", "plan", "pack", "decode"}
    assert all(seconds >= 0 for seconds in result.seconds.values())
    again = run(PARAMS, CONFIG, Request(PROMPTS, 12))
    assert again.seconds["compile"] == 0
    assert result.prompt_tokens == sum(map(len, PROMPTS))


def parts(retained: int = 20, candidate: int = 8, k_selected: int = 8) -> list[ChannelPartition]:
    end = retained + candidate
    indices = np.arange(end, dtype=np.int32)
    part = ChannelPartition(indices[:retained], indices[retained:], k_selected=k_selected)  # type: ignore[arg-type]
    return [part, part]


def test_a_partition_made_by_hand_prunes_any_method() -> None:
    """Channels that a hand-made partition leaves out are as good as zero."""
    params = dict(PARAMS)
    for i in range(2):
        mlp = dict(PARAMS[f"layer_{i}"]["mlp"])
        mlp["down"] = mlp["down"].at[28:].set(0)
        params[f"layer_{i}"] = {**PARAMS[f"layer_{i}"], "mlp": mlp}
    wanted = run(params, CONFIG, Request(PROMPTS, 8, options=FULL))
    method = Frozen(0.5)
    given = Request(PROMPTS, 8, method=method, partition=tuple(parts()), options=FULL)
    result = run(PARAMS, CONFIG, given)
    assert result.logits is not None and wanted.logits is not None
    tolerance = logit_tolerance(CONFIG, wanted.logits)
    np.testing.assert_allclose(result.logits, wanted.logits, rtol=0, atol=tolerance)
    assert result.tokens.tolist() == wanted.tokens.tolist()


def masks(steps: int = 7, rows: int = 3, width: int = 28, dtype: Any = bool) -> Any:
    return (np.ones((steps, rows, width), dtype),) * 2


GOOD = Request(PROMPTS, 8, method=OnlinePruning(ratio=0.5))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0 is not a whole number above 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens 2.5 is not a whole number"),
        ({"max_new_tokens": 45}, "20 tokens and 45 new ones .* context length of 64"),
        ({"prompts": [[1] * 57]}, "57 tokens and 8 new ones .* context length of 64"),
        ({"prompts": [[1], [VOCAB]]}, "prompt 1 has a token id outside 0..96"),
        ({"prompts": [[-1]]}, "prompt 0 has a token id outside 0..96"),
        ({"prompts": [[1], []]}, "prompt 1 has no tokens"),
        ({"prompts": []}, "prompt 0 has no tokens"),
        ({"seed": [1, 2]}, "2 seeds for 3 rows"),
        ({"seed": 0.5}, "seed 0.5 is not a whole number"),
        ({"sampling": SamplingConfig(min_new_tokens=9)}, "min_new_tokens 9 exceeds .* 8"),
        ({"method": OnlinePruning(model_ratio=0.9)}, "model_ratio 0.9 needs an FFN ratio"),
        ({"partition": tuple(parts()[:1])}, "partition has 1 layers, the model has 2"),
        ({"partition": tuple(parts(retained=45))}, "layer 0 names channel 48, outside 0..47"),
        ({"partition": tuple(parts(k_selected=9))}, "k_selected 9 of layer 0"),
        ({"partition": tuple(parts(k_selected=3)), "method": Griffin(0.5)}, "which Griffin cannot"),
        ({"masks": masks()}, "masks were given without a partition"),
        ({"partition": tuple(parts()), "masks": masks()[:1]}, "masks have 1 layers"),
        (
            {"partition": tuple(parts()), "masks": (*masks()[:1], *masks(steps=6)[1:])},
            r"layer 1 have shape \(6, 3, 28\), expected \(7, 3, 28\)",
        ),
        ({"partition": tuple(parts()), "masks": masks(rows=1)}, r"shape \(7, 1, 28\)"),
        ({"partition": tuple(parts()), "masks": masks(width=27)}, r"shape \(7, 3, 27\)"),
        ({"partition": tuple(parts()), "masks": masks(dtype=float)}, "float64 values: .* booleans"),
        (
            {
                "partition": tuple(parts(k_selected=3)),
                "masks": masks(),
                "options": Options(implementation="xla_gathered"),
            },
            r"\[28\] channels on, 'xla_gathered' needs 23",
        ),
    ],
)
def test_impossible_requests_are_refused_before_any_work(
    change: dict[str, Any], complaint: str
) -> None:
    before = PROGRAMS.compilations
    with pytest.raises(ValueError, match=complaint):
        run(PARAMS, CONFIG, dataclasses.replace(GOOD, **change))
    assert PROGRAMS.compilations == before


def test_an_unknown_implementation_is_refused() -> None:
    options = Options(implementation="fast")
    with pytest.raises(ValueError, match="implementation 'fast' is unknown"):
        run(PARAMS, CONFIG, dataclasses.replace(GOOD, options=options))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "method", [OnlinePruning(ratio=0.5), Frozen(0.5), Griffin(0.5), RescoreAll(0.5)], ids=str
)
def test_scores_that_are_not_finite_are_an_error_not_a_pattern(method: Method, bad: float) -> None:
    layer = PARAMS["layer_1"]
    up = layer["mlp"]["up"].at[3, 5].set(bad)
    params = {**PARAMS, "layer_1": {**layer, "mlp": {**layer["mlp"], "up": up}}}
    with pytest.raises(ValueError, match="not finite"):
        run(params, CONFIG, Request(PROMPTS[:1], 4, method=method))


def test_a_run_that_ended_early_replays_with_the_same_request() -> None:
    method, options = OnlinePruning(ratio=0.5), Options(record_masks=True)
    free = run(PARAMS, CONFIG, Request(PROMPTS[:1], 12, method=method)).tokens[0].tolist()
    asked = Request(PROMPTS[:1], 12, method=method, eos_ids=(free[5],), options=options)
    ended = run(PARAMS, CONFIG, asked)
    assert ended.steps < 12 and ended.masks is not None
    again = dataclasses.replace(asked, partition=ended.partition, masks=ended.masks)
    assert (run(PARAMS, CONFIG, again).tokens == ended.tokens).all()


@pytest.mark.parametrize(
    ("dtype", "implementation"),
    [("float32", "auto"), ("bfloat16", "auto"), ("float16", "xla")],
)
def test_every_dtype_of_weights_decodes(dtype: str, implementation: str) -> None:
    config = CONFIGS["llama"]
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), random_params(config))
    result = run(params, config, Request(PROMPTS, 6, options=Options(logits=True)))
    assert result.implementation == implementation
    assert result.logits is not None and np.isfinite(result.logits).all()
    again = run(params, config, Request(PROMPTS, 6, options=Options(implementation="xla")))
    assert (again.tokens[:, 0] == result.tokens[:, 0]).all()
