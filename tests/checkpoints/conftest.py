"""Made-up checkpoint files, byte by byte where the bytes are the point."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

Bytes = Callable[..., bytes]
_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "bool": "BOOL"}


def _raw_file(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file of any header: a JSON value, or bytes taken as they are."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def _good_file(tensors: dict[str, np.ndarray]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in tensors.items():
        span = [len(data), len(data) + array.nbytes]
        header[name] = {
            "dtype": _NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": span,
        }
        data += array.tobytes()
    return _raw_file(header, data)


@pytest.fixture
def raw_file() -> Bytes:
    return _raw_file


@pytest.fixture
def good_file() -> Bytes:
    return _good_file


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "a": rng.standard_normal((3, 4), np.float32),
        "b": rng.standard_normal((5,), np.float32).astype(np.float16),
        "c": rng.standard_normal((2, 2), np.float32).astype(ml_dtypes.bfloat16),
        "empty": np.zeros((0, 7), np.float32),
        "scalar": np.array(3.5, np.float32),
        "ids": np.arange(3, dtype=np.int64),
        "flags": np.array([True, False]),
    }


@pytest.fixture
def model_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes files (name -> bytes, str, or a JSON value) into a fresh folder."""

    def write(files: dict[str, Any]) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        for name, content in files.items():
            if not isinstance(content, bytes):
                content = content if isinstance(content, str) else json.dumps(content)
                content = content.encode()
            (folder / name).write_bytes(content)
        return folder

    return write
