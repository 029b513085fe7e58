"""What the masked feed-forward layer refuses, and what it says: shapes, dtypes, counts, names."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.masked_mlp import Selection, masked_mlp, native

# One of every kind; the others take the same way in.
EVERY = ("xla", "xla_gathered", "native", "pallas_interpret")


def inputs(B: int = 1, dtype: str = "float32", E: int = 4, D: int = 8) -> list[jax.Array]:
    """x [B, 1, D] and gate, up, down [E, D]."""
    rng = np.random.default_rng(0)
    shapes = [(B, 1, D), (E, D), (E, D), (E, D)]
    return [jnp.asarray(rng.standard_normal(shape), jnp.dtype(dtype)) for shape in shapes]


@pytest.mark.parametrize("implementation", ["xla", "native"])
@pytest.mark.parametrize(
    ("shapes", "complaint"),
    [
        ([(1, 1, 8), (4, 8), (4, 8), (5, 8)], "got .*5, 8"),
        ([(1, 1, 7), (4, 8), (4, 8), (4, 8)], "got .*1, 1, 7"),
    ],
)
def test_shapes_that_disagree_are_refused(
    shapes: list[Any], complaint: str, implementation: str
) -> None:
    arrays = [jnp.zeros(shape) for shape in shapes]
    with pytest.raises(ValueError, match=complaint):
        masked_mlp(*arrays, activation="silu", implementation=implementation)


def test_dtypes_that_the_kernels_cannot_read_are_refused() -> None:
    x, gate, up, down = inputs(2)
    half, mask = up.astype(jnp.bfloat16), jnp.ones((2, 1, 4), jnp.int32)
    for arrays, given, complaint in (
        ((x, gate, half, down), None, "one shape, one dtype"),
        ((x, gate, up, half), None, "one shape, one dtype"),
        ((x.astype(jnp.float16), gate, up, down), None, "x is not float32 or bfloat16"),
        ((x, *(w.astype(jnp.float16) for w in (gate, up, down))), None, "neither float32"),
        ((x, gate, up, down), mask, "a given mask is boolean"),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"popjax: .*{complaint}"):
            jax.block_until_ready(native.masked_mlp(*arrays, activation="silu", given=given))


def test_unknown_names_are_refused() -> None:
    arrays = inputs()
    with pytest.raises(ValueError, match="'fast' is unknown: use one of .*xla.*native"):
        masked_mlp(*arrays, activation="silu", implementation="fast")
    with pytest.raises(ValueError, match="'end' is unknown: use one of .*product.*gate"):
        masked_mlp(*arrays, activation="silu", selection=Selection(point="end"))
    with pytest.raises(ValueError, match="'swish' is unknown: use one of .*silu"):
        masked_mlp(*arrays, activation="swish")


def test_rows_are_not_gathered_without_a_fixed_count() -> None:
    arrays = inputs()
    by_threshold = Selection(num_candidate=4, threshold=jnp.zeros(4))
    for selection, given in ((by_threshold, None), (None, jnp.ones((1, 1, 4), bool))):
        with pytest.raises(ValueError, match="fixed count: use 'xla'"):
            masked_mlp(
                *arrays,
                activation="silu",
                selection=selection,
                given=given,
                implementation="xla_gathered",
            )


def test_what_the_tpu_kernels_cannot_run_is_refused() -> None:
    arrays = inputs()
    options: dict[str, Any] = {"activation": "silu", "implementation": "pallas_interpret"}
    half = [a.astype(jnp.float16) for a in arrays]
    with pytest.raises(ValueError, match="'pallas_interpret': the weights are float16"):
        masked_mlp(*half, **options)
    many = jnp.zeros((65, 1, 8))
    with pytest.raises(ValueError, match="65 vectors are more than the 64"):
        masked_mlp(many, *arrays[1:], **options)
    with pytest.raises(ValueError, match=r"rows of weights \[F,D/128,128\] only, got \(4, 8\)"):
        masked_mlp(*arrays, rows=jnp.arange(2), **options)
    for name, reason in (("pallas_tpu", "D = 8 is no multiple of 128"), ("pallas_gpu", "of 64")):
        with pytest.raises(ValueError, match=reason):
            masked_mlp(*arrays, **{**options, "implementation": name})


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize(
    ("selection", "complaint"),
    [
        (Selection(num_candidate=3, k_selected=4), r"k = 4 candidates is outside 0\.\.C = 3"),
        (Selection(num_candidate=3, k_selected=-1), r"k = -1 candidates is outside 0\.\.C = 3"),
        (Selection(num_candidate=5, k_selected=1), r"C = 5 candidates is outside 0\.\.E = 4"),
        (Selection(jnp.array([2]), num_candidate=2, k_selected=1), r"candidate .*\(1,\).* C = 2"),
        (Selection(None, jnp.ones(4), num_candidate=3), r"weight .* shape \(4,\), .* C = 3"),
        (Selection(threshold=jnp.ones(2), num_candidate=3), r"threshold .* shape \(2,\), .* C = 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_counts_that_cannot_be_are_refused(
    selection: Selection, complaint: str, implementation: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        masked_mlp(*inputs(), activation="silu", selection=selection, implementation=implementation)


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize(
    "given",
    [
        jnp.ones((2, 1, 3), bool),
        jnp.ones((3, 1, 4), bool),
        jnp.ones((2, 2, 4), bool),
        jnp.ones((2, 1, 4)),
    ],
    ids=["E", "B", "T", "dtype"],
)
def test_a_mask_that_does_not_fit_is_refused(given: jax.Array, implementation: str) -> None:
    complaint = r"given \[B or 1,T,E\] bool with B = 2, T = 1, E = 4, got .*32|bool of shape"
    with pytest.raises(ValueError, match=complaint):
        masked_mlp(*inputs(2), activation="silu", given=given, implementation=implementation)


@pytest.mark.parametrize("implementation", EVERY)
def test_matrices_of_unlike_dtypes_and_no_vectors_are_refused(implementation: str) -> None:
    x, gate, up, down = inputs()
    options: dict[str, Any] = {"activation": "silu", "implementation": implementation}
    with pytest.raises(ValueError, match="one dtype, got float32, bfloat16, float32"):
        masked_mlp(x, gate, up.astype(jnp.bfloat16), down, **options)
    with pytest.raises(ValueError, match="B = 0, T = 1"):
        masked_mlp(x[:0], gate, up, down, **options)


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize(
    "rows",
    [jnp.array([1.0, 2.0]), jnp.ones((4,), bool), jnp.array([[1, 2]]), jnp.array([1], jnp.uint8)],
    ids=["float", "mask", "2-D", "uint8"],
)
def test_rows_that_are_no_list_of_numbers_are_refused(rows: jax.Array, implementation: str) -> None:
    x, *weights = inputs(D=1024)
    held = [w.reshape(4, 8, 128) for w in weights]
    with pytest.raises(ValueError, match=r"rows \[E\] int32, got (float32|bool|int32|uint8) of"):
        masked_mlp(x, *held, activation="silu", rows=rows, implementation=implementation)
