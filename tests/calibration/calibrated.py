"""Tiny models of several families, statistics of each in a file, and methods calibrated by it."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from popjax.calibration.measuring import measure
from popjax.calibration.statistics import ChannelStatistics, load_statistics, save_statistics
from popjax.config import ModelConfig
from popjax.generate import Options
from popjax.methods import CHESS, FLAP, TEAL, Method, ProbePruning, WandaSP
from popjax.run import Request, RunResult, run
from tests.popjax.tiny_models import CONFIGS, PROMPTS, VOCAB, random_params

MAKERS: dict[str, Callable[[float, str], Method]] = {
    "wanda-sp": WandaSP,
    "flap": FLAP,
    # Of two layers the first stays whole, so the second loses twice the ratio.
    "probe-pruning": lambda ratio, file: ProbePruning(ratio / 2, file, dense_layers=1),
    "teal": TEAL,
    "chess": CHESS,
}
NEW = 6
NEVER = (VOCAB,)  # an end token that is not in the vocabulary
EVERYTHING = Options(logits=True, record_masks=True)
_FOLDER = tempfile.TemporaryDirectory()


def config_of(family: str) -> ModelConfig:
    return CONFIGS[family]


@functools.cache
def params_of(family: str) -> Any:
    return random_params(config_of(family))


def prompts(count: int = 4, length: int = 24) -> list[list[int]]:
    """Prompts of equal length, drawn from the vocabulary."""
    return np.random.default_rng(5).integers(0, VOCAB, (count, length)).tolist()


@functools.cache
def file_of(family: str) -> str:
    """A file of statistics of the family's tiny model."""
    params, config = params_of(family), config_of(family)
    # A folder of its own: what functions remember may be dropped between files of tests.
    path = Path(tempfile.mkdtemp(dir=_FOLDER.name)) / f"{family}.safetensors"
    return str(save_statistics(path, measure(params, config, prompts()), params, config, "noise"))


@functools.cache
def statistics_of(family: str) -> ChannelStatistics:
    return load_statistics(file_of(family), params_of(family), config_of(family))


def method(family: str, name: str, ratio: float = 0.5) -> Method:
    return MAKERS[name](ratio, file_of(family))


def request(family: str, name: str, ratio: float = 0.5, **changes: Any) -> Request:
    chosen = Method() if name == "dense" else method(family, name, ratio)
    base = Request(PROMPTS, NEW, method=chosen, eos_ids=NEVER, options=EVERYTHING)
    return dataclasses.replace(base, **changes)


def ran(family: str, asked: Request) -> RunResult:
    return run(params_of(family), config_of(family), asked)


@functools.cache
def reference(family: str, name: str) -> RunResult:
    return ran(family, request(family, name))
