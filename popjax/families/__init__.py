"""The Hugging Face families that popjax runs: one small file each, one table of them here."""

from __future__ import annotations

import difflib
from typing import Any

from popjax.config import ModelConfig
from popjax.families import llama, mistral, mixtral, olmoe, qwen2, qwen2_moe, qwen3, qwen3_moe
from popjax.families.family import Family

FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY
    for module in (llama, mistral, qwen2, qwen3, mixtral, qwen2_moe, qwen3_moe, olmoe)
}


def family_of(model_type: object) -> Family:
    """The family of a `model_type`. Raises ValueError with the supported ones and the nearest."""
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    near = difflib.get_close_matches(str(model_type), FAMILIES, n=1, cutoff=0.4)
    hint = f"; the nearest is {near[0]!r}" if near else ""
    raise ValueError(
        f"model_type {model_type!r} is not supported: popjax runs {', '.join(FAMILIES)}{hint}"
    )


def model_config(raw: dict[str, Any]) -> ModelConfig:
    """ModelConfig of a parsed config.json. Raises ValueError naming what is wrong in it."""
    if "model_type" not in raw:
        raise ValueError("config.json lacks 'model_type': it is not a Hugging Face model config")
    return family_of(raw["model_type"]).config(raw)


__all__ = ["FAMILIES", "Family", "family_of", "model_config"]
