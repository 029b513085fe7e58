"""What each method observes, decides and masks, against the formulas written out in NumPy."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.masked_mlp import choose
from kernels_pallas.masked_mlp.selection import scores as step_scores
from popjax.families import model_config
from popjax.generate import PROGRAMS, Options
from popjax.methods import (
    METHODS,
    Frozen,
    Griffin,
    LayerActs,
    Method,
    OnlinePruning,
    RescoreAll,
    method_name,
    method_named,
)
from popjax.methods.scores import channel_scores
from popjax.packing import down_norms
from popjax.run import Request, RunResult, run
from popjax.sparsity import ChannelBudget, ChannelPartition, partition_by_rank
from tests.popjax.published_models import LLAMA_31_8B
from tests.popjax.tiny_models import CONFIGS, PROMPTS, random_params

CONFIG = CONFIGS["llama"]
B, T, D, F = 3, 7, 32, 48
EPS = float(np.finfo(np.float32).eps)


def mlp(seed: int = 0) -> dict[str, jnp.ndarray]:
    return random_params(CONFIG, seed)["layer_0"]["mlp"]


def acts(params: Any, pads: float = 0.0, seed: int = 0) -> LayerActs:
    """Acts of a batch whose rows have 7, 4 and 2 tokens; `pads` fills the rest."""
    rng = np.random.default_rng(seed)
    x, residual = rng.standard_normal((2, B, T, D)).astype(np.float32)
    valid = np.arange(T)[None, :] >= np.array([0, 3, 5])[:, None]
    x[~valid] = residual[~valid] = pads
    arrays = (jnp.asarray(x), jnp.asarray(residual), jnp.asarray(valid))
    return LayerActs(*arrays, params, "silu")


def channels(params: Any, x: Any) -> np.ndarray:
    """h in float64."""
    gate, up, x = (np.asarray(a, np.float64) for a in (params["gate"], params["up"], x))
    opened = x @ gate.T
    return opened / (1 + np.exp(-opened)) * (x @ up.T)


def counted(params: Any, seen: LayerActs) -> np.ndarray:
    """h [tokens, F] of the real tokens."""
    return channels(params, seen.x)[np.asarray(seen.valid)]


@pytest.mark.parametrize("kind", ["down", "gate-up", "activation"])
def test_scores_are_the_formulas(kind: str) -> None:
    params = mlp()
    seen = acts(params, pads=5.0)
    norms = np.linalg.norm(counted(params, seen), axis=0)
    if kind == "down":
        wanted = norms * np.linalg.norm(np.asarray(params["down"], np.float64), axis=1)
    elif kind == "gate-up":
        x = np.asarray(seen.x, np.float64)[np.asarray(seen.valid)]
        squares = sum(np.asarray(params[name], np.float64) ** 2 for name in ("gate", "up"))
        wanted = np.sqrt(squares @ (x**2).sum(axis=0))
    else:
        wanted = norms
    scores = channel_scores(params, seen, kind)
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(scores), wanted, rtol=math.sqrt(D) * EPS * 8)


def test_griffin_normalises_each_token() -> None:
    params = mlp()
    seen = acts(params, pads=5.0)
    h = counted(params, seen)
    wanted = np.linalg.norm(h / np.linalg.norm(h, axis=1, keepdims=True), axis=0)
    statistic = Griffin(0.5).observe(params, seen)
    np.testing.assert_allclose(np.asarray(statistic), wanted, rtol=math.sqrt(D) * EPS * 8)


EVERY = [
    OnlinePruning(ratio=0.5),
    OnlinePruning(ratio=0.5, score="gate-up"),
    OnlinePruning(ratio=0.5, score="activation"),
    OnlinePruning(ratio=0.5, prefill="probe"),
    Frozen(0.5),
    Griffin(0.5),
]


@pytest.mark.parametrize("method", EVERY, ids=str)
def test_pad_tokens_never_count(method: Method) -> None:
    params = mlp()
    clean = np.asarray(method.observe(params, acts(params, pads=0.0)))
    noisy = np.asarray(method.observe(params, acts(params, pads=1e4)))
    assert (clean == noisy).all()


@pytest.mark.parametrize("method", EVERY, ids=str)
def test_a_longer_bucket_changes_no_score(method: Method) -> None:
    params = mlp()
    seen = acts(params, pads=5.0)
    longer = [
        jnp.concatenate([jnp.zeros_like(a[:, :5]), a], axis=1)
        for a in (seen.x, seen.residual, seen.valid)
    ]
    scores = method.observe(params, LayerActs(*longer, params, "silu"))
    wanted = method.observe(params, seen)
    np.testing.assert_allclose(scores, wanted, rtol=math.sqrt(D) * EPS * 8)


@pytest.mark.parametrize("kind", ["down", "gate-up", "activation"])
def test_partition_does_not_depend_on_token_order(kind: str) -> None:
    params = mlp()
    seen = acts(params)
    order = np.random.default_rng(1).permutation(T)
    shuffled = LayerActs(
        *(a[:, order] for a in (seen.x, seen.residual, seen.valid)), params, "silu"
    )
    budget = ChannelBudget(20, 8, 4)
    one = partition_by_rank(channel_scores(params, seen, kind), budget)
    other = partition_by_rank(channel_scores(params, shuffled, kind), budget)
    assert one.retained.tolist() == other.retained.tolist()
    assert one.candidate.tolist() == other.candidate.tolist()


def rescaled(params: Any) -> Any:
    """The same function of x: channel i of up times c_i, of down over it, c a power of two."""
    c = 2.0 ** np.random.default_rng(2).integers(-3, 4, (F, 1)).astype(np.float32)
    return {**params, "up": params["up"] * c, "down": params["down"] / c}


def test_score_does_not_depend_on_how_a_channel_is_scaled() -> None:
    params, other = mlp(), rescaled(mlp())
    scores = channel_scores(params, acts(params), "down")
    assert (np.asarray(scores) == np.asarray(channel_scores(other, acts(other), "down"))).all()
    without = channel_scores(other, acts(other), "activation")
    assert not np.allclose(without, channel_scores(params, acts(params), "activation"))


def test_step_score_does_not_depend_on_how_a_channel_is_scaled() -> None:
    scores = []
    for params in (mlp(), rescaled(mlp())):
        candidate = jnp.arange(10, 30, dtype=jnp.int32)
        part = ChannelPartition(
            jnp.arange(10, dtype=jnp.int32),
            candidate,
            candidate_norm=down_norms(params["down"])[candidate],
            k_selected=5,
        )
        selection = part.selection()
        assert selection is not None
        scores.append(np.asarray(step_scores(acts(params).channels(), selection)))
    assert (scores[0] == scores[1]).all()


def step(shared: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, OnlinePruning, Any]:
    rng = np.random.default_rng(3)
    h = rng.standard_normal((2, 4, 12)).astype(np.float32)
    norms = rng.uniform(0.5, 2.0, 6).astype(np.float32)
    part = ChannelPartition(
        jnp.arange(6, dtype=jnp.int32),
        jnp.arange(20, 26, dtype=jnp.int32),
        candidate_norm=jnp.asarray(norms),
        k_selected=2,
        packed=True,
    )
    method = OnlinePruning(ratio=0.5, batch_shared=shared)
    selection = method.selection(part)
    assert selection is not None
    return h, norms, np.asarray(choose(jnp.asarray(h), selection)), method, part


def test_step_mask_keeps_r_and_the_best_candidates_of_each_token() -> None:
    h, norms, mask, _, _ = step(shared=False)
    assert mask.shape == (2, 4, 12)
    assert mask[..., :6].all()
    best = np.argsort(-np.abs(h[..., 6:]) * norms, axis=-1)[..., :2]
    for b, t in np.ndindex(2, 4):
        assert set(np.flatnonzero(mask[b, t, 6:])) == set(best[b, t])


def test_shared_step_mask_takes_the_norm_over_the_batch() -> None:
    h, norms, mask, _, _ = step(shared=True)
    assert mask.shape == (1, 4, 12)
    best = np.argsort(-np.linalg.norm(h[..., 6:], axis=0) * norms, axis=-1)[..., :2]
    for t in range(4):
        assert set(np.flatnonzero(mask[0, t, 6:])) == set(best[t])


def test_probe_scores_half_the_positions_of_the_loudest_row() -> None:
    params = mlp()
    seen = acts(params, pads=50.0)
    valid = np.asarray(seen.valid)
    loud = np.where(valid, np.linalg.norm(np.asarray(seen.residual, np.float64), axis=-1), 0)
    positions = np.argsort(-loud.sum(axis=0))[:4]  # half of 7, rounded up
    row = int(np.argmax(loud[:, positions].sum(axis=1)))  # 5 % of 3 rows, at least one
    h = channels(params, seen.x)[row, positions][valid[row, positions]]
    wanted = np.linalg.norm(h, axis=0)
    wanted = wanted * np.linalg.norm(np.asarray(params["down"], np.float64), axis=1)
    statistic = OnlinePruning(ratio=0.5, prefill="probe").observe(params, seen)
    np.testing.assert_allclose(np.asarray(statistic), wanted, rtol=math.sqrt(D) * EPS * 8)


def decoded(method: Method) -> RunResult:
    request = Request(PROMPTS[:1], 8, method=method, options=Options(record_masks=True))
    return run(random_params(CONFIG), CONFIG, request)


def assert_same_partition(one: RunResult, other: RunResult) -> None:
    assert one.partition is not None and other.partition is not None
    for a, b in zip(one.partition, other.partition, strict=True):
        assert a.retained.tolist() == b.retained.tolist()
        assert a.candidate.tolist() == b.candidate.tolist()
        assert a.k_selected == b.k_selected


def test_no_band_is_the_frozen_mask() -> None:
    online, frozen = decoded(OnlinePruning(ratio=0.5, gamma=0.0)), decoded(Frozen(0.5))
    assert_same_partition(online, frozen)
    assert online.tokens.tolist() == frozen.tokens.tolist()


def test_a_band_of_everything_is_top_k_at_every_step() -> None:
    method = OnlinePruning(ratio=0.5, gamma=0.5, band="full", prefill="dense")
    online, rescored = decoded(method), decoded(RescoreAll(0.5))
    assert_same_partition(online, rescored)
    assert online.tokens.tolist() == rescored.tokens.tolist()
    assert online.masks is not None and rescored.masks is not None
    for one, other in zip(online.masks, rescored.masks, strict=True):
        assert (np.asarray(one) == np.asarray(other)).all()
        assert not np.asarray(one).all()


def test_band_names_the_two_readings_of_gamma() -> None:
    assert OnlinePruning(ratio=0.5, gamma=0.1).delta == 0.05
    assert OnlinePruning(ratio=0.5, gamma=0.1, band="full").delta == 0.1


def test_model_ratio_becomes_the_ffn_ratio_of_the_model() -> None:
    method = OnlinePruning(model_ratio=0.2).for_model(model_config(LLAMA_31_8B))
    assert method.ratio == pytest.approx(0.248, abs=5e-4)
    assert method.model_ratio is None
    with pytest.raises(ValueError, match="model_ratio 1.0 needs an FFN ratio"):
        OnlinePruning(model_ratio=1.0).for_model(CONFIG)


CALIBRATED = ("wanda-sp", "flap", "probe-pruning", "teal", "chess")


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_named_hashable_and_final(name: str) -> None:
    options: dict[str, Any] = {} if name == "dense" else {"ratio": 0.5}
    if name in CALIBRATED:
        options["statistics"] = "a file"
    method = method_named(name, **options, gamma=None)
    assert method_name(method) == name
    assert method == method_named(name, **options)
    assert hash(method) == hash(method_named(name, **options))
    assert type(method).__mro__[1:] in ((Method, object), (object,))
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.ratio = 0.1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "method",
    [
        Frozen(1.0),
        Griffin(1.0),
        OnlinePruning(ratio=1.0, gamma=0.0),
        OnlinePruning(ratio=0.99, gamma=0.0, prefill="dense"),
    ],
    ids=method_name,
)
def test_a_ratio_that_leaves_no_channel_is_refused_before_anything_is_compiled(
    method: Method,
) -> None:
    request = Request(PROMPTS[:1], 2, method=method)
    before = PROGRAMS.compilations
    with pytest.raises(ValueError, match="leaves no FFN channel of layer 0, which has 48: lower"):
        run(random_params(CONFIG), CONFIG, request)
    assert PROGRAMS.compilations == before


@pytest.mark.parametrize(
    "method",
    [
        Frozen(0.7),
        Griffin(0.7),
        RescoreAll(0.7),
        OnlinePruning(ratio=0.7),
        OnlinePruning(ratio=0.5, granularity=8),
    ],
    ids=method_name,
)
def test_a_method_announces_what_its_plan_evaluates(method: Method) -> None:
    statistics = tuple(jnp.arange(1.0, layer.mlp_dim + 1) for layer in CONFIG.layers)
    channels = method.plan(CONFIG, statistics).channels
    assert channels is not None
    announced = [method.evaluated(layer.mlp_dim) for layer in CONFIG.layers]
    assert announced == [part.evaluated for part in channels]


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: OnlinePruning(), "give exactly one of ratio .* and model_ratio"),
        (lambda: OnlinePruning(ratio=0.5, model_ratio=0.2), "give exactly one of ratio"),
        (lambda: OnlinePruning(ratio=1.5), "ratio 1.5 is outside 0..1"),
        (lambda: OnlinePruning(ratio=-0.1), "ratio -0.1 is outside 0..1"),
        (lambda: OnlinePruning(ratio=math.nan), "ratio nan is outside 0..1"),
        (lambda: OnlinePruning(ratio="half"), "ratio 'half' is a str: give a Python"),  # type: ignore[arg-type]
        (lambda: Griffin(np.float32(0.3)), "is a float32: give a Python number in 0..1"),  # type: ignore[arg-type]
        (lambda: OnlinePruning(ratio=True), "ratio True is outside"),
        (lambda: OnlinePruning(model_ratio=2), "model_ratio 2 is outside 0..1"),
        (lambda: OnlinePruning(ratio=0.5, gamma=1.1), "gamma 1.1 is outside 0..1"),
        (lambda: OnlinePruning(ratio=0.5, prefill="none"), "prefill 'none' is unknown"),
        (lambda: OnlinePruning(ratio=0.5, score="up"), "score 'up' is unknown"),
        (lambda: OnlinePruning(ratio=0.5, band="wide"), "band 'wide' is unknown"),
        (
            lambda: OnlinePruning(ratio=0.5, granularity=0),
            "granularity 0 is not a whole number above 0",
        ),
        (lambda: Frozen(2.0), "ratio 2.0 is outside"),
        (lambda: Griffin(-1), "ratio -1 is outside"),
        (lambda: RescoreAll(math.inf), "ratio inf is outside"),
        (lambda: method_named("frosen", ratio=0.5), "'frosen' is unknown: .* nearest is 'frozen'"),
        (lambda: method_named("xyz"), "'xyz' is unknown: use one of dense, .*griffin.*chess$"),
        (lambda: method_named("griffin", ratio=0.5, gamma=0.1), "'griffin' has no option 'gamma'"),
        (lambda: method_named("dense", ratio=0.5), "'dense' has no option 'ratio': .* none"),
        (lambda: method_named("frozen"), "method 'frozen' needs a ratio"),
    ],
)
def test_settings_out_of_range_are_refused(make: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make()
