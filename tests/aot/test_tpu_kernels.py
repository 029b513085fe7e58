"""Every TPU kernel, compiled for real chips at the shapes of real models.

It shows that they compile and what they hold beside their arguments, not how fast they are.
"""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.gather_rows import gather_rows
from kernels_pallas.masked_mlp import POINTS, Selection, masked_mlp
from kernels_pallas.row_products import contract, expand, tpu
from tests.aot.chips import first_chip

pytestmark = pytest.mark.aot

# D and F.
MODELS = {
    "Llama-3.1-8B": (4096, 14336),
    "Qwen3-8B": (4096, 12288),
    "Llama-3.1-70B": (8192, 28672),
}
# What a kernel may hold in HBM beside its arguments, where a hidden copy of one matrix would be a
# third; and the channels of a layer before and after each step of choosing, in rows of eight.
TEMPORARIES = 0.02
ACTIVATIONS = 16


def compiled(chip: Any, function: Any, *arrays: Any, channels: int = 0) -> Any:
    placed = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=chip), list(arrays)
    )
    found = jax.jit(function).lower(*placed).compile()
    memory = found.memory_analysis()
    most = TEMPORARIES * memory.argument_size_in_bytes + ACTIVATIONS * 4 * channels
    assert memory.temp_size_in_bytes <= most, (memory.temp_size_in_bytes, most)
    return found


def evaluated(F: int) -> tuple[int, int, int]:
    """Channels evaluated, candidates, and chosen of these: ratio 0.5, a band of a tenth."""
    return round(0.55 * F), round(0.1 * F), round(0.05 * F)


def selection(F: int, point: str, shared: bool) -> Selection:
    _, candidates, chosen = evaluated(F)
    norms: Any = jax.ShapeDtypeStruct((candidates,), jnp.float32)
    counts = {"num_candidate": candidates, "k_selected": chosen}
    return Selection(weight=norms, point=point, shared=shared, **counts)


def check_layer(chip: Any, model: str, form: str, dtype: str, vectors: int, point: str) -> None:
    D, F = MODELS[model]
    E, tiles = evaluated(F)[0], (D // tpu.LANES, tpu.LANES)
    shape = {"packed": (E, D), "packed tiles": (E, *tiles), "rows": (F, *tiles)}[form]
    w = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    x = jax.ShapeDtypeStruct((vectors, 1, D), jnp.dtype(dtype))
    rows = jax.ShapeDtypeStruct((E,), jnp.int32)

    def layer(x: Any, rows: Any, chosen: Any, *weights: Any) -> Any:
        named = rows if form == "rows" else None
        options = {"selection": chosen, "rows": named, "implementation": "pallas_tpu"}
        return masked_mlp(x, *weights, activation="silu", **options)

    chosen = selection(F, point, shared=vectors > 1)
    width = max(vectors, 8) * E
    text = compiled(chip, layer, x, rows, chosen, w, w, w, channels=width).as_text()
    assert text.count("tpu_custom_call") >= 2


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("form", ["packed", "packed tiles", "rows"])
@pytest.mark.parametrize("model", MODELS)
def test_an_online_pruned_layer(chip: Any, model: str, form: str, point: str) -> None:
    check_layer(chip, model, form, "bfloat16", 1, point)


def test_a_width_that_a_tpu_keeps_by_columns_is_refused_and_runs_through_xla(chip: Any) -> None:
    """SmolLM2-135M, D = 576: the kernels would hold a copy of the matrices, XLA does not."""
    D, F = 576, 1536
    w, x = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((F, D), (1, 1, D)))

    def layer(implementation: str) -> Any:
        options = {"activation": "silu", "implementation": implementation}
        return lambda x, *weights: masked_mlp(x, *weights, **options)[0]

    with pytest.raises(ValueError, match="D = 576 is no multiple of 128"):
        compiled(chip, layer("pallas_tpu"), x, w, w, w)
    compiled(chip, layer("xla"), x, w, w, w, channels=8 * F)
    units, count = jax.ShapeDtypeStruct((12,), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    placed = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=chip)
        for a in (jax.ShapeDtypeStruct((1, D), jnp.bfloat16), w, units, count)
    ]
    forced = jax.jit(lambda x, w, u, c: tpu.expand(x, [w], u, c, size=tpu.LANES))
    assert f"bf16[{F},{D}]{{0,1" in forced.lower(*placed).compile().as_text()  # by columns


@pytest.mark.parametrize("vectors", [4, 64])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("form", ["packed", "rows"])
def test_batches_and_dtypes(form: str, dtype: str, vectors: int) -> None:
    check_layer(first_chip("v5e"), "Llama-3.1-8B", form, dtype, vectors, "product")


@pytest.mark.parametrize("model", MODELS)
def test_a_block_sparse_layer_of_the_full_weights(chip: Any, model: str) -> None:
    D, F = MODELS[model]
    w = jax.ShapeDtypeStruct((F, D), jnp.bfloat16)
    x, mask = jax.ShapeDtypeStruct((4, 1, D), jnp.bfloat16), jax.ShapeDtypeStruct((4, 1, F), bool)

    def layer(x: Any, mask: Any, *weights: Any) -> Any:
        options = {"activation": "gelu_tanh", "implementation": "pallas_tpu"}
        return masked_mlp(x, *weights, given=mask, **options)[0]

    compiled(chip, layer, x, mask, w, w, w, channels=8 * F)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("model", MODELS)
def test_packing_holds_nothing_beside_its_result(chip: Any, model: str, dtype: str) -> None:
    D, F = MODELS[model]
    w = jax.ShapeDtypeStruct((F, D // tpu.LANES, tpu.LANES), jnp.dtype(dtype))
    rows = jax.ShapeDtypeStruct((evaluated(F)[0],), jnp.int32)
    found = compiled(chip, lambda w, rows: gather_rows(w, rows, "pallas_tpu"), w, rows)
    assert found.memory_analysis().temp_size_in_bytes == 0


@pytest.mark.parametrize("model", ["Llama-3.1-8B", "Llama-3.1-70B"])
def test_a_prefill_reads_rows_kept_as_tiles_without_a_copy(chip: Any, model: str) -> None:
    D, F = MODELS[model]
    w = jax.ShapeDtypeStruct((F, D // tpu.LANES, tpu.LANES), jnp.bfloat16)
    x, h = (jax.ShapeDtypeStruct((1, 512, n), jnp.bfloat16) for n in (D, F))
    found = compiled(chip, lambda x, w: expand(x, w.reshape(F, D)), x, w)
    assert found.memory_analysis().temp_size_in_bytes == 0
    found = compiled(chip, lambda h, w: contract(h, w.reshape(F, D)), h, w)
    assert found.memory_analysis().temp_size_in_bytes == 0
