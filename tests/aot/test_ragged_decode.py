"""The TPU kernel of ragged decode attention, compiled for real chips at the shapes of real models.

It shows that it compiles, what it holds beside its arguments, and that XLA copies no pool for it,
not how fast it is.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental.layout import Format, Layout

from kernels_pallas.ragged_decode import tpu

pytestmark = pytest.mark.aot

# Layers, query heads, KV heads, head size.
MODELS = {
    "Llama-3.1-8B": (32, 32, 8, 128),
    "Qwen3-8B": (36, 32, 8, 128),
    "Llama-3.1-70B": (80, 64, 8, 128),
    "SmolLM2-135M": (30, 9, 3, 64),
}
KEPT = 0.05
TAIL = 512
TEMPORARIES = 0.02
WINDOWED: dict[str, Any] = {"window": 4096, "softcap": 50.0}
models = pytest.mark.parametrize("model", MODELS)


def pool_rows(model: str, context: int, B: int) -> int:
    """Entries of a budget for all layers, rounded up so that their positions are whole tiles."""
    L, _, K, _ = MODELS[model]
    return -(-round(KEPT * context * L * K * B) // 1024) * 1024


def arguments(chip: Any, model: str, E: int, B: int, dtype: Any) -> list[Any]:
    """Tails row by row, as a decode loop that calls the kernel keeps them (the last test)."""
    _, N, K, H = MODELS[model]

    def array(*shape: int, dtype: Any = dtype) -> Any:
        by_rows = Format(Layout(tuple(range(len(shape)))), chip)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=by_rows)

    def whole(*shape: int) -> Any:
        return array(*shape, dtype=jnp.int32)

    pool = [array(E, 2 * H), whole(E), whole(B, K), whole(B, K)]
    tails = [array(B, K, TAIL, H)] * 2
    return [array(B, 1, N, H), *pool, *tails, whole(B, 1), whole(B, TAIL)]


def check(chip: Any, model: str, context: int, B: int, dtype: Any, options: dict[str, Any]) -> None:
    E = pool_rows(model, context, B)
    run = jax.jit(lambda *arrays: tpu.ragged_decode(*arrays, **options))
    found = run.lower(*arguments(chip, model, E, B, dtype)).compile()
    memory, text = found.memory_analysis(), found.as_text()
    assert text.count("tpu_custom_call") == 1
    assert memory.temp_size_in_bytes < TEMPORARIES * memory.argument_size_in_bytes
    assert not copies(text, E)


def copies(text: str, E: int) -> list[str]:
    """Operations of a program that make an array as long as the pool."""
    made = re.findall(rf"= \(?\w+\[{E}[],].*", text)
    harmless = ("parameter(", "get-tuple-element(", "bitcast(", "while(", "tuple(")
    return [line[:200] for line in made if not any(name in line for name in harmless)]


@models
@pytest.mark.parametrize("context", [2**15, 2**17])
def test_it_compiles_and_holds_nothing_beside_its_arguments(
    chip: Any, model: str, context: int
) -> None:
    check(chip, model, context, 1, jnp.bfloat16, {})
    check(chip, model, context, 4, jnp.bfloat16, WINDOWED)


@models
def test_float32(model: str, chip: Any) -> None:
    check(chip, model, 2**15, 1, jnp.float32, WINDOWED)


@pytest.mark.parametrize("model", ["Llama-3.1-8B", "SmolLM2-135M"])
def test_a_decode_loop_copies_neither_pool_nor_positions(chip: Any, model: str) -> None:
    """Pools that would fit into VMEM, where XLA would bring them for every call if it were free to.

    The tail is written in the loop, which keeps it in the form that the kernel reads.
    """
    (_, _, K, H), B, E, L = MODELS[model], 1, 2**16, 2

    def decode(q: Any, pool: Any, positions: Any, starts: Any, lengths: Any, *tails: Any) -> Any:
        def step(carry: Any) -> Any:
            t, q, tails, late = carry
            late = lax.dynamic_update_slice(late, jnp.full((B, 1), t), (jnp.int32(0), t))
            new = q[:, 0, :K, None]
            tails = [lax.dynamic_update_slice(x, new, (0, 0, t, 0)) for x in tails]
            for i in range(L):
                kept = (starts + i, lengths, *tails[2 * i : 2 * i + 2], jnp.full((B, 1), t), late)
                q = tpu.ragged_decode(q, pool, positions, *kept, **WINDOWED)
            return t + 1, q, tails, late

        late = jnp.full((B, TAIL), -1, jnp.int32)
        start = (jnp.int32(0), q, list(tails), late)
        return lax.while_loop(lambda carry: carry[0] < TAIL, step, start)[1]

    given = arguments(chip, model, E, B, jnp.bfloat16)
    given = [*given[:5], *[given[5]] * 2 * L]
    text = jax.jit(decode).lower(*given).compile().as_text()
    assert text.count("tpu_custom_call") == L
    assert not copies(text, E) and not copies(text, E // tpu.LANES)
    tail = rf"bf16\[{B},{K},{TAIL},{H}\]{{([\d,]+):"
    assert set(re.findall(tail, text)) == {"3,2,1,0"}
