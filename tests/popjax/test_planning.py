"""The search for the nearest request that fits, over a compiler that only does sums."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from popjax import planning
from popjax.ahead_of_time import (
    Forecast,
    Held,
    Program,
    Workload,
    bytes_wanted,
    collectives,
    implementation_of,
)
from popjax.config import to_json
from popjax.families import model_config
from popjax.methods import Frozen, Method, OnlinePruning, method_name
from popjax.targets import parse_target
from tests.popjax.published_models import LLAMA_31_8B

CONFIG = model_config(LLAMA_31_8B)
MIB = 2**20


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Workload]:
    """A v5e of 100 MiB, a model of 80 MiB, a cache of 1 KiB a slot, as much again beside it.

    Yields what was compiled. One chip or a power of two of them share the model.
    """
    asked: list[Workload] = []

    def weights_and_cache(workload: Workload) -> tuple[int, int]:
        slots = workload.batch * workload.slots
        return 80 * MIB // workload.target.chips, 1024 * slots // workload.target.chips

    def forecast(workload: Workload) -> Forecast:
        asked.append(workload)
        weights, cache = weights_and_cache(workload)
        held = Held(weights, 0, cache, 0, cache, 0)
        program = Program(compile_seconds=0.0)
        return Forecast(
            "online-pruning",
            "xla",
            {},
            program,
            program,
            held,
            held,
            100 * MIB,
            weights,
            cache,
            1.0,
        )

    monkeypatch.setattr(planning, "weights_and_cache", weights_and_cache)
    monkeypatch.setattr(planning, "forecast", forecast)
    return asked


def nearest(compiled: list[Workload], target: str, context: int, batch: int) -> Workload | None:
    """The nearest to a request, and no compilation forgotten."""
    method = OnlinePruning(ratio=0.5)
    workload = Workload(CONFIG, method, parse_target(target), context, batch)
    asked = planning.forecast(workload)
    compiled.clear()
    assert not asked.fits
    return planning.nearest_fit(workload, asked, lambda text: None)


def test_a_shorter_context_comes_first(compiled: list[Workload]) -> None:
    found = nearest(compiled, "v5e:1x1", 16384, 1)
    assert found is not None
    # 10,240 slots would fit: the bucket of 8,192 prompt slots is the largest below.
    assert (found.context, found.batch, str(found.target)) == (8192 + 256, 1, "v5e:1x1")
    assert compiled == [found], "the estimate spares what cannot fit"


def test_then_a_smaller_batch(compiled: list[Workload]) -> None:
    found = nearest(compiled, "v5e:1x1", 1024, 64)
    assert found is not None
    assert (found.context, found.batch) == (1024, 8)


def test_then_more_chips(compiled: list[Workload], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "SHORTEST_CONTEXT", 32768)
    found = nearest(compiled, "v5e:1x1", 32768, 1)
    assert found is not None
    assert (found.context, str(found.target)) == (32768, "v5e:2x2")


def test_a_model_too_large_for_the_largest_has_no_nearest(
    compiled: list[Workload], monkeypatch: pytest.MonkeyPatch
) -> None:
    large = planning.forecast

    def larger(workload: Workload) -> Forecast:
        return dataclasses.replace(large(workload), usable=0)

    monkeypatch.setattr(planning, "forecast", larger)
    assert nearest(compiled, "v5e:16x16", 8192, 1) is None
    assert compiled == []


def test_chips_that_cannot_share_the_model_lead_to_some_that_can(
    compiled: list[Workload], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = planning.weights_and_cache

    def uneven(workload: Workload) -> Any:
        if workload.target.chips > 4:
            raise ValueError("K = 8 is not a multiple of 3")
        return counted(workload)

    monkeypatch.setattr(planning, "weights_and_cache", uneven)
    workload = Workload(CONFIG, OnlinePruning(ratio=0.5), parse_target("v5e:4x4"), 1024)
    with pytest.raises(ValueError, match=r"multiple of 3; the nearest that fits: --target v5e:2x2"):
        planning._check_shared(workload, lambda text: None)


def test_contexts_stay_inside_the_model_and_above_the_new_tokens() -> None:
    with pytest.raises(ValueError, match="is above the model's longest, 32768"):
        Workload(CONFIG, OnlinePruning(ratio=0.5), parse_target("v5e"), 32769)
    with pytest.raises(ValueError, match="must exceed the 256 new ones"):
        Workload(CONFIG, OnlinePruning(ratio=0.5), parse_target("v5e"), 256)
    with pytest.raises(ValueError, match="batch 0"):
        Workload(CONFIG, OnlinePruning(ratio=0.5), parse_target("v5e"), 1024, 0)


@pytest.mark.parametrize(
    ("method", "complaint"),
    [
        (Frozen(1.0), "leaves no FFN channel of layer 0, which has 14336: lower the ratio"),
        (OnlinePruning(model_ratio=1.0), "model_ratio 1.0 needs an FFN ratio of .* above 1"),
    ],
)
def test_a_method_that_cannot_apply_is_refused_before_anything_is_compiled(
    compiled: list[Workload], method: Method, complaint: str
) -> None:
    request = {
        "config": to_json(CONFIG),
        "method": method_name(method),
        "options": dataclasses.asdict(method),
        "target": "v5e",
        **{"context": 1024, "batch": 1, "new_tokens": 256, "dtype": "bfloat16"},
    }
    with pytest.raises(ValueError, match=complaint):
        planning.planned(request, lambda text: None)
    assert compiled == []


def test_collectives_are_counted_where_they_start() -> None:
    text = """
      %all-reduce.1 = f32[8]{0} all-reduce(%x), replica_groups={}
      %ar-start = (f32[8], f32[8]) all-reduce-start(%x), channel_id=2
      %ar-done = f32[8] all-reduce-done(%ar-start)
      %g = f32[16]{0} all-gather(%all-reduce.1), dimensions={0}
    """
    assert collectives(text) == {"all-reduce": 2, "all-gather": 1}


def test_the_bytes_of_a_refusal_are_read() -> None:
    said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 21.50G of 15.75G hbm."
    assert bytes_wanted(said) == int(21.5 * 2**30)
    said = "required for HLO temporaries (400.00M) exceeds available HBM (15.75G). HLO module: jit"
    assert bytes_wanted(said) == 400 * MIB
    assert bytes_wanted("no number") == 0


def test_a_process_without_an_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="ended with code 1 and no answer"):
        planning.ask({}, lambda text: None)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "pallas_tpu"),
        ({"batch": 64}, "pallas_tpu"),
        ({"batch": 65}, "xla"),
        ({"dtype": "float16"}, "xla"),
        ({"config": dataclasses.replace(CONFIG, embed_dim=576)}, "xla"),
        ({"batch": 65, "implementation": "pallas_tpu"}, "pallas_tpu"),
    ],
)
def test_steps_are_computed_as_a_run_would_compute_them(
    change: dict[str, Any], expected: str
) -> None:
    workload = Workload(CONFIG, OnlinePruning(ratio=0.5), parse_target("v5e:2x2"), 2048)
    assert implementation_of(dataclasses.replace(workload, **change)) == expected
