"""Cache eviction: which entries of a prompt stay, by which method, and moving them.

One method, one file, one paper. `KV_METHODS` maps command names to classes.
"""

from __future__ import annotations

from typing import Any

from popjax.eviction.adakv import AdaKV
from popjax.eviction.criticalkv import CriticalKV
from popjax.eviction.fast_kvzip import FastKVzip
from popjax.eviction.h2o import H2O
from popjax.eviction.kvzip import KVzip
from popjax.eviction.laprox import LaProx
from popjax.eviction.method import KvMethod
from popjax.eviction.prefixkv import PrefixKV
from popjax.eviction.pyramidkv import PyramidKV
from popjax.eviction.snapkv import SnapKV
from popjax.eviction.streaming import StreamingLLM
from popjax.eviction.tova import Tova
from popjax.registry import name_of, resolved

KV_METHODS: dict[str, type[KvMethod]] = {
    "kvzip": KVzip,
    "fast-kvzip": FastKVzip,
    "laprox": LaProx,
    "streaming-llm": StreamingLLM,
    "snapkv": SnapKV,
    "tova": Tova,
    "h2o": H2O,
    "adakv": AdaKV,
    "criticalkv": CriticalKV,
    "pyramidkv": PyramidKV,
    "prefixkv": PrefixKV,
}


def kv_method_named(name: str, **options: Any) -> KvMethod:
    """The eviction method called `name` with its options; None-valued options are left out.

    Raises ValueError for an unknown name or an option that the method does not have.
    """
    kind, given = resolved(KV_METHODS, "kv method", name, options)
    return kind(**given)


def kv_method_name(method: KvMethod) -> str:
    """The command-line name of an eviction method."""
    return name_of(KV_METHODS, method)


__all__ = [
    "H2O",
    "KV_METHODS",
    "AdaKV",
    "CriticalKV",
    "FastKVzip",
    "KVzip",
    "KvMethod",
    "LaProx",
    "PrefixKV",
    "PyramidKV",
    "SnapKV",
    "StreamingLLM",
    "Tova",
    "kv_method_name",
    "kv_method_named",
]
