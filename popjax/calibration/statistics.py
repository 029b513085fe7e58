"""Statistics of a model's FFN channels over a text, in a file that names the model they are of.

Leaves out measuring them (`measuring.py`) and what methods make of them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import checkpoints
from popjax.artefact import Form, given_path, load_artefact, save_artefact
from popjax.config import LayerConfig, ModelConfig
from popjax.sparsity import Params

COMMAND = "popjax calibrate channels"
FORM = Form("channel-statistics", "1", f"{COMMAND} --text TEXT -o FILE")
# Where magnitudes are counted: what down, q k v, o and gate up read, and activated gates times
# their channel's rms of up (CHESS).
SITES = ("down", "attention", "output", "mlp", "gate")
# Quantiles at equal steps from 0 to 1: shares between them are interpolated.
STEPS = 200


@dataclasses.dataclass(frozen=True)
class LayerStatistics:
    """One layer over all tokens of the text, h being its channels and u those of up.

    energy, mean, variance [F] of h; up_energy [F], the mean of u^2, None without a gate.
    quantiles: by site, the magnitudes [STEPS + 1] at equal shares.
    """

    energy: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    up_energy: np.ndarray | None
    quantiles: dict[str, np.ndarray]

    def threshold(self, site: str, share: float) -> float:
        """The magnitude that the given share of a site's values stays below."""
        steps = np.linspace(0.0, 1.0, STEPS + 1)
        return float(np.interp(share, steps, self.quantiles[site]))

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """The arrays by the names that files use."""
        for name in ("energy", "mean", "variance", "up_energy"):
            array = getattr(self, name)
            if array is not None:
                yield name, array
        for site, array in self.quantiles.items():
            yield f"quantiles/{site}", array


ChannelStatistics = tuple[LayerStatistics, ...]


def sites_of(config: ModelConfig) -> tuple[str, ...]:
    """The sites that a model has: without a gate there is none to threshold."""
    return SITES if config.gated else tuple(site for site in SITES if site != "gate")


def save_statistics(
    path: str | os.PathLike[str],
    statistics: ChannelStatistics,
    params: Params,
    config: ModelConfig,
    about: str,
) -> Path:
    """Write the statistics of this model into one new safetensors file; returns its path.

    about: what they were measured on. Raises CheckpointError where the path exists.
    """
    arrays = {
        f"layer_{i}/{name}": np.asarray(array, np.float32)
        for i, layer in enumerate(statistics)
        for name, array in layer.arrays()
    }
    return save_artefact(path, FORM, arrays, params, config, about=about)


def load_statistics(
    path: str | os.PathLike[str], params: Params, config: ModelConfig
) -> ChannelStatistics:
    """What `save_statistics` wrote for this model.

    Raises CheckpointError for a file that is damaged, of another version, or of another model.
    """
    words = ("channel statistics", f"make a file of this one with `{COMMAND}`")
    arrays = load_artefact(path, FORM, params, config, words)
    wanted = {
        f"layer_{i}/{name}": shape
        for i, layer in enumerate(config.layers)
        for name, shape in _shapes(layer, config).items()
    }
    found = {name: array.shape for name, array in arrays.items()}
    if found != wanted:
        odd = next(
            name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)
        )
        raise checkpoints.CheckpointError(
            f"{path} has {odd!r} of shape {found.get(odd)}, this model needs {wanted.get(odd)}: "
            "calibrate again"
        )
    if bad := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
        raise checkpoints.CheckpointError(
            f"{path}: {bad[0]!r} has values that are not finite: calibrate again"
        )
    return tuple(_layer(arrays, i, config) for i in range(config.num_layers))


def _shapes(layer: LayerConfig, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    channels = ("energy", "mean", "variance", *(("up_energy",) if config.gated else ()))
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(channels, (layer.mlp_dim,))
    return shapes | {f"quantiles/{site}": (STEPS + 1,) for site in sites_of(config)}


def _layer(arrays: dict[str, np.ndarray], i: int, config: ModelConfig) -> LayerStatistics:
    def held(name: str) -> np.ndarray:
        return arrays[f"layer_{i}/{name}"]

    return LayerStatistics(
        *(held(name) for name in ("energy", "mean", "variance")),
        up_energy=held("up_energy") if config.gated else None,
        quantiles={site: held(f"quantiles/{site}") for site in sites_of(config)},
    )


def statistics_path(value: object) -> str:
    """The path that a calibrated method was given. Raises ValueError for anything but a path."""
    return given_path("statistics", value, COMMAND)


def check_dense(name: str, config: ModelConfig) -> None:
    """Raise ValueError for a mixture: these statistics are of FFNs that every token uses."""
    if any(layer.moe is not None for layer in config.layers):
        raise ValueError(
            f"{name} is calibrated on channels that every token uses, and this {config.family} "
            "model has experts: use online-pruning"
        )


__all__ = [
    "COMMAND",
    "SITES",
    "STEPS",
    "ChannelStatistics",
    "LayerStatistics",
    "check_dense",
    "load_statistics",
    "save_statistics",
    "sites_of",
    "statistics_path",
]
