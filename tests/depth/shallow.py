"""Tiny models of four layers, of every family, and runs of them that skip layers."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from popjax.config import ModelConfig
from popjax.depth import DepthMethod, PrefillPruning
from popjax.generate import Options
from popjax.run import Request, RunResult, run
from tests.popjax.same_runs import assert_same
from tests.popjax.tiny_models import CONFIGS, PROMPTS, VOCAB, random_params

NEW = 5
NEVER = (VOCAB,)
HALF = PrefillPruning(skip=0.5)
# Layers in the middle, so that tokens leave the stream of those that run and come back to it.
MIXED = PrefillPruning(choose=(0, 2))


@functools.cache
def config_of(family: str) -> ModelConfig:
    """Four layers, of two widths."""
    config = CONFIGS[family]
    return dataclasses.replace(config, layers=config.layers * 2)


@functools.cache
def params_of(family: str) -> Any:
    return random_params(config_of(family))


def request(depth: DepthMethod | None, **changes: Any) -> Request:
    base = Request(PROMPTS, NEW, eos_ids=NEVER, options=Options(logits=True), depth=depth)
    return dataclasses.replace(base, **changes)


def ran(family: str, asked: Request) -> RunResult:
    return run(params_of(family), config_of(family), asked)


@functools.cache
def reference(family: str, depth: DepthMethod | None) -> RunResult:
    return ran(family, request(depth))


def assert_same_run(family: str, result: RunResult, wanted: RunResult, rows: Any = ...) -> None:
    assert_same(config_of(family), result, wanted, rows)
