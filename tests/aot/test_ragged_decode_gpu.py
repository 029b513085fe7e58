"""The GPU kernel of ragged decode attention, compiled for an H100 by XLA and Mosaic GPU.

What compiles, what memory it takes and which bytes it moves; speed cannot be known this way. What
is computed is tests/kernels/test_ragged_decode_gpu.py.
"""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.ragged_decode import gpu
from tests.aot import test_gpu

pytestmark = pytest.mark.mosaic_gpu
compiled = test_gpu.compiled
# Layers, query heads, KV heads, head size.
MODELS = {
    "Llama-3.1-8B": (32, 32, 8, 128),
    "Qwen3-8B": (36, 32, 8, 128),
    "Llama-3.1-70B": (80, 64, 8, 128),
    "SmolLM2-135M": (30, 9, 3, 64),
}
KEPT, TAIL = 0.05, 512
models = pytest.mark.parametrize("model", MODELS)


def check(
    compiled: Callable[..., Any], model: str, context: int, B: int, dtype: Any, **options: Any
) -> None:
    """One kernel, temporaries below a fiftieth of the arguments, and no copy of the pool."""
    L, N, K, H = MODELS[model]
    E, whole = -(-round(KEPT * context * L * K * B) // 16) * 16, jnp.int32
    pool = [((E, 2 * H), dtype), ((E,), whole), ((B, K), whole), ((B, K), whole)]
    tails = [((B, K, TAIL, H), dtype)] * 2
    rest = [((B, 1), whole), ((B, TAIL), whole)]
    program = compiled(
        lambda *arrays: gpu.ragged_decode(*arrays, **options),
        ((B, 1, N, H), dtype),
        *pool,
        *tails,
        *rest,
    )
    memory, text = program.memory_analysis(), program.as_text()
    assert memory.temp_size_in_bytes < 0.02 * memory.argument_size_in_bytes
    assert text.count('custom_call_target="mosaic_gpu') == 1
    made = re.findall(rf"= \w+\[{E}[],].*", text)
    assert made and all("parameter(" in line for line in made), made


@models
def test_it_compiles_and_copies_no_pool(compiled: Callable[..., Any], model: str) -> None:
    check(compiled, model, 2**15, 1, jnp.bfloat16)
    check(compiled, model, 2**17, 4, jnp.bfloat16, window=4096, softcap=50.0)


def test_float32(compiled: Callable[..., Any]) -> None:
    check(compiled, "Llama-3.1-70B", 2**15, 1, jnp.float32, window=4096)


def walk(lengths: list[int], used: int) -> Counter[tuple[int, str, int]]:
    """How often each row of a head's range and tail is copied, following every program."""
    copies: Counter[tuple[int, str, int]] = Counter()
    for h, held in enumerate(lengths):
        pool, tail = (-(-n // gpu.BLOCK) for n in (held, used))
        for split in range(gpu.SPLITS):
            mine = (pool + tail - split + gpu.SPLITS - 1) // gpu.SPLITS
            for block in range(split, split + mine * gpu.SPLITS, gpu.SPLITS):
                place, first = ("pool", block) if block < pool else ("tail", block - pool)
                rows = range(first * gpu.BLOCK, (first + 1) * gpu.BLOCK)
                copies.update((h, place, row) for row in rows)
    return copies


@pytest.mark.parametrize("used", [0, 1, 200])
@pytest.mark.parametrize("model", ["Llama-3.1-8B", "SmolLM2-135M"])
def test_occupied_blocks_are_copied_once_and_little_else_is_moved(model: str, used: int) -> None:
    """At a twentieth of 32k tokens, spread unevenly over the heads."""
    _, N, K, H = MODELS[model]
    drawn = np.random.default_rng(0).dirichlet(np.full(K, 2.0)) * KEPT * 2**15 * K
    lengths = [int(n) for n in drawn]
    copies = walk(lengths, used)
    wanted = {(h, "pool", row) for h, held in enumerate(lengths) for row in range(held)}
    wanted |= {(h, "tail", row) for h in range(K) for row in range(used)}
    assert wanted <= set(copies) and set(copies.values()) == {1}
    assert len(copies) - len(wanted) < 2 * K * gpu.BLOCK
    row = 2 * H * 2
    assert len(copies) * (row + 4) <= 1.05 * len(wanted) * row
    parts = 4 * gpu.SPLITS * N * (H + 2)  # written once and, from the cache, read once
    assert 2 * parts <= 0.1 * len(wanted) * row


def test_the_cost_estimate_is_what_everything_takes() -> None:
    cost = gpu.cost(8, 4, 128, jnp.zeros((4096, 256), jnp.bfloat16), 512)
    rows = 4096 + 8 * 512
    assert cost.flops == 4 * 4 * 128 * rows and cost.transcendentals == 4 * rows
    assert cost.bytes_accessed == rows * (512 + 4) + 4 * gpu.SPLITS * 8 * 4 * (128 + 2)
