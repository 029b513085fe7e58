"""What a prefill multiplies, whole and with layers passed by: the ideal of what skipping spares.

Counts products of weights and of attention as the definition needs them: causal, within windows, no
pads. Leaves out norms, rotation and softmax, and what a machine makes of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from popjax.config import LayerConfig, ModelConfig
from popjax.depth.method import FULL, KV_ONLY, DepthPlan


def prefill_flops(
    config: ModelConfig, lengths: Sequence[int], plan: DepthPlan | None = None, before: int = 0
) -> int:
    """Floating-point operations (two a product) to prefill prompts of these lengths.

    before: tokens of a context that every prompt continues.
    """
    total = 0
    for length in lengths:
        for i, layer in enumerate(config.layers):
            kind = FULL if plan is None else plan.layers[i]
            total += _layer_flops(config, layer, kind, length, before)
        total += 2 * config.vocab_size * config.embed_dim
    return total


def _layer_flops(
    config: ModelConfig, layer: LayerConfig, kind: str, length: int, before: int
) -> int:
    heads, D = layer.head_dim * layer.num_heads, config.embed_dim
    entries = 2 * D * layer.head_dim * layer.num_kv_heads
    whole = entries + 2 * D * heads + config.mlp_matrices * D * layer.mlp_dim
    if layer.moe is not None:
        experts = config.mlp_matrices * layer.routed * layer.channels
        whole += D * (layer.moe.num_experts + experts)

    def attended(positions: range) -> int:
        window = layer.window
        seen = sum(p + 1 if window is None else min(p + 1, window) for p in positions)
        return 2 * heads * seen

    end = before + length
    if kind == FULL:
        return 2 * (whole * length + attended(range(before, end)))
    passing = entries * (length - 1) if kind == KV_ONLY else 0
    seen = attended(range(end - 1, end)) if kind == KV_ONLY else 2 * heads
    return 2 * (passing + whole + seen)


__all__ = ["prefill_flops"]
