"""What calibrated methods measure, score and zero, against the formulas written out in NumPy."""

from __future__ import annotations

import math
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
import pytest

from popjax.calibration.measuring import AttentionMagnitudes, Magnitudes, Moments
from popjax.calibration.prepared import with_leaves
from popjax.calibration.statistics import STEPS, LayerStatistics
from popjax.eviction.method import AttentionActs
from popjax.methods import CHESS, FLAP, TEAL, LayerActs, Method, ProbePruning, WandaSP
from popjax.nn.transformer import Transformer
from popjax.packing import pack
from popjax.sparsity import ChannelPartition, thresholded_partition
from tests.calibration.calibrated import config_of, file_of, params_of, statistics_of

CONFIG = config_of("llama")
B, T, D, F = 3, 16, 32, 48
RTOL = math.sqrt(F) * float(np.finfo(np.float32).eps) * 8
FILE = "a file"


def mlp() -> Any:
    return params_of("llama")["layer_0"]["mlp"]


def acts(params: Any, pads: float = 0.0, seed: int = 0) -> LayerActs:
    """Acts of a batch whose rows have 16, 9 and 2 tokens; `pads` fills the rest."""
    rng = np.random.default_rng(seed)
    x, residual = rng.standard_normal((2, B, T, D)).astype(np.float32)
    valid = np.arange(T)[None, :] >= np.array([0, 7, 14])[:, None]
    x[~valid] = residual[~valid] = pads
    return LayerActs(jnp.asarray(x), jnp.asarray(residual), jnp.asarray(valid), params, "silu")


def wide(array: Any) -> np.ndarray:
    return np.asarray(array, np.float64)


def gate_and_up(params: Any, x: Any) -> tuple[np.ndarray, np.ndarray]:
    opened = wide(x) @ wide(params["gate"]).T
    return opened / (1 + np.exp(-opened)), wide(x) @ wide(params["up"]).T


def statistics(**given: Any) -> LayerStatistics:
    rng = np.random.default_rng(1)
    values: dict[str, Any] = {"mean": rng.standard_normal(F), "quantiles": {}}
    values |= {name: rng.uniform(0.1, 1, F) for name in ("energy", "variance", "up_energy")}
    return LayerStatistics(**(values | given))


def test_moments_are_sums_over_tokens() -> None:
    params, seen = mlp(), acts(mlp())
    tokens = np.asarray(seen.x).reshape(-1, D)
    tokens = tokens[np.asarray(seen.valid).reshape(-1)]
    gate, up = gate_and_up(params, tokens)
    found = Moments().observe(params, seen)
    h = gate * up
    for name, value in {"mean": h, "energy": h**2, "up_energy": up**2}.items():
        scale = np.abs(value).sum(axis=0)
        assert (np.abs(wide(found[name]) - value.sum(axis=0)) <= 4 * RTOL * scale).all()


def test_magnitudes_are_ranked_over_every_eighth_token() -> None:
    rms = np.random.default_rng(2).uniform(0.5, 2, F).astype(np.float32)
    params = {**mlp(), "calibrated": jnp.asarray(rms)}
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, T, D)), jnp.float32)
    seen = LayerActs(x, x, jnp.ones((1, T), bool), params, "silu")
    gate, up = gate_and_up(params, np.asarray(seen.x)[:, ::8])
    shares = np.linspace(0, 1, STEPS + 1)
    found = Magnitudes().observe(params, seen)
    wanted = {"mlp": seen.x[:, ::8], "down": gate * up, "gate": gate * rms}
    for name, value in wanted.items():
        expected = np.quantile(np.abs(wide(value)), shares)
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=RTOL * expected[-1])


def test_magnitudes_of_attention_are_of_its_input_and_its_heads() -> None:
    rng, layer = np.random.default_rng(3), CONFIG.layers[0]
    x = rng.standard_normal((1, T, D)).astype(np.float32)
    q = rng.standard_normal((1, T, 4, 8)).astype(np.float32)
    k, v = rng.standard_normal((2, 1, 2, T, 8)).astype(np.float32)
    positions = jnp.arange(T, dtype=jnp.int32)[None]
    given: list[Any] = [*map(jnp.asarray, (x, q, k, v)), positions, positions, jnp.int32(0)]
    seen = AttentionActs(*given)
    found = AttentionMagnitudes().observe({}, layer, seen)
    heads = []
    for n in range(4):
        scores = wide(q[0, :, n]) @ wide(k[0, n // 2]).T / math.sqrt(8)
        shares = np.exp(np.where(np.tri(T, dtype=bool), scores, -np.inf))
        heads.append(shares / shares.sum(axis=1, keepdims=True) @ wide(v[0, n // 2]))
    wanted = {"attention": x[0, ::8], "output": np.stack(heads, axis=1)[::8]}
    for name, value in wanted.items():
        expected = np.quantile(np.abs(value), np.linspace(0, 1, STEPS + 1))
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=8 * RTOL * expected[-1])


def test_a_measured_model_adds_up_its_prompts() -> None:
    """Energies follow from means and variances, and thresholds from quantiles."""
    for layer, config in zip(statistics_of("llama"), CONFIG.layers, strict=True):
        assert layer.energy.shape == (config.mlp_dim,)
        together = layer.variance + layer.mean**2
        np.testing.assert_allclose(layer.energy, together, rtol=1e-5)
        assert layer.threshold("down", 0.0) < layer.threshold("down", 0.5)
        assert layer.threshold("down", 1.0) == np.max(layer.quantiles["down"])
        middle = (layer.quantiles["mlp"][100] + layer.quantiles["mlp"][101]) / 2
        assert layer.threshold("mlp", 0.5025) == pytest.approx(float(middle))


def test_wanda_scores_weights_times_the_root_of_energy() -> None:
    found = statistics()
    brought = WandaSP(0.5, FILE).calibrated((found,), {}, CONFIG, None)
    held = {**mlp(), "calibrated": jnp.asarray(brought.leaves["layer_0/mlp/calibrated"])}
    held["calibrated"] = held["calibrated"].astype(jnp.float32)
    score = WandaSP(0.5, FILE).observe(held, acts(held))
    wanted = np.mean(np.abs(wide(held["down"])) * np.sqrt(found.energy)[:, None], axis=1)
    np.testing.assert_allclose(score, wanted, rtol=RTOL)


def test_flap_keeps_what_fluctuates_most_over_all_layers_and_a_bias_of_the_rest() -> None:
    params, found = params_of("llama"), statistics_of("llama")
    brought = FLAP(0.4, FILE).calibrated(found, params, CONFIG, None)
    downs = [wide(params[f"layer_{i}"]["mlp"]["down"]) for i in range(2)]
    scores = []
    for layer, down in zip(found, downs, strict=True):
        score = wide(layer.variance) * (down**2).sum(axis=1)
        scores.append((score - score.mean()) / score.std(ddof=1))
    threshold = np.sort(np.concatenate(scores))[::-1][88 - 35 - 1]
    for i, (score, down, layer) in enumerate(zip(scores, downs, found, strict=True)):
        kept = score >= threshold
        assert brought.partition[i].retained.tolist() == np.flatnonzero(kept).tolist()
        wanted = np.where(kept, 0, wide(layer.mean)) @ down
        bias = brought.leaves[f"layer_{i}/mlp_compensation"]
        np.testing.assert_allclose(bias, wanted, rtol=0, atol=RTOL * np.abs(wanted).max() * 4)


def test_flap_compensates_for_the_partition_that_it_is_given() -> None:
    params, found = params_of("llama"), statistics_of("llama")
    none = jnp.zeros((0,), jnp.int32)
    halves = tuple(
        ChannelPartition(jnp.arange(layer.mlp_dim // 2, dtype=jnp.int32), none)
        for layer in CONFIG.layers
    )
    brought = FLAP(0.1, FILE).calibrated(found, params, CONFIG, halves)
    assert brought.partition is halves
    wanted = wide(found[0].mean)[24:] @ wide(params["layer_0"]["mlp"]["down"])[24:]
    bias = brought.leaves["layer_0/mlp_compensation"]
    np.testing.assert_allclose(bias, wanted, rtol=0, atol=RTOL * np.abs(wanted).max() * 4)


def test_flap_leaves_no_layer_empty() -> None:
    quiet, loud = (
        statistics(variance=np.ones(F)),
        statistics(variance=np.ones(40), mean=np.ones(40)),
    )
    params = params_of("llama")
    even = {**params, "layer_0": {"mlp": {"down": jnp.ones((F, D))}}}
    parts = FLAP(0.9, FILE).calibrated((quiet, loud), even, CONFIG, None).partition
    assert [part.num_retained for part in parts][0] >= 1
    assert sum(part.num_retained for part in parts) == 88 - 79
    with pytest.raises(ValueError, match="keeps 1 FFN channels for 2 layers: lower the ratio"):
        FLAP(0.99, FILE).calibrated((quiet, loud), even, CONFIG, None)


def test_probe_pruning_fuses_the_probe_with_history() -> None:
    history = np.random.default_rng(4).uniform(0.0, 2.0, F).astype(np.float32)
    params = {**mlp(), "calibrated": jnp.asarray(history)}
    seen = acts(params, pads=50.0)
    valid = np.asarray(seen.valid)
    loud = np.where(valid, np.linalg.norm(wide(seen.residual), axis=-1), 0)
    positions = np.argsort(-loud.sum(axis=0))[:8]  # half of 16
    row = int(np.argmax(loud[:, positions].sum(axis=1)))  # 5 % of 3 rows, at least one
    fused = np.zeros(F)
    for position in positions:
        if valid[row, position]:
            gate, up = gate_and_up(params, seen.x[row, position])
            energy = (gate * up) ** 2
            fused += (energy**2 + wide(history) ** 2) / (energy + history)
    wanted = np.linalg.norm(fused[:, None] * wide(params["down"]) ** 2, axis=1)
    statistic = ProbePruning(0.5, FILE).observe(params, seen)
    np.testing.assert_allclose(statistic, wanted, rtol=4 * RTOL)


def test_probe_pruning_takes_from_later_layers_what_the_first_keep() -> None:
    config = config_of("llama")
    settled = ProbePruning(0.3, FILE, dense_layers=1).for_model(config)
    assert settled.ratio == 0.6 and settled.for_model(config) == settled
    assert ProbePruning(0.3, FILE, dense_layers=1, rescale=False).for_model(config).ratio == 0.3
    with pytest.raises(ValueError, match=r"ratio 0.6 of 2 layers cannot come from those after"):
        ProbePruning(0.6, FILE, dense_layers=1).for_model(config)


def decoded(method: Method, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, Any]:
    """Output [T, D] and mask [T, F] of layer 0 under a method that is calibrated by its file."""
    found = method.calibrated(statistics_of("llama"), params_of("llama"), CONFIG, None)
    thresholds = jnp.asarray(found.leaves["layer_0/mlp/calibrated"])
    part = cast(Any, method.plan(CONFIG, (thresholds,) * 2).channels)[0]
    valid = jnp.ones(x.shape[:2], bool)
    given = (jnp.asarray(x), valid, part, None)
    params = with_leaves(params_of("llama"), found.leaves)
    model = Transformer(CONFIG, method)
    run = cast(Any, lambda model, *arrays: model.layer_0.mlp.decode(*arrays))
    y, mask = model.apply({"params": params}, *given, method=run)
    return np.asarray(y)[0], np.asarray(mask)[0], found


def test_teal_zeroes_channels_up_to_the_quantile() -> None:
    x = np.random.default_rng(6).standard_normal((1, 5, D)).astype(np.float32)
    y, mask, found = decoded(TEAL(0.3, file_of("llama")), x)
    gate, up = gate_and_up(mlp(), x[0])
    h, layer = gate * up, statistics_of("llama")[0]
    on = np.abs(h) > layer.threshold("down", 0.3)
    assert (mask == on).all() and 0 < on.sum() < on.size
    np.testing.assert_allclose(y, np.where(on, h, 0) @ wide(mlp()["down"]), rtol=0, atol=1e-4)
    assert found.decoding["layer_0/mlp_threshold"] == np.float32(layer.threshold("mlp", 0.3))
    assert found.decoding["layer_1/attn/q_threshold"] > 0


def test_chess_closes_gates_by_what_they_multiply_on_average() -> None:
    x = np.random.default_rng(6).standard_normal((1, 5, D)).astype(np.float32)
    y, mask, found = decoded(CHESS(0.3, file_of("llama"), attention=False), x)
    gate, up = gate_and_up(mlp(), x[0])
    layer = statistics_of("llama")[0]
    assert layer.up_energy is not None
    on = gate**2 * wide(layer.up_energy) > layer.threshold("gate", 0.3) ** 2
    assert (mask == on).all() and 0 < on.sum() < on.size
    wanted = np.where(on, gate, 0) * up @ wide(mlp()["down"])
    np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-4)
    assert not any("attn" in path for path in (*found.leaves, *found.decoding))


def test_chess_with_one_energy_for_all_is_a_plain_threshold() -> None:
    even = statistics(up_energy=np.full(F, 4.0), quantiles={"gate": np.linspace(0, 1, STEPS + 1)})
    leaves = CHESS(0.5, FILE, attention=False).calibrated((even,), {}, CONFIG, None).leaves
    np.testing.assert_allclose(leaves["layer_0/mlp/calibrated"], 0.25, rtol=1e-6)


def test_thresholds_evaluate_everything_and_pack_nothing() -> None:
    params = params_of("llama")
    parts = tuple(thresholded_partition(jnp.ones(y.mlp_dim), "gate") for y in CONFIG.layers)
    packed, config, found = pack(params, CONFIG, parts)
    assert packed["layer_0"]["mlp"] is params["layer_0"]["mlp"] and config == CONFIG
    assert cast(Any, found[0]).selection().point == "gate"
