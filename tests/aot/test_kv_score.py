"""Scores of cached keys, compiled for real chips at the shapes of real models.

It shows that they compile and what they hold in HBM beside their arguments, not how fast they are.
What a compiler keeps in VMEM counts nowhere, so a copy of a short cache may hide there: the longer
ones are what the bound is about.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.kv_score import Rule, kv_score, tpu
from tests.aot.chips import first_chip

pytestmark = pytest.mark.aot

# N, K, H.
MODELS = {
    "SmolLM2-135M": (9, 3, 64),
    "Llama-3.1-8B": (32, 8, 128),  # and Qwen3-8B
    "Llama-3.1-70B": (64, 8, 128),
}
SHORT, LONG = 8192, 131072
LAPROX = Rule("l2", "projected")
TEMPORARIES = 0.02


def compiled(
    chip: Any,
    sizes: tuple[int, ...],
    rule: Rule = LAPROX,
    dtype: str = "bfloat16",
    implementation: str = "pallas_tpu",
) -> Any:
    """The program for B, W, N, K, H, S, whose temporaries are few."""
    B, W, N, K, H, S = sizes

    def array(*shape: int, of: str = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(of), sharding=chip)

    arrays = [array(B, W, N, H), array(B, K, S, H), array(B, K, S, H)]
    arrays += [array(B, n, of="int32") for n in (W, S)]
    options = dataclasses.asdict(rule) | {"implementation": implementation}
    run = jax.jit(lambda g, *a: kv_score(*a, gram=g, **options))
    found: Any = run.lower(array(N, H, H, of="float32"), *arrays).compile()
    memory: Any = found.memory_analysis()
    most = TEMPORARIES * memory.argument_size_in_bytes
    assert memory.temp_size_in_bytes <= most, (memory.temp_size_in_bytes, most)
    return found


@pytest.mark.parametrize("model", MODELS)
def test_a_layer_of_a_model(chip: Any, model: str) -> None:
    text = compiled(chip, (1, 32, *MODELS[model], LONG)).as_text()
    assert text.count("tpu_custom_call") == 1


@pytest.mark.parametrize("model", MODELS)
def test_a_layer_of_a_shorter_context(model: str) -> None:
    compiled(first_chip("v5e"), (1, 32, *MODELS[model], SHORT))


# B, W, N, K, H, S.
OTHERS = [
    ((2, 1, 32, 8, 128, 8200), "bfloat16", Rule()),
    ((1, 64, 64, 8, 128, 8192), "float32", LAPROX),
    ((1, 64, 8, 8, 64, 16384), "float32", Rule("mean", "norm", "literal", 4096, 50.0)),
    ((1, 33, 6, 1, 80, 5000), "bfloat16", Rule("l2", "projected", "literal")),
    ((1, 8, 4, 2, 96, 333), "float32", Rule("mean", "projected")),
    ((1, 16, 16, 8, 256, 40000), "bfloat16", Rule("mean", "none", "literal", 1024)),
]


@pytest.mark.parametrize(("sizes", "dtype", "rule"), OTHERS)
def test_other_heads_windows_and_rules(sizes: Any, dtype: str, rule: Rule) -> None:
    compiled(first_chip("v5e"), sizes, rule, dtype)


def test_keys_kept_by_columns_are_read_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """H = 64: read as [S, H] they would be copied, padded to twice their size."""
    sizes = (1, 32, *MODELS["SmolLM2-135M"], LONG)
    chip = first_chip("v5e")
    assert "bf16[1,3,131072,64]{2,3,1,0" in compiled(chip, sizes).as_text()
    monkeypatch.setattr(tpu.Cut, "by_columns", False)
    with pytest.raises(AssertionError):
        compiled(chip, sizes)


@pytest.mark.parametrize("model", ["SmolLM2-135M", "Llama-3.1-8B"])
def test_what_runs_through_xla_copies_no_cache_either(model: str) -> None:
    sizes = (1, 32, *MODELS[model], LONG)
    compiled(first_chip("v5e"), sizes, implementation="xla")
