"""A mixture of experts compiled for chips: what a decode step moves, seen by the compiler."""

from __future__ import annotations

import pytest

from popjax.ahead_of_time import Program, Rehearsal, Workload, counted, read_weights
from popjax.families import model_config
from popjax.methods import Method, OnlinePruning
from popjax.targets import parse_target
from tests.popjax.published_models import QWEN3_30B_MOE, QWEN15_MOE

pytestmark = pytest.mark.aot
CONFIG = model_config({**QWEN3_30B_MOE, "num_hidden_layers": 1})
# One matrix of all experts of a layer, in bfloat16.
MATRIX = 128 * 768 * 2048 * 2


@pytest.mark.parametrize(
    ("target", "method"),
    [
        ("v5e:2x2", OnlinePruning(0.5)),
        pytest.param("v5e:1x1", Method(), marks=pytest.mark.slow),
        pytest.param("v5p:2x2x1", Method(), marks=pytest.mark.slow),
    ],
)
def test_a_step_copies_no_experts_and_sends_none(target: str, method: Method) -> None:
    workload = Workload(CONFIG, method, parse_target(target), context=512)
    program = Rehearsal(workload).decode()
    assert program.refused is None
    # A copy or another layout of the experts of a chip would be held while the step runs.
    assert program.temporaries < MATRIX // workload.target.chips // 8
    assert set(program.collectives) <= {"all-reduce"} or workload.target.chips == 1


def test_a_token_reads_its_own_experts() -> None:
    target = parse_target("v5e:1x1")
    one = Rehearsal(Workload(CONFIG, Method(), target, context=512))
    two = Rehearsal(Workload(CONFIG, Method(), target, context=512, batch=2))
    reads = [read_weights(made.packed_params, made.workload) for made in (one, two)]
    assert reads[1] - reads[0] == 3 * 8 * 768 * 2048 * 2


def test_pruned_experts_are_read_by_rows() -> None:
    """Gate and up of R u C, down of what is on: .55 M and .5 M at ratio .5."""
    target = parse_target("v5e:1x1")
    dense, pruned = (
        counted(made, Program(0.0), Program(0.0)).read_weights
        for method in (Method(), OnlinePruning(0.5))
        for made in [Rehearsal(Workload(CONFIG, method, target, context=512))]
    )
    part = Rehearsal(Workload(CONFIG, OnlinePruning(0.5), target, context=512)).parts
    width, on = part[0].width, part[0].num_retained + part[0].k_selected
    assert (width, on) == (422, 384)
    assert dense - pruned == 8 * (3 * 768 - 2 * width - on) * 2048 * 2


def test_a_packed_shared_ffn_is_counted_beside_its_experts() -> None:
    config = model_config({**QWEN15_MOE, "num_hidden_layers": 1})
    method = OnlinePruning(0.5, shared="pruned")
    made = Rehearsal(Workload(config, method, parse_target("v5e:1x1"), context=512))
    nothing = Program(compile_seconds=0.0)
    rows = made.packed_params["layer_0"]["shared"]["up"].shape[0]
    assert counted(made, nothing, nothing).decode_held.packed == 3 * rows * 2048 * 2
