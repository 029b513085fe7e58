"""popjax: Hugging Face language models in JAX that decode only what their prompt needs.

    model = popjax.load()
    result = model.generate("...", method=popjax.OnlinePruning(ratio=0.5))

Importing has no side effects: no backend starts, no environment variable is set, and jax itself is
imported with the first name that is used, so that `popjax --help` answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from popjax.config import ModelConfig
    from popjax.context import Context
    from popjax.depth import (
        DEPTH_METHODS,
        DepthMethod,
        PrefillPruning,
        ShortGPT,
        depth_method_named,
    )
    from popjax.eviction import (
        H2O,
        KV_METHODS,
        AdaKV,
        CriticalKV,
        FastKVzip,
        KvMethod,
        KVzip,
        LaProx,
        PrefixKV,
        PyramidKV,
        SnapKV,
        StreamingLLM,
        Tova,
        kv_method_named,
    )
    from popjax.exporting import calibrated_partition, statically_pruned
    from popjax.methods import (
        CHESS,
        FLAP,
        METHODS,
        TEAL,
        Frozen,
        GateFirst,
        Griffin,
        Method,
        OnlinePruning,
        ProbePruning,
        RescoreAll,
        Scout,
        WandaSP,
        method_named,
    )
    from popjax.model import Generation, LanguageModel, load
    from popjax.report import Report
    from popjax.sampling import SamplingConfig
    from popjax.sparsity import ChannelBudget, ChannelPartition, channel_budget

__all__ = [
    "CHESS",
    "DEPTH_METHODS",
    "FLAP",
    "H2O",
    "KV_METHODS",
    "METHODS",
    "TEAL",
    "AdaKV",
    "ChannelBudget",
    "ChannelPartition",
    "Context",
    "CriticalKV",
    "DepthMethod",
    "FastKVzip",
    "Frozen",
    "GateFirst",
    "Generation",
    "Griffin",
    "KVzip",
    "KvMethod",
    "LaProx",
    "LanguageModel",
    "Method",
    "ModelConfig",
    "OnlinePruning",
    "PrefillPruning",
    "PrefixKV",
    "ProbePruning",
    "PyramidKV",
    "Report",
    "RescoreAll",
    "SamplingConfig",
    "Scout",
    "ShortGPT",
    "SnapKV",
    "StreamingLLM",
    "Tova",
    "WandaSP",
    "calibrated_partition",
    "channel_budget",
    "depth_method_named",
    "kv_method_named",
    "load",
    "method_named",
    "statically_pruned",
]

_HOMES = {
    "config": ("ModelConfig",),
    "context": ("Context",),
    "depth": (
        "DEPTH_METHODS",
        "DepthMethod",
        "PrefillPruning",
        "ShortGPT",
        "depth_method_named",
    ),
    "eviction": (
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
        "kv_method_named",
    ),
    "exporting": ("calibrated_partition", "statically_pruned"),
    "model": ("Generation", "LanguageModel", "load"),
    "report": ("Report",),
    "sampling": ("SamplingConfig",),
    "sparsity": ("ChannelBudget", "ChannelPartition", "channel_budget"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'popjax' has no attribute {name!r}")
    home = next((home for home, names in _HOMES.items() if name in names), "methods")
    value = getattr(importlib.import_module(f"popjax.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
