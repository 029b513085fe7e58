"""Sizes of published models as their config.json state them, for tests that allocate nothing."""

from __future__ import annotations

from typing import Any

_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _raw(
    model_type: str,
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    heads: tuple[int, int],
    **more: Any,
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "max_position_embeddings": 32768,
        **more,
    }


def _llama31(*sizes: Any, **more: Any) -> dict[str, Any]:
    return _raw("llama", 128256, *sizes, rope_theta=500_000.0, rope_scaling=_LLAMA3, **more)


LLAMA_31_8B = _llama31(4096, 14336, 32, (32, 8))
LLAMA_31_70B = _llama31(8192, 28672, 80, (64, 8))
LLAMA_32_1B = _llama31(2048, 8192, 16, (32, 8), head_dim=64, tie_word_embeddings=True)
LLAMA_2_7B = _raw("llama", 32000, 4096, 11008, 32, (32, 32))
LLAMA_2_13B = _raw("llama", 32000, 5120, 13824, 40, (40, 40))
LLAMA_2_70B = _raw("llama", 32000, 8192, 28672, 80, (64, 8))
MISTRAL_7B = _raw("mistral", 32000, 4096, 14336, 32, (32, 8), sliding_window=4096)
QWEN25_7B = _raw("qwen2", 152064, 3584, 18944, 28, (28, 4))
QWEN3_8B = _raw("qwen3", 151936, 4096, 12288, 36, (32, 8), head_dim=128)
QWEN3_32B = _raw("qwen3", 151936, 5120, 25600, 64, (64, 8), head_dim=128)
MIXTRAL_8X7B = _raw(
    "mixtral", 32000, 4096, 14336, 32, (32, 8), num_local_experts=8, num_experts_per_tok=2
)
QWEN15_MOE = _raw(
    "qwen2_moe",
    151936,
    2048,
    5632,
    24,
    (16, 16),
    num_experts=60,
    num_experts_per_tok=4,
    moe_intermediate_size=1408,
    shared_expert_intermediate_size=5632,
)
QWEN2_57B_MOE = _raw(
    "qwen2_moe",
    151936,
    3584,
    18944,
    28,
    (28, 4),
    num_experts=64,
    num_experts_per_tok=8,
    moe_intermediate_size=2560,
    shared_expert_intermediate_size=20480,
)
QWEN3_30B_MOE = _raw(
    "qwen3_moe",
    151936,
    2048,
    6144,
    48,
    (32, 4),
    head_dim=128,
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
    norm_topk_prob=True,
)
OLMOE_7B = _raw("olmoe", 50304, 2048, 1024, 16, (16, 16), num_experts=64, num_experts_per_tok=8)
SMOLLM2_135M = _raw("llama", 49152, 576, 1536, 30, (9, 3), tie_word_embeddings=True)
GEMMA2_2B = _raw("gemma2", 256000, 2304, 9216, 26, (8, 4), head_dim=256)
GEMMA2_9B = _raw("gemma2", 256000, 3584, 14336, 42, (16, 8), head_dim=256)
_GEMMA3 = {"head_dim": 256, "sliding_window": 512, "rope_theta": 1e6, "rope_local_base_freq": 1e4}
GEMMA3_270M = _raw("gemma3_text", 262144, 640, 2048, 18, (4, 1), **_GEMMA3)
GEMMA3_1B = _raw("gemma3_text", 262144, 1152, 6912, 26, (4, 1), **_GEMMA3)
PHI3_MINI = _raw("phi3", 32064, 3072, 8192, 32, (32, 32), sliding_window=2047)
OLMO2_7B = _raw("olmo2", 100352, 4096, 11008, 32, (32, 32), rope_theta=500_000)


def _opt(*sizes: Any) -> dict[str, Any]:
    raw = _raw("opt", 50272, *sizes, max_position_embeddings=2048)
    raw["ffn_dim"] = raw.pop("intermediate_size")
    return raw


def _pythia(vocab_size: int, *sizes: Any) -> dict[str, Any]:
    more = {"rotary_pct": 0.25, "rotary_emb_base": 10000, "hidden_act": "gelu"}
    return _raw("gpt_neox", vocab_size, *sizes, **more, max_position_embeddings=2048)


OPT_125M = _opt(768, 3072, 12, (12, 12))
OPT_67B = _opt(4096, 16384, 32, (32, 32))
PYTHIA_160M = _pythia(50304, 768, 3072, 12, (12, 12))
PYTHIA_69B = _pythia(50432, 4096, 16384, 32, (32, 32))

PARAMETER_COUNTS: dict[str, tuple[dict[str, Any], int]] = {
    "Llama-3.1-8B": (LLAMA_31_8B, 8_030_261_248),
    "Llama-3.1-70B": (LLAMA_31_70B, 70_553_706_496),
    "Llama-2-7B": (LLAMA_2_7B, 6_738_415_616),
    "Llama-3.2-1B": (LLAMA_32_1B, 1_235_814_400),
    "Mistral-7B-v0.1": (MISTRAL_7B, 7_241_732_096),
    "Qwen2.5-7B": (QWEN25_7B, 7_615_616_512),
    "Qwen3-8B": (QWEN3_8B, 8_190_735_360),
    "SmolLM2-135M": (SMOLLM2_135M, 134_515_008),
    "Gemma-2-2B": (GEMMA2_2B, 2_614_341_888),
    "Gemma-2-9B": (GEMMA2_9B, 9_241_705_984),
    "Gemma-3-270M": (GEMMA3_270M, 268_098_176),
    "Gemma-3-1B": (GEMMA3_1B, 999_885_952),
    "Phi-3-mini-4k": (PHI3_MINI, 3_821_079_552),
    "OLMo-2-7B": (OLMO2_7B, 7_298_617_344),
    "OPT-125M": (OPT_125M, 125_239_296),
    "OPT-6.7B": (OPT_67B, 6_658_473_984),
    "Pythia-160M": (PYTHIA_160M, 162_322_944),
    "Pythia-6.9B": (PYTHIA_69B, 6_857_302_016),
    "Mixtral-8x7B-v0.1": (MIXTRAL_8X7B, 46_702_792_704),
    "Qwen1.5-MoE-A2.7B": (QWEN15_MOE, 14_315_784_192),
    "Qwen3-30B-A3B": (QWEN3_30B_MOE, 30_532_122_624),
    "OLMoE-1B-7B": (OLMOE_7B, 6_919_161_856),
}


# FFN ratio in percent at a model ratio of 20 % and 40 % (arXiv 2602.06822, Table 8). Of the
# mixtures only the activated routed experts count; of the vision models only the 7B language model.
FFN_RATIOS: dict[str, tuple[dict[str, Any], float, float]] = {
    "Llama-2-7B": (LLAMA_2_7B, 29.9, 59.8),
    "Llama-2-13B": (LLAMA_2_13B, 29.9, 59.8),
    "Llama-2-70B": (LLAMA_2_70B, 24.3, 48.6),
    "Llama-3.1-8B": (LLAMA_31_8B, 24.8, 49.5),
    "Llama-3.1-70B": (LLAMA_31_70B, 24.3, 48.6),
    "Qwen3-8B": (QWEN3_8B, 25.6, 51.1),
    "Qwen3-32B": (QWEN3_32B, 24.8, 49.6),
    "Qwen1.5-MoE-A2.7B": (QWEN15_MOE, 29.7, 59.4),
    "Qwen2-57B-A14B": (QWEN2_57B_MOE, 22.7, 45.3),
    "Qwen3-30B-A3B": (QWEN3_30B_MOE, 30.0, 60.0),
    "Qwen2-VL-7B": (QWEN25_7B, 22.9, 45.8),
    "Qwen2.5-VL-7B": (QWEN25_7B, 22.9, 45.8),
}
