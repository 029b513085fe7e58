"""The TPU kernel that scores cached keys, interpreted: right, without races, frugal with bytes.

Whether it compiles for a TPU is tests/aot/test_kv_score.py.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.kv_score import Rule, kv_score, tpu
from tests.kernels.test_kv_score import Problem, agrees, oracle, problem

# B, W, K, G, H, S: heads kept by columns and by rows, windows of one and of many tiles, one head a
# KV head and five, a last block that is partial and one that is not.
CASES = [
    ((2, 3, 2, 3, 16, 300), "float32", Rule("l2", "projected")),
    ((1, 33, 1, 5, 64, 1100), "bfloat16", Rule("l2", "projected", "literal", softcap=3.0)),
    ((1, 1, 3, 1, 128, 1024), "bfloat16", Rule("mean", "norm", window=90)),
    ((1, 64, 2, 2, 128, 40), "float32", Rule("mean", "projected", "literal", 20, 5.0)),
    ((2, 8, 1, 2, 256, 128), "bfloat16", Rule()),
]
# B, W, N, K, H.
MODELS = {
    "SmolLM2-135M": (1, 32, 9, 3, 64),
    "Llama-3.1-8B": (1, 32, 32, 8, 128),
    "Llama-3.1-70B": (1, 32, 64, 8, 128),
    "batch": (4, 32, 32, 8, 128),
}
RULE = Rule("l2", "projected")
WORST = 1.05


@pytest.mark.parametrize(("sizes", "dtype", "rule"), CASES)
def test_the_interpreted_kernel_is_float64(sizes: Any, dtype: str, rule: Rule) -> None:
    agrees(problem(0, sizes, dtype, rule), "pallas_interpret")


@pytest.mark.parametrize(
    ("H", "values"),
    [
        (16, "projected"),  # by columns
        (128, "none"),  # by rows
        *(pytest.param(*c, marks=pytest.mark.slow) for c in ((16, "none"), (128, "projected"))),
    ],
)
def test_no_race_and_nothing_read_that_was_not_written(
    H: int, values: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As on a TPU: copies arrive when waited for, fresh memory holds NaN."""
    monkeypatch.setattr(tpu, "_BLOCKS", (128,))
    p = spoilt(problem(1, (2, 3, 2, 2, H, 300), "float32", Rule("l2", values)))
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    arrays = (p.q, p.k, p.v, p.query_positions, p.key_positions, p.gram)
    found = np.asarray(tpu.kv_score(*arrays, p.rule, interpret=params), np.float64)
    wanted, allowed = oracle(dataclasses.replace(p, k=clean(p.k), v=clean(p.v)))
    assert (np.abs(found - wanted) <= allowed).all()
    assert "RACE" not in "".join(capfd.readouterr())


def test_what_lies_beyond_the_last_key_is_not_seen() -> None:
    """There an interpreter finds no position, but a TPU whatever it may."""
    how = dataclasses.replace(cut("SmolLM2-135M", 300), block=128)
    at, keys = jnp.zeros((32, 1), jnp.int32), jnp.zeros((1, 128), jnp.int32)
    for i, there in enumerate((128, 128, 44)):
        seen = np.asarray(tpu._seen(how, at, keys, jnp.int32(i)))
        assert seen[:, :there].all() and not seen[:, there:].any()


def spoilt(p: Problem) -> Problem:
    """NaN in every empty slot."""
    empty = (p.key_positions < 0)[:, None, :, None]
    k, v = (jnp.where(empty, jnp.nan, x) for x in (p.k, p.v))
    return dataclasses.replace(p, k=k, v=v)


def clean(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(x), 0.0, x)


def cut(model: str, S: int, rule: Rule = RULE) -> tpu.Cut:
    B, W, N, K, H = MODELS[model]
    q, k = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((B, W, N, H), (B, K, S, H)))
    return tpu.cut(q, k, rule)


def moved(how: tpu.Cut, spec: Any, itemsize: int) -> int:
    """Bytes that the pipeline copies: a block whenever the index map moves on, cut at the end."""
    last, total = None, 0
    for b in range(how.B):
        for sweep in range(2):
            for i in range(how.steps):
                place = spec.index_map(b, sweep, i)
                if place != last:
                    ends = min(how.block, how.S - max(place) * how.block)
                    total += math.prod(spec.block_shape) // how.block * ends * itemsize
                last = place
    return total


@pytest.mark.parametrize("S", [8192, 131072, 100_000])
@pytest.mark.parametrize("model", MODELS)
def test_keys_are_read_twice_and_values_once(model: str, S: int) -> None:
    how = cut(model, S)
    cache, scores = how.B * how.K * S * how.H * 2, how.B * how.K * S * 4
    read = moved(how, how.keys(), 2) + moved(how, how.values(), 2)
    written, places = moved(how, how.scores(), 4), moved(how, how.places(), 4)
    assert cache * 3 <= read and written == scores
    assert read + places + written <= WORST * (3 * cache + scores)
    grams = how.K * how.G * how.H**2 * 4
    assert how.cost().bytes_accessed == read + places + written + grams


def test_values_that_do_not_count_are_not_read() -> None:
    how, S = cut("Llama-3.1-8B", 8192, Rule()), 8192
    assert how.cost().bytes_accessed == how.K * S * (2 * how.H * 2 + 4) + 2 * S * 4
    p = problem(2, (1, 2, 1, 1, 128, 256), "float32", Rule())
    arrays = (p.q, p.k, p.v, p.query_positions, p.key_positions)
    program = jax.make_jaxpr(functools.partial(tpu.kv_score, gram=None, rule=Rule()))(*arrays)
    (kernel,) = [e for e in program.eqns if e.primitive.name == "pallas_call"]
    q, _, places, k = (x.aval.shape for x in kernel.invars)
    assert (q, places, k) == ((1, 1, 8, 128), (1, 1, 256), p.k.shape)


@pytest.mark.parametrize("model", MODELS)
def test_the_cost_estimate_counts_products_and_exponentials(model: str) -> None:
    B, W, N, _, H = MODELS[model]
    cost = cut(model, 8192).cost()
    assert cost.flops == B * N * 8192 * (2 * 2 * W * H + 2 * H * H)
    assert cost.transcendentals == 2 * B * N * W * 8192


@pytest.mark.parametrize(
    ("W", "H", "dtype", "message"),
    [
        (2, 8, "float16", "the keys are float16, and it reads bfloat16 and float32: use 'xla'"),
        (2, 12, "float32", "H = 12 is no multiple of 8: use 'xla'"),
        (20_000, 8, "float32", "W=20000 queries of N=2 heads on K=1, H=8 hold .* bytes of VMEM"),
    ],
)
def test_what_it_cannot_serve_is_said(W: int, H: int, dtype: str, message: str) -> None:
    shapes = ((1, W, 2, H), (1, 1, 9, H), (1, 1, 9, H))
    floats = [jnp.zeros(shape, jnp.dtype(dtype)) for shape in shapes]
    places = [jnp.zeros((1, n), jnp.int32) for n in (W, 9)]
    with pytest.raises(ValueError, match=message):
        kv_score(*floats, *places, implementation="pallas_interpret")
