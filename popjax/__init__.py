"""popjax: Hugging Face language models in JAX that decode only what their prompt needs.

    model = popjax.load()
    result = model.generate("...", method=popjax.OnlinePruning(ratio=0.5))

Importing has no side effects: no backend starts and no environment variable is set.
"""

from popjax.config import ModelConfig
from popjax.methods import (
    METHODS,
    Frozen,
    Griffin,
    Method,
    OnlinePruning,
    RescoreAll,
    method_named,
)
from popjax.model import Generation, LanguageModel, load
from popjax.report import Report
from popjax.sampling import SamplingConfig
from popjax.sparsity import ChannelBudget, ChannelPartition, channel_budget

__all__ = [
    "METHODS",
    "ChannelBudget",
    "ChannelPartition",
    "Frozen",
    "Generation",
    "Griffin",
    "LanguageModel",
    "Method",
    "ModelConfig",
    "OnlinePruning",
    "Report",
    "RescoreAll",
    "SamplingConfig",
    "channel_budget",
    "load",
    "method_named",
]
