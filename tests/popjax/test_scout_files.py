"""Scouts beside weights and in files: damaged ones, others than asked for, and models saved."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import checkpoints
from popjax import LanguageModel, PrefillPruning, scouts
from popjax.exporting import calibrated_partition, statically_pruned
from popjax.generate import Options
from popjax.methods import Frozen, GateFirst, Scout
from popjax.native import save_native
from popjax.run import Request, run
from tests.popjax.test_scouts import ALIKE, CONFIG, FIVE, decoded, params_with
from tests.popjax.tiny_models import PROMPTS, random_params


def negative(array: Any) -> Any:
    return array.at[0, 0].set(-1)


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("scout_up", lambda a: a[:7], r"scout_up' is uint8\[7, 16\], .* wants uint8\[4[08], 16\]"),
        ("scout_gate", lambda a: a[:, :8], r"scout_gate' is uint8\[4[08], 8\]"),
        ("scout_gate", lambda a: a.astype(jnp.int8), r"scout_gate' is int8\[4[08], 16\]"),
        ("scout_gate", None, "'layer_1/scout_gate' shows"),
        ("scout_up_scale", lambda a: a.astype(jnp.bfloat16), r"scale' is bfloat16\[4[08], 1\]"),
        ("scout_up_scale", lambda a: a.reshape(2, -1), r"scale' is float32\[2, 2[04]\]"),
        ("scout_up_scale", lambda a: a[:, 0], r"scale' is float32\[4[08]\]"),
        ("scout_up_scale", lambda a: a[0, 0], r"scale' is float32\[\]"),
        ("scout_up_scale", lambda a: a * jnp.nan, "scale' has scales that are negative or not"),
        ("scout_gate_scale", lambda a: a + jnp.inf, "scale' has scales that are negative or not"),
        ("scout_gate_scale", negative, "scale' has scales that are negative or not"),
    ],
)
@pytest.mark.parametrize("layer", [0, 1])
def test_files_that_are_no_scout_of_the_model(
    layer: int, name: str, change: Any, complaint: str, tmp_path: Path
) -> None:
    plain, _ = params_with()
    made = [dict(one) for one in scouts.make_scouts(plain, CONFIG, 4, 32, ends=True)]
    if change is None:
        del made[layer][name]
    else:
        made[layer][name] = change(made[layer][name])
    path = scouts.save_scouts(tmp_path / "scout.safetensors", tuple(made), plain, CONFIG)
    complaint = complaint.replace("layer_1", f"layer_{layer}")
    with pytest.raises(checkpoints.CheckpointError, match=complaint):
        scouts.load_scouts(path, plain, CONFIG)


@pytest.mark.parametrize(("ends", "share"), [(False, 0.34), (False, 0.7), (True, 0.4), (True, 1.0)])
def test_copies_of_some_layers_are_read_as_they_were(
    ends: bool, share: float, tmp_path: Path
) -> None:
    plain = random_params(FIVE)
    made = scouts.make_scouts(plain, FIVE, 8, 32, ends, copied=share)
    path = scouts.save_scouts(tmp_path / "scout.safetensors", made, plain, FIVE)
    read = scouts.load_scouts(path, plain, FIVE)
    held = scouts.copied_layers(5, ends, share)
    assert [i for i, one in enumerate(read) if one] == list(held)
    for wrote, found in zip(made, read, strict=True):
        assert {k: w.tobytes() for k, w in wrote.items()} == {
            k: np.asarray(w).tobytes() for k, w in found.items()
        }
    assert scouts.held_form(scouts.with_scouts(plain, read), 5) == (held, 8, 32)


@pytest.mark.parametrize("held", [(), (0, 1), (1, 2, 4)])
def test_copies_of_layers_that_no_share_is(held: tuple[int, ...], tmp_path: Path) -> None:
    plain = random_params(FIVE)
    made = scouts.make_scouts(plain, FIVE, 8, 32, ends=True)
    some = tuple(one if i in held else {} for i, one in enumerate(made))
    path = scouts.save_scouts(tmp_path / "scout.safetensors", some, plain, FIVE)
    with pytest.raises(checkpoints.CheckpointError, match=r"is no scout of this model"):
        scouts.load_scouts(path, plain, FIVE)


def test_a_layer_without_the_copies_that_a_run_needs() -> None:
    plain = random_params(FIVE)
    made = scouts.make_scouts(plain, FIVE, 8, 32, ends=True, copied=0.4)
    method = Scout(0.2, ends="pruned", bits=8, group=32)
    with pytest.raises(ValueError, match=r"the same `copied` as the method's"):
        decoded(scouts.with_scouts(plain, made), method, FIVE)


def test_copies_of_some_layers_go_with_no_depth_method() -> None:
    made = scouts.make_scouts(random_params(FIVE), FIVE, 8, 32, copied=0.7)
    asked = Request(
        PROMPTS[:1], 2, method=Scout(0.1, bits=8, group=32, copied=0.7), depth=PrefillPruning(0.2)
    )
    with pytest.raises(ValueError, match=r"which a depth method numbers anew: give copies to all"):
        run(scouts.with_scouts(random_params(FIVE), made), FIVE, asked)


@pytest.mark.parametrize(
    ("bits", "group", "words"),
    [(8, 32, "has 4 bits in groups of 32"), (4, 64, r"give Scout\(bits=4")],
)
def test_copies_of_other_bits_than_the_method_counts(bits: int, group: int, words: str) -> None:
    method = dataclasses.replace(ALIKE, bits=bits, group=group)
    with pytest.raises(ValueError, match=words):
        decoded(params_with()[1], method)


def test_a_model_is_saved_without_its_scout(tmp_path: Path, tiny_model: LanguageModel) -> None:
    made = scouts.make_scouts(tiny_model.params, tiny_model.config, 4, 32, ends=True)
    params = scouts.with_scouts(tiny_model.params, made)
    model = dataclasses.replace(tiny_model, params=params)
    with pytest.raises(ValueError, match=r"params=popjax.scouts.without_scouts\(params\)"):
        model.save(str(tmp_path / "model"))
    with pytest.raises(ValueError, match="no checkpoint has a place for it"):
        save_native(tmp_path / "native", model.config, params)
    partition = calibrated_partition(model, PROMPTS[:1], Frozen(0.5))
    with pytest.raises(ValueError, match="no checkpoint has a place for it"):
        statically_pruned(model, partition)
    assert not (tmp_path / "model").exists() and not (tmp_path / "native").exists()
    dataclasses.replace(model, params=scouts.without_scouts(params)).save(str(tmp_path / "model"))


def test_a_scout_is_told_from_others() -> None:
    plain, params = params_with()
    assert scouts.digest(plain) is None
    assert scouts.digest(params) == scouts.digest(params_with()[1])
    assert scouts.digest(params) != scouts.digest(params_with(8)[1])


@pytest.mark.parametrize(
    ("method", "choose"),
    [(Scout(0.3, group=32), "first"), (GateFirst(0.3, ends="dense"), "last")],
)
def test_ends_are_of_the_layers_that_run_the_prompt(method: Any, choose: str) -> None:
    """The two skipped layers decode whole, and so do the first and last of the other five."""
    config = dataclasses.replace(CONFIG, layers=CONFIG.layers[:1] * 7)
    plain = random_params(config)
    params = scouts.with_scouts(plain, scouts.make_scouts(plain, config, 4, 32))
    depth = PrefillPruning(skip=2 / 7, choose=choose)
    asked = Request(PROMPTS[:1], 4, method=method, depth=depth, options=Options(record_masks=True))
    result = run(params, config, asked)
    assert result.masks is not None
    counts = [int(np.asarray(mask)[0].sum()) for mask in result.masks]
    inner = counts[3] if choose == "first" else counts[1]
    pruned = range(3, 6) if choose == "first" else range(1, 4)
    assert inner < 48 and counts == [inner if i in pruned else 48 for i in range(7)]
    alone = method.budgets(FIVE)[1]
    assert inner == (alone.on if isinstance(method, Scout) else alone.active)
