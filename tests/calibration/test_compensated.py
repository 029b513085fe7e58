"""Rounding that makes up for its errors: against plain elimination, and by what it is for."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kernels_pallas.row_products import dequantized, quantized
from popjax import scouts
from popjax.calibration.compensated import compensated
from popjax.calibration.input_moments import input_moments
from popjax.calibration.measuring import means_over_prompts
from popjax.eviction.method import KvMethod
from popjax.methods import Method
from popjax.methods.method import LayerActs
from tests.popjax.tiny_models import CONFIGS, PROMPTS, random_params

CONFIG = CONFIGS["llama"]
F32 = np.dtype(np.float32)


def rows_and_moments(F: int = 24, D: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Rows, and second moments of inputs whose numbers go together, a few of them loud."""
    rng = np.random.default_rng(7)
    mixed = rng.standard_normal((D // 4, D)) * np.exp(rng.standard_normal(D))
    x = rng.standard_normal((4 * D, D // 4)) @ mixed + 0.3 * rng.standard_normal((4 * D, D))
    return rng.standard_normal((F, D)).astype(np.float32), x.T @ x


def missed(w: np.ndarray, copy: Any, moments: np.ndarray) -> float:
    error = np.asarray(dequantized(copy), np.float64) - w
    return float(np.einsum("fd,de,fe->", error, moments, error))


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (8, 128)])
@pytest.mark.parametrize("dtype", [F32, np.dtype(ml_dtypes.bfloat16)])
def test_products_lose_less_than_by_rounding_to_nearest(
    bits: int, group: int, dtype: np.dtype
) -> None:
    w, moments = rows_and_moments()
    plain = quantized(jnp.asarray(w), bits, group)
    plain = plain.replace(scales=plain.scales.astype(dtype).astype(jnp.float32))
    copy = compensated(w, moments, bits, group, dtype)
    assert (copy.bits, copy.shape, copy.scales.shape) == (bits, w.shape, plain.scales.shape)
    assert (np.asarray(copy.scales).astype(dtype) == np.asarray(copy.scales)).all()
    assert missed(w, copy, moments) < missed(w, plain, moments) / 2


def test_it_is_elimination_column_by_column() -> None:
    """The recursion of GPTQ's equations 2 and 3 themselves, without factors, in float64."""
    w, moments = rows_and_moments(6, 64)
    copy = compensated(w, moments, 4, 32, F32)
    scales = np.repeat(np.asarray(copy.scales, np.float64), 32, axis=1)
    left = w.astype(np.float64)
    inverse = np.linalg.inv(moments + 0.01 * np.diag(moments).mean() * np.eye(64))
    rounded = np.empty(left.shape)
    for j in range(64):
        rounded[:, j] = np.clip(np.round(left[:, j] / scales[:, j]), -7, 7) * scales[:, j]
        left -= np.outer((left[:, j] - rounded[:, j]) / inverse[j, j], inverse[j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    np.testing.assert_allclose(np.asarray(dequantized(copy)), rounded, rtol=1e-6)


def test_inputs_that_do_not_go_together_leave_nothing_to_make_up() -> None:
    w, _ = rows_and_moments()
    copy = compensated(w, np.diag(np.arange(1.0, 129.0)), 4, 64, F32)
    scales = np.repeat(np.asarray(copy.scales), 64, axis=1)
    nearest = np.clip(np.round(w / scales), -7, 7) * scales
    np.testing.assert_array_equal(np.asarray(dequantized(copy)), nearest)


def test_a_row_of_zeros_stays_one() -> None:
    w, moments = rows_and_moments()
    w[3] = 0
    copy = compensated(w, moments, 4, 64, F32)
    assert not np.asarray(dequantized(copy))[3].any() and not np.asarray(copy.scales)[3].any()


@pytest.mark.parametrize("moments", [np.eye(64), np.full((128, 128), np.nan), np.zeros((128, 128))])
def test_moments_that_tell_nothing(moments: np.ndarray) -> None:
    w, _ = rows_and_moments()
    with pytest.raises(ValueError, match=r"second moments \[.* of inputs do not fit rows of 128"):
        compensated(w, moments, 4, 64, F32)


@dataclasses.dataclass(frozen=True)
class Inputs(Method):
    """What each FFN reads."""

    def observe(self, params: Any, acts: LayerActs) -> Any:
        return acts.x


def test_moments_are_of_what_the_layers_read() -> None:
    params = random_params(CONFIG)
    prompts = [PROMPTS[0], PROMPTS[0][::-1]]
    heard: list[int] = []
    found = input_moments(params, CONFIG, prompts, heard.append)
    assert heard == [1, 2] and len(found) == CONFIG.num_layers
    for i, moments in enumerate(found):
        expected = np.zeros(moments.shape)
        for prompt in prompts:
            static = {"config": CONFIG, "method": Inputs(), "eviction": KvMethod()}
            (x,), _ = means_over_prompts(params, [prompt], static, lambda: None)[i]
            expected += x.T @ x / 2
        np.testing.assert_allclose(moments, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="there is none: give at least one"):
        input_moments(params, CONFIG, [])


def test_scouts_are_made_by_them() -> None:
    params = random_params(CONFIG)
    moments = input_moments(params, CONFIG, PROMPTS[:1])
    made = scouts.make_scouts(params, CONFIG, 4, 32, ends=True, moments=moments)
    for i, one in enumerate(made):
        w = np.asarray(params[f"layer_{i}"]["mlp"]["up"])
        copy = compensated(w, moments[i], 4, 32, F32)
        np.testing.assert_array_equal(one["scout_up"], copy.values)
    with pytest.raises(ValueError, match="moments of 1 layers were given for a model of"):
        scouts.make_scouts(params, CONFIG, 4, 32, moments=moments[:1])
