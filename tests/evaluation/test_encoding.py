"""Text to pairs where tokens are decided: start tokens, chats, lengths."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from popjax import LanguageModel
from popjax.evaluation.encoding import Encoder
from popjax.evaluation.local_tasks import encoded
from popjax.evaluation.protocols import SINGLE_PASS, SPLIT
from popjax.evaluation.task_files import load_task

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer(long_model: LanguageModel) -> Any:
    """The tiny model's, to be changed at will."""
    return copy.deepcopy(long_model.tokenizer)


def test_a_chat_is_a_turn_of_the_user_and_a_choice_the_reply(
    tokenizer: Any, task_file: Callable[..., Path]
) -> None:
    tokenizer.chat_template = TEMPLATE
    encoder = Encoder(tokenizer, 200)
    pair = encoded(load_task(task_file()), encoder, chat=True).pairs[0][0]
    whole = tokenizer.decode([*pair.context, *pair.continuation])
    assert whole == f"{tokenizer.bos_token}<user>The dog<assistant>barks."
    # The template wrote the start token; no other one is put before it.
    assert pair.context.count(tokenizer.bos_token_id) == 1


def test_chats_that_cannot_be_written_are_one_sentence(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    turns = [{"role": "user", "content": "Hi"}]
    with pytest.raises(ValueError, match="has no chat template"):
        Encoder(tokenizer, 64).chat(turns)
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(ValueError, match="refused the messages: no such role"):
        Encoder(tokenizer, 64).chat(turns)


def test_an_empty_context_starts_with_bos_else_eos_else_not(tokenizer: Any) -> None:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert Encoder(tokenizer, 64).pair("", "word").context == (bos,)
    tokenizer.bos_token = None
    assert Encoder(tokenizer, 64).pair("  ", "word").context == (eos,)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no BOS and no EOS token"):
        Encoder(tokenizer, 64).pair("", "word")


def test_a_prefill_has_room_for_one_token_more(tokenizer: Any) -> None:
    """Its last token is never an input, so that a window of n inputs scores n tokens."""
    for protocol, room in ((SPLIT, 8), (SINGLE_PASS, 9)):
        pair = Encoder(tokenizer, 8, protocol).fitted(list(range(20)), [1, 2, 3], "it")
        assert len(pair.context) + 3 == room and pair.cut == 20 + 3 - room
        assert pair.context[-1] == 19
        longest = [1] * (room - 1)
        assert Encoder(tokenizer, 8, protocol).fitted([5, 6], longest, "it").context == (6,)
        with pytest.raises(ValueError, match=f"it has {room} tokens, above"):
            Encoder(tokenizer, 8, protocol).fitted([5, 6], [*longest, 1], "it")
