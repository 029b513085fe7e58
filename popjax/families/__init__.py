"""The Hugging Face families that popjax runs: one small file each, one table of them here."""

from __future__ import annotations

import difflib
from typing import Any

from popjax.config import ModelConfig
from popjax.families import (
    gemma2,
    gemma3,
    gpt_neox,
    llama,
    mistral,
    mixtral,
    olmo2,
    olmoe,
    opt,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
from popjax.families.family import Family

_MODULES = (
    *(llama, mistral, qwen2, qwen3, gemma2, gemma3, phi3, olmo2, opt, gpt_neox),
    *(mixtral, qwen2_moe, qwen3_moe, olmoe),
)
FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in _MODULES}
# Near to a family, and yet not it.
_REFUSED = {
    "gemma3": "has a part that sees images; its text part alone is 'gemma3_text'",
    "gemma": "has norms before each branch only; Gemma 2 and 3 are read",
    "olmo": "has norms without parameters; OLMo 2 is read",
    "phi": "has one norm for both branches of a layer; Phi 3 and 4 are read",
}


def family_of(model_type: object) -> Family:
    """The family of a `model_type`. Raises ValueError with the supported ones and the nearest."""
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    if isinstance(model_type, str) and model_type in _REFUSED:
        raise ValueError(f"model_type {model_type!r} is not supported: it {_REFUSED[model_type]}")
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
