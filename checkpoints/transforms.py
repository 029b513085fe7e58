"""Named, invertible layout changes between a file's tensors and ours.

The names say what happens from file to us. Leaves out everything about which tensor needs which:
that is a row of a table (`engine.Row`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Transform:
    """A layout change: the file's shape for one of ours, the change, and the way back.

    Results may be views of the input.
    """

    source_shape: Callable[[Shape], Shape]
    forward: Callable[[np.ndarray, Shape], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]


def _need(shape: Shape, ranks: tuple[int, ...], name: str) -> None:
    if len(shape) not in ranks:
        wanted = " or ".join(map(str, ranks))
        raise ValueError(f"transform {name!r} needs a target of rank {wanted}, got shape {shape}")


def _same_shape(target: Shape) -> Shape:
    return target


def _split_shape(target: Shape) -> Shape:
    """NHD -> [N*H, D], NH -> [N*H]."""
    _need(target, (2, 3), "split")
    return (target[0] * target[1], *target[2:])


def _split_inverse(array: np.ndarray) -> np.ndarray:
    return array.reshape(_split_shape(array.shape))


def _transpose_shape(target: Shape) -> Shape:
    _need(target, (2,), "transpose")
    return target[::-1]


def _transpose_each_shape(target: Shape) -> Shape:
    """EMD -> [E, D, M]."""
    _need(target, (3,), "transpose_each")
    return (target[0], target[2], target[1])


def _transpose_split_shape(target: Shape) -> Shape:
    """NHD -> [D, N*H]."""
    _need(target, (3,), "transpose_split")
    return (target[2], target[0] * target[1])


def _transpose_split_inverse(array: np.ndarray) -> np.ndarray:
    _need(array.shape, (3,), "transpose_split")
    return array.reshape(-1, array.shape[2]).T


def _unpermute_shape(target: Shape) -> Shape:
    _need(target, (2, 3), "unpermute_split")
    if target[1] % 2:
        raise ValueError(f"transform 'unpermute_split' needs an even H, got shape {target}")
    return _split_shape(target)


def _unpermute(array: np.ndarray, target: Shape) -> np.ndarray:
    """llama.cpp stores a head's rows as (half, pair) interleaved: [N, H/2, 2] -> [N, 2, H/2]."""
    heads, size, *rest = target
    return array.reshape(heads, size // 2, 2, *rest).swapaxes(1, 2).reshape(target)


def _unpermute_inverse(array: np.ndarray) -> np.ndarray:
    flat = _unpermute_shape(array.shape)
    heads, size, *rest = array.shape
    return array.reshape(heads, 2, size // 2, *rest).swapaxes(1, 2).reshape(flat)


TRANSFORMS: Mapping[str, Transform] = MappingProxyType(
    {
        "same": Transform(_same_shape, lambda a, target: a, lambda a: a),
        "row": Transform(lambda target: (1, *target), lambda a, target: a[0], lambda a: a[None]),
        "split": Transform(_split_shape, lambda a, target: a.reshape(target), _split_inverse),
        "transpose": Transform(_transpose_shape, lambda a, target: a.T, lambda a: a.T),
        "transpose_each": Transform(
            _transpose_each_shape, lambda a, target: a.swapaxes(1, 2), lambda a: a.swapaxes(1, 2)
        ),
        "transpose_split": Transform(
            _transpose_split_shape,
            lambda a, target: a.T.reshape(target),
            _transpose_split_inverse,
        ),
        "unpermute_split": Transform(_unpermute_shape, _unpermute, _unpermute_inverse),
        # A scale that a file holds as 1 + w. The only change of values, exact but for rounding.
        "minus_one": Transform(_same_shape, lambda a, target: a - 1, lambda a: a + 1),
    }
)
