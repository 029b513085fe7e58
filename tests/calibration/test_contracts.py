"""What calibrated methods promise as all others do: see `tests/popjax/test_contracts.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
import pytest

from popjax.continuation import continuation_logits
from popjax.depth import PrefillPruning
from popjax.eviction import LaProx
from popjax.generate import PROGRAMS
from popjax.run import RunResult
from popjax.sparsity import channel_budget, rounded, whole_partition
from tests.calibration.calibrated import (
    EVERYTHING,
    MAKERS,
    NEW,
    config_of,
    method,
    params_of,
    ran,
    reference,
    request,
    statistics_of,
)
from tests.popjax.same_runs import assert_same, logits_of
from tests.popjax.tiny_models import PROMPTS, logit_tolerance

Pair = tuple[str, str]
THRESHOLDS = ("teal", "chess")
# One family with a plain gated layer, one with norms after it and a window, one without a gate.
FAMILIES = ("llama", "gemma3_text", "opt")
PAIRS = [(f, name) for f in FAMILIES for name in MAKERS if (f, name) != ("opt", "chess")]
# Of what methods share these show one that plans before the prompt, and one with thresholds in
# attention too; the others repeat it, and families differ in attention alone.
LAYER = config_of("llama").layers[1]
TELLING = [("llama", "flap"), ("llama", "chess")]


def over(pairs: Sequence[Pair], plain: Sequence[Pair] = TELLING) -> pytest.MarkDecorator:
    """Parameters for all pairs, of which those that repeat what others show are slow."""
    rows = [pytest.param(*p, marks=[] if p in plain else [pytest.mark.slow]) for p in pairs]
    return pytest.mark.parametrize(("family", "name"), rows)


def assert_same_run(family: str, result: RunResult, wanted: RunResult, rows: Any = ...) -> None:
    assert_same(config_of(family), result, wanted, rows)
    assert result.masks is not None and wanted.masks is not None
    for mask, other in zip(result.masks, wanted.masks, strict=True):
        assert (np.asarray(mask) == np.asarray(other)[:, rows]).all()


@over(PAIRS, plain=[("llama", name) for name in MAKERS])
def test_pruning_nothing_is_dense_bit_for_bit(family: str, name: str) -> None:
    result, dense = ran(family, request(family, name, 0.0)), reference(family, "dense")
    assert (logits_of(result) == logits_of(dense)).all()
    assert (result.tokens == dense.tokens).all()
    assert result.packed_bytes == 0
    pruned = reference(family, name)
    assert not np.allclose(logits_of(pruned)[:, 1:], logits_of(dense)[:, 1:], atol=1e-2)


@pytest.mark.slow
def test_a_model_without_a_gate_has_no_statistic_of_one() -> None:
    layer = statistics_of("opt")[0]
    assert layer.up_energy is None and "gate" not in layer.quantiles


@over([p for p in PAIRS if p[1] not in THRESHOLDS], plain=[("llama", name) for name in MAKERS])
def test_counts_are_those_asked_for(family: str, name: str) -> None:
    result, layers = reference(family, name), config_of(family).layers
    assert result.partition is not None and result.masks is not None
    found = [part.evaluated for part in result.partition]
    halves = [channel_budget(layer.mlp_dim, 0.5).active for layer in layers]
    if name == "flap":  # its layers compete
        total = sum(layer.mlp_dim for layer in layers)
        assert sum(found) == total - rounded(total / 2)
    elif name == "probe-pruning":  # its first layer stays whole
        assert found == [layers[0].mlp_dim, halves[1]]
    else:
        assert found == halves
    for mask, part in zip(result.masks, result.partition, strict=True):
        assert np.asarray(mask).all() and mask.shape == (NEW - 1, len(PROMPTS), part.evaluated)


@over([p for p in PAIRS if p[1] in THRESHOLDS], plain=[("llama", "teal"), ("llama", "chess")])
def test_thresholds_keep_about_the_share_asked_for(family: str, name: str) -> None:
    """Masks differ by token; 15 tokens of 88 channels lie within a tenth of the calibrated half."""
    masks = reference(family, name).masks
    assert masks is not None
    for mask in map(np.asarray, masks):
        assert not (mask[1:] == mask[:1]).all() and not (mask[:, 1:] == mask[:, :1]).all()
    assert np.mean([np.mean(mask) for mask in masks]) == pytest.approx(0.5, abs=0.1)


@over(PAIRS)
def test_a_row_alone_is_the_row_of_the_batch(family: str, name: str) -> None:
    wanted = reference(family, name)
    for row in (0, 2):
        changes = {"prompts": [PROMPTS[row]], "partition": wanted.partition}
        alone = ran(family, request(family, name, **changes))
        assert_same_run(family, alone, wanted, rows=[row])


@over(PAIRS)
def test_recorded_partition_and_masks_replay_the_run(family: str, name: str) -> None:
    wanted = reference(family, name)
    replay = {"partition": wanted.partition, "masks": wanted.masks}
    assert_same_run(family, ran(family, request(family, name, **replay)), wanted)


@over(PAIRS)
def test_streamed_is_unstreamed_and_nothing_more_compiles(family: str, name: str) -> None:
    wanted = reference(family, name)
    heard: list[int] = []

    def listen(tokens: np.ndarray, done: np.ndarray) -> np.ndarray:
        heard.append(tokens.shape[1])
        return np.zeros_like(done)

    before = PROGRAMS.compilations
    result = ran(family, request(family, name, chunk=3, on_chunk=listen))
    assert (logits_of(result) == logits_of(wanted)).all() and heard == [1, 4, NEW]
    other = [[3] * 17, [44, 2], [8, 9, 10, 11, 12, 13]]
    ran(family, request(family, name, prompts=other, max_new_tokens=NEW - 1))
    assert PROGRAMS.compilations == before


@over(PAIRS)
def test_the_kernels_agree_with_xla(family: str, name: str) -> None:
    options = dataclasses.replace(EVERYTHING, implementation="xla")
    result = ran(family, request(family, name, options=options))
    assert_same_run(family, result, reference(family, name))


@over(PAIRS)
def test_teacher_forced_scores_are_those_of_single_steps(family: str, name: str) -> None:
    wanted, config = reference(family, name), config_of(family)
    given = (params_of(family), config, method(family, name), PROMPTS, wanted.tokens.tolist())
    logits, expected = np.asarray(continuation_logits(*given)), logits_of(wanted)
    tolerance = logit_tolerance(config, expected)
    np.testing.assert_allclose(logits[:, :NEW], expected, rtol=0, atol=tolerance)


@over([("llama", name) for name in MAKERS if name != "probe-pruning"], plain=TELLING[1:])
def test_a_prompt_in_pieces_is_the_prompt(family: str, name: str) -> None:
    pieces = ran(family, request(family, name, prefill_chunk=8))
    assert_same_run(family, pieces, reference(family, name))


def test_thresholds_of_a_recorded_partition_are_obeyed_in_any_order() -> None:
    wanted = reference("llama", "chess")
    parts = cast(tuple[Any, ...], wanted.partition)
    turned = tuple(
        dataclasses.replace(part, candidate=part.candidate[::-1], threshold=part.threshold[::-1])
        for part in parts
    )
    assert_same_run("llama", ran("llama", request("llama", "chess", partition=turned)), wanted)
    with pytest.raises(ValueError, match="leaves candidates to choose, which Method cannot"):
        ran("llama", request("llama", "dense", partition=wanted.partition))
    short = tuple(dataclasses.replace(p, threshold=jnp.zeros(3)) for p in parts)
    with pytest.raises(ValueError, match=r"thresholds of shape \(3,\) for 48 candidates"):
        ran("llama", request("llama", "chess", partition=short))


@over([pair for pair in PAIRS if pair[0] == "llama"], plain=())
def test_skipped_layers_and_eviction_go_with_calibration(family: str, name: str) -> None:
    """A layer that saw no prompt is dense, unless the method decided before any prompt."""
    shallow = ran(family, request(family, name, depth=PrefillPruning(choose=(1,))))
    assert shallow.partition is not None and np.isfinite(logits_of(shallow)).all()
    seen, unseen = shallow.partition
    wanted = reference(family, name).partition
    assert wanted is not None and seen.evaluated == wanted[0].evaluated
    assert unseen.evaluated == (wanted[1] if name == "flap" else whole_partition(LAYER)).evaluated
    evicted = ran(family, request(family, name, eviction=LaProx(tokens=4, window=3)))
    assert evicted.kept is not None and np.isfinite(logits_of(evicted)).all()
    assert evicted.partition is not None
    for part, other in zip(evicted.partition, wanted, strict=True):
        assert part.evaluated == other.evaluated
