"""Routers, the three forms of a mixture, and a partition for each expert, against plain NumPy."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

import checkpoints
from checkpoints import CheckpointError
from popjax import loading
from popjax.cli import app
from popjax.config import MoeConfig, from_json, to_json
from popjax.evaluation.encoding import Pair
from popjax.evaluation.protocols import SINGLE_PASS, SPLIT, Case
from popjax.evaluation.scoring import Scorer
from popjax.eviction import LaProx
from popjax.expert_partition import ExpertPartition
from popjax.families import FAMILIES
from popjax.families.mixture import dense_layers
from popjax.generate import Options
from popjax.methods import Frozen, Method, OnlinePruning
from popjax.methods.experts import ExpertActs
from popjax.nn import expert_rows
from popjax.nn import moe as mixture
from popjax.report import layer_reports
from popjax.run import Request, RunResult, run
from tests.popjax.tiny_models import MIXTURES, PROMPTS, random_params, tiny

E, K, D, M, N = 5, 2, 16, 12, 23
MOE = MoeConfig(E, K, M)
RNG = np.random.default_rng(3)
X = RNG.standard_normal((N, D)).astype(np.float32)
ROUTER = RNG.standard_normal((E, D)).astype(np.float32)
WEIGHTS = {
    name: jnp.asarray(RNG.standard_normal((E, M, D)), jnp.float32) / 4
    for name in ("gate", "up", "down")
}
VALID = np.arange(N) % 7 != 3


def numpy_routes(moe: MoeConfig) -> tuple[np.ndarray, np.ndarray]:
    """Experts [N, k] and weights [N, k] of every token, by the book."""
    logits = X.astype(np.float64) @ ROUTER.T
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    experts = np.argsort(-shares, axis=-1, kind="stable")[:, : moe.top_k]
    weights = np.take_along_axis(shares, experts, axis=-1)
    return experts, weights / weights.sum(-1, keepdims=True) if moe.renormalise else weights


def numpy_channels(token: int, expert: int) -> np.ndarray:
    gate, up = (np.asarray(WEIGHTS[name], np.float64)[expert] @ X[token] for name in ("gate", "up"))
    return gate / (1 + np.exp(-gate)) * up


@pytest.mark.parametrize("renormalise", [True, False])
def test_routes_are_the_best_experts_and_padding_goes_nowhere(renormalise: bool) -> None:
    moe = dataclasses.replace(MOE, renormalise=renormalise)
    routes = mixture.route(jnp.asarray(X), jnp.asarray(ROUTER), moe, jnp.asarray(VALID))
    experts, weights = numpy_routes(moe)
    np.testing.assert_array_equal(routes.experts, np.where(VALID[:, None], experts, E))
    np.testing.assert_allclose(routes.weights, weights, rtol=1e-5)


def test_equal_experts_go_by_their_number() -> None:
    router = jnp.asarray(np.repeat(ROUTER[:1], E, axis=0))
    routes = mixture.route(jnp.asarray(X), router, MOE, jnp.ones((N,), bool))
    np.testing.assert_array_equal(routes.experts, np.tile([0, 1], (N, 1)))
    np.testing.assert_allclose(routes.weights, 0.5)


def test_experts_of_another_device_are_nowhere() -> None:
    """Two devices that hold some of the experts each give the sum of one that holds all."""
    valid, whole = jnp.asarray(VALID), numpy_output()
    total = np.zeros_like(whole)
    for first, held in ((0, 3), (3, 2)):
        here = dataclasses.replace(MOE, held=held)
        routes = mixture.route(jnp.asarray(X), jnp.asarray(ROUTER), here, valid, first)
        weights = {name: w[first : first + held] for name, w in WEIGHTS.items()}
        total += np.asarray(mixture.ragged(jnp.asarray(X), routes, weights, "silu"))
    np.testing.assert_allclose(total, whole, atol=1e-5)


def numpy_output() -> np.ndarray:
    experts, weights = numpy_routes(MOE)
    y, down = np.zeros((N, D)), np.asarray(WEIGHTS["down"], np.float64)
    for n in np.flatnonzero(VALID):
        for j in range(K):
            y[n] += weights[n, j] * numpy_channels(int(n), experts[n, j]) @ down[experts[n, j]]
    return y


def test_dense_ragged_and_listed_forms_are_one_function() -> None:
    x, valid = jnp.asarray(X), jnp.asarray(VALID)
    routes, wanted = mixture.route(x, jnp.asarray(ROUTER), MOE, valid), numpy_output()
    for form in (mixture.dense, mixture.ragged):
        y = jax.jit(form, static_argnames="activation")(x, routes, WEIGHTS, activation="silu")
        np.testing.assert_allclose(y, wanted, atol=1e-5)
        assert not np.asarray(y)[~VALID].any()
    rows = expert_rows.rows_of(routes, (E, M, D), jnp.arange(M, dtype=jnp.int32)[None, :])
    h = expert_rows.listed_channels(x, rows, WEIGHTS, "silu")
    listed = np.asarray(expert_rows.listed_output(h, rows, routes, WEIGHTS))
    np.testing.assert_allclose(listed, wanted, atol=1e-5)
    assert not listed[~VALID].any()


@pytest.mark.parametrize("tokens", [0, 1, 200])
def test_any_number_of_tokens_may_meet_in_one_expert(tokens: int) -> None:
    """None at all (a batch of padding), a prompt of one token, and more than a block holds."""
    x = jnp.asarray(RNG.standard_normal((max(tokens, 4), D)), jnp.float32)
    valid = jnp.arange(x.shape[0]) < tokens
    bias = jnp.zeros((E, D)).at[2].set(x[0])
    routes = mixture.route(x, bias, MOE, valid)
    forms = [form(x, routes, WEIGHTS, "silu") for form in (mixture.dense, mixture.ragged)]
    np.testing.assert_allclose(forms[1], forms[0], atol=1e-5)
    assert np.isfinite(np.asarray(forms[1])).all()


@pytest.mark.parametrize("gate_weighted", [False, True])
def test_an_expert_is_scored_by_the_tokens_routed_to_it(gate_weighted: bool) -> None:
    x, valid = jnp.asarray(X), jnp.asarray(VALID)
    routes = mixture.route(x, jnp.asarray(ROUTER), MOE, valid)
    method = OnlinePruning(0.5, expert_weighting=gate_weighted)
    found = method.observe(WEIGHTS, ExpertActs(x, routes, WEIGHTS, "silu"))
    experts, weights = numpy_routes(MOE)
    squares, counts = np.zeros((E, M)), np.zeros(E)
    for n in np.flatnonzero(VALID):
        for j in range(K):
            share = weights[n, j] if gate_weighted else 1.0
            squares[experts[n, j]] += (share * numpy_channels(int(n), experts[n, j])) ** 2
            counts[experts[n, j]] += 1
    norms = {
        name: np.linalg.norm(np.asarray(w, np.float64), axis=-1) for name, w in WEIGHTS.items()
    }
    np.testing.assert_allclose(found.scores, np.sqrt(squares) * norms["down"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(np.asarray(found.tokens) ** 2, counts, rtol=1e-6)
    # Weights speak for experts that too few tokens went to.
    assert counts.min() < 7 <= counts.max()
    few = dataclasses.replace(method, min_tokens=7)
    found = few.observe(WEIGHTS, ExpertActs(x, routes, WEIGHTS, "silu"))
    wanted = norms["gate"] * norms["up"] * norms["down"] * (counts < 7)[:, None]
    np.testing.assert_allclose(found.weights, wanted, rtol=1e-5)


def ran(method: Method, prompts: Any = PROMPTS, **options: Any) -> RunResult:
    config = tiny("olmoe")
    config = dataclasses.replace(config, layers=config.layers[:1])
    asked = Options(logits=True, record_masks=True, **options)
    return run(random_params(config), config, Request(prompts, 6, method=method, options=asked))


def test_unseen_experts_go_by_their_weights_or_stay_whole() -> None:
    """One token sees three of eight experts; the others cannot be ranked by it."""
    prompt = [PROMPTS[2][:1]]
    by_weights, whole = (
        ran(OnlinePruning(0.5, gamma=0.5, unseen=unseen), prompt) for unseen in ("weights", "dense")
    )
    assert by_weights.partition is not None and whole.partition is not None
    part = whole.partition[0]
    assert isinstance(part, ExpertPartition) and part.whole is not None
    unseen = np.asarray(part.whole)
    assert unseen.sum() == 5
    moe = random_params(dataclasses.replace(tiny("olmoe")))["layer_0"]["moe"]
    norms = np.prod([np.linalg.norm(moe[name], axis=-1) for name in ("gate", "up", "down")], axis=0)
    for e in np.flatnonzero(unseen):
        best = np.sort(np.argsort(-norms[e], kind="stable")[: part.num_retained])
        np.testing.assert_array_equal(by_weights.partition[0].retained[e], best)
    masks = np.asarray(whole.masks[0] if whole.masks else None).reshape(-1, 3, 24)
    assert set(masks.sum(-1).reshape(-1).tolist()) == {12, 24}
    xla = ran(OnlinePruning(0.5, gamma=0.5, unseen="dense"), prompt, implementation="xla")
    assert xla.tokens.tolist() == whole.tokens.tolist()


@pytest.mark.slow
def test_chunks_of_a_prompt_add_up() -> None:
    config = tiny("qwen3_moe")
    params, method = random_params(config), OnlinePruning(0.5, gamma=0.3, prefill="dense")
    whole = run(params, config, Request(PROMPTS, 8, method=method))
    chunked = run(params, config, Request(PROMPTS, 8, method=method, prefill_chunk=4))
    assert chunked.tokens.tolist() == whole.tokens.tolist()
    for mine, other in zip(chunked.partition or (), whole.partition or (), strict=True):
        np.testing.assert_array_equal(mine.retained, other.retained)
        np.testing.assert_array_equal(mine.candidate, other.candidate)


def test_a_token_reads_the_rows_of_its_own_experts() -> None:
    config = tiny("olmoe")
    found = ran(Frozen(0.5))
    assert found.packed_bytes == 0
    one = dataclasses.replace(config, layers=config.layers[:1])
    (by_index,) = layer_reports(one, found.partition, 4, False, by_index=("evaluated",))
    (masked,) = layer_reports(one, found.partition, 4, False)
    dense = 3 * 3 * 24 * 32 * 4
    assert (by_index.dense_bytes, by_index.read_bytes) == (dense, dense // 2)
    assert masked.read_bytes == dense


@pytest.mark.parametrize("layer", ["layer_0", "layer_1"])
def test_a_router_that_is_not_finite_is_named(layer: str) -> None:
    """That of the first layer spoils what the second shows to methods, the other the logits."""
    config = tiny("olmoe")
    params = random_params(config)
    moe = params[layer]["moe"]
    params[layer]["moe"] = {**moe, "router": moe["router"].at[3, 0].set(jnp.nan)}
    asked: list[dict[str, Any]] = [{"method": Method()}, {"method": Frozen(0.5)}]
    asked += [{"eviction": LaProx(tokens=4, window=2)}]
    for each in asked:
        with pytest.raises(ValueError, match=f"the router of {layer} has NaN"):
            run(params, config, Request(PROMPTS, 3, **each))
    pairs = [Pair((5, 6, 7), (8, 9))]
    cases = [Case("dense"), Case("frozen", Frozen(0.5))]
    for case, protocol in itertools.product(cases, (SPLIT, SINGLE_PASS)):
        with pytest.raises(ValueError, match=f"the router of {layer} has NaN"):
            list(Scorer(params, config, case, protocol).scores(pairs))


def test_a_part_of_a_prompt_does_not_show_experts() -> None:
    with pytest.raises(ValueError, match="prefill='probe' scores a part of the prompt"):
        ran(OnlinePruning(0.5, prefill="probe"))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"unseen": "random"}, "unseen 'random' is unknown"),
        ({"min_tokens": -1}, "min_tokens -1 is not a whole number"),
    ],
)
def test_bad_rules_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        OnlinePruning(0.5, **options)


@pytest.mark.parametrize("top_k", [0, 6, 2.0, True])
def test_more_experts_a_token_than_there_are_is_refused(top_k: Any) -> None:
    with pytest.raises(
        ValueError, match="num_experts_per_tok .* is outside 1..5, the number of experts"
    ):
        MoeConfig(E, top_k, M)


def test_partitions_that_do_not_fit_are_refused() -> None:
    found = ran(Frozen(0.5))
    assert found.partition is not None
    (part,) = found.partition
    doubled = part.retained.at[2, 1].set(part.retained[2, 0])
    for bad, complaint in (
        (dataclasses.replace(part, retained=doubled), "names a channel twice in one expert"),
        (dataclasses.replace(part, retained=part.retained[:4]), r"give \[8, R\]"),
        (dataclasses.replace(part, whole=jnp.ones((1,), bool)), r"whole of shape \(1,\)"),
        (dataclasses.replace(part, top_k=2), "is for 2 experts a token"),
        (dataclasses.replace(part, k_selected=1), "k_selected 1 of layer 0 is above"),
    ):
        config = tiny("olmoe")
        one = dataclasses.replace(config, layers=config.layers[:1])
        request = Request(PROMPTS, 2, method=Frozen(0.5), partition=(bad,))
        with pytest.raises(ValueError, match=complaint):
            run(random_params(one), one, request)


@pytest.mark.parametrize("family", MIXTURES)
def test_configs_survive_json(family: str) -> None:
    assert from_json(to_json(tiny(family))) == tiny(family)


def saved(folder: Path, drop: str = "", **raw: Any) -> str:
    """A Hugging Face folder of a tiny olmoe, without the tensors whose names hold `drop`."""
    config = {
        "model_type": "olmoe",
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 8,
        "num_experts_per_tok": 3,
    }
    params = random_params(FAMILIES["olmoe"].config(config))
    tensors = checkpoints.export(params, FAMILIES["olmoe"].hf_rows)
    kept = ((name, array) for name, array in tensors if not drop or drop not in name)
    checkpoints.save_safetensors(str(folder / "m"), kept, config={**config, **raw})
    return str(folder / "m")


@pytest.mark.parametrize(
    ("drop", "raw", "complaint"),
    [
        ("experts.5.up_proj", {}, r"lacks .*experts.5.up_proj.weight -> layer_0/moe/up\[5\]"),
        (
            "",
            {"num_experts": 9},
            "num_experts is 9, and the weights have 8 experts in layer 0: set",
        ),
        (
            "",
            {"num_experts": 7},
            "num_experts is 7, and the weights have 8 experts in layer 0: set",
        ),
        ("", {"intermediate_size": 20}, r"shape is wrong in .*experts.0.down_proj"),
    ],
)
def test_experts_that_disagree_with_the_config_are_named(
    tmp_path: Path, drop: str, raw: dict[str, Any], complaint: str
) -> None:
    source = loading.open_source(saved(tmp_path, drop, **raw))
    with pytest.raises(CheckpointError, match=complaint):
        loading.read_params(source)


def test_experts_are_read_into_their_slices(tmp_path: Path) -> None:
    source = loading.open_source(saved(tmp_path))
    params, _ = loading.read_params(source, dtype="float32")
    wanted = random_params(source.config)
    for name in ("router", "gate", "up", "down"):
        found = params["layer_0"]["moe"][name]
        np.testing.assert_array_equal(found, wanted["layer_0"]["moe"][name])


def test_dense_layers_that_are_no_list_are_refused() -> None:
    raw = {"num_hidden_layers": 2, "mlp_only_layers": 1}
    with pytest.raises(ValueError, match="mlp_only_layers 1 .* is not a list"):
        dense_layers(raw)


def test_inspect_says_how_many_experts_there_are(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", saved(tmp_path), "--json"])
    sizes = json.loads(result.stdout)["sizes"]
    found = [sizes[name] for name in ("expert_layers", "num_experts", "top_k", "expert_dim")]
    assert found == [1, 8, 3, 24]


def test_top_k_above_the_experts_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_experts_per_tok 9 .* outside 1..8"):
        loading.open_source(saved(tmp_path, num_experts_per_tok=9))
