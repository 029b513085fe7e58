"""Tensors of a file that hold several of ours: how they lie together, and the way back.

The names say how the file has them. Leaves out which tensor is which: that is a row of a table
(`engine.Row`) with several targets, in the order of the file.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Fusion:
    """The file's shape for several of ours, the parts of a tensor (views), and the way back."""

    source_shape: Callable[[Sequence[Shape]], Shape]
    forward: Callable[[np.ndarray, Sequence[Shape]], list[np.ndarray]]
    inverse: Callable[[Sequence[np.ndarray]], np.ndarray]


def _matrix(shape: Shape) -> Shape:
    """NHD -> [N*H, D]; FD stays."""
    return (math.prod(shape[:-1]), shape[-1])


def _stacked_shape(targets: Sequence[Shape]) -> Shape:
    matrices = [_matrix(shape) for shape in targets]
    if len({columns for _, columns in matrices}) > 1 or any(len(shape) < 2 for shape in targets):
        raise ValueError(f"fusion 'stacked' needs matrices of one width, got shapes {targets}")
    return (sum(rows for rows, _ in matrices), matrices[0][1])


def _stacked(array: np.ndarray, targets: Sequence[Shape]) -> list[np.ndarray]:
    ends = np.cumsum([_matrix(shape)[0] for shape in targets])[:-1]
    parts = zip(np.split(array, ends), targets, strict=True)
    return [part.reshape(shape) for part, shape in parts]


def _stacked_inverse(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([part.reshape(_matrix(part.shape)) for part in parts])


def _by_head_shape(targets: Sequence[Shape]) -> Shape:
    """n times NHD -> [N*n*H, D], NH -> [N*n*H]."""
    if len(set(targets)) > 1 or len(targets[0]) not in (2, 3):
        raise ValueError(f"fusion 'by_head' needs targets of one rank 2 or 3 shape, got {targets}")
    heads, size, *rest = targets[0]
    return (heads * len(targets) * size, *rest)


def _by_head(array: np.ndarray, targets: Sequence[Shape]) -> list[np.ndarray]:
    heads, *rest = targets[0]
    parts = array.reshape(heads, len(targets), *rest)
    return [parts[:, i] for i in range(len(targets))]


def _by_head_inverse(parts: Sequence[np.ndarray]) -> np.ndarray:
    together = np.stack(parts, axis=1)
    return together.reshape(_by_head_shape([part.shape for part in parts]))


FUSIONS: Mapping[str, Fusion] = MappingProxyType(
    {
        "stacked": Fusion(_stacked_shape, _stacked, _stacked_inverse),
        "by_head": Fusion(_by_head_shape, _by_head, _by_head_inverse),
    }
)
