"""Any bytes in a safetensors folder: it opens and reads, or is refused; nothing else happens."""

import json
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoints import CheckpointError, open_folder

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def opens_or_refuses(folder: Path) -> None:
    """Only `CheckpointError` may come out, and what opens must be readable or be refused."""
    try:
        source = open_folder(folder)
        for name in source.names():
            assert source.read(name).shape == source.info(name).shape
    except CheckpointError as error:
        assert str(error)


fuzz = settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzz
@given(
    edits=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=3)), min_size=1, max_size=4),
    keep=st.floats(0.5, 1.5),
)
def test_mutated_file(tmp_path, good_file, tensors, edits, keep):
    content = bytearray(good_file(tensors))
    for place, replacement in edits:
        start = int(place * len(content))
        content[start : start + len(replacement)] = replacement
    (tmp_path / SINGLE).write_bytes(content[: int(keep * len(content))])
    opens_or_refuses(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a"]), inner)
    ),
    max_leaves=12,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F4", "I64", "X"]) | json_values,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 40), max_size=3) | json_values,
    }
)


@fuzz
@given(header=st.dictionaries(st.text(max_size=4), entries | json_values), size=st.integers(0, 64))
def test_random_header(tmp_path, raw_file, header, size):
    (tmp_path / SINGLE).write_bytes(raw_file(header, bytes(size)))
    opens_or_refuses(tmp_path)


@fuzz
@given(weight_map=st.dictionaries(st.text(max_size=4), st.text(max_size=300) | json_values))
def test_random_index(tmp_path, weight_map):
    content = json.dumps({"weight_map": weight_map})
    (tmp_path / INDEX).write_text(content, encoding="utf-8")
    opens_or_refuses(tmp_path)
