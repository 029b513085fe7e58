"""Whole runs on the TPU kernels, interpreted: packed or fetched by index, as XLA computes them.

Interpreted kernels are slow, so the models are tiny but for their width: rows must be whole tiles.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popjax.generate import PROGRAMS, Options
from popjax.methods import Frozen, Method, OnlinePruning, RescoreAll
from popjax.nn.transformer import init_params
from popjax.run import Request, RunResult, run
from popjax.tiles import as_matrices, as_tiles
from tests.popjax.tiny_models import TILED as CONFIG

PROMPTS = [[3, 14, 15, 92, 65, 35], [8, 9, 7]]
METHODS = {
    "dense": Method(),
    "online-pruning": OnlinePruning(ratio=0.5),
    "online-pruning, all evaluated": OnlinePruning(ratio=0.04),
    "rescore-all": RescoreAll(0.6),
    "frozen": Frozen(0.5),
}
# Frozen is online pruning without a choice a step, which dense shows.
methods = pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, id=name, marks=[pytest.mark.slow] if name == "frozen" else [])
        for name, method in METHODS.items()
    ],
)


@pytest.fixture(scope="module")
def params() -> Any:
    return init_params(CONFIG, jax.random.key(0), jnp.float32)


def decoded(params: Any, method: Method, implementation: str, **options: Any) -> RunResult:
    how = Options(implementation=implementation, record_masks=True, **options)
    return run(params, CONFIG, Request(PROMPTS, 6, method=method, options=how))


def same(found: RunResult, wanted: RunResult) -> None:
    assert (found.tokens == wanted.tokens).all()
    if wanted.masks is not None and found.masks is not None:
        for a, b in zip(found.masks, wanted.masks, strict=True):
            assert (np.asarray(a) == np.asarray(b)).all()


@methods
def test_interpreted_kernels_decode_as_xla_does(params: Any, method: Method) -> None:
    wanted = decoded(params, method, "xla")
    found = decoded(params, method, "pallas_interpret")
    assert found.implementation == "pallas_interpret"
    same(found, wanted)


@methods
def test_rows_fetched_by_index_need_no_packed_copy(params: Any, method: Method) -> None:
    wanted = decoded(params, method, "xla")
    tiles = as_tiles(params)
    found = decoded(tiles, method, "pallas_interpret", pack=False)
    assert found.packed_bytes == 0
    same(found, wanted)


def test_a_second_prompt_compiles_nothing(params: Any) -> None:
    tiles, method = as_tiles(params), OnlinePruning(ratio=0.5)
    decoded(tiles, method, "pallas_interpret", pack=False)
    before = PROGRAMS.compilations
    how = Options(implementation="pallas_interpret", record_masks=True, pack=False)
    other = [[5, 6], [7, 8, 9, 10]]
    run(tiles, CONFIG, Request(other, 6, method=method, options=how))
    assert PROGRAMS.compilations == before


@pytest.mark.parametrize("implementation", ["xla", "native", "pallas_interpret"])
def test_tiles_are_the_same_model(params: Any, implementation: str) -> None:
    tiles = as_tiles(params)
    assert tiles["layer_0"]["mlp"]["up"].shape == (300, 8, 128)
    method = OnlinePruning(ratio=0.5)
    same(decoded(tiles, method, implementation), decoded(params, method, implementation))
    back = as_matrices(tiles)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_rows_that_are_not_whole_tiles_stay_as_they_are() -> None:
    config = dataclasses.replace(CONFIG, embed_dim=576)
    params = init_params(config, jax.random.key(0), jnp.float32)
    assert as_tiles(params)["layer_1"]["mlp"]["down"].shape == (300, 576)


@pytest.mark.parametrize(
    ("implementation", "tiled"),
    [
        *((name, tiled) for name in (None, "xla", "native") for tiled in (False, True)),
        ("pallas_interpret", False),
    ],
)
def test_fetching_by_index_is_refused_where_it_cannot_be(
    params: Any, implementation: str | None, tiled: bool
) -> None:
    how = Options(implementation=implementation, pack=False)
    request = Request(PROMPTS, 2, method=OnlinePruning(ratio=0.5), options=how)
    obstacle = "only the kernels of an accelerator do, and .* run on .* here: leave pack=True"
    if implementation == "pallas_interpret":
        obstacle = r"kept as tiles, and these are \(300, 1024\): load the model with tiles=True"
    with pytest.raises(ValueError, match=f"pack=False fetches rows by index, .*{obstacle}"):
        run(as_tiles(params) if tiled else params, CONFIG, request)


def test_rows_that_cannot_be_tiles_are_not_fetched_by_index() -> None:
    config = dataclasses.replace(CONFIG, embed_dim=576)
    how = Options(implementation="pallas_interpret", pack=False)
    request = Request(PROMPTS, 2, method=OnlinePruning(ratio=0.5), options=how)
    params = init_params(config, jax.random.key(0), jnp.float32)
    with pytest.raises(ValueError, match="a multiple of 1024 .* these have 576: leave pack=True"):
        run(params, config, request)


def test_pack_is_true_or_false(params: Any) -> None:
    no: Any = "no"
    with pytest.raises(ValueError, match="pack 'no' is not a bool"):
        run(params, CONFIG, Request(PROMPTS, 2, options=Options(pack=no)))


def test_kernels_of_chips_that_are_not_here_are_refused(params: Any) -> None:
    for name, chip in (("pallas_tpu", "TPU"), ("pallas_gpu", "GPU")):
        how = Options(implementation=name)
        with pytest.raises(ValueError, match=f"needs a {chip}, but the weights lie on cpu"):
            run(params, CONFIG, Request(PROMPTS, 2, options=how))
