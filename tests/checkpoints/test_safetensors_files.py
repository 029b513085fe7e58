"""Safetensors folders: what is read, and one test for each way a file can be bad."""

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoints import CheckpointError, open_folder

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def entry(**changes):
    return {**F32, **changes}


def refused(folder: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        open_folder(folder)


def assert_same(source, tensors) -> None:
    assert sorted(source.names()) == sorted(tensors)
    for name, array in tensors.items():
        read = source.read(name)
        assert read.dtype == array.dtype and source.info(name).shape == read.shape == array.shape
        assert read.tobytes() == array.tobytes()


def test_single_file(model_folder, good_file, tensors):
    source = open_folder(model_folder({SINGLE: good_file(tensors)}))
    assert_same(source, tensors)
    assert source.info("c").dtype == "BF16"
    assert source.names()[0] == "a", "file order"


def test_file_of_the_safetensors_package(tmp_path, tensors):
    save_file(tensors, tmp_path / SINGLE)
    assert_same(open_folder(tmp_path), tensors)


def test_shards(model_folder, good_file, tensors):
    first = {name: tensors[name] for name in ("a", "b")}
    second = {name: tensors[name] for name in tensors if name not in first}
    weight_map = dict.fromkeys(first, "x-1.safetensors") | dict.fromkeys(second, "x-2.safetensors")
    folder = model_folder(
        {
            "x-1.safetensors": good_file(first),
            "x-2.safetensors": good_file(second),
            INDEX: {"metadata": {"total_size": 1}, "weight_map": weight_map},
        }
    )
    assert_same(open_folder(folder), tensors)


def test_read_is_fresh_and_writable(model_folder, good_file):
    source = open_folder(model_folder({SINGLE: good_file({"a": np.ones(3, np.float32)})}))
    source.read("a")[:] = 7
    assert source.read("a").tolist() == [1, 1, 1]


def test_unknown_name(model_folder, good_file):
    source = open_folder(model_folder({SINGLE: good_file({"a": np.ones(3, np.float32)})}))
    with pytest.raises(CheckpointError, match="has no tensor 'z'"):
        source.read("z")


def test_unreadable_type_is_listed_but_not_read(model_folder, raw_file):
    header = {"a": entry(dtype="F8_E4M3", shape=[8])}
    source = open_folder(model_folder({SINGLE: raw_file(header, bytes(8))}))
    assert source.info("a").dtype == "F8_E4M3"
    with pytest.raises(CheckpointError, match="'a' is F8_E4M3, which is not read; readable: F64"):
        source.read("a")


# One file


def test_empty_file(model_folder):
    refused(model_folder({SINGLE: b""}), "model.safetensors is empty: fetch it again")


def test_too_short_for_a_header(model_folder):
    refused(model_folder({SINGLE: b"abc"}), "is 3 bytes long, too short")


def test_header_longer_than_the_file(model_folder):
    content = (1000).to_bytes(8, "little") + b'{"a":'
    refused(model_folder({SINGLE: content}), "header of 1000 bytes but is only 13 bytes long")


def test_header_over_the_limit(model_folder):
    content = (2**63).to_bytes(8, "little") + b"{}"
    refused(model_folder({SINGLE: content}), "the limit is 100000000")


def test_truncated_data(model_folder, good_file, tensors):
    content = good_file(tensors)
    size = len(content)
    refused(
        model_folder({SINGLE: content[:-1]}),
        f"truncated: its header describes {size} bytes, the file has {size - 1}",
    )


def test_trailing_data(model_folder, good_file, tensors):
    refused(model_folder({SINGLE: good_file(tensors) + b"xy"}), "has 2 bytes that no tensor owns")


def test_truncated_after_opening(model_folder, good_file, tensors):
    folder = model_folder({SINGLE: good_file(tensors)})
    source = open_folder(folder)
    os.truncate(folder / SINGLE, 300)
    with pytest.raises(CheckpointError, match="shrank while tensor 'flags' was read"):
        source.read("flags")


def test_lfs_pointer(model_folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    refused(model_folder({SINGLE: pointer}), "Git LFS pointer.*`git lfs pull`")


def test_lfs_pointer_index(model_folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    refused(model_folder({INDEX: pointer}), "index.json is a Git LFS pointer.*`git lfs pull`")


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (b"[1, 2]", "header does not start with {"),
        (b' {"a": 1}', "header does not start with {"),
        (b'{"a": ', "not valid JSON"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"\xff": 1}', "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
        (b'{"a": 1, "a": 2}', "key 'a' occurs twice"),
        ({"__metadata__": {"format": 1}}, "__metadata__ must map strings to strings"),
        ({"a": 5}, "tensor 'a' must have exactly dtype, shape and data_offsets"),
        ({"a": {"dtype": "F32", "shape": []}}, "must have exactly dtype, shape and data_offsets"),
        ({"a": entry(dtype="F33")}, "unknown dtype 'F33'"),
        ({"a": entry(dtype=["F32"])}, "unknown dtype"),
        ({"a": entry(shape=[-2])}, r"bad shape \[-2\]"),
        ({"a": entry(shape=[True, 2])}, "bad shape"),
        ({"a": entry(shape=[2.0])}, "bad shape"),
        ({"a": entry(shape=[2**64])}, "bad shape"),
        ({"a": entry(shape=[1] * 17)}, "bad shape.*at most 16 sizes"),
        ({"a": entry(data_offsets=[8, 0])}, r"bad data_offsets \[8, 0\]"),
        ({"a": entry(data_offsets=[0])}, "bad data_offsets"),
        ({"a": entry(shape=[3])}, r"spans 8 bytes, but F32\[3\] takes 12"),
        ({"a": entry(dtype="F4", shape=[3], data_offsets=[0, 1])}, "spans 1 bytes, but F4"),
    ],
)
def test_bad_header(model_folder, raw_file, header, match):
    refused(model_folder({SINGLE: raw_file(header, bytes(8))}), match)


def test_hole(model_folder, raw_file):
    header = {"a": entry(), "b": entry(data_offsets=[12, 20])}
    content = raw_file(header, bytes(20))
    refused(model_folder({SINGLE: content}), "a hole before tensor 'b' at byte 12, expected 8")


def test_overlap(model_folder, raw_file):
    header = {"a": entry(), "b": entry(data_offsets=[4, 12])}
    content = raw_file(header, bytes(12))
    refused(model_folder({SINGLE: content}), "overlaps tensor 'b' at byte 4, expected 8")


# The folder


def test_absent_folder(tmp_path):
    refused(tmp_path / "nowhere", "nowhere does not exist: pass a folder with 'model.safetensors'")


def test_file_instead_of_folder(model_folder, good_file, tensors):
    folder = model_folder({SINGLE: good_file(tensors)})
    refused(folder / SINGLE, "model.safetensors is not a folder")


def test_no_weights(model_folder):
    refused(model_folder({"config.json": "{}"}), f"looked for '{SINGLE}' and '{INDEX}'")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickle_only(model_folder, name):
    refused(
        model_folder({name: b"x"}), f"only pickle weights .*{name}.*convert them to safetensors"
    )


def test_gguf_folder(model_folder):
    refused(model_folder({"x.gguf": b"GGUF"}), "x.gguf: pass the .gguf file itself")


def test_wrong_case(model_folder):
    refused(
        model_folder({"Model.SafeTensors": b""}), "'Model.SafeTensors', which differs only in c"
    )


def test_shards_without_index(model_folder):
    name = "model-00001-of-00002.safetensors"
    refused(model_folder({name: b""}), f"1 safetensors file: {name}, but neither .*fetch the index")


def test_weights_are_a_folder(model_folder):
    folder = model_folder({})
    (folder / SINGLE).mkdir()
    refused(folder, "model.safetensors is not a file")


# The index


def index_of(**weight_map):
    return {"metadata": {}, "weight_map": weight_map}


def test_missing_shard(model_folder):
    refused(model_folder({INDEX: index_of(a="x.safetensors")}), "x.safetensors is missing$")


def test_wrong_case_shard(model_folder):
    files = {INDEX: index_of(a="x.safetensors"), "X.safetensors": b""}
    refused(model_folder(files), "x.safetensors is missing; 'X.safetensors' differs only in case")


def test_index_names_an_absent_tensor(model_folder, good_file):
    shard = good_file({"a": np.ones(2, np.float32)})
    files = {INDEX: index_of(a="x.safetensors", z="x.safetensors"), "x.safetensors": shard}
    refused(model_folder(files), "in 'x.safetensors', which lacks it, 1 tensor: z")


def test_shard_holds_an_unindexed_tensor(model_folder, good_file):
    shard = good_file({"a": np.ones(2, np.float32), "z": np.ones(2, np.float32)})
    files = {INDEX: index_of(a="x.safetensors"), "x.safetensors": shard}
    refused(model_folder(files), "does not place there, 1 tensor: z")


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "", "a\\b", "C:x"]
)
def test_weight_map_leaves_the_folder(model_folder, good_file, name):
    folder = model_folder({INDEX: index_of(a=name)})
    (folder.parent / "x.safetensors").write_bytes(good_file({"a": np.ones(2, np.float32)}))
    refused(folder, "only plain file names in the same folder")


def test_weight_map_names_a_pickle(model_folder):
    refused(model_folder({INDEX: index_of(a="x.bin")}), "only .safetensors files are read")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("[]", "must be a JSON object, found list"),
        ("{", "not valid JSON"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "only plain file names"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "'a' occurs twice"),
    ],
)
def test_bad_index(model_folder, content, match):
    refused(model_folder({INDEX: content}), match)


# Links


def test_link_out_of_the_folder(model_folder, good_file, tensors, tmp_path):
    (tmp_path / "elsewhere").write_bytes(good_file(tensors))
    folder = model_folder({})
    (folder / SINGLE).symlink_to("../elsewhere")
    refused(folder, "links to .*elsewhere, outside its folder")


def test_shard_links_out_of_the_folder(model_folder, good_file, tensors, tmp_path):
    (tmp_path / "elsewhere").write_bytes(good_file(tensors))
    folder = model_folder({INDEX: index_of(a="x.safetensors")})
    (folder / "x.safetensors").symlink_to(tmp_path / "elsewhere")
    refused(folder, "links to .*elsewhere, outside its folder")


def test_dangling_link(model_folder):
    folder = model_folder({})
    (folder / SINGLE).symlink_to("gone")
    refused(folder, "links to gone, which does not exist: download it again")


def test_link_inside_the_folder_and_to_the_folder(model_folder, good_file, tensors, tmp_path):
    folder = model_folder({"real": good_file(tensors)})
    (folder / SINGLE).symlink_to("real")
    (tmp_path / "alias").symlink_to(folder)
    assert_same(open_folder(folder), tensors)
    assert_same(open_folder(tmp_path / "alias"), tensors)


def hub_snapshot(cache: Path, content: bytes) -> Path:
    repository = cache / "models--owner--name"
    (repository / "blobs").mkdir(parents=True)
    (repository / "blobs" / "abc").write_bytes(content)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / SINGLE).symlink_to("../../blobs/abc")
    return snapshot


def test_hub_snapshot_links_to_its_blobs(tmp_path, good_file, tensors):
    assert_same(open_folder(hub_snapshot(tmp_path, good_file(tensors))), tensors)


def test_hub_snapshot_may_not_link_out_of_its_repository(tmp_path, good_file, tensors):
    snapshot = hub_snapshot(tmp_path, good_file(tensors))
    (tmp_path / "elsewhere").write_bytes(good_file(tensors))
    (snapshot / SINGLE).unlink()
    (snapshot / SINGLE).symlink_to(tmp_path / "elsewhere")
    refused(snapshot, "outside its folder")
