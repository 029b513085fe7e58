"""SHA-256 of files, and JSON files read strictly."""

import hashlib

import pytest

from checkpoints import CheckpointError, read_json_object, sha256


def test_sha256(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "x").write_bytes(content)
    assert sha256(tmp_path / "x") == hashlib.sha256(content).hexdigest()


def test_sha256_of_an_absent_file(tmp_path):
    with pytest.raises(CheckpointError, match="cannot read .*x to compute its SHA-256"):
        sha256(tmp_path / "x")


def test_json_object(tmp_path):
    (tmp_path / "x.json").write_text('{"a": [1, 2.5, null], "b": {"c": "é"}}', encoding="utf-8")
    assert read_json_object(tmp_path / "x.json") == {"a": [1, 2.5, None], "b": {"c": "é"}}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("[1]", "must be a JSON object, found list"),
        ('{"a": Infinity}', "Infinity is not JSON"),
        ('{"a": 1, "a": 1}', "key 'a' occurs twice"),
        ("{" * 100_000, "not valid JSON"),
        ("version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
    ],
)
def test_bad_json(tmp_path, content, match):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(CheckpointError, match=match):
        read_json_object(tmp_path / "x.json")


def test_absent_json(tmp_path):
    with pytest.raises(CheckpointError, match="cannot read .*x.json"):
        read_json_object(tmp_path / "x.json")


def test_json_over_the_limit(tmp_path):
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(100_000_001)
    with pytest.raises(CheckpointError, match="larger than 100000000 bytes"):
        read_json_object(tmp_path / "x.json")
