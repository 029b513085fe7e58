"""What depth methods refuse, each with a sentence that says what to do."""

from __future__ import annotations

from typing import Any

import pytest

from popjax import arguments
from popjax.depth import DEPTH_METHODS, PrefillPruning, ShortGPT, depth_method_name
from popjax.depth.cost import prefill_flops
from popjax.depth.method import DepthPlan
from popjax.eviction import FastKVzip, LaProx
from popjax.methods import OnlinePruning
from popjax.prefilling import make_context
from popjax.run import Request
from tests.depth.shallow import HALF, config_of, params_of, ran, request
from tests.popjax.tiny_models import PROMPTS

NAN = float("nan")


@pytest.mark.parametrize("kind", [PrefillPruning, ShortGPT])
@pytest.mark.parametrize("skip", [NAN, -0.1, 1.1, "half", True])
def test_shares_out_of_range_are_refused(kind: Any, skip: Any) -> None:
    with pytest.raises(ValueError, match=r"skip .* (is outside|in) 0\.\.1"):
        kind(skip=skip)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"choose": "deepest"}, "choose 'deepest' is unknown"),
        ({"choose": [1]}, r"choose \[1\] is unknown.*or a tuple of layers"),
        ({"choose": (1, 1)}, "name one twice"),
        ({"choose": "scores", "importance": 5}, "importance 5 is not a path"),
        ({"choose": "scores", "importance": b"x"}, "importance b'x' is not a path"),
        ({"choose": (-1,)}, "not a whole number of at least 0"),
        ({"choose": (0.5,)}, "not a whole number of at least 0"),
        ({"choose": (1,), "skip": 0.5}, "give one"),
        ({"choose": "scores"}, "needs a file"),
        ({"importance": "file"}, "nothing else reads one"),
        ({"handle_boundary": 1}, "is not a bool"),
        ({"kv": "no"}, "is not a bool"),
        ({"eviction": "some"}, "eviction 'some' is unknown"),
    ],
)
def test_options_of_prefill_pruning(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PrefillPruning(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "either layers or importance"),
        ({"layers": (1,), "importance": "file"}, "either layers or importance"),
        ({"layers": (1,), "skip": 0.5}, "give one"),
        ({"layers": 3}, "layers 3 are not a tuple"),
        ({"layers": [1]}, r"layers \[1\] are not a tuple"),
        ({"importance": {}}, "importance {} is not a path"),
        ({"layers": (0, 1, 2, 3)}, "drop every layer"),
        ({"layers": (9,)}, r"layer 9 is outside 0\.\.3"),
    ],
)
def test_options_of_short_gpt(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ShortGPT(**options).for_model(config_of("llama"), params_of("llama"))


NO_ENTRIES = PrefillPruning(skip=0.5, kv=False)
NO_BOUNDARY = PrefillPruning(skip=0.5, handle_boundary=False)
EVERY = PrefillPruning(skip=1.0)
EQUAL = PrefillPruning(skip=0.5, eviction="uniform")
LAPROX = LaProx(tokens=8, window=3)


@pytest.mark.parametrize(
    ("depth", "changes", "words"),
    [
        (PrefillPruning(choose=(4,)), {}, r"layer 4 is outside 0\.\.3"),
        ("prefill-pruning", {}, "is not a DepthMethod"),
        (EVERY, {"method": OnlinePruning(ratio=0.5)}, "every layer is skipped"),
        (NO_ENTRIES, {"eviction": LAPROX}, "without prompt entries"),
        (NO_BOUNDARY, {"eviction": LAPROX}, "leave out kv=, or handle the boundary"),
        (HALF, {"eviction": FastKVzip(tokens=8)}, "fast-kvzip scores entries by the attention"),
        (EQUAL, {"eviction": LAPROX, "evict_every": 4}, "leave out evict_every"),
    ],
)
def test_what_does_not_go_together(depth: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ran("llama", request(depth, **changes))


def test_contexts_hold_every_layer() -> None:
    config, params = config_of("llama"), params_of("llama")
    dropping = ShortGPT(layers=(1,))
    with pytest.raises(ValueError, match="entries of every layer"):
        make_context(params, config, Request([PROMPTS[0]], 1, depth=dropping))
    context = make_context(params, config, Request([PROMPTS[0]], 1))
    for depth in (dropping, NO_ENTRIES):
        with pytest.raises(ValueError, match="leave out"):
            ran("llama", request(depth, context=context))


def test_names_and_shares_of_a_call() -> None:
    assert arguments.chosen_depth("prefill-pruning", 0.2) == PrefillPruning(skip=0.2)
    assert arguments.chosen_depth(HALF, None) is HALF
    assert [depth_method_name(HALF), *DEPTH_METHODS][0] == "prefill-pruning"
    with pytest.raises(ValueError, match="goes with the name"):
        arguments.chosen_depth(HALF, 0.2)
    with pytest.raises(ValueError, match="is not a DepthMethod"):
        arguments.chosen_depth(3, None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="nearest is 'prefill-pruning'"):
        arguments.chosen_depth("prefil-pruning", None)


def test_flops_of_a_prompt_by_hand() -> None:
    """Llama's first two tiny layers have D = 32, N H = 32, K H = 16, F = 48 and 40."""
    config = config_of("llama")
    whole = [2 * 32 * 16 + 2 * 32 * 32 + 3 * 32 * F for F in (48, 40, 48, 40)]
    head, seen = 2 * 97 * 32, 2 * 2 * 32
    dense = 3 * 2 * sum(whole) + 4 * seen * (1 + 2 + 3) + head
    assert prefill_flops(config, [3]) == dense
    plan = DepthPlan(("full", "full", "kv-only", "skipped"))
    ran = 3 * 2 * sum(whole[:2]) + 2 * seen * 6
    passed = 2 * (2 * 2 * 32 * 16) + 2 * whole[2] + 3 * seen
    assert prefill_flops(config, [3], plan) == ran + passed + 2 * whole[3] + seen + head
