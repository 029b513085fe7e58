"""The FFN that every token uses beside experts, pruned: as any FFN is, and told in the report."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popjax import abstract_run
from popjax.config import ModelConfig
from popjax.expert_partition import ExpertPartition
from popjax.generate import Options
from popjax.methods import Frozen, Method, OnlinePruning
from popjax.nn.transformer import Inputs
from popjax.packing import pack
from popjax.report import bytes_per_token, layer_reports
from popjax.run import Request, RunResult, run
from popjax.sparsity import ChannelPartition, channel_budget, ffn_ratio
from popjax.tiles import as_matrices, as_tiles
from tests.popjax.tiny_models import PROMPTS, TILED, logit_tolerance, mixture, random_params, tiny

PRUNED = OnlinePruning(0.5, gamma=0.3, shared="pruned")
TINY = tiny("qwen2_moe")
CONFIG = dataclasses.replace(TINY, layers=TINY.layers[:1])
EVERYTHING = Options(logits=True, record_masks=True)
D, F, M, K = 32, 48, 24, 3


@functools.cache
def recorded(shared: str = "pruned") -> RunResult:
    return ran(dataclasses.replace(PRUNED, shared=shared))


def ran(method: Method = PRUNED, **changes: Any) -> RunResult:
    base = Request(PROMPTS, 6, method=method, options=EVERYTHING)
    return run(random_params(CONFIG), CONFIG, dataclasses.replace(base, **changes))


def split(result: RunResult) -> tuple[ExpertPartition, ChannelPartition]:
    assert result.partition is not None
    part = result.partition[0]
    assert isinstance(part, ExpertPartition) and part.shared is not None
    return part, part.shared


def silent_experts() -> tuple[dict[str, Any], ModelConfig, dict[str, Any]]:
    """A mixture that adds only half of its shared FFN, and the model with that half as its FFN."""
    params = random_params(CONFIG)
    layer = dict(params["layer_0"])
    moe = dict(layer.pop("moe"))
    moe["down"], moe["shared_gate"] = jax.tree.map(
        jnp.zeros_like, (moe["down"], moe["shared_gate"])
    )
    mlp = layer.pop("shared")
    alone = dataclasses.replace(CONFIG, layers=(dataclasses.replace(CONFIG.layers[0], moe=None),))
    half = {**mlp, "down": mlp["down"] / 2}
    mixed = {**params, "layer_0": {**layer, "shared": mlp, "moe": moe}}
    return mixed, alone, {**params, "layer_0": {**layer, "mlp": half}}


@pytest.mark.parametrize("prefill", ["partition", pytest.param("dense", marks=pytest.mark.slow)])
def test_it_is_pruned_as_the_ffn_of_a_layer_without_experts(prefill: str) -> None:
    """Halving is exact, so partitions and masks are equal to the bit."""
    method = dataclasses.replace(PRUNED, prefill=prefill)
    mixed, config, params = silent_experts()
    request = Request(PROMPTS, 6, method=method, options=EVERYTHING)
    found = run(mixed, CONFIG, request)
    plain = dataclasses.replace(method, shared="dense")
    wanted = run(params, config, dataclasses.replace(request, method=plain))
    part, beside = split(found)
    assert wanted.partition is not None and wanted.masks and found.masks
    np.testing.assert_array_equal(beside.retained, wanted.partition[0].retained)
    np.testing.assert_array_equal(beside.candidate, wanted.partition[0].candidate)
    np.testing.assert_array_equal(found.masks[0][..., part.routed :], wanted.masks[0])
    assert found.tokens.tolist() == wanted.tokens.tolist()
    expected = np.asarray(wanted.logits)
    tolerance = logit_tolerance(CONFIG, expected)
    np.testing.assert_allclose(np.asarray(found.logits), expected, rtol=0, atol=tolerance)


def test_its_rows_are_packed_and_reported() -> None:
    row, asked = D * 4, channel_budget(F, 0.5, 0.15)
    found, dense = recorded(), recorded("dense")
    part, beside = split(found)
    assert (beside.evaluated, beside.active) == (asked.evaluated, asked.active)
    assert (found.packed_bytes, dense.packed_bytes) == (3 * beside.evaluated * row, 0)
    (both,) = layer_reports(CONFIG, found.partition, 4, only_chosen=False, by_index=("evaluated",))
    (alone,) = layer_reports(CONFIG, dense.partition, 4, only_chosen=False, by_index=("evaluated",))
    assert both.dense_bytes - alone.dense_bytes == 3 * F * row
    assert both.read_bytes - alone.read_bytes == 3 * beside.evaluated * row
    assert both.channels == alone.channels + F == K * M + F
    assert both.active == K * (part.num_retained + part.k_selected) + beside.active
    (chosen,) = layer_reports(CONFIG, found.partition, 4, only_chosen=True, by_index=("evaluated",))
    assert both.read_bytes - chosen.read_bytes == (beside.evaluated - beside.active) * row
    # What every token reads of the model holds what every layer reads.
    assert bytes_per_token(CONFIG, random_params(CONFIG)) > both.dense_bytes


@pytest.mark.slow
def test_chunks_of_a_prompt_add_up() -> None:
    method = dataclasses.replace(PRUNED, prefill="dense")
    whole, chunked = ran(method), ran(method, prefill_chunk=4)
    for mine, other in zip(split(chunked), split(whole), strict=True):
        np.testing.assert_array_equal(mine.retained, other.retained)
        np.testing.assert_array_equal(mine.candidate, other.candidate)


def test_a_given_partition_may_leave_it_whole() -> None:
    whole = recorded("dense")
    again = ran(partition=whole.partition)
    assert again.tokens.tolist() == whole.tokens.tolist()
    assert (np.asarray(again.logits) == np.asarray(whole.logits)).all()


def test_a_partition_of_it_needs_a_method_that_prunes_it() -> None:
    found = recorded()
    for method in (dataclasses.replace(PRUNED, shared="dense"), Frozen(0.5)):
        with pytest.raises(ValueError, match="prunes what every token uses beside experts"):
            ran(method, partition=found.partition, masks=found.masks)
    part, beside = split(found)
    bad = dataclasses.replace(beside, retained=jnp.asarray([1, F], jnp.int32))
    with pytest.raises(ValueError, match=f"layer 0 names channel {F}, outside 0..{F - 1}"):
        ran(partition=(dataclasses.replace(part, shared=bad),))


def test_models_without_one_are_refused() -> None:
    for family in ("olmoe", "llama"):
        config = tiny(family)
        with pytest.raises(ValueError, match=f"this {family} model has none: leave shared='dense'"):
            run(random_params(config), config, Request(PROMPTS, 2, method=PRUNED))
    with pytest.raises(ValueError, match="shared 'half' is unknown"):
        OnlinePruning(0.5, shared="half")


def test_a_share_of_the_model_counts_it_where_it_is_pruned() -> None:
    attention, experts = 2 * D * 8 * (4 + 2), 3 * D * K * M
    assert ffn_ratio(CONFIG, 0.2) == pytest.approx(0.2 * (attention + experts) / experts)
    ffn = experts + 3 * D * F
    assert ffn_ratio(CONFIG, 0.2, shared=True) == pytest.approx(0.2 * (attention + ffn) / ffn)
    resolved = OnlinePruning(model_ratio=0.2, shared="pruned").for_model(CONFIG)
    assert resolved.ratio == ffn_ratio(CONFIG, 0.2, shared=True)


@pytest.mark.slow
def test_its_rows_are_fetched_by_index_where_kernels_do_that() -> None:
    """Kept as tiles, as those of any FFN; what experts hold stays as it is."""
    wide = dataclasses.replace(mixture(TILED.layers[0], M, shared_gate=True), mlp_dim=F)
    config = dataclasses.replace(TILED, layers=(wide,))
    params = random_params(config)
    tiles = as_tiles(params)
    assert tiles["layer_0"]["shared"]["up"].shape == (F, 8, 128)
    jax.tree.map(np.testing.assert_array_equal, as_matrices(tiles), params)
    request = Request(PROMPTS[2:], 4, method=PRUNED)
    how = Options(record_masks=True, implementation="pallas_interpret")
    packed, indexed = (
        run(tiles, config, dataclasses.replace(request, options=options))
        for options in (how, dataclasses.replace(how, pack=False))
    )
    assert packed.packed_bytes and not indexed.packed_bytes
    assert indexed.tokens.tolist() == packed.tokens.tolist()
    for mask, other in zip(indexed.masks or (), packed.masks or (), strict=True):
        np.testing.assert_array_equal(mask, other)


def test_what_is_compiled_for_chips_has_the_shapes_of_a_run() -> None:
    place = abstract_run.Place.of(CONFIG, jax.devices()[:1])
    params = place.params(CONFIG, jnp.float32)
    tokens = jnp.zeros((len(PROMPTS), 32), jnp.int32)
    inputs = place.abstract(Inputs(tokens, tokens), "")
    static = {"config": CONFIG, "method": PRUNED, "capacity": 64}
    outputs = abstract_run.outputs_of(place, params, inputs, static)
    params, config, parts = abstract_run.packed(place, params, CONFIG, PRUNED, outputs)
    real = pack(random_params(CONFIG), CONFIG, recorded().partition or ())
    assert config == real[1]
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (params, parts)]
    real_shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), real[i]) for i in (0, 2)]
    assert shapes == real_shapes
