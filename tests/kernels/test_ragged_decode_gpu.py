"""The GPU kernel of ragged decode attention in Mosaic GPU's interpreter, which looks for races and
starts buffers as NaN. Compiling for a real GPU is tests/aot/test_ragged_decode_gpu.py.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.ragged_decode import gpu
from tests.kernels.ragged_ranges import FILLS, FORMS, G, M, oracle, problem

pytestmark = pytest.mark.mosaic_gpu
EPS = 2.0**-23
ROUNDED = 2.0**-8  # what one rounding to bfloat16 may change


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    interpreted: Any = plgpu  # what jax 0.10 lacks, and its types do not know
    params = interpreted.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    with interpreted.force_gpu_interpret_mode(params):
        yield


@pytest.mark.parametrize(
    ("form", "fill"), [(FORMS[i], fill) for i, fill in enumerate(FILLS)] + [(FORMS[1], FILLS[0])]
)
def test_it_equals_the_oracle(form: Any, fill: Any) -> None:
    (H, dtype, window, softcap), (lengths, tails) = form, fill
    arrays = problem(lengths, tails, H, dtype)
    out = gpu.ragged_decode(*arrays, window=window, softcap=softcap)
    wanted, size = oracle(arrays, window, softcap)
    # Sums of H products, then of all entries; only the result is rounded to bfloat16. The cap is
    # made of exponentials: its error is relative to the cap, not to the score.
    terms = (H + max(lengths) + M) * EPS * (1 + (softcap or 0))
    terms += ROUNDED if dtype == "bfloat16" else 0
    assert out.dtype == arrays[0].dtype and out.shape == wanted.shape
    assert (np.abs(np.asarray(out, np.float64) - wanted) <= terms * size).all()


def test_the_sums_of_a_head_depend_on_nothing_but_its_own_entries() -> None:
    lengths, others = [300, 20, 700, 45], [300, 513, 0, 45]
    first, other = (
        np.asarray(gpu.ragged_decode(*problem(n, [30, 5], 64, "float32", order)))
        for n, order in ((lengths, [0, 1, 2, 3]), (others, [3, 1, 0, 2]))
    )
    for b, k in ((0, 0), (1, 1)):
        of_head = (b, 0, slice(k * G, (k + 1) * G))
        assert first[of_head].any() and (first[of_head] == other[of_head]).all()


def shaped(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"q": shaped(1, 2, 4, 64)}, "2 queries a row, and it serves one"),
        ({"q": shaped(1, 1, 4, 64, dtype=jnp.float16)}, "the queries are float16"),
        (
            {"entries": shaped(64, 128, dtype=jnp.float32)},
            "float32 and the tail bfloat16",
        ),
        ({"q": shaped(1, 1, 4, 80), "entries": shaped(64, 160)}, "the head size is 80"),
        ({"q": shaped(1, 1, 18, 64)}, "9 queries share a KV head, and it serves 1 to 8"),
        ({"entries": shaped(72, 128)}, "the pool has 72 rows: round them up"),
        ({"tail_k": shaped(1, 2, 16, 64)}, "the tail has 16 slots"),
    ],
)
def test_what_it_cannot_serve_is_said(change: dict[str, Any], reason: str | None) -> None:
    given = {
        "q": shaped(1, 1, 4, 64),
        "entries": shaped(64, 128),
        "tail_k": shaped(1, 2, 32, 64),
        "starts": shaped(1, 2, dtype=jnp.int32),
    }
    found = gpu.obstacle(**given | change)

    assert found is None if reason is None else found is not None and reason in found


def test_an_older_jax_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    with pytest.raises(NotImplementedError, match="of jax 0.12 on"):
        gpu.ragged_decode(*problem(*FILLS[0], 64, "float32"))
