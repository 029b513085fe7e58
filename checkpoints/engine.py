"""The converter: a table of rows, a source, and the shapes a model expects; every mismatch is an
error, and all of them are found before the first tensor is read.

Leaves out models and files: rows and expected shapes come from the caller, tensors from a
`TensorSource`.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints import buffers
from checkpoints.errors import CheckpointError, few
from checkpoints.fused import FUSIONS
from checkpoints.slices import Assembly, parent_of, parts_of
from checkpoints.source import PLAIN_FLOATS, QUANTISED, TensorSource
from checkpoints.transforms import TRANSFORMS

_PLACEHOLDER = re.compile(r"\{(\w+)\}")


class HasShape(Protocol):
    """Anything with a shape: `TensorInfo`, `jax.ShapeDtypeStruct`, an array."""

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Row:
    """One line of a converter table: `source` "layers.{i}.q.weight" -> `target` "layer_{i}/q".

    A `{letter}` stands for a whole number. `transform` names an entry of `TRANSFORMS`, or of
    `FUSIONS` where a tuple of targets lies in one tensor. A target that ends in "[{letter}]" is one
    slice of a parameter, along its first axis. `ValueError` for an unknown transform or
    placeholders that differ.
    """

    source: str
    target: str | tuple[str, ...]
    transform: str

    def __post_init__(self) -> None:
        known = TRANSFORMS if isinstance(self.target, str) else FUSIONS
        if self.transform not in known:
            raise ValueError(f"unknown transform {self.transform!r}: use one of {list(known)}")
        sides = [sorted(_PLACEHOLDER.findall(side)) for side in (self.source, *self.targets)]
        if any(side != sides[0] for side in sides) or len(set(sides[0])) != len(sides[0]):
            raise ValueError(f"{self.source!r} and {self.target!r} must have the same placeholders")

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,) if isinstance(self.target, str) else self.target

    def to_targets(self, name: str) -> tuple[str, ...] | None:
        """The target paths of a source name, `None` if this row does not match it."""
        found = [_rename(self._source_pattern, target, name) for target in self.targets]
        return tuple(path for path in found if path is not None) or None

    def to_source(self, path: str) -> str | None:
        """The source name of a target path, `None` if this row does not match it."""
        found = (_rename(pattern, self.source, path) for pattern in self._target_patterns)
        return next((name for name in found if name is not None), None)

    @cached_property
    def _source_pattern(self) -> re.Pattern[str]:
        return compile_pattern(self.source)

    @cached_property
    def _target_patterns(self) -> tuple[re.Pattern[str], ...]:
        return tuple(compile_pattern(target) for target in self.targets)

    def source_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of the file's tensor, from those of the targets."""
        if isinstance(self.target, str):
            return TRANSFORMS[self.transform].source_shape(shapes[0])
        return FUSIONS[self.transform].source_shape(shapes)

    def forward(self, array: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        """The targets' arrays, maybe views, of the file's tensor."""
        if isinstance(self.target, str):
            return [TRANSFORMS[self.transform].forward(array, shapes[0])]
        return FUSIONS[self.transform].forward(array, shapes)

    def inverse(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The file's tensor of the targets' arrays."""
        if isinstance(self.target, str):
            return TRANSFORMS[self.transform].inverse(arrays[0])
        return FUSIONS[self.transform].inverse(arrays)


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """The regular expression of a pattern: `{x}` is a decimal without leading zeros."""
    parts = _PLACEHOLDER.split(pattern)
    literal = [re.escape(part) for part in parts]
    literal[1::2] = [f"(?P<{part}>0|[1-9][0-9]{{0,8}})" for part in parts[1::2]]
    return re.compile("".join(literal))


def _rename(pattern: re.Pattern[str], template: str, name: str) -> str | None:
    match = pattern.fullmatch(name)
    return _PLACEHOLDER.sub(lambda hole: match[hole[1]], template) if match else None


@dataclass(frozen=True)
class _Job:
    source: str
    row: Row
    targets: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


def convert(
    source: TensorSource,
    rows: Sequence[Row],
    expected: Mapping[str, HasShape],
    *,
    dtype: Any,
    place: Callable[[str, np.ndarray], jax.Array] | None = None,
    check_tensors: bool = False,
    ignore: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The nested parameter tree of `expected` (flat path -> shape), read tensor by tensor.

    `place(path, array)` puts a finished array of `dtype` on its devices (default `jax.device_put`).
    `ignore` lists source patterns to leave unread. Peak memory is the weights plus one tensor.
    `CheckpointError` for unknown, ambiguous, doubled, absent, misshapen or non-float tensors, for
    values that overflow `dtype`, and with `check_tensors` for NaN and infinities.
    """
    wanted = jnp.dtype(dtype)
    if not jnp.issubdtype(wanted, jnp.floating):
        raise ValueError(f"dtype must be a float type, got {wanted}")
    flat: dict[str, Any] = {}
    damaged: list[str] = []
    jobs = _plan(source, rows, _targets(expected, rows), ignore)
    arena = _arena(expected, wanted) if place is None else None
    assembly = Assembly(target for job in jobs for target in job.targets)
    for job in jobs:
        for target, part in _load(source, job, wanted, arena):
            if check_tensors and (count := _count_non_finite(part)):
                damaged.append(f"{job.source} ({count} of {part.size} values)")
            path, array = _assembled(assembly, target, part, expected, arena)
            if array is not None:
                flat[path] = _placed(place, path, array)
            del part, array
    if damaged:
        raise CheckpointError(
            f"{source.location} has NaN or infinities in {few(damaged, 'tensor')}"
        )
    return nested({path: flat[path] for path in expected})


def _arena(expected: Mapping[str, HasShape], dtype: np.dtype) -> buffers.Arena | None:
    """Where all weights will lie side by side; None where devices have memory of their own."""
    if jax.default_backend() != "cpu":
        return None
    shapes = (tuple(whole.shape) for whole in expected.values())
    return buffers.Arena(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)


def _placed(
    place: Callable[[str, np.ndarray], jax.Array] | None, path: str, array: np.ndarray
) -> jax.Array:
    # Not jnp.asarray, which makes one more copy.
    placed = jax.device_put(array) if place is None else place(path, array)
    # Transfers run in the background; without waiting, host copies would pile up.
    return jax.block_until_ready(placed)


def _assembled(
    assembly: Assembly,
    target: str,
    part: np.ndarray,
    expected: Mapping[str, HasShape],
    arena: buffers.Arena | None,
) -> tuple[str, np.ndarray | None]:
    """The parameter that `part` is, or is a slice of, where all its slices are there."""
    path, index = parent_of(target)
    if index is None:
        return path, part
    array = assembly.held(path)
    if array is None:
        make = buffers.empty if arena is None else arena.empty
        array = make(tuple(expected[path].shape), part.dtype)
    array[index] = part
    return path, assembly.add(path, array)


def _load(
    source: TensorSource, job: _Job, dtype: np.dtype, arena: buffers.Arena | None
) -> Iterator[tuple[str, np.ndarray]]:
    parts = job.row.forward(source.read(job.source), job.shapes)
    try:
        for target, part in zip(job.targets, parts, strict=True):
            # A slice is copied from here to its place in the whole.
            place = arena if parent_of(target)[1] is None else None
            with np.errstate(over="raise"):
                array = _contiguous(part, dtype, place)
            yield target, array
            del array
    except FloatingPointError as error:
        raise CheckpointError(
            f"{source.location}: tensor {job.source!r} has values beyond the range of {dtype}: "
            "load it as bfloat16 or float32"
        ) from error


def _contiguous(array: np.ndarray, dtype: np.dtype, arena: buffers.Arena | None) -> np.ndarray:
    if arena is None and array.dtype == dtype and array.flags.c_contiguous:
        return array
    make = buffers.empty if arena is None else arena.empty
    result = make(array.shape, dtype)
    np.copyto(result, array, casting="unsafe")
    return result


def _count_non_finite(array: np.ndarray) -> int:
    return int(array.size - np.count_nonzero(np.isfinite(array)))


def _plan(
    source: TensorSource,
    rows: Sequence[Row],
    expected: Mapping[str, HasShape],
    ignore: Iterable[str],
) -> list[_Job]:
    """What to read in file order, or one `CheckpointError` that lists every mismatch by kind."""
    ignored = [compile_pattern(pattern) for pattern in ignore]
    jobs: list[_Job] = []
    extra, ambiguous, dtypes, shapes = [], [], [], []
    for name in source.names():
        if any(pattern.fullmatch(name) for pattern in ignored):
            continue
        matches = [(row, paths) for row in rows if (paths := row.to_targets(name)) is not None]
        if len(matches) > 1:
            ambiguous.append(f"{name} (rows {', '.join(row.source for row, _ in matches)})")
        elif not matches or not all(path in expected for path in matches[0][1]):
            extra.append(name)
        else:
            row, paths = matches[0]
            jobs.append(_Job(name, row, paths, tuple(tuple(expected[p].shape) for p in paths)))
    for job in jobs:
        info = source.info(job.source)
        if info.dtype not in PLAIN_FLOATS + QUANTISED:
            dtypes.append(f"{job.source} ({info.dtype})")
        wanted = job.row.source_shape(job.shapes)
        if info.shape != wanted:
            shapes.append(f"{job.source} (found {info.shape}, expected {wanted})")
    _refuse(
        source.location,
        {
            "two rows match": ambiguous,
            "this model has no place for": extra,
            "two tensors set the parameter of": _doubled(jobs),
            "the checkpoint lacks": _absent(jobs, rows, expected),
            f"the type is none of {', '.join(PLAIN_FLOATS)} or a quantised GGUF type in": dtypes,
            "the shape is wrong in": shapes,
        },
    )
    return jobs


def _targets(expected: Mapping[str, HasShape], rows: Sequence[Row]) -> dict[str, HasShape]:
    """What the rows can set, and its shape: each expected parameter, or each of its slices."""
    targets: dict[str, HasShape] = {}
    for path, whole in expected.items():
        shape = tuple(whole.shape)
        parts = parts_of(path, shape, rows)
        one = whole if parts == [path] else jax.ShapeDtypeStruct(shape[1:], np.float32)
        targets |= dict.fromkeys(parts, one)
    return targets


def _doubled(jobs: Sequence[_Job]) -> list[str]:
    pairs = [(job.source, target) for job in jobs for target in job.targets]
    counts = Counter(target for _, target in pairs)
    return [f"{source} -> {target}" for source, target in pairs if counts[target] > 1]


def _absent(
    jobs: Sequence[_Job], rows: Sequence[Row], expected: Mapping[str, HasShape]
) -> list[str]:
    present = {target for job in jobs for target in job.targets}
    absent = []
    for path in expected:
        if path not in present:
            names = [name for row in rows if (name := row.to_source(path)) is not None]
            absent.append(f"{' or '.join(names) or 'no row'} -> {path}")
    return absent


def _refuse(location: str, mismatches: Mapping[str, list[str]]) -> None:
    found = [f"{kind} {few(items, 'tensor')}" for kind, items in mismatches.items() if items]
    if found:
        raise CheckpointError(f"{location} does not fit this model: {'; '.join(found)}")


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A flat path -> value mapping as nested dictionaries, split at "/"."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree
