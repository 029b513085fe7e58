"""Products with chosen rows, compiled for an H100 by XLA and Mosaic GPU where there is none.

What compiles, what memory it takes and which bytes it moves; speed cannot be known this way. What
is computed is tests/kernels/test_gpu_rows.py.
"""

import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from kernels_pallas.row_products import gpu

pytestmark = pytest.mark.mosaic_gpu
# Model width D and FFN channels F.
MODELS = {
    "SmolLM2-135M": (576, 1536),
    "Llama-3.1-8B": (4096, 14336),
    "Qwen3-8B": (4096, 12288),
    "Llama-3.1-70B": (8192, 28672),
}
SHARES = (0.4, 0.5, 0.55)
KIND = "NVIDIA H100 80GB HBM3"
BF16 = jnp.bfloat16

models = pytest.mark.parametrize(
    ("D", "F"), [pytest.param(D, F, id=name) for name, (D, F) in MODELS.items()]
)


@pytest.fixture(scope="module")
def compiled() -> Callable[..., Any]:
    """Compiles a function of arrays, given by shape and dtype, for one H100."""
    target = Path(__file__).with_name("h100.txtpb").read_text()
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", topology="1x1x1", target_config=target
    )
    on_chip = jax.sharding.SingleDeviceSharding(topology.devices[0])
    device = jax.sharding.AbstractDevice(device_kind=KIND, num_cores=132, platform="cuda")
    mesh = jax.sharding.AbstractMesh((1,), ("chip",), abstract_device=device)

    def run(fn: Callable[..., Any], *arrays: tuple[tuple[int, ...], Any]) -> Any:
        shapes = [jax.ShapeDtypeStruct(*array, sharding=on_chip) for array in arrays]
        with jax.sharding.use_abstract_mesh(mesh):
            return jax.jit(fn).lower(*shapes).compile()

    return run


def product(
    compiled: Callable[..., Any], name: str, B: int, D: int, F: int, n: int, dtype: Any = BF16
) -> Any:
    """The compiled product, whose temporaries are below a fiftieth of its arguments."""
    fn = gpu.expand_rows if name == "expand" else gpu.contract_rows
    vector = ((B, D if name == "expand" else n), dtype)
    program = compiled(fn, vector, ((F, D), dtype), ((1, n), jnp.int32), ((1,), jnp.int32))
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < 0.02 * memory.argument_size_in_bytes
    return program.as_text()


def gathered(program: str, dtype: str) -> int:
    """Weights that the gathers of a program take, wherever they are fused into."""
    shapes = re.findall(rf"= {dtype}\[([\d,]+)\]\S* gather\(", program)
    return sum(math.prod(map(int, shape.split(","))) for shape in shapes)


@models
@pytest.mark.parametrize("B", [1, 4])
def test_expand_is_one_pass_over_the_chosen_rows(
    compiled: Callable[..., Any], B: int, D: int, F: int
) -> None:
    n = F // 2
    text = product(compiled, "expand", B, D, F, n)
    assert gathered(text, "bf16") == n * D
    # In the fused computation, not in the program: no row is ever written.
    assert " gather(" not in text[text.index("\nENTRY") :]


def test_expand_of_as_many_vectors_as_are_served_is_one_pass(compiled: Callable[..., Any]) -> None:
    D, F = MODELS["Llama-3.1-8B"]
    text = product(compiled, "expand", gpu.MOST_VECTORS, D, F, F // 2)
    assert gathered(text, "bf16") == F // 2 * D


@models
@pytest.mark.parametrize("B", [1, 4])
def test_contract_is_the_kernel_and_no_copy_of_the_rows(
    compiled: Callable[..., Any], B: int, D: int, F: int
) -> None:
    text = product(compiled, "contract", B, D, F, F // 2)
    assert text.count("contract_rows") and text.count('custom_call_target="mosaic_gpu') == 1
    assert gathered(text, "bf16") == 0


@pytest.mark.parametrize("name", ["expand", "contract"])
@pytest.mark.parametrize(("B", "dtype"), [(gpu.MOST_VECTORS, BF16), (2, jnp.float32)])
def test_the_other_dtype_and_the_most_vectors_compile(
    compiled: Callable[..., Any], name: str, B: int, dtype: Any
) -> None:
    D, F = MODELS["Llama-3.1-70B"]
    product(compiled, name, B, D, F, round(0.55 * F), dtype)


def walk(how: gpu.Cut, capacity: int, count: int) -> Counter[tuple[int, int]]:
    """How often each (place in the list, tile of columns) is copied, following every program."""
    copies: Counter[tuple[int, int]] = Counter()
    assert how.splits * how.rows >= capacity and how.rows % how.block == 0
    for split in range(how.splits):
        first = split * how.rows
        mine = min(max(count - first, 0), how.rows)
        for i in range(first, first + -(-mine // how.block) * how.block):
            copies.update((min(i, count - 1), tile) for tile in range(how.tiles))
    return copies


@models
@pytest.mark.parametrize("B", [1, 2, 4, 8])
@pytest.mark.parametrize("share", SHARES)
def test_the_kernel_copies_the_chosen_rows_once_and_moves_little_else(
    D: int, F: int, share: float, B: int
) -> None:
    capacity = round(F * share)
    how = gpu.cut(B, F, D, capacity, 2)
    assert how.tiles * how.columns == D
    for count in (0, 1, capacity // 3, capacity):
        copies = walk(how, capacity, count)
        assert set(copies) == {(i, tile) for i in range(count) for tile in range(how.tiles)}
        # Only the last block is filled up, with copies of the last row.
        assert copies.total() - len(copies) < how.block * how.tiles
    copied = copies.total() * how.columns * 2
    partial_sums = how.splits * B * D * 4
    factors_and_list = how.splits * how.rows * B * 4 + capacity * 4
    moved = gpu.cost(B, F, D, capacity, 2).bytes_accessed
    # The rows that a last block repeats come from the cache.
    assert moved == len(copies) * how.columns * 2 + partial_sums + factors_and_list
    assert copied <= 1.02 * capacity * D * 2
    assert moved <= 1.05 * capacity * D * 2 + B * capacity * 4
