"""Prompts to ids, whole decodes, and streams whose pieces join to the whole decode."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import open_gguf
from popjax.default_model import GGUF_MEMBER, default_model_wheel
from popjax.gguf_tokenizer import tokenizer_from_gguf
from popjax.text import (
    TextStream,
    TokenizerError,
    decode,
    encode_prompts,
    load_tokenizer,
    truncate_at_stop,
)
from tests.popjax.toy_vocabularies import byte_level, sentencepiece

BYTE_LEVEL = tokenizer_from_gguf(byte_level("qwen2"))
SENTENCEPIECE = tokenizer_from_gguf(sentencepiece())
TOKENIZERS = {"byte level": BYTE_LEVEL, "sentencepiece": SENTENCEPIECE}


@pytest.fixture(scope="module")
def default_tokenizer() -> Any:
    return tokenizer_from_gguf(open_gguf(default_model_wheel(), member=GGUF_MEMBER).metadata)


def chunked(ids: list[int], cuts: list[int]) -> list[list[int]]:
    edges = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    return [ids[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def streamed(tokenizer: Any, chunks: list[list[int]], **options: Any) -> tuple[str, bool]:
    stream = TextStream(tokenizer, **options)
    text = "".join(stream.push(chunk) for chunk in chunks) + stream.finish()
    return text, stream.stopped


CUTS = st.lists(st.integers(0, 80), max_size=40)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(data=st.data(), cuts=CUTS, skip=st.booleans())
def test_stream_of_random_ids_equals_the_whole_decode(
    kind: str, data: st.DataObject, cuts: list[int], skip: bool
) -> None:
    tokenizer = TOKENIZERS[kind]
    # A few ids past the vocabulary: models pad theirs, and such ids decode to nothing.
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 3), max_size=60))
    text, stopped = streamed(tokenizer, chunked(ids, cuts), skip_special_tokens=skip)
    assert (text, stopped) == (decode(tokenizer, ids, skip_special_tokens=skip), False)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=st.text(alphabet="hé🙂界 \n\ufffd", max_size=12), data=st.data())
def test_stream_of_broken_characters_equals_the_whole_decode(
    kind: str, text: str, data: st.DataObject
) -> None:
    """Bytes one token each, some dropped: every state of a UTF-8 decoder, one token at a time."""
    tokenizer = TOKENIZERS[kind]
    ids = [byte_token(kind, byte) for byte in text.encode()]
    ids = [token_id for token_id in ids if data.draw(st.integers(0, 4)) > 0]
    streamed_text, _ = streamed(tokenizer, [[token_id] for token_id in ids])
    assert streamed_text == decode(tokenizer, ids)


def byte_token(kind: str, byte: int) -> int:
    tokenizer = TOKENIZERS[kind]
    if kind == "sentencepiece":
        return tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>")
    from tokenizers import pre_tokenizers

    # Byte-level vocabularies write a byte as a character; the printable ones stand for themselves.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [other for other in range(256) if other not in printable]
    piece = chr(byte) if byte in printable else chr(256 + others.index(byte))
    assert piece in pre_tokenizers.ByteLevel.alphabet()
    return tokenizer.convert_tokens_to_ids(piece)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(data=st.data(), cuts=CUTS)
def test_stop_strings_cut_where_the_whole_text_is_cut(
    kind: str, data: st.DataObject, cuts: list[int]
) -> None:
    tokenizer = TOKENIZERS[kind]
    text = data.draw(st.text(alphabet="helo w", max_size=40))
    stops = data.draw(st.lists(st.text(alphabet="helo w", min_size=1, max_size=5), max_size=3))
    ids = tokenizer(text)["input_ids"]
    found = streamed(tokenizer, chunked(ids, cuts), stop_strings=stops)
    assert found == truncate_at_stop(text, stops)


def test_a_character_is_held_back_until_it_is_complete() -> None:
    stream = TextStream(BYTE_LEVEL)
    pieces = [stream.push([byte_token("byte level", byte)]) for byte in "a€b".encode()]
    assert pieces == ["a", "", "", "€", "b"]
    assert stream.push([byte_token("byte level", 0xE2)]) == ""
    assert stream.finish() == "\ufffd"


def test_bytes_that_can_never_be_a_character_are_not_held_back() -> None:
    stream = TextStream(BYTE_LEVEL)
    released = [stream.push([byte_token("byte level", 0x80)]) for _ in range(50)]
    assert sum(map(len, released)) >= 49
    assert len(stream._pending) <= 1


def test_text_is_released_at_once_where_nothing_can_change_it() -> None:
    ids = SENTENCEPIECE("hello world")["input_ids"]
    stream = TextStream(SENTENCEPIECE)
    assert [stream.push([token_id]) for token_id in ids] == ["", "hello", " world"]


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    ids = [[token_id] for token_id in BYTE_LEVEL("hello")["input_ids"]]
    stream = TextStream(BYTE_LEVEL, stop_strings=["lox"])
    assert "".join(stream.push(chunk) for chunk in ids) == "hel"
    assert stream.finish() == "lo"
    assert not stream.stopped


def test_after_a_stop_string_nothing_comes() -> None:
    stream = TextStream(BYTE_LEVEL, stop_strings=["END"])
    assert stream.push(BYTE_LEVEL("a END b")["input_ids"]) == "a "
    assert stream.stopped
    assert stream.push(BYTE_LEVEL("more")["input_ids"]) == ""
    assert stream.finish() == ""
    assert stream.stopped


def test_a_finished_stream_takes_no_tokens() -> None:
    stream = TextStream(BYTE_LEVEL)
    stream.finish()
    with pytest.raises(ValueError, match="finished"):
        stream.push([5])


def test_work_per_token_does_not_grow_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = 0

    def counting(tokenizer: Any, token_ids: list[int], **options: Any) -> str:
        nonlocal decoded
        decoded += len(token_ids)
        return decode(tokenizer, token_ids, **options)

    monkeypatch.setattr("popjax.text.decode", counting)
    for kind, tokenizer in TOKENIZERS.items():
        for byte in (0x80, 0x41, 0xF0):
            stream = TextStream(tokenizer)
            decoded = 0
            for _ in range(300):
                stream.push([byte_token(kind, byte)])
            stream.finish()
            assert decoded <= 300 * 10, (kind, byte)


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("abcdef", ["cd"], ("ab", True)),
        ("abcdef", ["x"], ("abcdef", False)),
        ("abcdef", [], ("abcdef", False)),
        ("abcdef", ["abcd", "c"], ("ab", True)),  # "c" is complete first
        ("abcdef", ["c", "bc"], ("a", True)),  # complete together: the longer
        ("aaa", ["aa"], ("", True)),
    ],
)
def test_truncate_at_the_first_stop_to_be_completed(
    text: str, stops: list[str], expected: tuple[str, bool]
) -> None:
    assert truncate_at_stop(text, stops) == expected


@pytest.mark.parametrize("stops", ["END", [""], [3]])
def test_unusable_stop_strings_are_refused(stops: Any) -> None:
    with pytest.raises(ValueError, match="stop"):
        TextStream(BYTE_LEVEL, stop_strings=stops)


def test_plain_prompts_are_tokenised_with_bos() -> None:
    ids = encode_prompts(SENTENCEPIECE, ["hello", "", "world"], chat=False)
    assert ids == [SENTENCEPIECE(text)["input_ids"] for text in ("hello", "", "world")]
    assert encode_prompts(BYTE_LEVEL, [""], chat=False) == [[BYTE_LEVEL.bos_token_id]]


def test_chats_go_through_the_template() -> None:
    messages = [{"role": "user", "content": "hi"}]
    [ids, short] = encode_prompts(BYTE_LEVEL, [messages, "hi"], chat=True)
    text = decode(BYTE_LEVEL, ids, skip_special_tokens=False)
    assert text == "<|user|>hi<|end|><|assistant|>"
    assert ids == short
    assert all(type(token_id) is int for token_id in ids)
    adding = tokenizer_from_gguf(byte_level("llama-bpe"))
    assert adding.bos_token_id not in encode_prompts(adding, [messages], chat=True)[0]


@pytest.mark.parametrize(
    ("prompts", "chat", "message"),
    [
        ("hello", False, r"must be a list, got str: write \[prompt\]"),
        (["a", 7], False, r"prompt 1 must be a str, got int"),
        ([[{"role": "user", "content": "x"}]], False, r"prompt 0 must be a str, .*chat=True"),
        (["a", None], True, r"prompt 1 must be a str or a non-empty list of messages"),
        ([[]], True, r"prompt 0 must be a str or a non-empty list"),
        ([[{"role": "user"}]], True, r"prompt 0 has the message \{'role': 'user'\}"),
        ([["hi"]], True, r"prompt 0 has the message 'hi'"),
        (["x\ud800"], False, r"prompt 0 has a lone surrogate at character 1"),
    ],
)
def test_unusable_prompts_are_refused_by_index(prompts: Any, chat: bool, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        encode_prompts(BYTE_LEVEL, prompts, chat=chat)


def test_an_empty_prompt_needs_a_bos_token() -> None:
    tokenizer = tokenizer_from_gguf(byte_level(bos_token_id=None))
    with pytest.raises(TokenizerError, match="prompt 1 is empty and .* no BOS"):
        encode_prompts(tokenizer, ["x", ""], chat=False)


def test_chat_without_a_template_is_refused() -> None:
    with pytest.raises(TokenizerError, match="no chat template"):
        encode_prompts(SENTENCEPIECE, ["hi"], chat=True)


def test_what_a_chat_template_refuses_is_said() -> None:
    metadata = byte_level() | {"tokenizer.chat_template": "{{ raise_exception('no system role') }}"}
    with pytest.raises(TokenizerError, match="refused prompt 0: no system role"):
        encode_prompts(tokenizer_from_gguf(metadata), ["hi"], chat=True)


def test_a_folder_gives_the_tokenizer_that_was_saved(tmp_path: Path) -> None:
    BYTE_LEVEL.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    text = "It's 1234 <|end|>  naïve 🙂"
    assert loaded(text)["input_ids"] == BYTE_LEVEL(text)["input_ids"]
    assert (loaded.padding_side, loaded.eos_token_id) == ("left", BYTE_LEVEL.eos_token_id)
    assert encode_prompts(loaded, ["hi"], chat=True) == encode_prompts(
        BYTE_LEVEL, ["hi"], chat=True
    )


def test_unusable_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="is not a folder"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(TokenizerError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    BYTE_LEVEL.save_pretrained(tmp_path)
    whole = (tmp_path / "tokenizer.json").read_text("utf-8")
    (tmp_path / "tokenizer.json").write_text(whole[: len(whole) // 2], "utf-8")
    with pytest.raises(TokenizerError, match="cannot be read") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_code_in_a_folder_is_never_run(tmp_path: Path) -> None:
    BYTE_LEVEL.save_pretrained(tmp_path)
    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    settings |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(TokenizerError, match="cannot be read"):
        load_tokenizer(tmp_path)
    assert not marker.exists()


def test_importing_loads_neither_transformers_nor_torch() -> None:
    code = "import sys, popjax.text, popjax.gguf_tokenizer, popjax.default_model\n"
    code += "print(sorted({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_loading_gives_no_advice_about_torch(tmp_path: Path) -> None:
    BYTE_LEVEL.save_pretrained(tmp_path)
    code = "import sys\nfrom popjax.text import load_tokenizer\nload_tokenizer(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_a_gguf_tokenizer_is_built_without_torch() -> None:
    code = "import sys\nfrom popjax.gguf_tokenizer import tokenizer_from_gguf\n"
    code += "from tests.popjax.toy_vocabularies import byte_level\n"
    code += "tokenizer_from_gguf(byte_level())('hi')\nprint('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert (done.stdout, done.stderr) == ("False\n", "")


@pytest.mark.weights
@given(data=st.data(), cuts=CUTS)
def test_default_model_streams_random_ids(
    default_tokenizer: Any, data: st.DataObject, cuts: list[int]
) -> None:
    ids = data.draw(st.lists(st.integers(0, len(default_tokenizer) - 1), max_size=60))
    assert streamed(default_tokenizer, chunked(ids, cuts))[0] == decode(default_tokenizer, ids)


@pytest.mark.weights
def test_default_model_chat(default_tokenizer: Any) -> None:
    [ids] = encode_prompts(default_tokenizer, ["Hi"], chat=True)
    text = decode(default_tokenizer, ids, skip_special_tokens=False)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
