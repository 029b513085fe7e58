"""A second prompt of a bucket compiles nothing: counted by jax, not by our own bookkeeping."""

import jax
import pytest
from jax import monitoring

from popjax.config import LayerConfig, ModelConfig
from popjax.generate import PROGRAMS
from popjax.methods import Frozen, Griffin, Method, OnlinePruning, RescoreAll
from popjax.nn.transformer import init_params
from popjax.run import Request, run
from popjax.sampling import SamplingConfig

CONFIG = ModelConfig(
    family="llama",
    vocab_size=64,
    embed_dim=16,
    layers=(LayerConfig(2, 1, 8, 32),) * 2,
    max_positions=256,
)
BACKEND_COMPILE = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def backend_compiles():
    """The list that every backend compilation of this process appends to while the module runs."""
    seen: list[str] = []

    def listen(event: str, duration: float, **_) -> None:
        if event == BACKEND_COMPILE:
            seen.append(event)

    monitoring.register_event_duration_secs_listener(listen)
    yield seen
    seen.append("module over")


@pytest.mark.parametrize(
    "method",
    [
        *(Method(), OnlinePruning(0.5), Griffin(0.5)),
        # By our own count these are tested in test_contracts.py.
        *(
            pytest.param(method, marks=pytest.mark.slow)
            for method in (OnlinePruning(0.5, prefill="probe"), Frozen(0.5), RescoreAll(0.5))
        ),
    ],
    ids=lambda method: f"{type(method).__name__}-{getattr(method, 'prefill', '')}",
)
def test_second_prompt_of_a_bucket_compiles_nothing(params, backend_compiles, method):
    def ask(prompts, new_tokens, seed, temperature):
        sampling = SamplingConfig(do_sample=True, temperature=temperature, top_p=0.9)
        request = Request(prompts, new_tokens, method=method, sampling=sampling, seed=seed)
        return run(params, CONFIG, request)

    before = len(backend_compiles)
    first = ask([[1, 2, 3], [4, 5]], 9, seed=1, temperature=0.7)
    assert len(backend_compiles) > before, "the first prompt must compile, or nothing is counted"
    assert first.compilations > 0
    counted, ours = len(backend_compiles), PROGRAMS.compilations
    second = ask([[9] * 11, [7] * 6], 12, seed=2, temperature=1.3)
    assert len(backend_compiles) == counted
    assert PROGRAMS.compilations == ours
    assert second.compilations == 0
