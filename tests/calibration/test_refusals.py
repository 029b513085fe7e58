"""What calibrated methods refuse, each with a sentence that says what to do."""

from __future__ import annotations

from typing import Any

import pytest

from popjax.methods import CHESS, FLAP, TEAL, ProbePruning, WandaSP, method_named
from tests.calibration.calibrated import MAKERS
from tests.popjax.tiny_models import CONFIGS


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: method_named("flap", ratio=0.5), "method 'flap' needs statistics: give the file"),
        (lambda: method_named("flap", statistics="file"), "method 'flap' needs a ratio"),
        (lambda: WandaSP(0.5, 3), "statistics 3 is not a path: give the file that `popjax cal"),  # type: ignore[arg-type]
        (lambda: FLAP(-1, "file"), "ratio -1 is outside"),
        (lambda: ProbePruning(0.5, "file", dense_layers=-1), "dense_layers -1 is not a whole"),
        (lambda: TEAL(0.5, "file", prefill="half"), "prefill 'half' is unknown"),
        (lambda: CHESS(0.5, "file", attention=1), "attention 1 is not a bool"),  # type: ignore[arg-type]
        (lambda: CHESS(0.5, "file").for_model(CONFIGS["opt"]), "chess closes gates, and the FFN"),
    ],
)
def test_settings_out_of_range(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("name", MAKERS)
def test_mixtures(name: str) -> None:
    method = method_named(name, ratio=0.5, statistics="file")
    with pytest.raises(ValueError, match=f"{name} is calibrated on channels that .* has experts"):
        method.for_model(CONFIGS["qwen2_moe"])
