"""A loaded model: prompts in any form, arguments as in transformers, by-products in one struct."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import popjax
from popjax import LanguageModel, OnlinePruning

PROMPT = "The quick brown fox"
METHOD = OnlinePruning(ratio=0.5, gamma=0.3)


@pytest.fixture(scope="module")
def free(tiny_model: LanguageModel) -> popjax.Generation:
    """Greedy text of PROMPT up to the length limit: the tiny model never ends by itself here."""
    return tiny_model.generate(PROMPT, eos_token_id=[])


def test_defaults_come_from_the_generation_config(
    tiny_model: LanguageModel, free: popjax.Generation
) -> None:
    assert tiny_model.eos_token_ids == (1,)
    assert [len(row) for row in free.tokens] == [12]
    assert free.finish_reason == ["length"]
    assert free.logprobs is free.logits is free.partition is free.masks is None


def test_prompts_in_any_form_are_the_same_prompt(
    tiny_model: LanguageModel, free: popjax.Generation
) -> None:
    ids = tiny_model.encode(PROMPT)
    forms: list[Any] = [[PROMPT], ids[0], ids, np.array(ids), jax.numpy.array(ids[0])]
    for form in forms:
        assert tiny_model.encode(form) == ids
        assert tiny_model.generate(form, eos_token_id=[]).text == free.text
    many = tiny_model.generate([PROMPT, "def f(x):"], eos_token_id=[])
    assert len(many.text) == 2
    assert many.tokens[0] == free.tokens[0]


def test_chat_goes_through_the_template(tiny_model: LanguageModel) -> None:
    messages = [{"role": "user", "content": "hello"}]
    ids = tiny_model.encode(messages)
    text = tiny_model.tokenizer.decode(ids[0])
    assert text == "<|user|>hello<|end|><|assistant|>"
    assert tiny_model.encode([messages, messages], chat=True) == ids * 2
    assert tiny_model.encode("hello", chat=True) == ids


def test_end_token_ends_the_row_and_stays_out_of_the_text(
    tiny_model: LanguageModel, free: popjax.Generation
) -> None:
    end = free.tokens[0][4]
    result = tiny_model.generate(PROMPT, eos_token_id=[end, 3])
    count = free.tokens[0].index(end) + 1
    assert result.tokens[0] == free.tokens[0][:count]
    assert result.finish_reason == ["stop"]


def test_stop_string_ends_the_text_before_it(
    tiny_model: LanguageModel, free: popjax.Generation
) -> None:
    stop = free.text[0][3:6]
    at = free.text[0].index(stop)
    result = tiny_model.generate(PROMPT, eos_token_id=[], stop_strings=stop)
    assert result.text == [free.text[0][:at]]
    assert result.finish_reason == ["stop"]
    assert result.tokens[0] == free.tokens[0][: len(result.tokens[0])]
    missed = tiny_model.generate(PROMPT, eos_token_id=[], stop_strings=["nowhere to be found"])
    assert (missed.text, missed.finish_reason) == (free.text, ["length"])


def test_streamed_pieces_join_to_the_text(
    tiny_model: LanguageModel, free: popjax.Generation
) -> None:
    pieces: list[str] = []
    result = tiny_model.generate(PROMPT, eos_token_id=[], streamer=pieces.append)
    assert "".join(pieces) == result.text[0] == free.text[0]
    assert result.tokens == free.tokens
    assert len(pieces) > 1


def test_a_streamer_object_gets_prompt_and_new_ids(
    tiny_model: LanguageModel, free: popjax.Generation
) -> None:
    class Collector:
        def __init__(self) -> None:
            self.heard: list[list[int]] = []
            self.ended = 0

        def put(self, ids: np.ndarray) -> None:
            self.heard.append(ids.tolist())

        def end(self) -> None:
            self.ended += 1

    collector = Collector()
    tiny_model.generate(PROMPT, eos_token_id=[], streamer=collector)
    assert collector.heard[0] == tiny_model.encode(PROMPT)[0]
    assert [token for ids in collector.heard[1:] for token in ids] == free.tokens[0]
    assert collector.ended == 1


def test_several_sequences_of_one_prompt(tiny_model: LanguageModel) -> None:
    options: dict[str, Any] = {"do_sample": True, "temperature": 2.0, "eos_token_id": []}
    result = tiny_model.generate(PROMPT, num_return_sequences=3, seed=[4, 5, 4], **options)
    assert len(result.text) == 3
    assert result.tokens[0] == result.tokens[2] != result.tokens[1]
    alone = tiny_model.generate(PROMPT, seed=5, **options)
    assert alone.tokens[0] == result.tokens[1]


def test_by_products_come_when_asked_for(tiny_model: LanguageModel) -> None:
    result = tiny_model.generate(
        [PROMPT, "def"],
        method=METHOD,
        max_new_tokens=7,
        eos_token_id=[],
        return_logprobs=True,
        return_logits=True,
        record_masks=True,
    )
    assert result.logits is not None and result.logprobs is not None
    assert result.partition is not None and result.masks is not None
    assert result.logits.shape == (2, 7, tiny_model.config.vocab_size)
    assert [len(row) for row in result.logprobs] == [7, 7]
    assert all(value < 0 for row in result.logprobs for value in row)
    evaluated = [part.evaluated for part in result.partition]
    assert [mask.shape for mask in result.masks] == [(6, 2, width) for width in evaluated]
    replayed = tiny_model.generate(
        [PROMPT, "def"],
        method=METHOD,
        max_new_tokens=7,
        eos_token_id=[],
        partition=result.partition,
        masks=result.masks,
    )
    assert replayed.tokens == result.tokens


def test_a_method_by_name_is_the_method(tiny_model: LanguageModel) -> None:
    named = tiny_model.generate(PROMPT, method="online-pruning", ratio=0.5, gamma=0.3)
    assert named.tokens == tiny_model.generate(PROMPT, method=METHOD).tokens
    assert named.report.method == "online-pruning"


def test_the_report_counts_what_the_run_did(tiny_model: LanguageModel) -> None:
    result = tiny_model.generate(PROMPT, method=METHOD, eos_token_id=[])
    report = result.report
    # F = 48, r = 0.5, delta = 0.15: |R| = 48 - 31, |P| = 17, |C| = 14, 24 active.
    counts = [(y.channels, y.retained, y.candidate, y.active) for y in report.layers]
    assert counts == [(48, 17, 14, 24)] * 2
    row = 32 * 4
    assert [layer.dense_bytes for layer in report.layers] == [3 * 48 * row] * 2
    # Of the product's three matrices down is read where the mask is on; through XLA all of R u C.
    chosen = 24 if report.implementation == "auto" else 31
    assert [layer.read_bytes for layer in report.layers] == [(2 * 31 + chosen) * row] * 2
    saved = report.dense_bytes_per_token - report.read_bytes_per_token
    assert saved == 2 * (3 * 48 - 2 * 31 - chosen) * row
    leaves = jax.tree.leaves(tiny_model.params)
    assert report.weight_bytes == sum(leaf.nbytes for leaf in leaves)
    table = 32 * tiny_model.config.vocab_size * 4
    assert report.dense_bytes_per_token == report.weight_bytes - table + row
    assert report.packed_bytes == 2 * 3 * 31 * row
    assert (report.new_tokens, report.decode_steps) == (12, 11)
    assert report.prompt_tokens == len(tiny_model.encode(PROMPT)[0])
    assert report.totals().active == 48
    assert json.loads(json.dumps(report.to_json()))["totals"]["candidate"] == 28
    phases = {"load", "compile", "prefill", "plan", "pack", "decode"}
    assert phases <= set(report.seconds)
    gathered = tiny_model.generate(PROMPT, method=METHOD, implementation="xla_gathered")
    assert gathered.report.layers[0].read_bytes == (2 * 31 + 24) * row


def test_a_saved_model_loads_as_itself(tiny_model: LanguageModel, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    tiny_model.save(str(folder))
    again = popjax.load(str(folder))
    assert again.config == tiny_model.config
    pairs = zip(jax.tree.leaves(again.params), jax.tree.leaves(tiny_model.params), strict=True)
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in pairs)
    assert again.encode(PROMPT) == tiny_model.encode(PROMPT)
    assert again.eos_token_ids == tiny_model.eos_token_ids


def test_saving_keeps_the_dtype_of_the_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    popjax.load(str(tiny_checkpoint), dtype="bfloat16").save(str(tmp_path / "half"))
    raw = json.loads((tmp_path / "half" / "config.json").read_text())
    assert raw["dtype"] == "bfloat16"
    again = popjax.load(str(tmp_path / "half"), dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(again.params)} == {"bfloat16"}


def test_the_end_token_of_the_config_serves_where_nothing_else_states_one(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / "generation_config.json").unlink()
    model = popjax.load(str(folder))
    assert model.eos_token_ids == (1,)
    # Without a stated length: 128 tokens, or what is left of a context of 64.
    assert len(model.generate([[5] * 10], eos_token_id=[]).tokens[0]) == 54


@pytest.mark.parametrize(
    ("prompts", "arguments", "complaint"),
    [
        ([], {}, "no prompts were given"),
        ([[]], {}, "prompt 0 has no tokens"),
        ([[5, 10**6]], {}, "prompt 0 has a token id outside"),
        ([[1] * 64], {}, "64 tokens and 1 new ones .* context length of 64"),
        (PROMPT, {"max_new_tokens": 0}, "max_new_tokens 0"),
        (PROMPT, {"temperature": 0.5}, "temperature 0.5 has no effect on greedy"),
        (PROMPT, {"do_sample": True, "temperature": 0}, "temperature 0 is out of range"),
        (PROMPT, {"do_sample": True, "top_p": 1.5}, "top_p 1.5"),
        (PROMPT, {"num_return_sequences": 2}, "greedy decoding would be copies"),
        (
            PROMPT,
            {"num_return_sequences": 0},
            "num_return_sequences 0 is not a whole number above 0",
        ),
        (
            PROMPT,
            {"do_sample": True, "num_return_sequences": 2, "seed": [1]},
            "1 seeds for 2 rows",
        ),
        (PROMPT, {"method": "onlin-pruning"}, "nearest is 'online-pruning'"),
        (PROMPT, {"method": "online-pruning"}, "needs a ratio"),
        (PROMPT, {"method": "griffin", "ratio": 0.5, "gamma": 0.1}, "has no option 'gamma'"),
        (PROMPT, {"method": "online-pruning", "ratio": 1.2}, "ratio 1.2 is outside 0..1"),
        (PROMPT, {"method": "online-pruning", "ratio": 0.5, "gamma": -1}, "gamma -1"),
        (PROMPT, {"method": METHOD, "ratio": 0.5}, "'ratio' is not an argument of generate"),
        (PROMPT, {"method": 0.5}, "method 0.5 is not a Method"),
        (PROMPT, {"metod": "dense"}, "'dense' has no option 'metod'"),
        ([PROMPT, PROMPT], {"streamer": print}, "a streamer follows one row, 2 were"),
        (PROMPT, {"streamer": 3}, "streamer 3 can take nothing"),
        (PROMPT, {"implementation": "fast"}, "implementation 'fast' is unknown"),
    ],
)
def test_bad_arguments_are_refused(
    tiny_model: LanguageModel, prompts: Any, arguments: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        tiny_model.generate(prompts, **arguments)


@pytest.mark.parametrize("prompts", [7, None, 2.5])
def test_what_is_no_prompt_is_refused(tiny_model: LanguageModel, prompts: Any) -> None:
    with pytest.raises(ValueError, match="neither text nor token ids"):
        tiny_model.generate(prompts)


def test_a_model_is_immutable(tiny_model: LanguageModel) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_model.name = "other"  # type: ignore[misc]
