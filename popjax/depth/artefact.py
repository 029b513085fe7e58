"""Scores of a model's layers in a file of their own, which names the model they are of.

Leaves out measuring them (`importance.py`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import checkpoints
from popjax import artefact
from popjax.config import ModelConfig
from popjax.sparsity import Params

COMMAND = "popjax calibrate prefill-pruning"
FORM = artefact.Form("layer-scores", "1", f"{COMMAND} --text TEXT -o FILE")
NAMES = ("prefill", "decode", "influence")


def given_path(importance: Any) -> str:
    """The path that a depth method was given. Raises ValueError for anything but a path."""
    return artefact.given_path("importance", importance, COMMAND)


def save_scores(
    path: str | os.PathLike[str],
    scores: Mapping[str, np.ndarray],
    params: Params,
    config: ModelConfig,
    about: str,
) -> Path:
    """Write scores [L] by name, of this model, into one new safetensors file; returns its path.

    about: what they were measured on. Raises CheckpointError where the path exists.
    """
    arrays = {name: np.asarray(scores[name], np.float32) for name in NAMES}
    return artefact.save_artefact(path, FORM, arrays, params, config, about=about)


def load_scores(
    path: str | os.PathLike[str], params: Params, config: ModelConfig
) -> dict[str, np.ndarray]:
    """Scores [L] by name that `save_scores` wrote for this model.

    Raises CheckpointError for a file that is damaged, of another version, or of another model.
    """
    words = ("layer scores", "calibrate this one")
    arrays = artefact.load_artefact(path, FORM, params, config, words)
    shapes = {name: array.shape for name, array in arrays.items()}
    if shapes != dict.fromkeys(NAMES, (config.num_layers,)):
        raise checkpoints.CheckpointError(
            f"{path} holds arrays {shapes}, not {', '.join(NAMES)} of {config.num_layers} layers: "
            "calibrate again"
        )
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise checkpoints.CheckpointError(f"{path} holds scores that are not finite: calibrate "
                                          "again")  # fmt: skip
    return arrays


__all__ = ["NAMES", "given_path", "load_scores", "save_scores"]
