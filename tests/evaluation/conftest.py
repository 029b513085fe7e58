"""Tiny models with their tokenizer, one with room for sentences, and tasks in files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import popjax
from popjax import LanguageModel
from tests.popjax.conftest import tiny_checkpoint
from tests.scripts.conftest import long_checkpoint

__all__ = ["long_checkpoint", "tiny_checkpoint"]

ITEMS: list[dict[str, Any]] = [
    {"context": "The dog", "choices": [" barks.", " purrs loudly."], "answer": 0},
    {"context": "The cat", "choices": [" barks.", " purrs.", " is a fish."], "answer": 1},
    {"context": "", "choices": ["It rains", "It rain"], "answer": 0},
    {"context": "Two and two make ", "choices": ["four", "five"], "answer": 0},
]


@pytest.fixture(scope="session")
def long_model(long_checkpoint: Path) -> LanguageModel:
    """The tiny llama with a context of 1024 tokens."""
    return popjax.load(str(long_checkpoint))


@pytest.fixture
def task_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a task file of items, or of lines as they are."""

    def write(items: list[Any] = ITEMS, name: str = "pets") -> Path:
        path = tmp_path / f"{name}.jsonl"
        lines = (item if isinstance(item, str) else json.dumps(item) for item in items)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write
