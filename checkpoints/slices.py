"""Parameters that files hold in slices: "layer_0/moe/gate[3]" is slice 3 of "layer_0/moe/gate".

A row whose target ends in "[{e}]" says so of its parameter. Left out: slices along any other axis
than the first.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

_SLICE = re.compile(r"(.*)\[(\d+)\]")


class HasSource(Protocol):
    """A row of a converter table."""

    def to_source(self, path: str) -> str | None:
        """The name in a file of a target path, `None` if the row does not match it."""
        ...


def parts_of(path: str, shape: Sequence[int], rows: Iterable[HasSource]) -> list[str]:
    """The targets that rows give the parameter at `path`: itself, or one for each slice."""
    if shape and any(row.to_source(f"{path}[0]") is not None for row in rows):
        return [f"{path}[{index}]" for index in range(shape[0])]
    return [path]


def parent_of(target: str) -> tuple[str, int | None]:
    """The parameter that a target belongs to, and which slice of it; None for all of it."""
    match = _SLICE.fullmatch(target)
    return (match[1], int(match[2])) if match else (target, None)


class Assembly:
    """Parameters that are being put together from their slices, in any order."""

    def __init__(self, targets: Iterable[str]) -> None:
        self._missing: dict[str, int] = {}
        self._arrays: dict[str, np.ndarray] = {}
        for target in targets:
            path, index = parent_of(target)
            if index is not None:
                self._missing[path] = self._missing.get(path, 0) + 1

    def held(self, path: str) -> np.ndarray | None:
        """The array of a parameter some of whose slices have come."""
        return self._arrays.get(path)

    def add(self, path: str, whole: np.ndarray) -> np.ndarray | None:
        """Note one more slice written to the array `whole`; the array itself with the last one."""
        self._arrays[path] = whole
        self._missing[path] -= 1
        return None if self._missing[path] else self._arrays.pop(path)


def targets_of(leaves: Mapping[str, Any], rows: Sequence[HasSource]) -> list[str]:
    """Every target that rows give the leaves of a tree, by their paths."""
    parts = (parts_of(path, np.shape(leaf), rows) for path, leaf in leaves.items())
    return [target for targets in parts for target in targets]
