"""What an evaluation found: a row a task, metric and case, with its difference from dense.

Leaves out how it is shown (`cli/evaluation_tables.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from popjax.evaluation.protocols import DENSE
from popjax.evaluation.statistics import Mean, paired


@dataclasses.dataclass(frozen=True)
class Row:
    """One metric of one task under one case; difference: from dense, paired, where both were run.

    from_harness: mean and error are those that lm-eval reports.
    """

    task: str
    metric: str
    case: str
    value: Mean
    difference: Mean | None = None
    from_harness: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "task": self.task,
            "metric": self.metric,
            "case": self.case,
            "value": self.value.to_json(),
            "difference_from_dense": None if self.difference is None else self.difference.to_json(),
            "from_lm_eval": self.from_harness,
        }


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """All rows of a run, under which protocol and settings, and what to know about them."""

    model: str
    protocol: str
    rows: tuple[Row, ...]
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "model": self.model,
            "protocol": self.protocol,
            "settings": dict(self.settings),
            "notes": list(self.notes),
            "results": [row.to_json() for row in self.rows],
        }


def differences(by_case: Mapping[str, Sequence[float]], name: str) -> Mean | None:
    """The paired difference of a case's values from dense's; None for dense, or without it."""
    if name == DENSE or DENSE not in by_case:
        return None
    return paired(by_case[name], by_case[DENSE])


__all__ = ["Evaluation", "Row", "differences"]
