"""Meshes of the eight CPU devices, and tiny models whose sizes they divide."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection, Iterable
from typing import Any

import jax
import pytest
from jax.sharding import Mesh

from popjax.config import ModelConfig
from popjax.methods import Frozen, GateFirst, Griffin, Method, OnlinePruning, RescoreAll
from popjax.sharding import placed_params
from tests.popjax.tiny_models import random_params, tiny

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# A group shares one key/value head: there K is the size of "model". Four prompts of two lengths.
SHAPES: dict[str, dict[str, int]] = {
    "model=2": {"model": 2},
    "model=4": {"model": 4},
    "model=2,group=2": {"model": 2, "group": 2},
}
PRUNING: dict[str, Method] = {
    "online-pruning": OnlinePruning(0.5, gamma=0.5),
    "frozen": Frozen(0.5),
    "griffin": Griffin(0.5),
    "rescore-all": RescoreAll(0.5),
    "gate-first": GateFirst(0.5),
}
VOCAB = 96


def mesh_of_shape(shape: dict[str, int]) -> Mesh:
    devices = jax.devices()[: math.prod(shape.values())]
    return jax.make_mesh(tuple(shape.values()), tuple(shape), devices=devices)


@functools.cache
def config_of(family: str, name: str = "model=2") -> ModelConfig:
    """The tiny config of a family with 8 query heads, and as many K as the mesh wants."""
    config = tiny(family, VOCAB)
    kv_heads = 2 if "group" in name else 4
    layers = (
        dataclasses.replace(layer, num_heads=8, num_kv_heads=kv_heads) for layer in config.layers
    )
    return dataclasses.replace(config, layers=tuple(layers))


@functools.cache
def case(family: str, name: str) -> tuple[ModelConfig, dict[str, Any], dict[str, Any]]:
    """Config, parameters on one device, and the same parameters on the mesh."""
    config = config_of(family, name)
    params = random_params(config)
    return config, params, placed_params(params, config, mesh_of_shape(SHAPES[name]))


def pairs(firsts: Iterable[str], shapes: Iterable[str], known: Collection[str] = ()) -> list[Any]:
    """All pairs; slow are those of which each half is tested in another pair or `known`."""
    firsts, shapes = list(firsts), list(shapes)
    return [
        pytest.param(first, shape, marks=[pytest.mark.slow] if first in known or (i and j) else [])
        for i, first in enumerate(firsts)
        for j, shape in enumerate(shapes)
    ]
