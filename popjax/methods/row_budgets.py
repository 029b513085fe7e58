"""Bytes of a step in rows: what online pruning reads, so that methods of other forms spend as much.

A row is that of a channel in gate, up or down; a layer of F channels has 3 F. Leaves out how a
method spends its rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from popjax.sparsity import channel_budget

ENDS = ("dense", "pruned")


def rows_of_online_pruning(mlp_dim: int, ratio: float) -> int:
    """Rows of gate, up and down that a step of online pruning reads of F channels.

    Gate and up of R + C each and down of the chosen, with its default band gamma = 0.1: close to
    (2 (1 - r + 0.05) + 1 - r) F. What methods of other forms spend for the same bytes.
    """
    budget = channel_budget(mlp_dim, ratio, 0.05)
    return 2 * budget.evaluated + budget.active


def rows_with_dense_ends(widths: Sequence[int], rows: Sequence[int]) -> list[int]:
    """Rows of each layer where the first and last of F channels have all 3 F, at the same sum.

    What is left is shared among the others in proportion to `rows`. Raises ValueError where
    nothing is.
    """
    whole = [3 * F if i in (0, len(rows) - 1) else 0 for i, F in enumerate(widths)]
    inner = sum(n for n, full in zip(rows, whole, strict=True) if not full)
    left, wanted = sum(rows) - sum(whole), sum(3 * F for F in widths)
    if sum(rows) < wanted and left <= 0:
        raise ValueError(
            f"ends 'dense' leave the first and last of {len(rows)} layers whole, which alone is "
            f"more than the {sum(rows) / wanted:.0%} of FFN weights asked for: lower the ratio, or "
            "give ends='pruned'"
        )
    return [full or n * left // inner for n, full in zip(rows, whole, strict=True)]
