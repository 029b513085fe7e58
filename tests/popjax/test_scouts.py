"""Scouts: what is stored and read, what a token is given by them, against NumPy and dense runs."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import checkpoints
from kernels_pallas.masked_mlp import Selection, masked_mlp
from kernels_pallas.row_products import QuantizedRows, dequantized, quantized, rounded
from popjax import scouts
from popjax.config import ModelConfig
from popjax.fingerprint import fingerprint
from popjax.generate import Options
from popjax.methods import Method, RescoreAll, Scout
from popjax.methods.row_budgets import rows_of_online_pruning
from popjax.methods.scout import ScoutBudget, mixed_budgets, scout_budget
from popjax.report import bytes_per_token, layer_reports, reads_only_chosen, weight_bytes
from popjax.run import Request, RunResult, run
from popjax.sharding import placed_params
from tests.popjax.tiny_models import CONFIGS, PROMPTS, logit_tolerance, random_params
from tests.sharding.meshes import SHAPES, case, mesh_of_shape

CONFIG = CONFIGS["llama"]
FIVE = dataclasses.replace(CONFIG, layers=CONFIG.layers[:1] * 5)
# Rows of 32 weights are one group.
ALIKE = Scout(0.4, ends="pruned", group=32)
EPS = float(np.finfo(np.float32).eps)
IMPLEMENTATIONS = ("xla", "xla_gathered", "native", "pallas_interpret")


@functools.cache
def params_with(bits: int = 4, five: bool = False) -> tuple[Any, Any]:
    config = FIVE if five else CONFIG
    plain = random_params(config)
    made = scouts.make_scouts(plain, config, bits, 32, ends=not five)
    return plain, scouts.with_scouts(plain, made)


def decoded(
    params: Any, method: Method, config: ModelConfig = CONFIG, rows: int = 1, **options: Any
) -> RunResult:
    kept = Options(record_masks=True, logits=True, **options)
    return run(params, config, Request(PROMPTS[:rows], 6, method=method, options=kept))


def test_copies_and_rows_are_what_online_pruning_reads() -> None:
    rows, copy = rows_of_online_pruning(1000, 0.5), 4.25 / 16
    # 2 F copies are 0.53125 F rows; 1,068.75 of the 1,600 are left: 801 of down, 133 of the others.
    assert scout_budget(1000, rows, copy, foretold=True) == ScoutBudget(801, 133)
    assert scout_budget(1000, rows, copy, foretold=False) == ScoutBudget(356, 356)
    assert scout_budget(1000, 3000, copy, foretold=True) == ScoutBudget(1000, 1000)
    assert scout_budget(1000, 500, copy, foretold=True) == ScoutBudget(0, 0)
    for rows in range(550, 3000, 50):
        found = scout_budget(1000, rows, copy, foretold=True)
        assert 0 <= found.exact <= found.on <= max(900, found.exact)
        assert 0 <= rows - (531.25 + found.on + 2 * found.exact) < 3


def test_copies_of_some_layers_leave_all_as_many_rows_of_down() -> None:
    # Thirty layers of 1,536 channels, ends whole, fourteen copied at 8.25 bits a weight: of
    # 30 * 3,609 rows 2 * 4,608 are the ends', 14 * 3,072 of layers without, 14 * (1,584 + 2) of
    # those with: 33,842 are left for 28.
    rows = [4608, *[(30 * 3609 - 2 * 4608) // 28] * 28, 4608]
    held = scouts.copied_layers(30, False, 0.5)
    assert held == (2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28)
    found = mixed_budgets([1536] * 30, rows, 8.25 / 16, held)
    assert [i for i, one in enumerate(found) if one.exact < one.on] == list(held)
    assert {found[i] for i in held} == {ScoutBudget(1208, 1)}
    assert {found[i] for i in range(1, 29) if i not in held} == {ScoutBudget(1208, 1536)}
    assert found[0] == found[29] == ScoutBudget(1536, 1536)
    # Rows to spare are exact channels where there are copies.
    more = mixed_budgets([100, 200], [270, 540], 0.5, [1])
    assert more == (ScoutBudget(100, 100), ScoutBudget(200, 55))
    assert mixed_budgets([100, 200], [300, 600], 0.5, [1])[0] == ScoutBudget(100, 100)
    with pytest.raises(ValueError, match=r"^copies in 1 of 2 pruned layers leaves no rows"):
        mixed_budgets([100, 200], [130, 260], 0.5, [1])


def test_shares_of_layers_are_whole_layers_and_even() -> None:
    assert scouts.copied_layers(6, True, 1.0) == (0, 1, 2, 3, 4, 5)
    assert scouts.copied_layers(6, False, 1.0) == (1, 2, 3, 4)
    assert scouts.copied_layers(8, False, 0.5) == (2, 4, 6)
    assert (
        scouts.copied_layers(8, False, 0.34) == (2, 5) and scouts.copied_layers(2, False, 1) == ()
    )
    for layers in range(3, 40):
        for count in range(1, layers - 1):
            held = scouts.copied_layers(layers, False, count / (layers - 2))
            assert len(set(held)) == count and scouts.share_of(held, layers, False) is not None
    with pytest.raises(ValueError, match=r"copied 0.2 of 4 pruned layers .* give 0.25 or more"):
        scouts.copied_layers(6, False, 0.2)


@pytest.mark.parametrize("copied", [0, -0.5, 1.5, float("nan"), True, "half", None])
def test_what_is_no_share_of_the_layers(copied: Any) -> None:
    with pytest.raises(ValueError, match=r"no share of the pruned layers: give one above 0"):
        Scout(0.25, copied=copied)
    with pytest.raises(ValueError, match=r"no share of the pruned layers: give one above 0"):
        scouts.make_scouts({}, CONFIG, copied=copied)


def test_copies_of_some_layers_want_what_they_foretell_used() -> None:
    with pytest.raises(ValueError, match=r"rest 'off' lets exact channels on alone"):
        Scout(0.25, copied=0.5, rest="off")


def layer_arrays(seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 1, 64)).astype(np.float32)
    gate, up, down = rng.standard_normal((3, 90, 64)).astype(np.float32) / 8
    return x, gate, up, down * np.exp(rng.standard_normal((90, 1))).astype(np.float32)


def copied(w: Any, bits: int = 4) -> QuantizedRows:
    return quantized(jnp.asarray(w), bits, 32)


@pytest.mark.parametrize(
    ("bits", "shared", "exact"), [(4, False, 9), (4, True, None), (6, False, 9), (8, False, 0)]
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_copies_choose_and_the_weights_compute(
    implementation: str, bits: int, shared: bool, exact: int | None
) -> None:
    x, gate, up, down = layer_arrays()
    copies = (copied(gate, bits), copied(up, bits))
    norms = np.linalg.norm(down, axis=1)
    choice = Selection(
        candidate=jnp.arange(90, dtype=jnp.int32),
        weight=jnp.asarray(norms),
        num_candidate=90,
        k_selected=30,
        shared=shared,
        exact=exact,
    )
    y, mask = masked_mlp(
        *map(jnp.asarray, (x, gate, up, down)),
        activation="silu",
        selection=choice,
        scout=copies,
        implementation=implementation,
    )

    def channels(x: Any, gate: Any, up: Any) -> np.ndarray:
        x, gate, up = (np.asarray(w, np.float64) for w in (x, gate, up))
        g, u = (x[:, 0] @ w.T for w in (gate, up))
        return g / (1 + np.exp(-g)) * u

    told = channels(rounded(jnp.asarray(x)) if bits < 8 else x, *map(dequantized, copies))
    score = np.abs(told) * norms
    if shared:
        score = np.linalg.norm(score, axis=0, keepdims=True)
    places = np.argsort(np.argsort(-score, axis=1), axis=1)
    wanted, best = places < 30, places < (30 if exact is None else exact)
    assert mask is not None and (np.asarray(mask)[:, 0] == wanted).all()
    expected = np.where(best, channels(x, gate, up), np.where(wanted, told, 0)) @ down
    scale = float(np.abs(expected).max())
    np.testing.assert_allclose(np.asarray(y)[:, 0], expected, rtol=0, atol=scale * EPS * 64)


def test_a_given_mask_replaces_the_choice_of_a_scout() -> None:
    x, gate, up, down = map(jnp.asarray, layer_arrays())
    copies = (copied(gate), copied(up))
    given = jnp.asarray(np.random.default_rng(3).random((2, 1, 90)) < 0.3)
    choice = Selection(num_candidate=90, k_selected=30)
    found = [
        masked_mlp(
            *(x, gate, up, down),
            activation="silu",
            selection=choice,
            given=given,
            scout=scout,
            implementation=name,
        )
        for name in ("xla", "native")
        for scout in (None, copies)
    ]
    for y, mask in found:
        assert (np.asarray(mask) == np.asarray(given)).all()
        scale = float(np.abs(np.asarray(y)).max())
        np.testing.assert_allclose(y, found[0][0], rtol=0, atol=scale * EPS * 64)


def test_a_tpu_fetches_the_chosen_rows_one_by_one() -> None:
    """Of rows kept as tiles, with as many of them as a choice can name."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, 1, 1024)), jnp.float32)
    weights = [jnp.asarray(w, jnp.float32) for w in rng.standard_normal((3, 40, 1024)) / 32]
    copies = (copied(weights[0]), copied(weights[1]))
    choice: dict[str, Any] = {"selection": Selection(num_candidate=40, k_selected=9, exact=5)}
    choice |= {"activation": "silu", "scout": copies}
    tiles = [w.reshape(40, 8, 128) for w in weights]
    y, mask = masked_mlp(x, *tiles, **choice, implementation="pallas_interpret")
    wanted, other = masked_mlp(x, *weights, **choice)
    assert (np.asarray(mask) == np.asarray(other)).all() and int(np.asarray(mask).sum()) == 9
    scale = float(np.abs(np.asarray(wanted)).max())
    np.testing.assert_allclose(y, wanted, rtol=0, atol=scale * EPS * 256)


def test_a_mesh_run_replays_on_one_device() -> None:
    config, plain, _ = case("llama", "model=2")
    params = scouts.with_scouts(plain, scouts.make_scouts(plain, config, group=32, ends=True))
    spread = placed_params(params, config, mesh_of_shape(SHAPES["model=2"]))
    asked = Request(PROMPTS[:2], 5, method=ALIKE, options=Options(record_masks=True))
    together = run(spread, config, asked)
    replay = dataclasses.replace(asked, partition=together.partition, masks=together.masks)
    assert run(params, config, replay).tokens.tolist() == together.tokens.tolist()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"scout": "short"}, r"scout of gate and up \[E,D\] = \[90, 64\], got"),
        ({"scout": "whole", "gate": None}, "takes a scout of all rows of a gated layer"),
    ],
)
def test_scouts_that_do_not_fit(changes: dict[str, Any], complaint: str) -> None:
    x, gate, up, down = map(jnp.asarray, layer_arrays())
    rows = 80 if changes["scout"] == "short" else 90
    copies = (copied(gate[:rows]), copied(up[:rows]))
    gate = changes.get("gate", gate)
    with pytest.raises(ValueError, match=complaint):
        masked_mlp(x, gate, up, down, activation="silu", scout=copies)


@pytest.mark.parametrize("implementation", [pytest.param("xla", marks=pytest.mark.slow), "native"])
def test_with_eight_bits_a_run_is_nearly_that_of_the_true_best(implementation: str) -> None:
    """The same count chosen from exact scores: eight bits move few of them, and logits little."""
    plain, params = params_with(8)
    method = dataclasses.replace(ALIKE, bits=8, rest="off")
    found = decoded(params, method, implementation=implementation)
    assert found.partition is not None and found.masks is not None
    counts = [budget.on for budget in method.budgets(CONFIG)]
    assert [np.unique(np.asarray(m).sum(-1)).tolist() for m in found.masks] == [[k] for k in counts]
    exact = tuple(dataclasses.replace(part, point="product") for part in found.partition)
    asked = Request(
        PROMPTS[:1],
        6,
        method=RescoreAll(0.5),
        partition=exact,
        options=Options(record_masks=True, implementation=implementation),
    )
    best = run(plain, CONFIG, asked)
    assert best.masks is not None
    # The first step of either reads the same token.
    for mine, true in zip(found.masks, best.masks, strict=True):
        assert float(np.mean(np.asarray(mine)[0] == np.asarray(true)[0])) > 0.9


def test_steps_and_rows_choose_for_themselves() -> None:
    masks = decoded(params_with()[1], ALIKE, rows=3).masks
    assert masks is not None
    for mask in masks:
        assert not (mask[1:] == mask[:1]).all() and not (mask[:, 1:] == mask[:, :1]).all()


def test_dense_ends_need_no_scout() -> None:
    plain, params = params_with(five=True)
    held = [
        sorted(name for name in params[f"layer_{i}"]["mlp"] if "scout" in name) for i in range(5)
    ]
    assert held == [[], *[sorted(scouts.names())] * 3, []]
    method = Scout(0.3, group=32)
    result = decoded(params, method, FIVE)
    assert result.masks is not None
    counts = [int(np.asarray(mask)[0].sum()) for mask in result.masks]
    assert counts == [48, *[method.budgets(FIVE)[1].on] * 3, 48]
    assert result.packed_bytes == 0


@pytest.mark.parametrize("implementation", ["native", "xla"])
def test_reports_count_the_scout_as_held_and_read(implementation: str) -> None:
    plain, params = params_with(five=True)
    copies = 48 * 2 * (32 // 2 + 4)  # of a layer: half a byte a weight, and a float32 scale a row
    assert scouts.scout_bytes(params) == 3 * copies
    assert weight_bytes(params) == weight_bytes(plain) + 3 * copies
    assert bytes_per_token(FIVE, params) == bytes_per_token(FIVE, plain)
    method = Scout(0.3, group=32)
    result = decoded(params, method, FIVE, implementation=implementation)
    only_chosen = reads_only_chosen(result)
    layers = layer_reports(FIVE, result.partition, 4, only_chosen, params=params)
    budget = method.budgets(FIVE)[1]
    rows = 2 * budget.exact + budget.on if implementation == "native" else 3 * 48
    assert [layer.read_bytes for layer in layers[:2]] == [48 * 3 * 128, rows * 128 + copies]


def test_a_saved_scout_comes_back(tmp_path: Path) -> None:
    for five in (False, True):
        config = FIVE if five else CONFIG
        plain, params = params_with(five=five)
        made = scouts.make_scouts(plain, config, 4, 32, ends=not five)
        path = scouts.save_scouts(tmp_path / f"{five}.safetensors", made, params, config)
        read = scouts.load_scouts(path, plain, config)
        for mine, other in zip(read, made, strict=True):
            assert mine.keys() == other.keys()
            for name, array in mine.items():
                assert array.dtype == other[name].dtype and (array == other[name]).all()
    assert fingerprint(params, config) == fingerprint(plain, config)
    assert scouts.without_scouts(params)["layer_2"]["mlp"].keys() == plain["layer_2"]["mlp"].keys()
    with pytest.raises(checkpoints.CheckpointError, match="a scout of another model or dtype"):
        scouts.load_scouts(path, random_params(FIVE, seed=1), FIVE)


def test_a_model_without_a_scout_says_how_to_add_one() -> None:
    with pytest.raises(ValueError, match=r"popjax.scouts.with_scouts\(params, make_scouts"):
        decoded(params_with()[0], ALIKE)


@pytest.mark.parametrize(
    ("config", "method", "complaint"),
    [
        (CONFIGS["opt"], ALIKE, "this opt model has no gate: use online-pruning"),
        (CONFIGS["qwen2_moe"], ALIKE, "has mixtures of experts"),
        (CONFIG, Scout(0.4), "ends 'dense' leave the first and last of 2 layers whole"),
        (CONFIG, Scout(0.9, ends="pruned"), "leaves layer 0 no bytes beside its scout: lower"),
    ],
)
def test_models_it_cannot_serve(config: ModelConfig, method: Scout, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        method.for_model(config)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"ratio": -1}, "ratio -1 is outside 0..1"),
        ({"ratio": 0.5, "ends": "open"}, "ends 'open' is unknown"),
        ({"ratio": 0.5, "rest": "some"}, "rest 'some' is unknown"),
        ({"ratio": np.float32(0.3)}, r"is a float32: give a Python number in 0\.\.1"),
        ({"ratio": 0.5, "bits": 3}, "bits 3 make no scout: use 4, 6 or 8"),
        ({"ratio": 0.5, "bits": 4.0}, "bits 4.0 make no scout"),
        ({"ratio": 0.5, "group": 48}, "group 48 makes no scout"),
        ({"ratio": 0.5, "group": "64"}, "group '64' makes no scout"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Scout(**options)


def test_other_layers_than_the_model_has() -> None:
    plain, _ = params_with()
    with pytest.raises(ValueError, match="scouts of 1 layers were given for a model of 2"):
        scouts.with_scouts(plain, [{}])


@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_kernels_and_xla_give_one_answer(ratio: float) -> None:
    """Also where nine tenths of the channels go on, which is the most."""
    _, params = params_with()
    method = dataclasses.replace(ALIKE, ratio=ratio)
    assert (method.budgets(CONFIG)[0].on == 43) == (ratio == 0.1)
    kernels, xla = (decoded(params, method, rows=3, implementation=n) for n in ("native", "xla"))
    assert kernels.tokens.tolist() == xla.tokens.tolist()
    assert kernels.logits is not None and xla.logits is not None
    tolerance = logit_tolerance(CONFIG, xla.logits)
    np.testing.assert_allclose(kernels.logits, xla.logits, rtol=0, atol=tolerance)
