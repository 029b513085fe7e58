"""Scores of cached keys, compiled for an H100 by XLA where there is none.

What compiles and what memory it takes; speed cannot be known this way. What is computed is
tests/kernels/test_kv_score.py.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from kernels_pallas.kv_score import Rule, kv_score

pytestmark = pytest.mark.mosaic_gpu

# N, K, H.
MODELS = {
    "SmolLM2-135M": (9, 3, 64),
    "Llama-3.1-8B": (32, 8, 128),  # and Qwen3-8B
    "Llama-3.1-70B": (64, 8, 128),
}
KIND = "NVIDIA H100 80GB HBM3"
CACHE_BYTES = 50 * 2**20  # what lies in it need not be read from memory again
LAPROX = Rule("l2", "projected")


@pytest.fixture(scope="module")
def chip() -> Any:
    target = Path(__file__).with_name("h100.txtpb").read_text()
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", topology="1x1x1", target_config=target
    )
    return jax.sharding.SingleDeviceSharding(topology.devices[0])


def compiled(chip: Any, model: str, S: int, dtype: str = "bfloat16", rule: Rule = LAPROX) -> Any:
    """The program of `pallas_gpu` for a window of 32 queries, and the bytes of its temporaries."""
    (N, K, H), W = MODELS[model], 32

    def array(*shape: int, of: str = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(of), sharding=chip)

    arrays = [array(1, W, N, H), array(1, K, S, H), array(1, K, S, H)]
    arrays += [array(1, n, of="int32") for n in (W, S)]
    options = dataclasses.asdict(rule) | {"implementation": "pallas_gpu"}
    run = jax.jit(lambda g, *a: kv_score(*a, gram=g, **options))
    device = jax.sharding.AbstractDevice(device_kind=KIND, num_cores=132, platform="cuda")
    mesh = jax.sharding.AbstractMesh((1,), ("chip",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        found: Any = run.lower(array(N, H, H, of="float32"), *arrays).compile()
    return found.as_text(), found.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("model", MODELS)
def test_temporaries_stay_in_the_cache_however_long_the_context(chip: Any, model: str) -> None:
    (_, short), (text, long) = (compiled(chip, model, S) for S in (8192, 131072))
    assert long == short <= CACHE_BYTES // 2
    assert text.count(" while(") == 2  # one a pass


@pytest.mark.parametrize(
    ("dtype", "rule"),
    [("float32", LAPROX), ("bfloat16", Rule("mean", "norm", "literal", 4096, 50))],
)
def test_the_other_dtype_and_rules(chip: Any, dtype: str, rule: Rule) -> None:
    _, temporaries = compiled(chip, "Llama-3.1-8B", 32768, dtype, rule)
    assert temporaries <= CACHE_BYTES // 2
