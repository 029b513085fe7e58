"""Calibrated methods are of one device, and say so before anything is read."""

from __future__ import annotations

import pytest

from popjax.methods import METHODS, method_named
from popjax.run import Request, run
from tests.popjax.tiny_models import PROMPTS
from tests.sharding.meshes import case


@pytest.mark.parametrize("name", ["wanda-sp", "flap", "probe-pruning", "teal", "chess"])
def test_calibrated_methods_want_one_device(name: str) -> None:
    config, _, spread = case("qwen3", "model=2")
    options = {"dense_layers": 0} if name == "probe-pruning" else {}
    method = method_named(name, ratio=0.5, statistics="nowhere", **options)
    with pytest.raises(ValueError, match=f"{METHODS[name].__name__} is calibrated over all chann"):
        run(spread, config, Request(PROMPTS[:1], 2, method=method))
