"""A statically pruned default model as transformers loads it: the same logits on real text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from popjax import Frozen, LanguageModel
from popjax.continuation import continuation_logits
from popjax.exporting import calibrated_partition, statically_pruned
from popjax.methods import Method
from tests.parity.test_default_model import TEXT, doubled

pytestmark = [pytest.mark.parity, pytest.mark.weights, pytest.mark.slow]


def test_transformers_loads_what_was_saved(default_model: LanguageModel, tmp_path: Path) -> None:
    import torch
    import transformers

    ids = default_model.encode(TEXT)[0][:256]
    partition = calibrated_partition(default_model, [ids[:128], ids[128:]], Frozen(0.25))
    narrow = statically_pruned(default_model, partition)
    narrow.save(str(tmp_path / "narrow"))
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "narrow", dtype=torch.float32
    ).eval()
    assert reference.config.intermediate_size == 1152
    with torch.no_grad():
        wanted = reference(torch.tensor([ids])).logits[0].numpy()
    found = continuation_logits(narrow.params, narrow.config, Method(), [ids[:200]], [ids[200:]])
    sides = doubled((np.asarray(found)[0, : len(ids) - 200], wanted[199:-1]))
    ours, theirs = (x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in sides)
    # What two float32 implementations may differ in nats: the bound of the default model's tests.
    assert (np.exp(theirs) * (theirs - ours)).sum(axis=-1).max() < 1e-6
