"""What devices say to each other in a compiled step: two sums a layer, and nothing for pruning."""

import re
from collections import Counter
from typing import Any

import pytest

from popjax.generate import Options
from popjax.methods import Method
from popjax.program import Program
from popjax.run import Request, run
from tests.popjax.tiny_models import PROMPTS
from tests.sharding.meshes import PRUNING, case, pairs

# An instruction of a compiled module, in its plain or its asynchronous form.
COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast)"
    r"(?:-start)?\("
)
NEW = 8
METHODS = {"dense": Method(), **PRUNING}


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The executables that runs of this test used, by the name of their function."""
    used: dict[str, Any] = {}

    def call(self: Program, *args: Any, **static: Any) -> Any:
        compiled = self.compiled(*args, **static)
        used[re.search(r"HloModule jit_(\w+?)[,\s]", compiled.as_text())[1]] = compiled
        return compiled(*args)

    monkeypatch.setattr(Program, "__call__", call)
    return used


def collectives(compiled: Any) -> dict[str, int]:
    return dict(Counter(COLLECTIVE.findall(compiled.as_text())))


@pytest.mark.parametrize(
    ("method", "name"),
    pairs(METHODS, ["model=4", "model=2,group=2"], known=("frozen", "rescore-all")),
)
def test_a_step_sums_twice_a_layer_and_pruning_adds_nothing(
    programs: dict[str, Any], method: str, name: str
) -> None:
    config, _, spread = case("llama", name)
    run(spread, config, Request([PROMPTS[0]], NEW, method=METHODS[method]))
    # One sum after attention and one after the MLP, one for the embedding; logits are gathered.
    expected = {"all-reduce": 2 * config.num_layers + 1, "all-gather": 1}
    assert collectives(programs["decode"]) == expected
    # Griffin also sums how loud each token is, which XLA sends along with the MLP's output.
    assert collectives(programs["prefill"]) == expected
    assert collectives(programs["start"]) == {}
    # Whether all scores are finite, once a prompt.
    assert set(collectives(programs["make_plan"])) <= {"all-reduce"}


def test_the_decode_state_is_updated_in_place(programs: dict[str, Any]) -> None:
    config, _, spread = case("llama", "model=4")
    options = Options(record_masks=True)
    method = PRUNING["online-pruning"]
    result = run(spread, config, Request([PROMPTS[0]], NEW, method=method, options=options))
    sizes = programs["decode"].memory_analysis()
    # Of each device: a quarter of the heads, all slot positions.
    assert sizes.alias_size_in_bytes > result.cache_bytes / 4
    assert sizes.output_size_in_bytes - sizes.alias_size_in_bytes < 1024
