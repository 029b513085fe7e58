"""Benchmarks take turns, keep phases apart, and claim nothing that their spread does not show."""

import dataclasses
import json
from typing import Any

import jax
import pytest

from popjax.bench import BenchResult, MethodBench, Spread, bench, interleaved, speedup_text
from popjax.buckets import left_padded
from popjax.config import ModelConfig
from popjax.depth import PrefillPruning
from popjax.eviction import SnapKV
from popjax.generate import PROGRAMS, Options
from popjax.methods import Frozen, Method, OnlinePruning, RescoreAll
from popjax.report import weight_bytes
from popjax.run import Request, run
from popjax.sparsity import Params, channel_budget
from tests.popjax.tiny_models import CONFIGS, PROMPTS, random_params


@dataclasses.dataclass(frozen=True)
class Tiny:
    config: ModelConfig
    params: Params


TINY = Tiny(CONFIGS["llama"], random_params(CONFIGS["llama"]))
METHODS: dict[str, Method] = {"frozen": Frozen(0.5), "rescore-all": RescoreAll(0.5)}


@pytest.fixture(scope="module")
def result() -> BenchResult:
    return bench(
        TINY, METHODS, prompt_ids=PROMPTS[:1], new_tokens=6, rounds=3, implementation="xla"
    )


def timed(name: str, steps: tuple[float, ...], read: int = 1) -> MethodBench:
    spread = Spread(steps)
    return MethodBench(name, *[spread] * 5, 0.0, read, 1, 0, 1)


def test_rounds_take_turns_and_rotate() -> None:
    order: list[str] = []
    finished: list[int] = []

    def measure(name: str) -> Any:
        return lambda: order.append(name) or len(order)

    found = interleaved({n: measure(n) for n in "abc"}, 4, finished.append)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert finished == [1, 2, 3, 4]
    assert found["b"] == (2, [5, 7, 12, 14])


def test_a_spread_is_taken_round_by_round() -> None:
    dense, fast = Spread((4.0, 6.0, 9.0)), Spread((2.0, 2.0, 9.0))
    ratio = dense.over(fast)
    assert ratio.rounds == (2.0, 3.0, 1.0)
    assert (ratio.low, ratio.median, ratio.high) == (1.0, 2.0, 3.0)


@pytest.mark.parametrize(
    ("rounds", "text"),
    [
        ((1.5, 1.4, 1.8), "1.50 times faster (ratio 1.40..1.80 over 3 rounds)"),
        ((0.5, 0.4, 0.8), "2.00 times slower (ratio 0.40..0.80 over 3 rounds)"),
        ((1.5, 0.99, 1.8), "no speed-up shown: 0.99..1.80 over 3 rounds contains 1"),
        ((1.5,), "no speed-up shown: 1.50..1.50 over 1 round, and fewer than 3 show none"),
        ((1.5, 1.0, 1.8), "no speed-up shown: 1.00..1.80 over 3 rounds contains 1"),
    ],
)
def test_no_speed_up_is_claimed_where_the_spread_contains_one(
    rounds: tuple[float, ...], text: str
) -> None:
    assert speedup_text(Spread(rounds)) == text


def test_ratios_are_dense_over_method() -> None:
    rows = (timed("dense", (4.0, 4.0, 3.0), read=10), timed("fast", (2.0, 1.0, 1.0), read=5))
    result = BenchResult(1, 8, 4, rows)
    assert result.ratio("fast").rounds == (2.0, 4.0, 3.0)
    assert result.bytes_ratio("fast") == 2.0
    assert result.speedup("fast").startswith("3.00 times faster")


def test_dense_comes_first_and_every_phase_of_every_round_is_kept(result: BenchResult) -> None:
    assert [row.name for row in result.methods] == ["dense", "frozen", "rescore-all"]
    assert (result.batch, result.prompt_tokens, result.new_tokens) == (1, len(PROMPTS[0]), 6)
    for row in result.methods:
        for phase in (row.prefill, row.plan, row.pack, row.decode_step):
            assert len(phase.rounds) == 3 and phase.low > 0


def test_bytes_are_those_of_the_arrays(result: BenchResult) -> None:
    dense, frozen, rescore = result.methods
    held = weight_bytes(TINY.params)
    rows = sum(channel_budget(layer.mlp_dim, 0.5).active for layer in TINY.config.layers)
    channels = sum(layer.mlp_dim for layer in TINY.config.layers)
    row_bytes = 3 * TINY.config.embed_dim * 4
    assert dense.weight_bytes == frozen.weight_bytes == held
    assert (dense.packed_bytes, frozen.packed_bytes) == (0, rows * row_bytes)
    assert dense.read_bytes - frozen.read_bytes == (channels - rows) * row_bytes
    # All channels are evaluated, and through XLA all of down is read too.
    assert rescore.read_bytes == dense.read_bytes and rescore.packed_bytes == 0
    table = TINY.config.vocab_size * TINY.config.embed_dim * 4
    assert dense.read_bytes == held - table + TINY.config.embed_dim * 4


def test_json_holds_every_number_and_the_verdict(result: BenchResult) -> None:
    values = json.loads(json.dumps(result.to_json(), allow_nan=False))
    frozen = values["methods"][1]
    assert frozen["decode_step"]["rounds"] == list(result["frozen"].decode_step.rounds)
    assert frozen["decode_step"]["median"] == result["frozen"].decode_step.median
    assert frozen["ratio_to_dense"]["rounds"] == list(result.ratio("frozen").rounds)
    assert frozen["speedup"] == result.speedup("frozen")
    assert "speedup" not in values["methods"][0]


def test_rounds_compile_nothing_and_the_warm_up_says_what_it_compiled() -> None:
    # A ratio that no other test uses: its programs are new to the process.
    methods = {"online-pruning": OnlinePruning(ratio=0.4375)}
    counts: list[int] = []
    before = PROGRAMS.compilations
    result = bench(
        TINY,
        methods,
        prompt_ids=PROMPTS[:1],
        new_tokens=6,
        rounds=2,
        on_round=lambda done: counts.append(PROGRAMS.compilations),
    )
    assert before < counts[0] == counts[1]
    assert result["online-pruning"].compile > 0


def test_dense_pays_nothing_for_methods() -> None:
    """Its programs observe, plan and mask nothing: no output exists that a method would need."""
    arguments = (TINY.params, left_padded(PROMPTS[:1]), None)
    static = {"config": TINY.config, "capacity": 32}
    dense = PROGRAMS.prefill(*arguments, method=Method(), **static)
    frozen = PROGRAMS.prefill(*arguments, method=Frozen(0.5), **static)
    assert jax.tree.leaves((dense.statistics, dense.masks)) == []
    assert len(jax.tree.leaves(frozen.statistics)) == TINY.config.num_layers
    options = Options(record_masks=True)
    result = run(TINY.params, TINY.config, Request(PROMPTS[:1], 4, options=options))
    assert result.partition is None and result.masks is None and result.packed_bytes == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"new_tokens": 1}, "new_tokens 1 is below 2"),
        ({"rounds": 0}, "rounds 0 is below 1"),
        ({"new_tokens": 60}, "maximum context length"),
        ({"methods": {"dense": Frozen(0.5)}}, "'dense' means no pruning"),
    ],
)
def test_what_cannot_be_timed_is_refused(arguments: dict[str, Any], message: str) -> None:
    asked = {"methods": METHODS, "prompt_ids": PROMPTS[:1], "new_tokens": 4, "rounds": 1}
    with pytest.raises(ValueError, match=message):
        bench(TINY, **{**asked, **arguments})


def test_layers_and_entries_are_timed_beside_channels() -> None:
    result = bench(
        TINY,
        {"frozen, snapkv": Frozen(0.5)},
        depths={"prefill-pruning": PrefillPruning(choose=(1,))},
        evictions={"snapkv": SnapKV(tokens=4, window=2), "frozen, snapkv": SnapKV(keep=0.5)},
        prompt_ids=PROMPTS[:1],
        new_tokens=2,
        rounds=1,
        implementation="xla",
    )
    assert [row.name for row in result.methods] == [
        "dense",
        "prefill-pruning",
        "snapkv",
        "frozen, snapkv",
    ]
    assert result["snapkv"].evict.median > result["dense"].evict.median
    assert result["snapkv"].cache_bytes < result["dense"].cache_bytes
    assert result["frozen, snapkv"].packed_bytes > 0 == result["snapkv"].packed_bytes
    with pytest.raises(ValueError, match="'dense' means every entry"):
        bench(TINY, {}, prompt_ids=PROMPTS[:1], evictions={"dense": SnapKV(keep=0.5)})
