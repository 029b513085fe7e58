"""GGUF vocabularies: splitting, merging, special tokens, and parity with transformers."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import open_gguf
from popjax.default_model import GGUF_MEMBER, default_model_wheel
from popjax.gguf_tokenizer import end_token_ids, tokenizer_from_gguf
from popjax.text import TokenizerError, decode
from tests.popjax.toy_vocabularies import byte_level, sentencepiece

TEXTS = [
    "The cat (1984) sat on 12,345 mats.",
    "def f(x):\n    return x + 1  # twice\n\n\n\tclass A: pass\r\n",
    "a  1   22    333\n\n 4",
    "It's we'LL they'Ve I'M 'tis",
    "naïve façade übermäßig привет мир 你好世界 こんにちは สวัสดี नमस्ते שלום",
    "🙂🙃👩‍👩‍👧 ½ ² Ⅷ ٣ ~~ $5+$6=<11>",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <|im_end|>x",
    "   leading and trailing   ",
    " ",
    "e\u0301 \u00a0nbsp \u200bzero",
]


@pytest.fixture(scope="module")
def default_gguf() -> Any:
    return open_gguf(default_model_wheel(), member=GGUF_MEMBER)


def pieces(pre: str, text: str) -> list[str]:
    tokenizer = tokenizer_from_gguf(byte_level(pre))
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [piece for piece, _ in split]


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("smollm", "a  123 b", ["a", "ĠĠ", "1", "2", "3", "Ġb"]),
        ("gpt-2", "a  123 b", ["a", "Ġ", "Ġ123", "Ġb"]),
        ("qwen2", "It'S 123\n\n x", ["It", "'S", "Ġ", "1", "2", "3", "ĊĊ", "Ġx"]),
        ("llama-bpe", "It's 12345 (x)", ["It", "'s", "Ġ", "123", "45", "Ġ(", "x", ")"]),
        ("tekken", "helloWorld/\n12", ["hello", "World", "/Ċ", "1", "2"]),
        ("default", "a==b 12345", ["a", "==", "b", "Ġ", "123", "45"]),
    ],
)
def test_text_is_split_as_the_named_pre_tokenizer_splits_it(
    pre: str, text: str, expected: list[str]
) -> None:
    assert pieces(pre, text) == expected


@pytest.mark.parametrize("alias", ["llama3", "deepseek-r1-qwen", "minerva-7b", "smaug-bpe"])
def test_aliases_split_like_their_originals(alias: str) -> None:
    original = {"llama3": "llama-bpe", "deepseek-r1-qwen": "qwen2", "minerva-7b": "smollm"}
    for text in TEXTS:
        assert pieces(alias, text) == pieces(original.get(alias, "llama-bpe"), text)


def test_special_tokens_come_from_the_token_types() -> None:
    tokenizer = tokenizer_from_gguf(byte_level())
    ids = tokenizer("<|user|>hi<think>x<|end|>")["input_ids"]
    names = tokenizer.convert_ids_to_tokens(ids)
    assert (names[0], names[-1]) == ("<|user|>", "<|end|>")
    assert "<think>" in names
    assert decode(tokenizer, ids, skip_special_tokens=False) == "<|user|>hi<think>x<|end|>"
    assert decode(tokenizer, ids) == "hi<think>x"  # user-defined tokens are text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.pad_token is None
    assert tokenizer.padding_side == "left"
    assert len(tokenizer) == len(byte_level()["tokenizer.ggml.tokens"])


@pytest.mark.parametrize(
    ("pre", "entries", "first", "last"),
    [
        ("smollm", {}, False, False),
        ("llama-bpe", {}, True, False),
        ("llama-bpe", {"add_bos_token": False}, False, False),
        ("qwen2", {"add_bos_token": True, "add_eos_token": True}, True, True),
    ],
)
def test_bos_and_eos_are_added_as_stated_or_implied(
    pre: str, entries: dict[str, Any], first: bool, last: bool
) -> None:
    ids = tokenizer_from_gguf(byte_level(pre, **entries))("hi")["input_ids"]
    assert (ids[0] == 0, ids[-1] == 1) == (first, last)


def test_ignore_merges_keeps_a_word_that_is_a_token() -> None:
    metadata = byte_level("llama-bpe", add_bos_token=False)
    metadata["tokenizer.ggml.tokens"] += ["zqzq"]
    metadata["tokenizer.ggml.token_type"] += [1]
    whole = tokenizer_from_gguf(metadata)
    assert whole.tokenize("zqzq") == ["zqzq"]
    pieced = tokenizer_from_gguf(metadata | {"tokenizer.ggml.pre": "smaug-bpe"})
    assert pieced.tokenize("zqzq") == ["z", "q", "z", "q"]


def test_a_missing_pre_tokenizer_is_said_aloud() -> None:
    with pytest.warns(UserWarning, match="does not say how its text is split"):
        tokenizer = tokenizer_from_gguf(byte_level(None))
    assert tokenizer.tokenize("1234") == tokenizer_from_gguf(byte_level("default")).tokenize("1234")


@given(st.text(max_size=60))
def test_byte_level_round_trip(text: str) -> None:
    for pre in ("smollm", "default"):
        tokenizer = ROUND_TRIP[pre]
        assert decode(tokenizer, tokenizer(text)["input_ids"], skip_special_tokens=False) == text


ROUND_TRIP = {pre: tokenizer_from_gguf(byte_level(pre)) for pre in ("smollm", "default")}
SENTENCEPIECE = tokenizer_from_gguf(sentencepiece())


def test_sentencepiece_spaces_bytes_and_specials() -> None:
    tokenizer = SENTENCEPIECE

    def split(text: str) -> list[str]:
        return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])

    assert split("hello world") == ["<s>", "▁hello", "▁world"]
    assert split(" hello") == ["<s>", "▁", "▁hello"] or split(" hello") == ["<s>", "▁▁", "hello"]
    assert split("é")[1:] == ["▁", "<0xC3>", "<0xA9>"]
    assert split("[INST]hello</s>hello") == ["<s>", "[INST]", "▁hello", "</s>", "▁hello"]
    assert decode(tokenizer, tokenizer(" hello\n world")["input_ids"]) == " hello\n world"
    assert split("") == ["<s>"]


def test_sentencepiece_without_prefix_space() -> None:
    tokenizer = tokenizer_from_gguf(sentencepiece(add_space_prefix=False, add_bos_token=False))
    assert tokenizer.tokenize("hello world") == ["hello", "▁world"]
    assert decode(tokenizer, tokenizer(" hello")["input_ids"]) == " hello"


def best_score_first(text: str) -> list[str]:
    """SentencePiece BPE as its paper states it: join the best-scoring pair, leftmost first."""
    metadata = sentencepiece()
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    scores = {
        token: score
        for token, kind, score in zip(tokens, types, metadata["tokenizer.ggml.scores"], strict=True)
        if kind == 1
    }
    symbols = list(("▁" + text.replace(" ", "▁")) if text else "")
    while True:
        pairs = [
            (-scores[left + right], at)
            for at, (left, right) in enumerate(zip(symbols, symbols[1:], strict=False))
            if left + right in scores
        ]
        if not pairs:
            break
        at = min(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    known = set(scores)
    return [
        name
        for symbol in symbols
        for name in ([symbol] if symbol in known else [f"<0x{b:02X}>" for b in symbol.encode()])
    ]


@given(st.text(alphabet="helowrd 12é\n", max_size=30))
def test_sentencepiece_joins_the_best_score_first(text: str) -> None:
    assert SENTENCEPIECE.tokenize(text) == best_score_first(text)
    assert decode(SENTENCEPIECE, SENTENCEPIECE(text)["input_ids"]) == text


def test_sentencepiece_ids_default_to_the_usual_three() -> None:
    metadata = sentencepiece()
    for key in ("bos", "eos", "unknown"):
        del metadata[f"tokenizer.ggml.{key}_token_id"]
    tokenizer = tokenizer_from_gguf(metadata)
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


def test_end_token_ids_are_the_stated_ones_once() -> None:
    stated = {"eos_token_id": 7, "eot_token_id": 9, "eom_token_id": 7}
    assert end_token_ids({f"tokenizer.ggml.{k}": v for k, v in stated.items()}) == (7, 9)
    assert end_token_ids({}) == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "bert"}, r"model is 'bert', supported are 'gpt2' .* 'llama'"),
        ({"model": None}, r"model is None, supported"),
        ({"pre": "chatglm-bpe"}, r"pre is 'chatglm-bpe', supported are smollm, .*qwen2"),
        ({"tokens": None}, r"has no list tokenizer.ggml.tokens"),
        ({"tokens": ["a", "b", "a"], "token_type": [1, 1, 1]}, r"has 'a' twice"),
        ({"tokens": ["a", 3]}, r"holds 3, a int"),
        ({"token_type": [1, 1]}, r"token_type has 2 entries for \d+ tokens"),
        ({"merges": ["ab"]}, r"merges holds 'ab', which is not 'left right'"),
        ({"merges": ["nope nopenope"]}, r"vocabulary is inconsistent \(.*nope"),
        ({"merges": None}, r"has no list tokenizer.ggml.merges"),
        ({"bos_token_id": 10**6}, r"bos_token_id is 1000000, but there are \d+ tokens"),
        ({"bos_token_id": None, "add_bos_token": True}, r"add_bos_token is set, but .* no .*bos"),
    ],
)
def test_unusable_metadata_is_refused_in_one_sentence(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        tokenizer_from_gguf(byte_level(**change))
    assert "\n" not in str(caught.value)


def test_sentencepiece_needs_scores() -> None:
    with pytest.raises(TokenizerError, match="has no list tokenizer.ggml.scores"):
        tokenizer_from_gguf(sentencepiece(scores=None))
    with pytest.raises(TokenizerError, match="scores has 1 entries"):
        tokenizer_from_gguf(sentencepiece(scores=[0.0]))


@pytest.mark.weights
def test_default_model_round_trips_and_splits_digits(default_gguf: Any) -> None:
    tokenizer = tokenizer_from_gguf(default_gguf.metadata)
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert decode(tokenizer, ids, skip_special_tokens=False) == text
    assert tokenizer.tokenize("x  1984") == ["x", "ĠĠ", "1", "9", "8", "4"]
    assert tokenizer.special_tokens_map["eos_token"] == "<|im_end|>"
    assert end_token_ids(default_gguf.metadata) == (2,)


@pytest.mark.weights
@pytest.mark.parity
def test_default_model_equals_transformers_but_for_its_pre_tokenizer(default_gguf: Any) -> None:
    """transformers 5.23 splits this GGUF as GPT-2 does; the model's own tokenizer, like llama.cpp,
    sets each digit apart first. With that put right every id agrees; without it, the spaces
    before a digit differ.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    path = Path(default_gguf.location)
    reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = tokenizer_from_gguf(default_gguf.metadata)
    for text in TEXTS:
        if not any(character.isnumeric() for character in text):
            assert ours(text)["input_ids"] == reference(text)["input_ids"], text
    assert reference.tokenize("a  1") == ["a", "Ġ", "Ġ", "1"]
    assert ours.tokenize("a  1") == ["a", "ĠĠ", "1"]
    reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    for text in [*TEXTS, "\n".join(TEXTS)]:
        ids = ours(text)["input_ids"]
        assert ids == reference(text)["input_ids"], text
        assert decode(ours, ids) == reference.decode(ids, skip_special_tokens=True)
    messages = [{"role": "user", "content": "Hi  2"}]
    render = {"add_generation_prompt": True, "tokenize": False}
    assert ours.apply_chat_template(messages, **render) == reference.apply_chat_template(
        messages, **render
    )


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["llama-bpe", "qwen2", "tekken", "gpt-2", "sentencepiece"])
def test_toy_vocabularies_equal_transformers(kind: str) -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

    metadata = sentencepiece() if kind == "sentencepiece" else byte_level(kind)
    keys = {"model": "tokenizer_type", "pre": "pre_tokenizer_type"}
    theirs = {
        keys.get(name := key.removeprefix("tokenizer.ggml."), name): value
        for key, value in metadata.items()
    }
    # transformers knows <|endoftext|> even where the vocabulary does not.
    texts = [text for text in TEXTS if "<|endoftext|>" not in text]
    # phi3 is the one architecture for which it adds the space as llama.cpp does.
    reference, _ = convert_gguf_tokenizer("phi3", theirs)
    ours = tokenizer_from_gguf(metadata)
    for text in [*texts, "hello  world, hello[INST] wor</s> hell 12", "<|user|>a <think> b"]:
        expected = reference.encode(text, add_special_tokens=False)
        assert ours(text, add_special_tokens=False)["input_ids"] == expected.ids, text
        assert decode(ours, expected.ids) == reference.decode(expected.ids)
