"""LaProx against its definition written out: explicit attention, explicit norms, one global sort.

Nothing here comes from the implementation but the method itself and the bool sets it returns.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from popjax.eviction import LaProx
from popjax.eviction.allocation import Candidates
from popjax.eviction.laprox import output_gram
from tests.eviction import oracles
from tests.eviction.prompts import D, Heads, Prompt, kept, prompt, ran

WINDOW, SLOTS = 4, 24
LENGTHS = (21, 13, 3)  # the last is shorter than the window
ROWS = [prompt(n, seed=2) for n in LENGTHS]
METHOD = LaProx(window=WINDOW)


def value_norms(heads: Heads, h: int, values: str) -> np.ndarray:
    if values == "projected":
        return np.linalg.norm(oracles.projected(heads, h), axis=1)
    if values == "norm":
        return np.linalg.norm(heads.v[h // heads.queries].astype(np.float64), axis=1)
    return np.ones(heads.v.shape[1])


def head_scores(heads: Heads, g: int, method: LaProx) -> np.ndarray:
    """Scores [c] of the candidates of one KV head, smoothed where the method says so."""
    members = oracles.group(heads, g)
    A = oracles.attention(heads, method.window)[:, :, : -method.window]
    norms = {h: value_norms(heads, h, method.values)[: -method.window] for h in members}
    widths = (method.pooling, 1) if method.pool == "attention" else (1, method.pooling)
    inner, outer = (functools.partial(oracles.smoothed, width=width) for width in widths)
    if method.group == "literal":
        columns = np.linalg.norm(A[list(members)].mean(0), axis=0)
        return outer(inner(columns) * np.mean(list(norms.values()), axis=0))
    products = [inner(np.linalg.norm(A[h], axis=0)) * norms[h] for h in members]
    return outer(np.mean(products, axis=0))


def oracle(layers: Prompt, budget: int, method: LaProx, tolerance: float) -> np.ndarray:
    """Which entries stay, bool [L, K, n]."""
    n = layers[0].q.shape[0]
    keep = np.ones((len(layers), len(layers[0].k), n), bool)
    if n <= method.window:
        return keep
    p = np.stack([[head_scores(x, g, method) for g in range(len(x.k))] for x in layers])
    count = budget - method.window
    if method.scope == "global":
        p = p / p.sum(axis=(1, 2), keepdims=True)
    if method.scope in ("global", "global-unnormalised"):
        chosen = oracles.top(p, count * p.shape[0] * p.shape[1], tolerance)
    elif method.scope == "layer":
        chosen = np.stack([oracles.top(layer, count * p.shape[1], tolerance) for layer in p])
    else:
        chosen = oracles.per_head(p, [count] * len(p), tolerance)
    return oracles.beside(chosen, 0, n)


SWITCHES: dict[str, list[Any]] = {
    "values": ["norm", "none"],
    "scope": ["global-unnormalised", "layer", "head"],
    "group": ["literal"],
    "pool": ["attention"],
    "pooling": [1, 3],
}
# Every switch, several at a time: each program takes a second to compile.
ABLATIONS: list[dict[str, Any]] = [
    {},
    {"values": "norm", "scope": "global-unnormalised"},
    {"values": "none", "scope": "layer"},
    {"group": "literal", "scope": "head"},
    {"pool": "attention"},
    {"pool": "attention", "group": "literal", "values": "norm", "pooling": 3},
    {"pool": "attention", "values": "none", "pooling": 1},
]


@pytest.mark.parametrize("options", ABLATIONS, ids=lambda o: "-".join(map(str, o.values())) or "-")
def test_what_stays_is_what_the_definition_says(options: dict[str, Any]) -> None:
    method = dataclasses.replace(METHOD, **options)
    for budgets in ((5, 5, 3), (9, 7, 3), (20, 12, 3)):
        found = kept(method, ROWS, budgets, SLOTS)
        for row, budget, keep in zip(ROWS, budgets, found, strict=True):
            wanted = oracle(row, budget, method, oracles.rounding(row))
            np.testing.assert_array_equal(keep, wanted)


def test_every_switch_changes_the_choice() -> None:
    """One that changed nothing would pass every other test."""
    tested = {(name, value) for options in ABLATIONS for name, value in options.items()}
    assert tested == {(name, value) for name, values in SWITCHES.items() for value in values}
    alone = [{name: value} for name, values in SWITCHES.items() for value in values]
    methods = [dataclasses.replace(METHOD, **options) for options in [{}, *alone]]
    sets = {tuple(oracle(ROWS[0], n, m, 0.0).tobytes() for n in (7, 9, 12)) for m in methods}
    assert len(sets) == len(methods)


def test_the_gram_form_is_the_explicit_norm() -> None:
    heads = ROWS[0][0]
    gram = np.asarray(output_gram(jnp.asarray(heads.o)), np.float64)
    for h in range(len(gram)):
        v, o = heads.v[h // heads.queries].astype(np.float64), heads.o[h].astype(np.float64)
        squares = np.einsum("si,ij,sj->s", v, gram[h], v)
        # D products and sums a Gram entry, each of at most the product of the rows' lengths.
        error = oracles.EPS * D * (abs(v) @ np.linalg.norm(o, axis=1)) ** 2
        explicit = (oracles.projected(heads, h) ** 2).sum(1)
        assert (abs(squares - explicit) <= error).all()
        assert (error < 1e-3 * explicit.max()).all()


def test_a_score_is_the_norm_of_what_the_token_adds_to_the_output() -> None:
    """||A[:, j]|| ||v_j W_O|| is the Frobenius norm of the outer product of the two."""
    row = prompt(13, seed=5, layers=1, heads=1, kv_heads=1)
    _, (scores,) = ran(METHOD, [row], [9], SLOTS)
    A, values = oracles.attention(row[0], WINDOW)[0], oracles.projected(row[0], 0)
    added = [np.linalg.norm(np.outer(A[:, j], values[j])) for j in range(13)]
    np.testing.assert_allclose(scores[0, 0], added, rtol=oracles.rounding(row))


@pytest.mark.parametrize("budget", [4, 6, 13])
def test_one_layer_with_one_head_is_top_k(budget: int) -> None:
    row = prompt(13, seed=6, layers=1, heads=2, kv_heads=1)
    by_head = dataclasses.replace(METHOD, scope="head")
    globally, alone = (kept(m, [row], [budget], SLOTS)[0] for m in (METHOD, by_head))
    np.testing.assert_array_equal(globally, alone)
    assert globally.sum() == budget


def test_equal_scores_go_to_the_lower_layer_head_and_token() -> None:
    """Scores of few distinct values: most of the cut is decided by ties."""
    rng = np.random.default_rng(0)
    L, B, K, S, count = 3, 2, 2, 16, 5
    scores = rng.integers(0, 3, (L, B, K, S)).astype(np.float32)
    candidates = Candidates(jnp.ones((B, S), bool), jnp.full((B,), count, jnp.int32))
    method = LaProx(window=1, pooling=1, scope="global-unnormalised")
    found = np.stack(method.allocate(tuple(jnp.asarray(x) for x in scores), candidates))
    for b in range(B):
        np.testing.assert_array_equal(found[:, b], oracles.top(scores[:, b], count * K * L))


def test_layers_are_made_comparable_by_their_sums() -> None:
    """A layer whose values are a thousand times larger takes no more of the budget."""
    row = ROWS[0]
    loud = (row[0], dataclasses.replace(row[1], v=row[1].v * np.float32(1024)))
    same, other = (kept(METHOD, [r], [9], SLOTS)[0] for r in (row, loud))
    np.testing.assert_array_equal(same, other)
    plain = dataclasses.replace(METHOD, scope="global-unnormalised")
    assert kept(plain, [loud], [9], SLOTS)[0][0].sum() == row[0].k.shape[0] * WINDOW


def test_queries_before_the_window_do_not_matter() -> None:
    row = ROWS[0]
    n = row[0].q.shape[0]
    other = tuple(
        dataclasses.replace(x, q=np.concatenate([-x.q[: n - WINDOW], x.q[n - WINDOW :]]))
        for x in row
    )
    same, changed = (kept(METHOD, [r], [9], SLOTS)[0] for r in (row, other))
    np.testing.assert_array_equal(same, changed)
