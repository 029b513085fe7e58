"""What contracts mean by the same run: equal tokens, logits up to the order of summation."""

from __future__ import annotations

from typing import Any

import numpy as np

from popjax.config import ModelConfig
from popjax.run import RunResult
from tests.popjax.tiny_models import logit_tolerance


def logits_of(result: RunResult) -> np.ndarray:
    assert result.logits is not None
    return result.logits


def assert_same(config: ModelConfig, result: RunResult, wanted: RunResult, rows: Any = ...) -> None:
    """The result is that of some rows of another run, or of all."""
    expected = logits_of(wanted)
    tolerance = logit_tolerance(config, expected)
    np.testing.assert_allclose(logits_of(result), expected[rows], rtol=0, atol=tolerance)
    assert result.tokens.tolist() == wanted.tokens[rows].tolist()
