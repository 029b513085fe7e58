"""Weights lie side by side in one block, as jax's own arrays without a copy.

Reads /proc, so it needs Linux.
"""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import Row, TensorInfo, convert, open_folder, save_safetensors, store
from checkpoints.buffers import Arena, settle

SHAPES = {"a": (3, 5), "b": (700, 300), "c": (1,)}


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(s).astype(np.float32) for name, s in SHAPES.items()}


def span(tree: dict[str, jax.Array]) -> int:
    """Bytes from the first array's start to the last one's end."""
    places = [(x.unsafe_buffer_pointer(), x.nbytes) for x in tree.values() if x.size]
    assert all(place % 64 == 0 for place, _ in places)
    return max(place + size for place, size in places) - min(place for place, _ in places)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_converted_and_restored_weights_share_a_block(tmp_path: Path, dtype: str) -> None:
    wanted = {name: values.astype(jnp.dtype(dtype)) for name, values in arrays().items()}
    save_safetensors(tmp_path / "model", arrays().items(), config={})
    rows = tuple(Row(name, name, "same") for name in SHAPES)
    infos = {name: TensorInfo(shape, "F32") for name, shape in SHAPES.items()}
    tree = convert(open_folder(tmp_path / "model"), rows, infos, dtype=dtype)
    store.save(tmp_path / "store", {}, tree)
    for found in (tree, store.restore(tmp_path / "store")[1]):
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
        total = sum(x.nbytes for x in tree.values())
        assert total <= span(found) < total + 64 * len(SHAPES)


def test_a_large_block_asks_for_large_pages() -> None:
    held = [jnp.ones((2048, 2048), jnp.float32)]
    settle(held)
    place = held[0].unsafe_buffer_pointer()
    maps = Path("/proc/self/smaps").read_text()
    for mapping in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", maps, flags=re.MULTILINE)[1:]:
        first, last = (int(end, 16) for end in mapping.split(maxsplit=1)[0].split("-"))
        if first <= place < last:
            assert "hg" in mapping.split("VmFlags:")[1].split()
            return
    raise AssertionError("the array lies in no mapping")


def test_an_arena_is_made_for_what_it_holds() -> None:
    arena = Arena([np.zeros((4, 4), np.float32)])
    arena.empty((4, 4), np.dtype(np.float32))
    with pytest.raises(AssertionError, match="was not made for"):
        arena.empty((1,), np.dtype(np.float32))
