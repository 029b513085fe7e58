"""What a report counts of a model's weights, by hand."""

from __future__ import annotations

import pytest

from popjax.ahead_of_time import Workload, read_weights
from popjax.methods import Method
from popjax.report import bytes_per_token, weight_bytes
from popjax.targets import parse_target
from tests.popjax.tiny_models import CONFIGS, random_params


@pytest.mark.parametrize("family", ["opt", "gpt_neox"])
def test_of_a_table_that_is_looked_up_a_token_reads_one_row(family: str) -> None:
    config = CONFIGS[family]
    params = random_params(config)
    # opt looks its position up and multiplies by its embeddings; gpt_neox looks the latter up.
    table = params["positions" if family == "opt" else "embed"]["table"]
    read = weight_bytes(params) - table.nbytes + config.embed_dim * 4
    assert bytes_per_token(config, params) == read
    asked = Workload(config, Method(), parse_target("v5e"), context=40, new_tokens=8)
    assert read_weights(params, asked) == read
