"""No list of rows that the library makes can name a row that is not there, or one row twice.

Kernels of accelerators fetch rows by number and check nothing, so this is asserted of the lists as
compiled programs make them: for any sizes, and any scores, also equal, infinite or NaN ones.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.masked_mlp import POINTS, Selection, listed
from kernels_pallas.masked_mlp.listed import Units
from popjax import renumbering
from popjax.config import LayerConfig, ModelConfig
from popjax.methods import OnlinePruning
from popjax.methods.online_pruning import BANDS
from popjax.sparsity import ChannelBudget, ChannelPartition, partition_by_rank
from tests.sharding.meshes import mesh_of_shape

SHARES = st.sampled_from([0.0, 0.01, 0.3, 0.5, 0.97, 1.0])
KINDS = ("normal", "alike", "few", "infinite", "NaN")
SEEDS = st.integers(0, 2**32 - 1)


def drawn_scores(size: int, kind: str, seed: int) -> jax.Array:
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal(size)
    if kind == "alike":
        scores[:] = 1.5
    elif kind == "few":
        scores = np.round(scores)
    elif kind in ("infinite", "NaN"):
        odd = [np.inf, -np.inf] if kind == "infinite" else [np.nan, -np.nan]
        scores = np.where(rng.random(size) < 0.4, rng.choice(odd, size), scores)
    return jnp.asarray(scores, jnp.float32)


def assert_in_range(rows: Any, size: int, *, ascending: bool = True) -> None:
    """Rows [R] are int32 in 0..size-1, each named once; in order unless told otherwise."""
    chex.assert_type(rows, jnp.int32)
    found = np.asarray(rows) if ascending else np.sort(rows)
    chex.assert_trees_all_equal(found, np.clip(found, 0, size - 1))
    # Without repeats there are as many after sorting out as before, and the same.
    chex.assert_equal_shape([found, np.unique(found)])
    chex.assert_trees_all_equal(found, np.unique(found))


def assert_partition(part: ChannelPartition, size: int) -> None:
    """Both sets are in range and ascending, and no channel is in both."""
    for rows in (part.retained, part.candidate):
        assert_in_range(rows, size)
    both = np.concatenate([part.retained, part.candidate])
    assert_in_range(both, size, ascending=False)
    chex.assert_scalar_in(part.k_selected, 0, part.num_candidate)


@settings(max_examples=7)
@given(size=st.integers(1, 3000), seed=SEEDS, kind=st.sampled_from(KINDS), data=st.data())
def test_ranks_become_rows_that_are_there(size: int, seed: int, kind: str, data: Any) -> None:
    retained = data.draw(st.integers(0, size))
    candidate = data.draw(st.integers(0, size - retained))
    budget = ChannelBudget(retained, candidate, data.draw(st.integers(0, candidate)))
    part = jax.jit(partition_by_rank, static_argnums=1)(drawn_scores(size, kind, seed), budget)
    assert_partition(part, size)
    assert (part.num_retained, part.num_candidate) == (retained, candidate)


@settings(max_examples=7)
@given(
    sizes=st.lists(st.integers(1, 700), min_size=1, max_size=2),
    ratio=SHARES,
    gamma=SHARES,
    band=st.sampled_from(BANDS),
    granularity=st.sampled_from([1, 8, 128]),
    kind=st.sampled_from(KINDS),
    seed=SEEDS,
)
def test_plans_of_online_pruning_name_rows_that_are_there(
    sizes: list[int],
    ratio: float,
    gamma: float,
    band: str,
    granularity: int,
    kind: str,
    seed: int,
) -> None:
    layers = tuple(LayerConfig(1, 1, 2, mlp_dim=size) for size in sizes)
    config = ModelConfig("llama", 8, 2, layers, max_positions=8)
    method = OnlinePruning(ratio, gamma=gamma, band=band, granularity=granularity)
    statistics = tuple(drawn_scores(size, kind, seed + i) for i, size in enumerate(sizes))
    channels = jax.jit(method.plan, static_argnums=0)(config, statistics).channels
    assert channels is not None
    for part, size in zip(channels, sizes, strict=True):
        assert_partition(part, size)


@dataclasses.dataclass(frozen=True)
class Recorded:
    """An Access of units of `width` channels that keeps every list it is asked to read."""

    width: int
    lists: list[tuple[jax.Array, jax.Array]]

    def obstacle(self, weights: jax.Array, vectors: int) -> None:
        return None

    def size(self, weights: jax.Array, most: int, channels: int) -> int:
        return self.width

    def expand(self, x: jax.Array, weights: Sequence[jax.Array], units: Units) -> list[jax.Array]:
        self.lists.append((units.numbers, units.count))
        size = units.numbers.shape[0] * units.size
        return [jnp.sin(x[:, :1] * jnp.arange(1.0, size + 1.0)[None]) for _ in weights]

    def contract(self, h: jax.Array, w: jax.Array, units: Units) -> jax.Array:
        self.lists.append((units.numbers, units.count))
        return jnp.zeros((h.shape[0], w.shape[1]), jnp.float32)


@pytest.mark.parametrize("by_rows", [False, True])
@settings(max_examples=6)
@given(
    size=st.integers(1, 400),
    B=st.integers(1, 5),
    T=st.integers(1, 2),
    gated=st.booleans(),
    point=st.sampled_from(POINTS),
    how=st.sampled_from(["every", "chosen", "shared", "threshold", "given"]),
    kind=st.sampled_from(KINDS),
    seed=SEEDS,
    data=st.data(),
)
def test_lists_of_a_feed_forward_layer_name_units_that_are_there(
    by_rows: bool,
    size: int,
    B: int,
    T: int,
    gated: bool,
    point: str,
    how: str,
    kind: str,
    seed: int,
    data: Any,
) -> None:
    rng = np.random.default_rng(seed)
    evaluated = data.draw(st.integers(0 if by_rows else size, size))
    candidate = data.draw(st.integers(0, evaluated))
    keep = data.draw(st.integers(0, candidate))
    width = 1 if by_rows else data.draw(st.sampled_from([1, 8, 128]))
    rows = jnp.asarray(rng.permutation(size)[:evaluated], jnp.int32) if by_rows else None
    selection, mask = None, None
    if how == "given":
        mask = jnp.asarray(rng.random((B, T, evaluated)) < rng.random())
    elif how != "every":
        selection = Selection(
            weight=drawn_scores(candidate, kind, seed),
            threshold=drawn_scores(candidate, "normal", seed) if how == "threshold" else None,
            num_candidate=candidate,
            k_selected=keep,
            shared=how == "shared",
            point=point,
        )

    @jax.jit
    def lists_of(x: jax.Array, w: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        access = Recorded(width, [])
        options = {"activation": "relu", "selection": selection, "given": mask, "rows": rows}
        listed.masked_mlp(x, w if gated else None, w, w, access, **options)
        return access.lists

    x = jnp.asarray(rng.standard_normal((B, T, 3)), jnp.float32)
    for numbers, count in lists_of(x, jnp.zeros((size, 3))):
        chex.assert_shape(count, (1,))
        chex.assert_scalar_in(int(count[0]), 0, numbers.shape[0])
        # The whole list: what lies past the count may be looked at, if not read.
        assert_in_range(numbers, -(-size // width), ascending=False)
        # Rows of a partition are in its order, units of a matrix in that of the matrix.
        assert_in_range(numbers[: int(count[0])], -(-size // width), ascending=not by_rows)


@settings(max_examples=5)
@given(
    shards=st.sampled_from([1, 2, 4, 8]),
    width=st.integers(1, 500),
    ratio=SHARES,
    kind=st.sampled_from(KINDS),
    seed=SEEDS,
)
def test_renumbered_rows_are_those_of_their_shard(
    shards: int, width: int, ratio: float, kind: str, seed: int
) -> None:
    mesh = mesh_of_shape({"model": shards})
    layer = LayerConfig(shards, shards, 2, mlp_dim=shards * width)
    config = ModelConfig("llama", 8, 2, (layer,), max_positions=8)
    budget = OnlinePruning(ratio, gamma=0.5).budget(width)
    ranked = [partition_by_rank(drawn_scores(width, kind, seed + i), budget) for i in range(shards)]
    inside = ChannelPartition(
        jnp.concatenate([part.retained for part in ranked]),
        jnp.concatenate([part.candidate for part in ranked]),
        k_selected=budget.k_selected,
    )
    outside = renumbering.from_shards((inside,), config, mesh)
    assert outside is not None
    assert_partition(outside[0], shards * width)
    again = renumbering.to_shards(outside, config, mesh)
    assert again is not None
    for name in ("retained", "candidate"):
        held, before = getattr(again[0], name), getattr(inside, name)
        chex.assert_trees_all_equal(np.asarray(held), np.asarray(before))
        for rows in np.split(np.asarray(held), shards):
            assert_in_range(rows, width)


@pytest.mark.parametrize("rows", [[0, 8], [7, -1], [-1, 3], [3, 3], [5, 2]])
def test_the_assertion_sees_what_it_should(rows: list[int]) -> None:
    with pytest.raises(AssertionError):
        assert_in_range(np.asarray(rows, np.int32), 8)
