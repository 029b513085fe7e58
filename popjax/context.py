"""A prompt prefilled once and evicted, kept for many questions, in memory or in a file.

The file is safetensors: the pool of entries, where each head's lie, and the context's tokens.
Leaves out prefilling (`prefilling.py`).
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import checkpoints
from popjax import cache as kv
from popjax.config import ModelConfig
from popjax.eviction.pool import alignment

KIND, VERSION = "context", "1"
_FIELDS = ("entries", "positions", "starts", "lengths")


@dataclasses.dataclass(frozen=True)
class Context:
    """What stayed of one prompt: its entries, all of its tokens, and which model it is of.

    kept: the entries, B = 1; fingerprint: of the model's config and weights; method: the eviction
    that decided, in words.
    """

    kept: kv.Kept
    tokens: tuple[int, ...]
    fingerprint: str
    method: str

    @property
    def bytes_held(self) -> int:
        """Bytes of its arrays."""
        return sum(getattr(self.kept, name).nbytes for name in _FIELDS)

    def of_rows(self, rows: int) -> kv.Kept:
        """The entries for a batch of rows."""
        return self.kept.for_rows(rows)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one new safetensors file. Raises CheckpointError where the path exists."""
        arrays = {name: getattr(self.kept, name) for name in _FIELDS}
        arrays["tokens"] = np.asarray(self.tokens, np.int32)
        about = {"fingerprint": self.fingerprint, "method": self.method}
        return checkpoints.save_bundle(path, KIND, VERSION, arrays, about)


def load_context(
    path: str | os.PathLike[str], config: ModelConfig, fingerprint: str, dtype: jnp.dtype
) -> Context:
    """The context that `save` wrote, for the model of this config, fingerprint and dtype.

    Raises CheckpointError for a file that is damaged, truncated, of another version or of another
    model; nothing is half restored.
    """
    arrays, about = checkpoints.load_bundle(path, KIND, VERSION, "Context.save(FILE)")
    if about.get("fingerprint") != fingerprint:
        raise checkpoints.CheckpointError(
            f"{path} is a context of another model (fingerprint {about.get('fingerprint')}, this "
            f"one has {fingerprint}): prefill it again with this model"
        )
    _check(path, arrays, config, dtype)
    kept = kv.Kept(*(jnp.asarray(arrays[name]) for name in _FIELDS))
    tokens = tuple(arrays["tokens"].tolist())
    return Context(kept, tokens, fingerprint, about.get("method", ""))


def _check(
    path: str | os.PathLike[str],
    arrays: dict[str, np.ndarray],
    config: ModelConfig,
    dtype: jnp.dtype,
) -> None:
    """Raise CheckpointError unless the arrays are a context of this model."""
    layer = config.layers[0]
    names = {*_FIELDS, "tokens"}
    if set(arrays) != names:
        raise checkpoints.CheckpointError(
            f"{path} holds arrays {sorted(arrays)}, not {sorted(names)}: it is no context"
        )
    E, n = len(arrays["entries"]), arrays["tokens"].size
    places = (config.num_layers, 1, layer.num_kv_heads)
    wanted = {
        "entries": ((E, 2 * layer.head_dim), jnp.dtype(dtype)),
        "positions": ((E,), jnp.dtype("int32")),
        "starts": (places, jnp.dtype("int32")),
        "lengths": (places, jnp.dtype("int32")),
        "tokens": ((n,), jnp.dtype("int32")),
    }
    for name, (shape, kind) in wanted.items():
        if arrays[name].shape != shape or arrays[name].dtype != kind:
            raise checkpoints.CheckpointError(
                f"{path}: {name} is {arrays[name].dtype}{list(arrays[name].shape)}, this model "
                f"needs {kind}{list(shape)}: prefill the context again"
            )
    if not _is_sound(arrays, config):
        raise checkpoints.CheckpointError(
            f"{path} holds values that are not finite, or names entries, tokens or positions that "
            "it does not have: it is damaged, prefill the context again"
        )


def _is_sound(arrays: dict[str, np.ndarray], config: ModelConfig) -> bool:
    """Whether entries are finite, and all places, tokens and positions are ones there are."""
    starts, lengths, tokens = (arrays[name] for name in ("starts", "lengths", "tokens"))
    E, n = len(arrays["entries"]), tokens.size
    inside = (
        (starts >= 0).all()
        and not (starts % alignment()).any()
        and (lengths >= 0).all()
        and (lengths <= E - starts).all()  # the sum of the two might overflow
    )
    known = n > 0 and tokens.min() >= 0 and tokens.max() < config.vocab_size
    placed = (arrays["positions"] >= -1).all() and (arrays["positions"] < n).all()
    return bool(inside and known and placed and np.isfinite(arrays["entries"]).all())
