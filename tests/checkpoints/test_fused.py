"""Tensors that hold several parameters: split on reading, joined on saving, refused if amiss."""

import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import FUSIONS, CheckpointError, Row, TensorInfo, convert, export

N, K, H, D = 4, 2, 3, 5
QKV = ("layer_{i}/q", "layer_{i}/k", "layer_{i}/v")


class Memory:
    """A source over arrays that counts what is read."""

    location = "memory"

    def __init__(self, arrays):
        self.arrays, self.reads = arrays, []

    def names(self):
        return tuple(self.arrays)

    def info(self, name):
        return TensorInfo(self.arrays[name].shape, "F32")

    def read(self, name):
        self.reads.append(name)
        return self.arrays[name].copy()


def values(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def expected(*shapes):
    paths = (path.replace("{i}", "0") for path in QKV)
    return {path: TensorInfo(shape, "F32") for path, shape in zip(paths, shapes, strict=True)}


@pytest.mark.parametrize(
    ("transform", "shapes", "stored", "parts"),
    [
        (
            "stacked",
            [(N, H, D), (K, H, D), (K, H, D)],
            values((N + 2 * K) * H, D),
            lambda a: (a[: N * H], a[N * H : (N + K) * H], a[(N + K) * H :]),
        ),
        (
            "by_head",
            [(N, H, D)] * 3,
            values(N * 3 * H, D),
            lambda a: tuple(a.reshape(N, 3, H, D)[:, i] for i in range(3)),
        ),
        (
            "by_head",
            [(N, H)] * 3,
            values(N * 3 * H),
            lambda a: tuple(a.reshape(N, 3, H)[:, i] for i in range(3)),
        ),
    ],
)
def test_there_and_back(transform, shapes, stored, parts):
    rows = (Row("layers.{i}.qkv", QKV, transform),)
    source = Memory({"layers.0.qkv": stored})
    tree = convert(source, rows, expected(*shapes), dtype=jnp.float32)
    assert source.reads == ["layers.0.qkv"]
    for name, part, shape in zip("qkv", parts(stored), shapes, strict=True):
        np.testing.assert_array_equal(tree["layer_0"][name], part.reshape(shape))
    ((name, again),) = export(tree, rows)
    assert name == "layers.0.qkv"
    np.testing.assert_array_equal(again, stored)
    del tree["layer_0"]["k"]
    with pytest.raises(CheckpointError, match="no row exports .*layer_0/q"):
        export(tree, rows)


def test_wrong_shapes_and_targets_are_refused():
    rows = (Row("layers.{i}.qkv", QKV, "stacked"),)
    wanted = expected((N, H, D), (K, H, D), (K, H, D))
    with pytest.raises(CheckpointError, match=r"shape is wrong .*found \(7, 5\), expected \(24, 5"):
        convert(Memory({"layers.0.qkv": values(7, D)}), rows, wanted, dtype=jnp.float32)
    with pytest.raises(CheckpointError, match="lacks .*layers.0.qkv -> layer_0/q"):
        convert(Memory({}), rows, wanted, dtype=jnp.float32)
    fewer = {path: wanted[path] for path in list(wanted)[:2]}
    with pytest.raises(CheckpointError, match="no place for .*layers.0.qkv"):
        convert(Memory({"layers.0.qkv": values(24, D)}), rows, fewer, dtype=jnp.float32)
    with pytest.raises(ValueError, match="unknown transform 'split': use one of .*stacked"):
        Row("a", ("b", "c"), "split")
    with pytest.raises(ValueError, match="needs matrices of one width"):
        FUSIONS["stacked"].source_shape([(2, 3), (2, 4)])
    with pytest.raises(ValueError, match="needs targets of one rank 2 or 3 shape"):
        FUSIONS["by_head"].source_shape([(2, 3), (2, 4)])
