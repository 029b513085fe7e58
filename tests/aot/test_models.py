"""Whole prefill and decode programs of published models, compiled for TPUs from shapes alone.

This proves that they compile, where their memory goes and what the chips say to each other; not
how fast they run. Figures are a chip's. All programs have all layers of their model, except
prefills, which take minutes to compile: those that prune, since they do what dense ones do and
more. Whole is that of the 8B model on one chip, the others have 8 layers, of full width.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

from popjax.ahead_of_time import Program, Rehearsal, Workload, counted
from popjax.families import model_config
from popjax.methods import Method, OnlinePruning
from popjax.targets import parse_target
from tests.popjax.published_models import LLAMA_31_8B, LLAMA_31_70B

pytestmark = [pytest.mark.aot, pytest.mark.slow]
METHODS = {"dense": Method(), "online-pruning": OnlinePruning(ratio=0.5)}
# Model, target, and the mesh that it is split over.
PLACES: dict[str, tuple[dict[str, Any], str, dict[str, int]]] = {
    "8B, one v5p": (LLAMA_31_8B, "v5p:1x1x1", {}),
    "8B, four v5e": (LLAMA_31_8B, "v5e:2x2", {"model": 4}),
    "70B, sixteen v5p": (LLAMA_31_70B, "v5p:2x2x4", {"model": 8, "group": 2}),
}
FEWER_LAYERS = {place: 8 for place in PLACES if place != "8B, one v5p"}
CASES = [(place, method) for place in PLACES for method in METHODS]
DECODE_CONTEXT, PREFILL_CONTEXT = 32768, 8192


@functools.cache
def rehearsal(place: str, method: str, layers: int, context: int) -> Rehearsal:
    raw, target, _ = PLACES[place]
    config = model_config(raw | {"num_hidden_layers": layers})
    return Rehearsal(Workload(config, METHODS[method], parse_target(target), context))


def all_layers(place: str) -> int:
    return PLACES[place][0]["num_hidden_layers"]


def spoken(place: str, layers: int) -> dict[str, int]:
    """Sums after attention and MLP of each layer, of the looked-up tokens, and of the logits.

    The program gathers the logits; the TPU compiler writes that as a sum of parts that are zero
    elsewhere. Nothing else: channels are ranked, packed and chosen inside each shard.
    """
    return {"all-reduce": 2 * layers + 2} if PLACES[place][2] else {}


@pytest.mark.parametrize(("place", "method"), CASES)
def test_decode(place: str, method: str) -> None:
    """It holds nothing twice: no copy of weights, cache or output table beside the arguments."""
    made = rehearsal(place, method, all_layers(place), DECODE_CONTEXT)
    assert (dict(made.place.mesh.shape) if made.place.mesh else {}) == PLACES[place][2]
    program = made.decode()
    assert program.refused is None
    found = counted(made, Program(0.0), program)
    assert found.decode_held.total <= found.usable
    assert program.temporaries < 0.02 * program.arguments
    # The state comes back where it was: cache, tokens and all.
    assert program.aliased >= found.decode_held.cache
    assert program.outputs - program.aliased < 2**16
    assert program.collectives == spoken(place, all_layers(place))
    assert (found.decode_held.packed > 0) == (method != "dense")


@pytest.mark.parametrize("place", PLACES)
def test_prefill(place: str) -> None:
    """It fits, attention scores and FFN activations of a prompt of 8,192 slots included."""
    layers = FEWER_LAYERS.get(place, all_layers(place))
    made = rehearsal(place, "online-pruning", layers, PREFILL_CONTEXT)
    program = made.prefill()
    assert program.refused is None
    found = counted(made, program, Program(0.0))
    assert found.prefill_held.total <= found.usable
    assert program.collectives == spoken(place, layers)
