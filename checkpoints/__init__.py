"""Checkpoint files in and out: safetensors, GGUF, hub folders, orbax. Knows no models.

Reading: `open_folder`, `open_gguf` (a `TensorSource` each), `fetch_folder`. Converting: `convert`
and `export`, driven by tables of `Row`s. Writing: `save_safetensors`, `store` for (config, params)
of our own, `save_bundle` for what belongs to a model but is none. Every unusable file is a
`CheckpointError`.
"""

from checkpoints import store
from checkpoints.atomic import refuse_existing
from checkpoints.bundle import check_bundle, load_bundle, save_bundle
from checkpoints.digest import sha256
from checkpoints.engine import Row, convert, nested
from checkpoints.errors import CheckpointError
from checkpoints.fused import FUSIONS, Fusion
from checkpoints.gguf_files import GgufSource, open_gguf
from checkpoints.hub import fetch_folder
from checkpoints.json_files import read_json_object
from checkpoints.safetensors_files import open_folder
from checkpoints.save import export, save_safetensors
from checkpoints.source import TensorInfo, TensorSource
from checkpoints.transforms import TRANSFORMS, Transform

__all__ = [
    "FUSIONS",
    "TRANSFORMS",
    "CheckpointError",
    "Fusion",
    "GgufSource",
    "Row",
    "TensorInfo",
    "TensorSource",
    "Transform",
    "check_bundle",
    "convert",
    "export",
    "fetch_folder",
    "load_bundle",
    "nested",
    "open_folder",
    "open_gguf",
    "read_json_object",
    "refuse_existing",
    "save_bundle",
    "save_safetensors",
    "sha256",
    "store",
]
