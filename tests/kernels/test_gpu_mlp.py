"""The feed-forward layer on the GPU forms, in Mosaic GPU's interpreter: equal to XLA's."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.masked_mlp import POINTS, Selection, masked_mlp

pytestmark = pytest.mark.mosaic_gpu
EPS = 2.0**-23


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    interpreted: Any = plgpu  # what jax 0.10 lacks, and its types do not know
    with interpreted.force_gpu_interpret_mode(interpreted.InterpretGPUParams(detect_races=True)):
        yield


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("choice", [None, "given", *POINTS])
@pytest.mark.parametrize("B", [1, 3])
def test_it_is_the_layer_of_xla(B: int, choice: str | None, named: bool) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((B, 1, 128)), jnp.float32)
    weights = [jnp.asarray(rng.standard_normal((90, 128)) / 10, jnp.float32) for _ in range(3)]
    rows = jnp.asarray(rng.permutation(90)[:60], jnp.int32) if named else None
    E = 60 if named else 90
    options: dict[str, Any] = {"activation": "silu"}
    if choice == "given":
        options["given"] = jnp.asarray(rng.random((B, 1, E)) < 0.3)
    elif choice is not None:
        options["selection"] = Selection(num_candidate=E - 20, k_selected=11, point=choice)
    out, mask = masked_mlp(x, *weights, rows=rows, implementation="pallas_gpu", **options)
    held = weights if rows is None else [w[rows] for w in weights]
    wanted, used = masked_mlp(x, *held, implementation="xla", **options)
    # Sums of 128 and of 90 products of order one, chained.
    np.testing.assert_allclose(np.asarray(out), np.asarray(wanted), rtol=0, atol=EPS * 128 * 90)
    assert (mask is None) == (used is None)
    if mask is not None:
        assert (np.asarray(mask) == np.asarray(used)).all()
