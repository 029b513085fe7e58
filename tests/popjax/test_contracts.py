"""What every method promises on every family: one reference run a pair, looked at from all sides.

Every pair prunes nothing as dense, and what it is asked for; rows and streams know nothing of what
the newer families add, so there one method speaks for all.

Runs are bit-equal where they execute the same program, or the same products of the same arrays;
elsewhere logits may differ by the rounding of a reordered sum, and tokens and masks by nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import native
from popjax.buckets import bucket, left_padded
from popjax.config import ModelConfig
from popjax.generate import PROGRAMS, Options
from popjax.methods import Frozen, GateFirst, Griffin, Method, OnlinePruning, RescoreAll, Scout
from popjax.nn.transformer import Inputs
from popjax.packing import pack
from popjax.run import Request, RunResult, run
from popjax.sampling import SamplingConfig
from popjax.scouts import make_scouts, with_scouts
from tests.popjax.asked_counts import asked_of
from tests.popjax.same_runs import assert_same, logits_of
from tests.popjax.tiny_models import (
    CONFIGS,
    NEWER,
    PROMPTS,
    VOCAB,
    logit_tolerance,
    random_params,
)

METHODS: dict[str, Method] = {
    "dense": Method(),
    # A wide band, so that masks have something to choose from.
    "online": OnlinePruning(ratio=0.5, gamma=0.3),
    "online-dense": OnlinePruning(ratio=0.5, gamma=0.3, prefill="dense"),
    "online-probe": OnlinePruning(ratio=0.5, gamma=0.3, prefill="probe"),
    "online-shared": OnlinePruning(ratio=0.5, gamma=0.3, shared="pruned"),
    "frozen": Frozen(0.5),
    "rescore": RescoreAll(0.5),
    "griffin": Griffin(0.5),
    "gate-first": GateFirst(0.5),
    # Two layers are both ends, which by default stay whole.
    "scout": Scout(0.5, ends="pruned", group=32),
    "scout-half": Scout(0.25, ends="pruned", group=32, bits=6, copied=0.5),
}
# The default on one CPU is the kernels, so plain names run on them; these name the other form.
KERNEL_PAIRS = ("dense", "online", "frozen", "rescore", "griffin", "gate-first")
XLA = tuple(f"{name}/xla" for name in KERNEL_PAIRS)
METHODS |= {name: METHODS[name.removesuffix("/xla")] for name in XLA}
NEW = 12
NEVER = (VOCAB,)  # an end token that is not in the vocabulary
EVERYTHING = Options(logits=True, record_masks=True)
ONLINE = ("online", "online-shared")
SCOUTS = {name: method for name, method in METHODS.items() if isinstance(method, Scout)}
VARIANTS = ("online-dense", "online-probe", "online-shared")
PAIRS = [
    (family, name)
    for family in CONFIGS
    for name in METHODS
    if name not in (*VARIANTS, *XLA) or family in ("llama", "qwen3", "opt", "qwen2_moe")
]
# Which tokens an expert sees is a method's business: a part of a prompt does not show it.
PAIRS.remove(("qwen2_moe", "online-probe"))
# Only this family has an FFN beside its experts.
PAIRS = [pair for pair in PAIRS if pair[0] == "qwen2_moe" or pair[1] != "online-shared"]
# Half of one layer is none.
PAIRS = [pair for pair in PAIRS if pair[0] == "llama" or pair[1] != "scout-half"]
# A choice by the gate needs one, and is not made among experts.
WITHOUT_GATES = ("opt", "gpt_neox", "qwen2_moe")
PAIRS = [
    (family, name)
    for family, name in PAIRS
    if family not in WITHOUT_GATES or not name.startswith(("gate-first", "scout"))
]
PRUNED = [pair for pair in PAIRS if not pair[1].startswith("dense")]
REPLAYED = [pair for pair in PRUNED if pair[0] == "llama" or pair[1] in ONLINE]
MASKED = [pair for pair in PAIRS if pair[1] in (*ONLINE, "rescore", "gate-first", *SCOUTS)]
SCORED = [pair for pair in PAIRS if pair[0] == "llama" or pair[1] in ONLINE]
# One method a newer family.
FEWER = [pair for pair in PAIRS if pair[0] not in NEWER or pair[1] in ("dense", "online")]
# Families differ in attention and methods in the FFN, so these pairs show what any other would;
# once planned, Griffin is Frozen.
TELLING = [
    (family, name)
    for family, name in PAIRS
    if (family == "llama" and name != "griffin/xla")
    or (family, name) == ("qwen2_moe", "online/xla")
    or name in ONLINE
    or (name == "dense" and family not in ("llama3", *NEWER))
]


# Rows, replays and scores pass through what families share: one of each kind shows them.
KEY = ("llama", "gemma2", "qwen2_moe")


def over(
    pairs: list[tuple[str, str]], families: tuple[str, ...] = tuple(CONFIGS)
) -> pytest.MarkDecorator:
    """Parameters for all pairs, of which those that repeat what others show are slow."""
    telling = [pair for pair in TELLING if pair[0] in families]
    rows = [
        pytest.param(*pair, marks=[] if pair in telling else [pytest.mark.slow]) for pair in pairs
    ]
    return pytest.mark.parametrize(("family", "name"), rows)


def config_of(family: str) -> ModelConfig:
    """Two layers of llama, where layers meet; one of the others, which differ within a layer."""
    config = CONFIGS[family]
    return config if family == "llama" else dataclasses.replace(config, layers=config.layers[:1])


@functools.cache
def params_of(family: str, name: str = "dense") -> dict[str, Any]:
    """Parameters of a family, with scouts where the method needs them."""
    config = config_of(family)
    if name not in SCOUTS:
        return random_params(config)
    plain, method = params_of(family), SCOUTS[name]
    form = {"bits": method.bits, "group": method.group, "copied": method.copied}
    return with_scouts(plain, make_scouts(plain, config, ends=True, **form))


def request(name: str, **changes: Any) -> Request:
    options = EVERYTHING
    if name in XLA:
        options = dataclasses.replace(options, implementation="xla")
    base = Request(PROMPTS, NEW, method=METHODS[name], eos_ids=NEVER, options=options)
    return dataclasses.replace(base, **changes)


def ran(family: str, asked: Request) -> RunResult:
    name = next((k for k, method in SCOUTS.items() if method == asked.method), "dense")
    return run(params_of(family, name), config_of(family), asked)


@functools.cache
def reference(family: str, name: str) -> RunResult:
    return ran(family, request(name))


def masks_of(result: RunResult) -> list[np.ndarray]:
    assert result.masks is not None
    return [np.asarray(mask) for mask in result.masks]


def assert_same_run(family: str, result: RunResult, wanted: RunResult, rows: Any = ...) -> None:
    """Equal tokens and masks, and logits equal up to the order of summation."""
    assert_same(config_of(family), result, wanted, rows)
    if wanted.masks is not None:
        for mask, other in zip(masks_of(result), masks_of(wanted), strict=True):
            assert (mask == other[:, rows]).all()


@over(PAIRS)
def test_runs_are_computed_as_asked(family: str, name: str) -> None:
    assert native.available(), native.status().reason
    assert reference(family, name).implementation == ("xla" if name in XLA else "auto")


@over([pair for pair in PAIRS if pair[1] in XLA])
def test_the_kernels_agree_with_xla(family: str, name: str) -> None:
    kernels = reference(family, name.removesuffix("/xla"))
    assert_same_run(family, reference(family, name), kernels)


@over(PRUNED)
def test_pruning_nothing_is_dense_bit_for_bit(family: str, name: str) -> None:
    everything = dataclasses.replace(METHODS[name], ratio=0.0)  # type: ignore[call-arg]
    result = ran(family, request(name, method=everything))
    dense = reference(family, "dense/xla" if name in XLA else "dense")
    assert (logits_of(result) == logits_of(dense)).all()
    assert (result.tokens == dense.tokens).all()
    assert result.packed_bytes == 0


@over(PRUNED)
def test_counts_are_those_asked_for(family: str, name: str) -> None:
    result = reference(family, name)
    assert result.partition is not None
    layers = zip(result.partition, masks_of(result), config_of(family).layers, strict=True)
    for part, mask, layer in layers:
        asked = asked_of(METHODS[name], layer.channels)
        found = (part.num_retained, part.num_candidate, part.k_selected)
        assert found == (asked.retained, asked.candidate, asked.k_selected)
        assert mask.shape == (NEW - 1, len(PROMPTS), part.evaluated)
        ours = isinstance(METHODS[name], GateFirst | Scout)
        half = asked.active if ours else layer.channels // 2
        evaluated, active = (layer.routed * n for n in (asked.evaluated, half))
        if name == "online-shared":
            evaluated += asked_of(METHODS[name], layer.mlp_dim).evaluated
            active += layer.mlp_dim // 2
        assert part.evaluated == evaluated
        assert (mask.sum(axis=-1) == active).all()


@over(MASKED)
def test_masks_differ_between_steps_and_rows(family: str, name: str) -> None:
    for mask in masks_of(reference(family, name)):
        assert not (mask[1:] == mask[:1]).all()
        assert not (mask[:, 1:] == mask[:, :1]).all()


@over(FEWER, KEY)
def test_a_row_alone_is_the_row_of_the_batch(family: str, name: str) -> None:
    """Rows 0 and 2 alone also fit a smaller bucket, so this is padded against unpadded too."""
    wanted = reference(family, name)
    for row in (0, 2):
        assert bucket(len(PROMPTS[row])) < bucket(max(map(len, PROMPTS)))
        alone = request(name, prompts=[PROMPTS[row]], partition=wanted.partition)
        assert_same_run(family, ran(family, alone), wanted, rows=[row])


@pytest.mark.parametrize("name", ["dense", "online"])
def test_a_row_with_its_own_seed_samples_the_same_alone(name: str) -> None:
    sampling = SamplingConfig(do_sample=True, temperature=1.5, top_p=0.9)
    seeds = [11, 12, 13]
    together = ran("llama", request(name, sampling=sampling, seed=seeds))
    assert together.tokens.tolist() != reference("llama", name).tokens.tolist()
    for row in (0, 2):
        alone = request(
            name,
            prompts=[PROMPTS[row]],
            partition=together.partition,
            sampling=sampling,
            seed=[seeds[row]],
        )
        assert_same_run("llama", ran("llama", alone), together, rows=[row])


@over(REPLAYED, KEY)
def test_recorded_partition_and_masks_replay_the_run(family: str, name: str) -> None:
    wanted = reference(family, name)
    result = ran(family, request(name, partition=wanted.partition, masks=wanted.masks))
    assert_same_run(family, result, wanted)


@pytest.mark.parametrize("name", ["online", "rescore", "gate-first", *SCOUTS])
def test_foreign_masks_are_obeyed(name: str) -> None:
    wanted = reference("llama", name)
    masks = tuple(jnp.asarray(mask[::-1]) for mask in masks_of(wanted))
    result = ran("llama", request(name, partition=wanted.partition, masks=masks))
    for used, given in zip(masks_of(result), masks, strict=True):
        assert (used == np.asarray(given)).all()
    assert result.tokens[:, 1:].tolist() != wanted.tokens[:, 1:].tolist()


@over(FEWER)
def test_streamed_is_unstreamed(family: str, name: str) -> None:
    wanted, chunk = reference(family, name), 5
    heard: list[np.ndarray] = []

    def listen(tokens: np.ndarray, done: np.ndarray) -> np.ndarray:
        heard.append(tokens)
        return np.zeros_like(done)

    result = ran(family, request(name, chunk=chunk, on_chunk=listen))
    assert (logits_of(result) == logits_of(wanted)).all()
    assert (result.tokens == wanted.tokens).all()
    assert [tokens.shape[1] for tokens in heard] == [*range(1, NEW, chunk), NEW]
    assert all((tokens == wanted.tokens[:, : tokens.shape[1]]).all() for tokens in heard)


@over(FEWER)
def test_a_second_prompt_of_a_bucket_compiles_nothing(family: str, name: str) -> None:
    first = reference(family, name)
    prompts = [[3] * 17, [44, 2], [8, 9, 10, 11, 12, 13]]
    before = PROGRAMS.compilations
    result = ran(family, request(name, prompts=prompts, max_new_tokens=9, seed=5))
    assert PROGRAMS.compilations == before
    assert result.compilations == 0
    assert result.tokens[:, :9].tolist() != first.tokens[:, :9].tolist()


@pytest.mark.parametrize(
    ("family", "name"), [("llama", "rescore"), ("qwen3", "online"), ("llama", "gate-first")]
)
def test_gathering_chosen_rows_agrees_with_masking(family: str, name: str) -> None:
    options = dataclasses.replace(EVERYTHING, implementation="xla_gathered")
    assert_same_run(family, ran(family, request(name, options=options)), reference(family, name))


@over(SCORED, KEY)
def test_teacher_forced_scores_are_those_of_single_steps(family: str, name: str) -> None:
    wanted, config, params = reference(family, name), config_of(family), params_of(family, name)
    static = {"config": config, "method": METHODS[name]}
    inputs = left_padded(PROMPTS)
    capacity = inputs.tokens.shape[1] + bucket(NEW)
    cache = PROGRAMS.prefill(params, inputs, None, **static, capacity=capacity).cache
    packed = wanted.partition
    if packed is not None:
        params, static["config"], packed = pack(params, config, packed)
    positions = inputs.positions[:, -1:] + 1 + jnp.arange(NEW - 1, dtype=jnp.int32)[None, :]
    given = Inputs(jnp.asarray(wanted.tokens[:, :-1]), positions)
    logits = np.asarray(PROGRAMS.score(params, given, cache, packed, **static))
    expected = logits_of(wanted)
    tolerance = logit_tolerance(config, expected)
    np.testing.assert_allclose(logits, expected[:, 1:], rtol=0, atol=tolerance)


@over(FEWER)
def test_a_finished_row_leaves_the_others_as_they_were(family: str, name: str) -> None:
    wanted = reference(family, name)
    end = int(wanted.tokens[2, 2])
    result = ran(family, request(name, eos_ids=(end,)))
    for row in range(len(PROMPTS)):
        tokens = wanted.tokens[row].tolist()
        count = tokens.index(end) + 1 if end in tokens else NEW
        assert (bool(result.stopped[row]), result.counts[row]) == (end in tokens, count)
        assert result.tokens[row, :count].tolist() == tokens[:count]
        assert (logits_of(result)[row, :count] == logits_of(wanted)[row, :count]).all()


SHARED = OnlinePruning(ratio=0.5, gamma=0.3, batch_shared=True)


@functools.cache
def shared_reference() -> RunResult:
    return ran("llama", request("online", method=SHARED))


def test_a_shared_mask_is_one_for_all_rows() -> None:
    shared = shared_reference()
    for mask in masks_of(shared):
        assert (mask == mask[:, :1]).all()
        assert not (mask == mask[:1]).all()


def test_a_finished_row_has_no_vote_in_a_shared_mask() -> None:
    """With row 2 over after its first token, the others decode as the batch of two they now are."""
    shared = shared_reference()
    end = (int(shared.tokens[2, 0]),)
    assert end[0] not in shared.tokens[:2, 0]
    three = request("online", method=SHARED, eos_ids=end, partition=shared.partition)
    result, pair = (
        ran("llama", three),
        ran("llama", dataclasses.replace(three, prompts=PROMPTS[:2])),
    )
    assert result.counts[2] == 1
    assert result.tokens[:2].tolist() == pair.tokens.tolist()
    for mask, other in zip(masks_of(result), masks_of(pair), strict=True):
        assert (mask[:, :2] == other).all()
    voted = zip(masks_of(result), masks_of(shared), strict=True)
    assert not all((mask[0] == other[0]).all() for mask, other in voted)
