"""Lengths rounded up, so that prompts of many lengths share few compiled programs, and padding."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from popjax.nn.transformer import Inputs


def bucket(length: int, smallest: int = 16) -> int:
    """The least of 16, 24, 32, 48, 64, 96, ... that holds `length`: few compiles, few pads."""
    size = smallest
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return size


def left_padded(
    prompts: Sequence[Sequence[int]], length: int | None = None, first: int = 0
) -> Inputs:
    """Inputs [B, T] of token lists, right-aligned in a bucket (or `length`), pads at position -1.

    first: the position of a prompt's first token, behind those of a context. Raises ValueError for
    an empty prompt.
    """
    empty = [i for i, prompt in enumerate(prompts) if len(prompt) == 0]
    if empty or not prompts:
        raise ValueError(f"prompt {empty[0] if empty else 0} has no tokens: give at least one")
    T = bucket(max(len(prompt) for prompt in prompts)) if length is None else length
    tokens = np.zeros((len(prompts), T), np.int32)
    positions = np.full((len(prompts), T), -1, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, T - len(prompt) :] = prompt
        positions[row, T - len(prompt) :] = first + np.arange(len(prompt))
    return Inputs(jnp.asarray(tokens), jnp.asarray(positions))
