"""Static pruning: what is written is the model that the partition describes, and nothing else."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import popjax
from popjax import FLAP, Frozen, LanguageModel, OnlinePruning
from popjax.continuation import continuation_logits
from popjax.exporting import calibrated_partition, statically_pruned
from popjax.families import family_of, model_config
from popjax.methods import Method
from popjax.sparsity import ChannelPartition, thresholded_partition, whole_partition
from tests.popjax.published_models import PARAMETER_COUNTS
from tests.popjax.tiny_models import PROMPTS, logit_tolerance, random_params, tiny

FULL = jnp.arange(48, dtype=jnp.int32)
WITHOUT_EXPERTS = [
    name
    for name, (raw, _) in PARAMETER_COUNTS.items()
    if all(layer.moe is None for layer in model_config(raw).layers)
]


def test_it_decodes_as_the_full_model_masked(tiny_model: LanguageModel) -> None:
    partition = calibrated_partition(tiny_model, PROMPTS, Frozen(0.5))
    narrow = statically_pruned(tiny_model, partition)
    assert {layer.mlp_dim for layer in narrow.config.layers} == {24}
    given = ([PROMPTS[0]], [PROMPTS[1][:6]])
    want = continuation_logits(
        tiny_model.params, tiny_model.config, Frozen(0.5), *given, partition=partition
    )
    found = continuation_logits(narrow.params, narrow.config, Method(), *given)
    tolerance = logit_tolerance(tiny_model.config, np.asarray(want))
    # What padding leaves in the last columns is no continuation.
    np.testing.assert_allclose(found[:, :6], want[:, :6], rtol=0, atol=tolerance)
    dense = continuation_logits(tiny_model.params, tiny_model.config, Method(), *given)
    assert np.max(np.abs(np.asarray(dense - want)[:, :6])) > 100 * tolerance


def test_what_is_saved_loads_as_narrow(tiny_model: LanguageModel, tmp_path: Path) -> None:
    narrow = statically_pruned(tiny_model, calibrated_partition(tiny_model, PROMPTS, Frozen(0.25)))
    narrow.save(str(tmp_path / "narrow"))
    assert json.loads((tmp_path / "narrow/config.json").read_text())["intermediate_size"] == 36
    loaded = popjax.load(str(tmp_path / "narrow"))
    assert loaded.config == narrow.config
    for name in ("gate", "up", "down"):
        kept = np.asarray(narrow.params["layer_1"]["mlp"][name])
        np.testing.assert_array_equal(loaded.params["layer_1"]["mlp"][name], kept)


def test_all_channels_give_the_model_itself(tiny_model: LanguageModel) -> None:
    whole = ChannelPartition(FULL, FULL[:0])
    same = statically_pruned(tiny_model, (whole, whole))
    np.testing.assert_array_equal(
        same.params["layer_0"]["mlp"]["down"], tiny_model.params["layer_0"]["mlp"]["down"]
    )


def test_a_choice_at_every_step_is_refused(tiny_model: LanguageModel) -> None:
    with pytest.raises(ValueError, match="candidates to be chosen at every step"):
        calibrated_partition(tiny_model, PROMPTS, OnlinePruning(0.5))
    thresholds = tuple(thresholded_partition(jnp.ones(48)) for _ in range(2))
    with pytest.raises(ValueError, match="48 of 48 candidates to be chosen at every step"):
        statically_pruned(tiny_model, thresholds)


def test_what_may_bring_a_bias_is_refused(tiny_model: LanguageModel) -> None:
    with pytest.raises(ValueError, match="is calibrated by a file, and may bring a bias"):
        calibrated_partition(tiny_model, PROMPTS, FLAP(0.5, "file"))


def test_dense_is_refused(tiny_model: LanguageModel) -> None:
    with pytest.raises(ValueError, match="prunes no FFN channels"):
        calibrated_partition(tiny_model, PROMPTS, Method())


def test_unequal_widths_are_refused(tiny_model: LanguageModel) -> None:
    parts = tuple(ChannelPartition(FULL[:n], FULL[:0]) for n in (20, 30))
    with pytest.raises(ValueError, match="20 to 30 channels"):
        statically_pruned(tiny_model, parts)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_mixtures_are_refused(tiny_model: LanguageModel, family: str) -> None:
    """Packing leaves experts whole, so their checkpoint would state a width it has not."""
    config = tiny(family)
    mixed = dataclasses.replace(tiny_model, config=config, params=random_params(config))
    with pytest.raises(ValueError, match="is a mixture of experts"):
        calibrated_partition(mixed, PROMPTS, Frozen(0.5))
    whole = tuple(whole_partition(layer) for layer in config.layers)
    with pytest.raises(ValueError, match="is a mixture of experts"):
        statically_pruned(mixed, whole)


@pytest.mark.parametrize("name", WITHOUT_EXPERTS)
def test_every_family_names_its_width(name: str) -> None:
    """What is exported states its width where the family looks for it."""
    raw, _ = PARAMETER_COUNTS[name]
    family = family_of(raw["model_type"])
    narrow = family.config({**raw, family.width_key: 128})
    assert {layer.mlp_dim for layer in narrow.layers} == {128}
