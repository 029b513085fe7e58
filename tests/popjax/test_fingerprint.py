"""Which models a fingerprint tells apart: every expert counts, and few of their rows are read."""

from __future__ import annotations

import dataclasses

import pytest

from popjax.config import MoeConfig
from popjax.fingerprint import fingerprint
from tests.popjax.tiny_models import random_params, tiny


@pytest.mark.parametrize("expert", [0, 11])
def test_every_expert_counts(expert: int) -> None:
    config = tiny("olmoe")
    layer = dataclasses.replace(config.layers[0], moe=MoeConfig(12, 3, 24))
    config = dataclasses.replace(config, layers=(layer,))
    params = random_params(config)
    mine = fingerprint(params, config)
    held = params["layer_0"]["moe"]
    # Only the first row is read: of published mixtures whole experts would be gigabytes.
    for row, differs in ((0, True), (1, False)):
        changed = {**held, "up": held["up"].at[expert, row].add(1.0)}
        other = {**params, "layer_0": {**params["layer_0"], "moe": changed}}
        assert (fingerprint(other, config) != mine) is differs
