"""Scores of cached keys: the reference and the blocks of XLA against NumPy in float64.

Leaves out the TPU kernel (test_kv_score_tpu.py).
"""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.kv_score import COLUMNS, GROUPS, VALUES, Rule, kv_score, reference, xla

EPS = 2.0**-23
# The square of a smaller weight is no float32.
LOST = 1e-18


@dataclasses.dataclass
class Problem:
    q: jax.Array
    k: jax.Array
    v: jax.Array
    query_positions: jax.Array
    key_positions: jax.Array
    gram: jax.Array
    rule: Rule

    def score(self, implementation: str) -> np.ndarray:
        """The public function, but `reference`, which it does not offer."""
        arrays = [self.q, self.k, self.v, self.query_positions, self.key_positions]
        if implementation == "reference":
            run: Any = functools.partial(reference.kv_score, rule=self.rule)
        else:
            options = dataclasses.asdict(self.rule) | {"implementation": implementation}
            run = functools.partial(kv_score, **options)
        found = jax.jit(run)(*arrays, gram=self.gram)
        assert found.dtype == jnp.float32 and found.shape == self.k.shape[:3]
        return np.asarray(found, np.float64)


def problem(seed: int, sizes: tuple[int, ...], dtype: str, rule: Rule) -> Problem:
    """Rows with keys in any order and some empty slots, and windows that may begin with padding."""
    rng, (B, W, K, G, H, S) = np.random.default_rng(seed), sizes
    N = K * G
    q, k, v = (
        jnp.asarray(rng.standard_normal(shape), jnp.dtype(dtype))
        for shape in ((B, W, N, H), (B, K, S, H), (B, K, S, H))
    )
    keys = np.stack([rng.permutation(S) for _ in range(B)]).reshape(B, S)
    keys[rng.random((B, S)) < 0.2] = -1
    last = rng.integers(0, S + 2, (B, 1))
    queries = np.maximum(last - np.arange(W)[::-1], -1)
    o = rng.standard_normal((N, H, max(H // 2, 1))) / np.sqrt(H)  # a Gram matrix may lack rank
    gram = jnp.asarray(o @ o.transpose(0, 2, 1), jnp.float32)
    places = jnp.asarray(queries, jnp.int32), jnp.asarray(keys, jnp.int32)
    return Problem(q, k, v, *places, gram, rule)


def oracle(p: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Scores [B, K, S], one query head after the other, and what rounding may change in them."""
    q, k, v, gram = (np.asarray(a, np.float64) for a in (p.q, p.k, p.v, p.gram))
    (B, W, N, H), (K, S), rule = q.shape, k.shape[1:3], p.rule
    scores, errors = np.zeros((B, K, S)), np.zeros((B, K, S))
    for b in range(B):
        at, keys = np.asarray(p.query_positions)[b][:, None], np.asarray(p.key_positions)[b]
        seen = (at >= 0) & (keys >= 0) & (keys <= at) & (at - keys < (rule.window or np.inf))
        count = max(int((at >= 0).sum()), 1) if rule.columns == "mean" else 1
        for j in range(K):
            heads = range(j * N // K, (j + 1) * N // K)
            A = [softmax(q[b, :, n] @ k[b, j].T / np.sqrt(H), seen, rule) for n in heads]
            norms = [lengths(v[b, j], gram[n], rule) for n in heads]
            size = abs(q[b]).max() * np.sqrt(H) * abs(k[b, j]).max()
            relative = (2 * (H + 8) * size + S + W + N + 32) * EPS
            if rule.group == "literal":
                A, norms = [np.mean(A, 0)], [np.mean(norms, 0)]
            form = np.linalg.norm if rule.columns == "l2" else np.sum
            columns = np.stack([form(a, axis=0) / count for a in A])
            (value, error) = np.stack(norms, 1)
            scores[b, j] = (columns * value).mean(0)
            allowed = (columns * relative + LOST) * (value + error) + columns * error
            errors[b, j] = np.where(seen.any(0), allowed.mean(0), 0)
    return scores, errors


def softmax(scores: np.ndarray, seen: np.ndarray, rule: Rule) -> np.ndarray:
    if rule.softcap is not None:
        scores = rule.softcap * np.tanh(scores / rule.softcap)
    weights = np.where(seen, np.exp(scores), 0)
    total = weights.sum(1, keepdims=True)
    return weights / np.where(total > 0, total, 1)


def lengths(v: np.ndarray, gram: np.ndarray, rule: Rule) -> np.ndarray:
    """Norms of the values [S], and the rounding of each [2, S]."""
    if rule.values == "none":
        return np.stack([np.ones(len(v)), np.zeros(len(v))])
    gram = np.eye(len(gram)) if rule.values == "norm" else gram
    square = np.maximum(np.einsum("sh,hi,si->s", v, gram, v), 0)
    off = 2 * (len(gram) + 4) * EPS * np.einsum("sh,hi,si->s", abs(v), abs(gram), abs(v))
    error = np.minimum(np.sqrt(off), off / np.maximum(np.sqrt(square), 1e-300))
    return np.stack([np.sqrt(square), error])


def agrees(p: Problem, implementation: str) -> None:
    wanted, allowed = oracle(p)
    error = np.abs(p.score(implementation) - wanted)
    assert (error <= allowed).all(), (p.rule, (error - allowed).max())


rules = st.builds(
    Rule,
    columns=st.sampled_from(COLUMNS),
    values=st.sampled_from(VALUES),
    group=st.sampled_from(GROUPS),
    window=st.one_of(st.none(), st.integers(1, 300)),
    softcap=st.one_of(st.none(), st.sampled_from([0.5, 30.0])),
)


@st.composite
def problems(draw: Any, keys: tuple[int, ...] = (33, 128, 300, 701)) -> Problem:
    sizes = [st.integers(1, 2), st.sampled_from([1, 2, 7, 32, 64]), st.integers(1, 3)]
    B, W, K, G = (draw(size) for size in [*sizes, st.integers(1, 4)])
    H, S = draw(st.sampled_from([1, 3, 16, 64])), draw(st.sampled_from([1, 2, 9, *keys]))
    dtype = draw(st.sampled_from(["float32", "bfloat16"]))
    seed = draw(st.integers(0, 2**32 - 1))
    return problem(seed, (B, W, K, G, H, S), dtype, draw(rules))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@settings(max_examples=10)
@given(problem=problems())
def test_scores_are_those_of_float64(implementation: str, problem: Problem) -> None:
    agrees(problem, implementation)


@pytest.mark.parametrize("rule", [Rule(), Rule("mean", "projected", "literal", 150, 5.0)])
@pytest.mark.parametrize("S", [127, 129, 256, 700])
def test_many_blocks_are_one_sum(S: int, rule: Rule) -> None:
    assert xla.block_keys(64, S, 1) == min(S, 128)
    p = problem(0, (2, 5, 2, 3, 8, S), "float32", rule)
    wanted, allowed = oracle(p)
    arrays = (p.q, p.k, p.v, p.query_positions, p.key_positions, p.gram)
    small: Any = functools.partial(xla.kv_score, rule=rule, block_values=1)
    found = jax.jit(small)(*arrays)
    assert (np.abs(np.asarray(found, np.float64) - wanted) <= allowed).all()


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_no_number_in_an_empty_slot_does_not_matter_and_elsewhere_shows(
    implementation: str,
) -> None:
    p = problem(1, (2, 4, 2, 2, 8, 300), "float32", Rule("l2", "projected"))
    empty = (p.key_positions < 0)[:, None, :, None]
    k, v = (jnp.where(empty, jnp.nan, x) for x in (p.k, p.v))
    plain, spoilt = p.score(implementation), dataclasses.replace(p, k=k, v=v)
    assert bool(empty.any()) and (spoilt.score(implementation) == plain).all()
    all_spoilt = dataclasses.replace(p, v=jnp.full_like(v, jnp.nan)).score(implementation)
    assert (np.isnan(all_spoilt) == (plain > 0)).all()


@pytest.mark.parametrize("implementation", ["xla", "pallas_interpret"])
@pytest.mark.parametrize(("W", "S"), [(0, 5), (3, 0)])
def test_without_queries_or_keys_there_is_nothing_to_score(
    W: int, S: int, implementation: str
) -> None:
    p = problem(2, (1, W, 2, 1, 8, S), "float32", Rule("mean", "norm"))
    assert not p.score(implementation).any()


def test_names_without_a_kernel_of_their_own_are_xla() -> None:
    p = problem(3, (1, 3, 2, 2, 8, 200), "bfloat16", Rule())
    arrays = (p.q, p.k, p.v, p.query_positions, p.key_positions)
    texts = set()
    for name in ("xla", "xla_gathered", "native", "auto", "pallas_gpu"):
        run = jax.jit(functools.partial(kv_score, implementation=name))
        texts.add(re.sub("partial|kv_score", "", run.lower(*arrays).as_text()))
    assert len(texts) == 1


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_temporaries_are_a_few_blocks(values: str, dtype: str) -> None:
    """At the shapes of Llama-3.1-8B, where a copy of the keys would be 256 MB."""
    W, N, K, H, S = 32, 32, 8, 128, 131072
    float_, int_ = jnp.dtype(dtype), jnp.int32
    cache = jax.ShapeDtypeStruct((1, K, S, H), float_)
    places = (jax.ShapeDtypeStruct((1, n), int_) for n in (W, S))
    arrays = [jax.ShapeDtypeStruct((1, W, N, H), float_), cache, cache, *places]
    gram = jax.ShapeDtypeStruct((N, H, H), jnp.float32)
    run = jax.jit(lambda g, *a: kv_score(*a, gram=g, values=values))
    memory: Any = run.lower(gram, *arrays).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 4 * 4 * xla.BLOCK_VALUES + K * S * 4


# What to change of a good call, and what the error says.
BAD: list[tuple[dict[str, Any], str]] = [
    ({"columns": "max"}, "columns 'max' is unknown: use one of"),
    ({"values": "l1"}, "values 'l1' is unknown"),
    ({"group": "sum"}, "group 'sum' is unknown"),
    ({"implementation": "cuda"}, "implementation 'cuda' is unknown"),
    ({"values": "projected", "gram": None}, r"needs gram \[N,H,H\]"),
    ({"window": 0}, "window is 0, the least is 1"),
    ({"softcap": 0.0}, "softcap is 0.0, not above 0"),
    ({"softcap": float("nan")}, "softcap is nan, not above 0"),
    ({"q": (1, 2, 4)}, r"needs q \[B,W,N,H\] and k, v \[B,K,S,H\], got \(1, 2, 4\)"),
    ({"v": (1, 2, 9, 4)}, r"\(1, 2, 9, 8\), \(1, 2, 9, 4\)"),
    ({"q": (3, 2, 4, 8)}, "q has B=3, H=8, but k has B=1, H=8"),
    ({"q": (1, 2, 4, 6)}, "q has B=1, H=6, but k has B=1, H=8"),
    ({"q": (1, 2, 3, 8)}, "N a multiple of K, got H=8, N=3, K=2"),
    ({"q": jnp.zeros((1, 2, 4, 8), jnp.bfloat16)}, "one float dtype, got bfloat16, float32"),
    ({"query_positions": (1, 3)}, r"\[B,W\]=\(1, 2\) and \[B,S\]=\(1, 9\), got \(1, 3\)"),
    ({"key_positions": (2, 9)}, r"got \(1, 2\), \(2, 9\)"),
    ({"query_positions": jnp.zeros((1, 2))}, "integer positions, got float32, int32"),
    ({"gram": (4, 8, 7)}, r"gram \[N,H,H\]=\(4, 8, 8\) float32, got \(4, 8, 7\)"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_what_does_not_fit_is_said(change: dict[str, Any], message: str) -> None:
    ints = {name: jnp.zeros(s, jnp.int32) for name, s in (("query_", (1, 2)), ("key_", (1, 9)))}
    good: dict[str, Any] = {f"{name}positions": array for name, array in ints.items()}
    shapes = {"q": (1, 2, 4, 8), "k": (1, 2, 9, 8), "v": (1, 2, 9, 8), "gram": (4, 8, 8)}
    good |= {name: jnp.zeros(shape) for name, shape in shapes.items()}
    assert not kv_score(**good, values="projected")[0].any()
    for name, value in change.items():
        dtype = jnp.int32 if name.endswith("positions") else jnp.float32
        good[name] = jnp.zeros(value, dtype) if isinstance(value, tuple) else value
    with pytest.raises(ValueError, match=message):
        kv_score(**good)
