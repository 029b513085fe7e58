"""Chips as the compiler knows them: how many there are, and how much memory they have to give."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest

from popjax.targets import CHIPS, GIB, devices, parse_target

pytestmark = pytest.mark.aot


@pytest.mark.parametrize("name", CHIPS)
def test_usable_memory_is_what_the_compiler_states(name: str) -> None:
    one = jax.sharding.SingleDeviceSharding(devices(parse_target(name))[0])
    huge = jax.ShapeDtypeStruct((400, GIB // 4), jnp.float32, sharding=one)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED") as refusal:
        jax.jit(lambda x: x + 1).lower(huge).compile()
    stated = re.search(r"exceeds available HBM \(([\d.]+)G\)", str(refusal.value))
    assert stated is not None
    assert abs(CHIPS[name].usable / GIB - float(stated[1])) < 0.02


@pytest.mark.parametrize("text", ["v4:2x2x1", "v5e:1x1", "v5e:2x2", "v5p:1x1x1", "v5p:2x2x4"])
def test_a_device_is_a_chip(text: str) -> None:
    target = parse_target(text)
    assert len(devices(target)) == target.chips
    assert len({tuple(device.coords) for device in devices(target)}) == target.chips
