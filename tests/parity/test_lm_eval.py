"""lm-eval's own torch backend against ours: the same log-likelihoods and texts on one model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

import popjax
from popjax.evaluation.protocols import SINGLE_PASS, SPLIT
from tests.evaluation.conftest import ITEMS
from tests.evaluation.test_lm import TEXT, requests
from tests.scripts.conftest import long_checkpoint, tiny_checkpoint

__all__ = ["long_checkpoint", "tiny_checkpoint"]

pytestmark = pytest.mark.parity
PAIRS = [(item["context"], choice) for item in ITEMS for choice in item["choices"]]
PAIRS += [(TEXT * 2, "The fox."), (TEXT, TEXT), ("", TEXT), (TEXT[:-1], " ")]
# As many as the checkpoint states: transformers would take that number over lm-eval's.
GREEDY = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}


def reference(folder: Path, **options: Any) -> Any:
    """lm-eval's `hf` model of a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval.models.huggingface import HFLM

        return HFLM(pretrained=str(folder), device="cpu", dtype="float32", **options)


def compare(theirs: Any, ours: Any, pairs: list[tuple[str, str]], text: str) -> None:
    asked = requests("loglikelihood", *pairs)
    wanted = theirs.loglikelihood(asked, disable_tqdm=True)
    for found, (logprob, greedy) in zip(ours.loglikelihood(asked), wanted, strict=True):
        assert found == (pytest.approx(logprob, abs=1e-3), greedy)
    if ours.protocol == SINGLE_PASS:
        asked = requests("loglikelihood_rolling", (text,))
        (total,) = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
        # Each of its tokens may differ as little as each of a request's.
        assert ours.loglikelihood_rolling(asked)[0] == pytest.approx(total, abs=1e-2)


@pytest.mark.parametrize(("protocol", "length"), [(SPLIT, 1024), (SINGLE_PASS, 96)])
def test_a_tiny_model_answers_alike(long_checkpoint: Path, protocol: str, length: int) -> None:
    """With 96 tokens at once contexts are cut, and a document has several windows."""
    theirs = reference(long_checkpoint, max_length=length, batch_size=3)
    ours = popjax_lm(popjax.load(str(long_checkpoint)), protocol, length)
    assert (ours.prefix_token_id, ours.eot_token_id) == (
        theirs.prefix_token_id,
        theirs.eot_token_id,
    )
    compare(theirs, ours, PAIRS, TEXT * 4)
    asked = requests("generate_until", *((context, GREEDY) for context, _ in PAIRS if context))
    assert ours.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)


@pytest.mark.weights
@pytest.mark.slow
def test_the_default_model_answers_alike(default_model: Any, tmp_path: Path) -> None:
    folder = tmp_path / "default"
    default_model.save(str(folder))
    compare(
        reference(folder, max_length=128, batch_size=4),
        popjax_lm(default_model, SPLIT, 128),
        [pair for pair in PAIRS if len(pair[0] + pair[1]) < 300],
        TEXT,
    )


def popjax_lm(model: Any, protocol: str, length: int) -> Any:
    from popjax.evaluation.lm import PopjaxLM

    return PopjaxLM(model, protocol=protocol, max_length=length, batch_size=4)
