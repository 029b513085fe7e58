"""The tokenizer that the key/values of a GGUF file describe, splitting text as llama.cpp does.

Two kinds: byte-level BPE ("gpt2", with a named pre-tokenizer) and SentencePiece BPE with scores
and byte fallback ("llama"). Leaves out WordPiece, Unigram and the vocabularies of families popjax
does not run. Like llama.cpp and unlike Qwen's own tokenizer.json, it does not normalise to NFC.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from popjax.text import TokenizerError, first_line, import_transformers

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

_KEY = "tokenizer.ggml."
# Token types of ggml's docs/gguf.md.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_SPACE = "\u2581"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_CASED_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
)


@dataclass(frozen=True)
class _PreTokenizer:
    """Regular expressions that split the text one after the other, and what llama.cpp implies."""

    splits: tuple[str, ...]
    add_bos: bool = False
    # A word that is a token stays whole even where merges would not produce it.
    ignore_merges: bool = False


_LLAMA3_SPLITS = (rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}",)
_DEFAULT = _PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))
_KINDS: tuple[tuple[_PreTokenizer, tuple[str, ...]], ...] = (
    # Each digit by itself, and before the split at spaces: "a  1" has a run of two spaces.
    (_PreTokenizer((r"\p{N}", _GPT2)), ("smollm", "minerva-7b", "refact", "starcoder")),
    (
        _PreTokenizer(_LLAMA3_SPLITS, add_bos=True, ignore_merges=True),
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "midm-2.0", "pixtral"),
    ),
    (_PreTokenizer(_LLAMA3_SPLITS), ("smaug-bpe",)),
    (
        _PreTokenizer((rf"{_WORDS}|\p{{N}}|{_REST}",)),
        ("qwen2", "deepseek-r1-qwen", "f2llmv2", "kormo", "megrez"),
    ),
    (
        _PreTokenizer(
            (rf"{_CASED_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",),
            add_bos=True,
            ignore_merges=True,
        ),
        ("tekken",),
    ),
    (_PreTokenizer((_GPT2,)), ("gpt-2", "a.x-4.0", "mellum", "trillion")),
    (_DEFAULT, ("default",)),
)
_PRE_TOKENIZERS = {name: kind for kind, names in _KINDS for name in names}


@dataclass(frozen=True)
class _Vocabulary:
    tokens: list[str]
    types: list[int]
    ids: dict[str, int]

    def of_types(self, *types: int) -> list[str]:
        return [token for token, kind in zip(self.tokens, self.types, strict=True) if kind in types]


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> "PreTrainedTokenizerFast":
    """Builds the tokenizer from GGUF metadata: vocabulary, special tokens, BOS/EOS, chat template.

    Pads on the left. `TokenizerError` for an unsupported `tokenizer.ggml.model` or
    `tokenizer.ggml.pre`, and for absent, inconsistent or malformed entries. Without
    `tokenizer.ggml.pre` it warns and splits as llama.cpp does then.
    """
    import_transformers()
    model = metadata.get(_KEY + "model")
    vocabulary = _vocabulary(metadata)
    try:
        if model == "gpt2":
            pre = _pre_tokenizer(metadata)
            backend, adds_bos = _byte_level(vocabulary, _merges(metadata), pre), pre.add_bos
        elif model == "llama":
            backend, adds_bos = _sentencepiece(metadata, vocabulary), True
        else:
            raise TokenizerError(
                f"tokenizer.ggml.model is {model!r}, supported are 'gpt2' (byte-level BPE) and "
                "'llama' (SentencePiece): use a folder with the model's tokenizer.json"
            )
        _keep_marked_tokens_whole(backend, vocabulary)
    except TokenizerError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        raise TokenizerError(
            f"the GGUF vocabulary is inconsistent ({first_line(error)}): fetch the file again"
        ) from error
    return _wrapped(backend, metadata, vocabulary, adds_bos)


def end_token_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids a GGUF file says end a generation: end of sequence, of turn, of message."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    stated = (metadata.get(_KEY + key) for key in keys)
    return tuple(dict.fromkeys(token_id for token_id in stated if token_id is not None))


def _list(metadata: Mapping[str, Any], key: str, kinds: type | tuple[type, ...]) -> list[Any]:
    values = metadata.get(_KEY + key)
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise TokenizerError(
            f"the GGUF metadata has no list {_KEY}{key}: use a file that carries its tokenizer, "
            "or a folder with the model's tokenizer.json"
        )
    for value in values:
        if not isinstance(value, kinds):
            raise TokenizerError(f"{_KEY}{key} holds {value!r:.40}, a {type(value).__name__}")
    return list(values)


def _per_token(metadata: Mapping[str, Any], key: str, kinds: Any, count: int) -> list[Any]:
    values = _list(metadata, key, kinds)
    if len(values) != count:
        raise TokenizerError(
            f"{_KEY}{key} has {len(values)} entries for {count} tokens: fetch the file again"
        )
    return values


def _vocabulary(metadata: Mapping[str, Any]) -> _Vocabulary:
    tokens = _list(metadata, "tokens", str)
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        twice = next(token for token_id, token in enumerate(tokens) if ids[token] != token_id)
        raise TokenizerError(f"{_KEY}tokens has {twice!r:.40} twice: fetch the file again")
    types = [_NORMAL] * len(tokens)
    if _KEY + "token_type" in metadata:
        types = _per_token(metadata, "token_type", int, len(tokens))
    return _Vocabulary(tokens, types, ids)


def _pre_tokenizer(metadata: Mapping[str, Any]) -> _PreTokenizer:
    name = metadata.get(_KEY + "pre")
    if name is None:
        warnings.warn(
            "this GGUF file does not say how its text is split (tokenizer.ggml.pre): it is split "
            "as llama.cpp does by default, which may differ from the model's training; prefer a "
            "newer conversion",
            stacklevel=3,
        )
        return _DEFAULT
    if name not in _PRE_TOKENIZERS:
        raise TokenizerError(
            f"tokenizer.ggml.pre is {name!r:.40}, supported are {', '.join(_PRE_TOKENIZERS)}: use "
            "a folder with the model's tokenizer.json"
        )
    return _PRE_TOKENIZERS[name]


def _merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges = []
    for merge in _list(metadata, "merges", str):
        left, space, right = merge.partition(" ")
        if not (left and space and right):
            raise TokenizerError(f"{_KEY}merges holds {merge!r:.40}, which is not 'left right'")
        merges.append((left, right))
    return merges


def _byte_level(
    vocabulary: _Vocabulary, merges: list[tuple[str, str]], pre: _PreTokenizer
) -> "Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    model = models.BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=pre.ignore_merges)
    backend = Tokenizer(model)
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in pre.splits]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return backend


def _sentencepiece(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = _per_token(metadata, "scores", (int, float), len(vocabulary.tokens))
    unknown = vocabulary.tokens[_special_id(metadata, "unknown_token_id", vocabulary, 0) or 0]
    model = models.BPE(
        vocab=vocabulary.ids,
        merges=_merges_by_score(vocabulary, scores),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = Tokenizer(model)
    escape = normalizers.Replace(" ", _SPACE)
    unescape = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get(_KEY + "add_space_prefix", True):
        # Normalisers run on each stretch between special tokens, so the space is added after
        # every one of them, as llama.cpp does.
        escape = normalizers.Sequence([normalizers.Prepend(_SPACE), escape])
        unescape.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = escape  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.Sequence(unescape)  # pyright: ignore[reportAttributeAccessIssue]
    return backend


def _merges_by_score(vocabulary: _Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """Every way to put a normal token together from two, best score first, longer left first.

    SentencePiece joins the pair whose union scores highest; ranked merges do the same, except
    that among equal scores a rank decides where SentencePiece takes the leftmost.
    """
    normal = set(vocabulary.of_types(_NORMAL))
    ranked = [
        (-scores[vocabulary.ids[token]], -cut, vocabulary.ids[token])
        for token in normal
        for cut in range(1, len(token))
        if token[:cut] in normal and token[cut:] in normal
    ]
    tokens = vocabulary.tokens
    return [(tokens[at][:-cut], tokens[at][-cut:]) for _, cut, at in sorted(ranked)]


def _keep_marked_tokens_whole(backend: "Tokenizer", vocabulary: _Vocabulary) -> None:
    from tokenizers import AddedToken

    special = vocabulary.of_types(_CONTROL, _UNKNOWN)
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    plain = vocabulary.of_types(_USER_DEFINED)
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t in plain])


def _special_id(
    metadata: Mapping[str, Any], key: str, vocabulary: _Vocabulary, default: int | None
) -> int | None:
    token_id = metadata.get(_KEY + key, default)
    if token_id is not None and not 0 <= token_id < len(vocabulary.tokens):
        raise TokenizerError(
            f"{_KEY}{key} is {token_id}, but there are {len(vocabulary.tokens)} tokens: fetch the "
            "file again"
        )
    return token_id


def _special_tokens(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> dict[str, str]:
    # SentencePiece files may leave their three usual ids out.
    usual = (0, 1, 2) if metadata[_KEY + "model"] == "llama" else (None, None, None)
    keys = {
        "unk_token": ("unknown_token_id", usual[0]),
        "bos_token": ("bos_token_id", usual[1]),
        "eos_token": ("eos_token_id", usual[2]),
        "pad_token": ("padding_token_id", None),
    }
    ids = {
        name: _special_id(metadata, key, vocabulary, default)
        for name, (key, default) in keys.items()
    }
    return {
        name: vocabulary.tokens[token_id] for name, token_id in ids.items() if token_id is not None
    }


def _flag(metadata: Mapping[str, Any], name: str, implied: bool, special: dict[str, str]) -> bool:
    """`add_bos_token` or `add_eos_token`: what the file states, else what its kind implies."""
    token = name.removeprefix("add_")
    stated = metadata.get(_KEY + name)
    if stated and token not in special:
        raise TokenizerError(f"{_KEY}{name} is set, but the file has no {_KEY}{token}_id")
    return bool(implied and token in special) if stated is None else bool(stated)


def _wrapped(
    backend: "Tokenizer", metadata: Mapping[str, Any], vocabulary: _Vocabulary, adds_bos: bool
) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    special = _special_tokens(metadata, vocabulary)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        padding_side="left",
        add_bos_token=_flag(metadata, "add_bos_token", adds_bos, special),
        add_eos_token=_flag(metadata, "add_eos_token", False, special),
        **special,
    )
