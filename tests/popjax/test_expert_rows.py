"""Rows of a token's experts by index on the TPU kernels, interpreted: those, and no others."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popjax.generate import PROGRAMS, Options
from popjax.methods import Frozen, Method, OnlinePruning
from popjax.nn import expert_rows
from popjax.nn import moe as mixture
from popjax.report import layer_reports
from popjax.run import Request, RunResult, run
from popjax.tiles import as_matrices, as_tiles
from tests.popjax.tiny_models import TILED, logit_tolerance, random_params
from tests.popjax.tiny_models import mixture as with_experts

# One layer of eight experts, three a token, whose rows are whole tiles.
M = 40
LAYER = dataclasses.replace(with_experts(TILED.layers[0], M), mlp_dim=0)
CONFIG = dataclasses.replace(TILED, layers=(LAYER,))
PARAMS = random_params(CONFIG)
TILES = as_tiles(PARAMS)
PROMPTS = [[3, 14, 15, 92, 65, 35], [8, 9, 7]]
ONLINE = OnlinePruning(0.5, gamma=0.3)


def decoded(params: Any, method: Method, implementation: str, **fields: Any) -> RunResult:
    how = Options(implementation=implementation, record_masks=True, logits=True)
    asked = Request(PROMPTS, 4, method=method, options=how, eos_ids=(TILED.vocab_size,))
    return run(params, CONFIG, dataclasses.replace(asked, **fields))


def same(found: RunResult, wanted: RunResult) -> None:
    """Sums of the two are of the same products in another order."""
    assert found.logits is not None and wanted.logits is not None
    logits = np.asarray(wanted.logits)
    np.testing.assert_allclose(found.logits, logits, atol=logit_tolerance(CONFIG, logits))
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    for a, b in zip(found.masks or (), wanted.masks or (), strict=True):
        np.testing.assert_array_equal(a, b)


def test_experts_kept_as_tiles_are_the_same_model() -> None:
    assert TILES["layer_0"]["moe"]["up"].shape == (8, M, 8, 128)
    jax.tree.map(np.testing.assert_array_equal, as_matrices(TILES), PARAMS)
    for method in (Method(), ONLINE):
        same(decoded(TILES, method, "xla"), decoded(PARAMS, method, "xla"))


@pytest.mark.parametrize("method", [ONLINE, Frozen(0.5)], ids=["online", "frozen"])
def test_rows_by_index_are_what_xla_masks(method: Method) -> None:
    found = decoded(TILES, method, "pallas_interpret")
    same(found, decoded(TILES, method, "xla"))
    assert found.partition is not None
    one = decoded(TILES, method, "pallas_interpret", partition=found.partition, masks=found.masks)
    same(one, found)


def test_keeping_everything_is_dense_bit_for_bit() -> None:
    dense = decoded(TILES, Method(), "pallas_interpret")
    kept = decoded(TILES, OnlinePruning(0.0), "pallas_interpret")
    np.testing.assert_array_equal(kept.logits, dense.logits)


def test_a_second_prompt_compiles_nothing() -> None:
    decoded(TILES, ONLINE, "pallas_interpret")
    before = PROGRAMS.compilations
    decoded(TILES, ONLINE, "pallas_interpret", prompts=[[5, 6], [7, 8, 9, 10]])
    assert PROGRAMS.compilations == before


def test_rows_that_are_off_may_hold_anything() -> None:
    """Neither pruned channels, nor experts that no token goes to, nor channels off in a step."""
    rng = np.random.default_rng(0)
    shape = (8, M, 1024)
    x = jnp.asarray(rng.normal(size=(2, 1024)), jnp.float32)
    weights = {
        name: rng.normal(size=shape).astype(np.float32) / 32 for name in ("gate", "up", "down")
    }
    experts = np.array([[0, 5, 2], [5, 8, 7]], np.int32)  # 8: of another device
    routes = mixture.Routes(
        jnp.asarray(experts), jnp.asarray(rng.uniform(size=(2, 3)), jnp.float32)
    )
    order = np.stack([rng.permutation(M)[:12] for _ in range(8)]).astype(np.int32)
    on = rng.uniform(size=(6, 12)) < 0.5
    wanted = _by_hand(np.asarray(x), weights, routes, order, on)
    read = np.zeros((8, M), bool)
    for expert in {0, 2, 5, 7}:
        read[expert, order[expert]] = True
    spoilt = {name: np.where(read[..., None], w, np.nan) for name, w in weights.items()}
    tiles = {name: jnp.asarray(w.reshape(8, M, 8, 128)) for name, w in spoilt.items()}
    rows = expert_rows.rows_of(routes, shape, jnp.asarray(order))
    h = expert_rows.listed_channels(x, rows, tiles, "silu", "pallas_interpret")
    y = expert_rows.listed_output(h, rows, routes, tiles, jnp.asarray(on), "pallas_interpret")
    np.testing.assert_allclose(y, wanted, atol=1e-4)


def _by_hand(
    x: np.ndarray, weights: dict, routes: mixture.Routes, order: np.ndarray, on: np.ndarray
) -> np.ndarray:
    y = np.zeros((2, 1024))
    for n in range(2):
        for j, expert in enumerate(np.asarray(routes.experts)[n]):
            if expert < 8:
                rows = order[expert][on[3 * n + j]]
                gate, up = (weights[name][expert, rows] @ x[n] for name in ("gate", "up"))
                h = gate / (1 + np.exp(-gate)) * up
                y[n] += float(routes.weights[n, j]) * h @ weights["down"][expert, rows]
    return y


def test_whole_experts_are_read_where_that_is_less() -> None:
    """So many tokens that most experts are reached, and each would read its rows again."""
    found = decoded(TILES, ONLINE, "pallas_interpret")
    assert found.partition is not None
    part, moe = found.partition[0], LAYER.moe
    assert moe is not None
    listing = expert_rows.listing
    assert listing("pallas_tpu", True, 1, moe, part) == "chosen"
    assert listing("pallas_tpu", True, 16, moe, part) is None
    assert listing("pallas_tpu", False, 1, moe, part) is None
    assert listing("xla", True, 1, moe, part) is None
    assert listing("native", False, 16, moe, part) == "evaluated"


def test_bytes_are_those_of_rows_that_are_on() -> None:
    found = decoded(TILES, ONLINE, "pallas_interpret")
    part = found.partition[0]
    (layer,) = layer_reports(CONFIG, found.partition, 4, False, by_index=("chosen",))
    width, on = part.width, part.num_retained + part.k_selected
    assert layer.read_bytes == 3 * (2 * width + on) * 1024 * 4
    assert layer.dense_bytes == 3 * 3 * M * 1024 * 4
