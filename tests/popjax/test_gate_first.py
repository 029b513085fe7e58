"""GateFirst: what it spends, observes and chooses, against counts by hand and NumPy."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.masked_mlp import masked_mlp
from popjax import renumbering
from popjax.config import ModelConfig
from popjax.generate import Options
from popjax.methods import GateFirst, LayerActs, Method, OnlinePruning, Scout
from popjax.methods.gate_first import GateStatistic, gate_budget
from popjax.methods.row_budgets import rows_of_online_pruning
from popjax.packing import pack_layer
from popjax.report import layer_reports, reads_only_chosen
from popjax.run import Request, RunResult, run
from popjax.sparsity import ChannelPartition
from tests.popjax.tiny_models import CONFIGS, PROMPTS, random_params
from tests.sharding.meshes import mesh_of_shape

CONFIG = CONFIGS["llama"]
FIVE = dataclasses.replace(CONFIG, layers=CONFIG.layers[:1] * 5)
ALIKE = GateFirst(0.5)
DENSE_ENDS = GateFirst(0.7, ends="dense")
EPS = float(np.finfo(np.float32).eps)


def test_more_than_half_of_the_bytes_are_gates() -> None:
    rows = rows_of_online_pruning(1000, 0.5)
    assert rows == 1600  # 2 (0.5 + 0.05) + 0.5 of the 3,000
    budget = gate_budget(1000, rows)
    assert (budget.retained, budget.candidate, budget.tried, budget.k_selected) == (
        0,
        900,
        450,
        250,
    )


@pytest.mark.parametrize("width", [40, 1536, 2047])
def test_rows_are_those_of_online_pruning(width: int) -> None:
    for ratio in np.linspace(1, 0, 21).tolist():
        budget = OnlinePruning(ratio=ratio).budget(width)
        rows = 2 * budget.evaluated + budget.active
        found = gate_budget(width, rows_of_online_pruning(width, ratio))
        assert 0 <= found.k_selected <= found.tried <= found.candidate <= width
        assert not found.retained and found.evaluated + found.tried + found.k_selected == rows
    assert found.evaluated == found.k_selected == width  # at ratio 0


def test_dense_ends_cost_no_more_in_all() -> None:
    alike, ends = (GateFirst(0.4, ends=kind).budgets(FIVE) for kind in ("pruned", "dense"))
    rows = [[b.evaluated + b.tried + b.k_selected for b in budgets] for budgets in (alike, ends)]
    assert rows[1][0] == rows[1][-1] == 3 * 48
    assert len(set(rows[1][1:-1])) == 1 and rows[1][1] < rows[0][1]
    # At most one row a layer is left of what online pruning reads.
    assert all(0 <= 5 * rows_of_online_pruning(48, 0.4) - sum(one) <= 5 for one in rows)


def acts(params: Any, pads: float = 0.0) -> LayerActs:
    """Acts of rows of 7, 4 and 2 tokens; `pads` fills the rest."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 7, 32)).astype(np.float32)
    valid = np.arange(7)[None, :] >= np.array([0, 3, 5])[:, None]
    x[~valid] = pads
    return LayerActs(jnp.asarray(x), jnp.asarray(x), jnp.asarray(valid), params, "silu")


def weights(seed: int = 0) -> dict[str, Any]:
    return random_params(CONFIG, seed)["layer_0"]["mlp"]


def arrays(params: Any) -> tuple[np.ndarray, ...]:
    gate, up, down = (np.asarray(params[name], np.float64) for name in ("gate", "up", "down"))
    return gate, up, down


def test_the_statistic_is_the_formulas_and_no_pad_counts() -> None:
    params = weights()
    seen = acts(params, pads=5.0)
    gate, up, down = arrays(params)
    x = np.asarray(seen.x, np.float64)[np.asarray(seen.valid)]
    g, u = x @ gate.T, x @ up.T
    lengths = [np.linalg.norm(w, axis=1) for w in (gate, up, down)]
    found = ALIKE.observe(params, seen)
    tolerance = math.sqrt(32) * EPS * 8
    used = np.linalg.norm(g / (1 + np.exp(-g)) * u, axis=0) * lengths[2]
    np.testing.assert_allclose(found.used, used, rtol=tolerance)
    np.testing.assert_allclose(found.up, np.linalg.norm(u, axis=0), rtol=tolerance)
    np.testing.assert_allclose(found.weights, np.prod(lengths, axis=0), rtol=tolerance)
    clean = ALIKE.observe(params, acts(params))
    for name in ("used", "up"):
        assert (np.asarray(getattr(found, name)) == np.asarray(getattr(clean, name))).all()


def test_a_gain_after_the_layer_counts_as_part_of_down() -> None:
    params = weights()
    seen, plain = acts(params), ALIKE.observe(params, acts(params))
    gain = np.exp(np.random.default_rng(4).standard_normal(32)).astype(np.float32)
    seen.gain = jnp.asarray(gain)
    louder = {**params, "down": params["down"] * gain[None, :]}
    found, wanted = ALIKE.observe(params, seen), ALIKE.observe(louder, acts(louder))
    for name in ("used", "weights"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-5)
    # Beside the norms of down, which packing multiplies by, it holds what the gain adds to them.
    ratio = np.linalg.norm(louder["down"], axis=1) / np.linalg.norm(params["down"], axis=1)
    np.testing.assert_allclose(found.gain, ratio, rtol=1e-5)
    assert (np.asarray(found.up) == np.asarray(plain.up)).all()
    assert (np.asarray(plain.gain) == 1).all()
    factors = Scout(0.5).observe(params, seen)
    np.testing.assert_allclose(factors, ratio, rtol=1e-5)
    assert Scout(0.5).observe(params, acts(params)) == ()


def test_families_with_a_norm_after_the_layer_pass_its_gain() -> None:
    """Gemma's stored scales are gains less one."""
    config = CONFIGS["gemma3_text"]
    plain = random_params(config)
    scale = plain["layer_0"]["mlp_out_norm"]["scale"]
    louder = {**plain["layer_0"], "mlp_out_norm": {"scale": jnp.where(scale > 1, 8.0, scale)}}
    parts = []
    for params in (plain, {**plain, "layer_0": louder}):
        partition = run(params, config, Request(PROMPTS[:1], 2, method=ALIKE)).partition
        assert partition is not None
        parts.append(partition[0])
    assert parts[0].candidate.tolist() != parts[1].candidate.tolist()


def test_chunks_of_a_prompt_add_up() -> None:
    params = weights()
    seen = acts(params)
    parts = []
    for span in (slice(0, 4), slice(4, 7)):
        x, valid = seen.x[:, span], seen.valid[:, span]
        parts.append(LayerActs(x, x, valid, params, "silu"))
    combined = ALIKE.combine(*(ALIKE.observe(params, part) for part in parts))
    whole = ALIKE.observe(params, seen)
    for name in ("used", "up", "weights", "gain"):
        np.testing.assert_allclose(getattr(combined, name), getattr(whole, name), rtol=1e-5)


def planned(static: float, params: Any) -> tuple[GateStatistic, ChannelPartition]:
    method = dataclasses.replace(ALIKE, static=static)
    one = dataclasses.replace(CONFIG, layers=CONFIG.layers[:1])
    statistic = method.observe(params, acts(params))
    channels = method.plan(one, (statistic,)).channels
    assert channels is not None and isinstance(channels[0], ChannelPartition)
    return statistic, channels[0]


@pytest.mark.parametrize("static", [0.0, 0.2, 1.0])
def test_the_prompt_and_the_weights_decide_the_gates(static: float) -> None:
    statistic, part = planned(static, weights())
    used, alone = (np.asarray(s, np.float64) for s in (statistic.used, statistic.weights))
    score = (1 - static) * used / used.mean() + static * alone / alone.mean()
    assert part.candidate.tolist() == sorted(np.argsort(-score)[:42])
    assert (part.num_retained, part.tried, part.k_selected) == (0, 21, 13)
    assert (np.asarray(part.candidate_up) == np.asarray(statistic.up)[part.candidate]).all()
    assert (np.asarray(part.candidate_factor) == 1).all()


@pytest.mark.parametrize("implementation", ["xla", "xla_gathered", "native", "pallas_interpret"])
def test_a_token_uses_the_best_of_the_channels_with_the_loudest_gates(implementation: str) -> None:
    params = weights()
    statistic, part = planned(0.2, params)
    packed, part = pack_layer(params, part, 48)
    x = np.random.default_rng(1).standard_normal((2, 1, 32)).astype(np.float32)
    y, mask = masked_mlp(
        jnp.asarray(x),
        *(packed[name] for name in ("gate", "up", "down")),
        activation="silu",
        selection=ALIKE.selection(part),
        implementation=implementation,
    )
    rows = np.asarray(part.candidate)
    gate, up, down = (w[rows] for w in arrays(params))
    g, u = x[:, 0] @ gate.T, x[:, 0] @ up.T
    a = g / (1 + np.exp(-g))
    lengths = np.linalg.norm(down, axis=1)
    score = np.abs(a) * np.asarray(statistic.up)[rows] * lengths
    tried = np.argsort(-score, axis=1)[:, :21]
    late = np.full_like(score, -1.0)
    np.put_along_axis(late, tried, np.take_along_axis(np.abs(a * u) * lengths, tried, 1), axis=1)
    best = np.argsort(-late, axis=1)[:, :13]
    wanted = np.zeros((2, 42), bool)
    np.put_along_axis(wanted, best, True, axis=1)
    assert mask is not None and (np.asarray(mask)[:, 0] == wanted).all()
    expected = (a * u * wanted) @ down
    scale = float(np.abs(expected).max())
    np.testing.assert_allclose(np.asarray(y)[:, 0], expected, rtol=0, atol=scale * EPS * 8 * 7)


def decoded(config: ModelConfig, method: Method, **options: Any) -> RunResult:
    asked = Request(PROMPTS[:1], 6, method=method, options=Options(record_masks=True, **options))
    return run(random_params(config), config, asked)


@pytest.mark.parametrize(
    ("implementation", "rows"), [("native", 42 + 21 + 13), ("xla_gathered", 76), ("xla", 3 * 42)]
)
def test_the_report_counts_what_is_read(implementation: str, rows: int) -> None:
    result = decoded(CONFIG, ALIKE, implementation=implementation)
    first, _ = layer_reports(CONFIG, result.partition, 4, reads_only_chosen(result))
    assert (first.retained, first.candidate, first.active) == (0, 42, 13)
    assert first.read_bytes == rows * 32 * 4
    # Layers of 48 and 40 channels, of which the rows of 42 and 36 lie packed, three each.
    assert result.packed_bytes == (42 + 36) * 3 * 32 * 4


def test_dense_ends_keep_every_channel() -> None:
    method = GateFirst(0.4, ends="dense")
    result = decoded(FIVE, method)
    assert result.partition is not None and result.masks is not None
    counts = [np.unique(np.asarray(mask).sum(-1)).tolist() for mask in result.masks]
    assert counts[0] == counts[-1] == [48]
    inner = method.budgets(FIVE)[1]
    assert counts[1:-1] == [[inner.k_selected]] * 3
    assert [part.evaluated for part in result.partition[1:-1]] == [inner.evaluated] * 3


def test_factors_follow_their_candidates() -> None:
    """Into shards and out, and where a caller gives candidates in another order."""
    _, part = planned(0.0, weights())
    part = dataclasses.replace(part, candidate=jnp.arange(0, 48, 2, dtype=jnp.int32), k_selected=8)
    numbers = jnp.arange(24, dtype=jnp.float32)
    part = dataclasses.replace(part, candidate_factor=numbers, candidate_up=-numbers, tried=12)
    one = dataclasses.replace(CONFIG, layers=CONFIG.layers[:1])
    mesh = mesh_of_shape({"model": 4})
    local = renumbering.to_shards((part,), one, mesh)
    back = renumbering.from_shards(local, one, mesh)
    assert local is not None and back is not None and isinstance(back[0], ChannelPartition)
    assert np.asarray(local[0].candidate).reshape(4, -1).max() < 12
    assert back[0].candidate_factor is not None and back[0].point == "gate"
    assert back[0].candidate.tolist() == part.candidate.tolist()
    assert back[0].candidate_factor.tolist() == list(range(24))
    assert isinstance(local[0], ChannelPartition) and back[0].candidate_up is not None
    assert (local[0].tried, back[0].tried) == (3, 12)
    assert back[0].candidate_up.tolist() == [-n for n in range(24)]


def test_a_given_partition_keeps_its_factors_in_order() -> None:
    wanted = decoded(CONFIG, ALIKE)
    assert wanted.partition is not None
    given = []
    for part in wanted.partition:
        assert isinstance(part, ChannelPartition) and part.candidate_up is not None
        order = np.random.default_rng(0).permutation(part.num_candidate)
        moved = {"candidate": part.candidate, "candidate_up": part.candidate_up}
        moved = {name: array[order] for name, array in moved.items()}
        given.append(dataclasses.replace(part, candidate_factor=None, **moved))
    asked = Request(PROMPTS[:1], 6, method=ALIKE, partition=tuple(given))
    assert run(random_params(CONFIG), CONFIG, asked).tokens.tolist() == wanted.tokens.tolist()


@pytest.mark.parametrize(
    ("config", "method", "complaint"),
    [
        (CONFIGS["opt"], ALIKE, "this opt model has no gate: use online-pruning"),
        (CONFIGS["qwen2_moe"], ALIKE, "this qwen2_moe model has mixtures of experts"),
        (
            CONFIG,
            GateFirst(0.5, ends="dense"),
            "ends 'dense' leave the first and last of 2 layers whole",
        ),
        (
            FIVE,
            GateFirst(0.7, ends="dense"),
            "more than the 33% of FFN weights asked for: lower the ratio",
        ),
    ],
)
def test_models_it_cannot_serve(config: ModelConfig, method: GateFirst, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        method.for_model(config)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"ratio": 1.5}, "ratio 1.5 is outside 0..1"),
        ({"ratio": 0.5, "static": -0.1}, "static -0.1 is outside 0..1"),
        ({"ratio": 0.5, "ends": "open"}, "ends 'open' is unknown"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        GateFirst(**options)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"candidate_factor": jnp.ones(3)}, r"candidate_factor of layer 0 has shape \(3,\)"),
        ({"candidate_up": jnp.ones(3)}, r"candidate_up of layer 0 has shape \(3,\)"),
        ({"point": "end"}, "point 'end' of layer 0 is unknown"),
    ],
)
def test_partitions_that_are_not_right(changes: dict[str, Any], complaint: str) -> None:
    _, part = planned(0.0, weights())
    odd = dataclasses.replace(part, **changes)
    asked = Request(PROMPTS[:1], 6, method=ALIKE, partition=(odd, odd))
    with pytest.raises(ValueError, match=complaint):
        run(random_params(CONFIG), CONFIG, asked)


def test_fewer_tried_than_are_on_is_refused() -> None:
    packed, part = pack_layer(weights(), planned(0.0, weights())[1], 48)
    few = ALIKE.selection(dataclasses.replace(part, tried=3))
    matrices = (packed[name] for name in ("gate", "up", "down"))
    with pytest.raises(ValueError, match="tries 3 chooses by rank of the gate, and tries at least"):
        masked_mlp(jnp.ones((1, 1, 32)), *matrices, activation="silu", selection=few)
