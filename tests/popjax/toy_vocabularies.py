"""Small vocabularies as GGUF metadata, for tests of tokenizers and of text streams."""

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog.  It's 1234 o'clock, isn't it?",
    "def f(x):\n    return x + 12\n\n\ndef g(y):\n        return f(y)  # twice\n",
    "Naïve façade, übermäßig; привет мир, 你好世界, こんにちは 🙂🙃 🙂 👩‍👩‍👧",
] * 3
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level(pre: str | None = "smollm", **entries: Any) -> dict[str, Any]:
    """A byte-level vocabulary of a few hundred tokens; `entries` go under tokenizer.ggml."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merges = _merges_of(tokenizer)
    controls = ["<|bos|>", "<|end|>", "<|user|>", "<|assistant|>"]
    tokens = [*controls, *(piece for piece, _ in pieces), "<think>"]
    metadata = {
        "model": "gpt2",
        "tokens": tokens,
        "token_type": [3] * len(controls) + [1] * len(pieces) + [4],
        "merges": merges,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **({} if pre is None else {"pre": pre}),
        **entries,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items()} | {
        "tokenizer.chat_template": TEMPLATE
    }


def _merges_of(tokenizer: Tokenizer) -> list[str]:
    import json

    return [" ".join(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


def sentencepiece(**entries: Any) -> dict[str, Any]:
    """A SentencePiece vocabulary with scores and byte tokens, each score different."""
    joined = ["he", "ll", "hell", "hello", "▁hello", "or", "wor", "▁wor", "ld", "▁world", "▁▁"]
    joined += ["▁w", "▁h", "lo", "llo", "▁hell", "rl", "orl", "▁▁▁", "el", "12"]
    single = list("▁helowrd12,.!")
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *joined, *single, "[INST]"]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(joined) + len(single)), 4]
    metadata = {
        "model": "llama",
        "tokens": tokens,
        "token_type": types,
        "scores": [0.0] * 259 + [-float(n) for n in range(len(tokens) - 259)],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **entries,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
