"""What callers and checkpoints get wrong, and what a saved model or a cut run must still know."""

import json
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest

import popjax
from popjax import LanguageModel, OnlinePruning

METHOD = OnlinePruning(ratio=0.5)


def with_generation_config(folder: Path, target: Path, values: dict[str, Any]) -> LanguageModel:
    shutil.copytree(folder, target)
    (target / "generation_config.json").write_text(json.dumps(values))
    return popjax.load(target)


def test_a_saved_model_stops_where_it_did(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = with_generation_config(
        tiny_checkpoint, tmp_path / "a", {"eos_token_id": [1, 292, 10**6]}
    )
    assert model.eos_token_ids == (1, 292)
    model.save(str(tmp_path / "b"))
    assert popjax.load(str(tmp_path / "b")).eos_token_ids == (1, 292)


def test_saved_weights_are_as_readable_as_their_config(
    tiny_model: LanguageModel, tmp_path: Path
) -> None:
    tiny_model.save(str(tmp_path / "out"))
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1


def test_one_message_is_one_conversation(tiny_model: LanguageModel) -> None:
    message = {"role": "user", "content": "hi"}
    assert tiny_model.encode(message) == tiny_model.encode([message])
    with pytest.raises(ValueError, match="neither text nor token ids"):
        tiny_model.encode(b"abc")


def test_a_run_cut_by_a_stop_string_replays(tiny_model: LanguageModel) -> None:
    free = tiny_model.generate("ab", method=METHOD, max_new_tokens=20, eos_token_id=[])
    stop = free.text[0][2:4]
    wanted = tiny_model.generate(
        "ab",
        method=METHOD,
        max_new_tokens=20,
        eos_token_id=[],
        stop_strings=[stop],
        record_masks=True,
        return_logits=True,
    )
    assert wanted.finish_reason == ["stop"] and wanted.masks and wanted.logits is not None
    kept = len(wanted.tokens[0])
    assert kept < 20 and wanted.logits.shape[1] == kept
    assert {len(mask) for mask in wanted.masks} == {kept - 1}
    again = tiny_model.generate(
        "ab",
        method=METHOD,
        max_new_tokens=20,
        eos_token_id=[],
        partition=wanted.partition,
        masks=wanted.masks,
    )
    assert again.tokens == wanted.tokens


@pytest.mark.parametrize(
    ("stated", "arguments", "complaint"),
    [
        ({"max_new_tokens": "9"}, {}, "max_new_tokens '9' in generation_config.json"),
        ({"eos_token_id": "x"}, {}, "eos_token_id 'x' of the checkpoint"),
        ({"eos_token_id": [[1]]}, {}, "of the checkpoint is not a token id"),
        ({"do_sample": "true"}, {}, "do_sample 'true' is neither True nor False"),
        ({}, {"eos_token_id": "12"}, "eos_token_id '12' of generate"),
        ({}, {"eos_token_id": 10**12}, "eos_token_id 1000000000000 is outside 0.."),
        ({}, {"do_sample": True, "temperature": 1e-45}, "temperature 1e-45 is out of range"),
        ({}, {"stop_strings": 5}, "stop_strings must be a list"),
        ({}, {"num_return_sequences": 2.0, "do_sample": True}, "num_return_sequences 2.0"),
        ({}, {"max_new_tokens": 2.5}, "max_new_tokens 2.5 is not a whole number"),
        ({}, {"partition": 5}, "not a sequence of ChannelPartition"),
        ({}, {"method": "frozen", "ratio": 1.0}, "leaves no FFN channel of layer 0"),
        ({}, {"method": "online-pruning", "ratio": 0.5, "granularity": 1.5}, "granularity 1.5"),
    ],
)
def test_wrong_values_are_named(
    tiny_checkpoint: Path,
    tmp_path: Path,
    stated: dict[str, Any],
    arguments: dict[str, Any],
    complaint: str,
) -> None:
    model = with_generation_config(tiny_checkpoint, tmp_path / "model", stated)
    with pytest.raises(ValueError, match=complaint):
        model.generate("ab", **{"max_new_tokens": None, **arguments})


def test_stated_values_that_do_not_apply_give_way(tiny_checkpoint: Path, tmp_path: Path) -> None:
    stated = {"temperature": 0.0, "do_sample": False, "min_new_tokens": 20, "max_new_tokens": None}
    model = with_generation_config(tiny_checkpoint, tmp_path / "model", stated)
    assert len(model.generate("ab", max_new_tokens=3).tokens[0]) == 3


def test_a_refused_request_says_nothing_to_its_streamer(tiny_model: LanguageModel) -> None:
    heard: list[Any] = []

    class Streamer:
        def put(self, ids: Any) -> None:
            heard.append(ids)

        def end(self) -> None:
            heard.append(None)

    with pytest.raises(ValueError, match="maximum context length"):
        tiny_model.generate("ab", streamer=Streamer(), max_new_tokens=9999)
    assert heard == []


def test_a_model_may_be_named_by_a_path_but_not_a_number(tiny_checkpoint: Path) -> None:
    assert popjax.load(tiny_checkpoint).config.num_layers == 2
    with pytest.raises(ValueError, match="model name 5"):
        popjax.load(5)  # type: ignore[arg-type]


def test_a_folder_without_a_tokenizer_fails_before_the_work(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bare" / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="tokenizer"):
        popjax.load(tmp_path / "bare").generate([5, 6], max_new_tokens=2)
