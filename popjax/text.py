"""Text in, text out: tokenizers of Hugging Face folders, prompts to ids, ids to text as they come.

Leaves out GGUF vocabularies (gguf_tokenizer.py) and padding, which belongs to generation. The
whole-string decode that everything here agrees with is `decode`.
"""

import logging
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Message = Mapping[str, str]

_MESSAGE_KEYS = ("role", "content")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# What a decoder writes for bytes that are not UTF-8, hence also for a character not yet complete.
_REPLACEMENT = "\ufffd"
# A UTF-8 character has at most four bytes, so of any four boundaries between tokens one is clean.
_MAX_BOUNDARIES = 4


class TokenizerError(ValueError):
    """A tokenizer, prompt or chat template cannot be used; the message says which and the fix."""


def first_line(error: Exception) -> str:
    """What an exception says, cut to its first line (its class if it says nothing)."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def import_transformers() -> ModuleType:
    """The transformers package, without its advice to install torch, which is not needed here."""
    logger = logging.getLogger("transformers")

    def is_not_advice(record: logging.LogRecord) -> bool:
        return "PyTorch was not found" not in record.getMessage()

    logger.addFilter(is_not_advice)
    try:
        import transformers
    finally:
        logger.removeFilter(is_not_advice)
    return transformers


def load_tokenizer(folder: str | Path) -> "PreTrainedTokenizerFast":
    """The fast tokenizer of a Hugging Face folder on this disk, padding on the left.

    Needs no torch, reaches no network and runs no code from the folder. `TokenizerError` if the
    folder is missing, has no tokenizer, or has one that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise TokenizerError(f"{folder} is not a folder: pass one that holds tokenizer.json")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise TokenizerError(
            f"{folder} has no tokenizer (none of {', '.join(_TOKENIZER_FILES)}): copy the model's "
            "tokenizer.json and tokenizer_config.json into it"
        )
    auto_tokenizer = import_transformers().AutoTokenizer
    try:
        tokenizer = auto_tokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, padding_side="left"
        )
    # The tokenizers library raises bare Exception, and a bad file can fail in many other ways.
    except Exception as error:
        raise TokenizerError(
            f"the tokenizer in {folder} cannot be read ({first_line(error)}): copy the model's "
            "tokenizer.json and tokenizer_config.json again"
        ) from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise TokenizerError(
            f"{folder} has only a {type(tokenizer).__name__}, which is not a fast tokenizer: add "
            "the model's tokenizer.json"
        )
    return tokenizer


def encode_prompts(
    tokenizer: "PreTrainedTokenizerFast",
    prompts: Sequence[str] | Sequence[Sequence[Message]],
    *,
    chat: bool,
    begin: bool = True,
) -> list[list[int]]:
    """Token ids of each prompt, with the special tokens the model expects, not padded.

    Without `begin` a str is the middle of a text: no token that starts one is put before it.

    With `chat`, a prompt is a list of {"role", "content"} messages (or a str, one user turn) and
    goes through the chat template, ready for the assistant's turn; otherwise it is a str, and an
    empty one is the BOS token alone. `TokenizerError` names the index of an unusable prompt.
    """
    if isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Sequence):
        raise TokenizerError(
            f"prompts must be a list, got {type(prompts).__name__}: write [prompt] for one prompt"
        )
    if chat and not tokenizer.chat_template:
        raise TokenizerError(
            "this model's tokenizer has no chat template: pass plain text prompts instead of a chat"
        )
    if chat:
        return [_encode_chat(tokenizer, prompt, i) for i, prompt in enumerate(prompts)]
    return [_encode_text(tokenizer, prompt, i, begin) for i, prompt in enumerate(prompts)]


def _encode_text(
    tokenizer: "PreTrainedTokenizerFast", prompt: Any, index: int, begin: bool
) -> list[int]:
    if not isinstance(prompt, str):
        hint = ": pass chat=True for messages" if isinstance(prompt, Sequence) else ""
        raise TokenizerError(f"prompt {index} must be a str, got {type(prompt).__name__}{hint}")
    ids = _token_ids(tokenizer, prompt, index, add_special_tokens=begin)
    if ids:
        return ids
    if not begin:
        raise TokenizerError(f"prompt {index} is empty: write at least one character")
    start = cast("int | None", tokenizer.bos_token_id)
    if start is None:
        raise TokenizerError(
            f"prompt {index} is empty and this tokenizer has no BOS token to start from: write at "
            "least one character"
        )
    return [start]


def _token_ids(
    tokenizer: "PreTrainedTokenizerFast", text: str, index: int, *, add_special_tokens: bool
) -> list[int]:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"prompt {index} has a lone surrogate at character {error.start}, which is not text: "
            "decode the input as UTF-8"
        ) from error
    encoded = tokenizer(text, add_special_tokens=add_special_tokens)
    return cast("list[int]", encoded["input_ids"])


def _encode_chat(tokenizer: "PreTrainedTokenizerFast", prompt: Any, index: int) -> list[int]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, Sequence) or not messages:
        raise TokenizerError(
            f"prompt {index} must be a str or a non-empty list of messages, got {messages!r:.60}"
        )
    for message in messages:
        fields = (
            message.get(key) if isinstance(message, Mapping) else None for key in _MESSAGE_KEYS
        )
        if not all(isinstance(field, str) for field in fields):
            raise TokenizerError(
                f"prompt {index} has the message {message!r:.80}: each is a mapping of 'role' and "
                "'content' to a str"
            )
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, tokenize=False
        )
    # Templates are foreign programs: they refuse roles or turn orders with errors of any kind.
    except Exception as error:
        raise TokenizerError(
            f"the chat template refused prompt {index}: {first_line(error)}"
        ) from error
    # The template writes the special tokens itself: adding BOS again would double it.
    return _token_ids(tokenizer, str(text), index, add_special_tokens=False)


def decode(
    tokenizer: "PreTrainedTokenizerFast",
    token_ids: Iterable[int],
    *,
    skip_special_tokens: bool = True,
) -> str:
    """The text of token ids; bytes that are not UTF-8 become U+FFFD, unknown ids nothing.

    Never "cleans up" spaces: that is lossy, and a prefix of the ids would not give a prefix of
    the text.
    """
    text = tokenizer.decode(
        [int(token_id) for token_id in token_ids],
        skip_special_tokens=skip_special_tokens,
        clean_up_tokenization_spaces=False,
    )
    assert isinstance(text, str)  # a flat list of ids gives one text
    return text


def truncate_at_stop(text: str, stop_strings: Sequence[str]) -> tuple[str, bool]:
    """`text` up to the first stop string to be completed, and whether there was one.

    Of two stop strings completed by the same character the longer one counts: exactly what
    `TextStream` finds, whatever the pieces the text comes in. `ValueError` for an empty one.
    """
    start = _first_stop(text, _checked_stops(stop_strings))
    return (text, False) if start is None else (text[:start], True)


def _first_stop(text: str, stops: tuple[str, ...]) -> int | None:
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def _checked_stops(stop_strings: Sequence[str]) -> tuple[str, ...]:
    if isinstance(stop_strings, str):
        raise ValueError(f"stop_strings must be a list, got the str {stop_strings!r}: write [...]")
    if not isinstance(stop_strings, Iterable):
        raise ValueError(f"stop_strings must be a list of str, got {stop_strings!r}")
    for stop in stop_strings:
        if not isinstance(stop, str) or not stop:
            raise ValueError(f"each stop string must be a non-empty str, got {stop!r}")
    return tuple(stop_strings)


class TextStream:
    """Token ids to text as they come: the pieces join to `decode` of all ids, cut at the stop.

    Holds back what later tokens could still change: an incomplete UTF-8 character, a run of
    byte tokens, and any ending that could be the beginning of a stop string. Each push decodes
    the tokens it releases and a constant number around them.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        *,
        stop_strings: Sequence[str] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._stops = _checked_stops(stop_strings)
        added = tokenizer.added_tokens_decoder.items() if skip_special_tokens else ()
        self._skipped = frozenset(token_id for token_id, token in added if token.special)
        # Such a decoder turns a whole run of byte tokens into U+FFFD if the run is not UTF-8, so
        # the run is final only when another token ends it.
        self._byte_fallback = "ByteFallback" in repr(self._backend.decoder)
        self._byte_run = 0
        # The last released token: SentencePiece decoders strip the space of a first token.
        self._context: list[int] = []
        self._pending: list[int] = []
        self._held = ""
        self._stopped = False
        self._finished = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string was completed; from then on `push` and `finish` return ""."""
        return self._stopped

    def push(self, token_ids: Iterable[int]) -> str:
        """Takes the next ids, returns the text that became final; `ValueError` after `finish`."""
        if self._finished:
            raise ValueError("this TextStream is finished: make a new one for another text")
        for token_id in token_ids:
            self._append(int(token_id))
        return self._release(self._take(self._num_final()))

    def finish(self) -> str:
        """Returns the text held back so far; the stream takes no more tokens."""
        self._finished = True
        text = self._release(self._take(len(self._pending)))
        rest, self._held = self._held, ""
        return text + rest

    def _append(self, token_id: int) -> None:
        # Ids without a piece (vocabularies are padded) decode to nothing and are no context.
        piece = None if token_id in self._skipped else self._backend.id_to_token(token_id)
        if not piece or self._stopped:
            return
        self._pending.append(token_id)
        is_byte = self._byte_fallback and _BYTE_PIECE.fullmatch(piece)
        self._byte_run = self._byte_run + 1 if is_byte else 0

    def _decode(self, token_ids: list[int]) -> str:
        return decode(self._tokenizer, token_ids, skip_special_tokens=False)

    def _num_final(self) -> int:
        """How many of the pending tokens have a text that no later token can change."""
        if self._byte_fallback:
            return len(self._pending) - self._byte_run
        text = self._decode(self._context + self._pending)
        if not text.endswith(_REPLACEMENT):
            return len(self._pending)
        # Inside a character, the halves decode to more replacements than the whole: a boundary
        # where they join to the whole is clean, and stays so whatever follows.
        for count in range(len(self._pending) - 1, 0, -1)[:_MAX_BOUNDARIES]:
            rest = self._decode(self._pending[count:])
            if rest and self._decode(self._context + self._pending[:count]) + rest == text:
                return count
        return 0

    def _take(self, count: int) -> str:
        """The text of the first `count` pending tokens, which become context."""
        if count == 0:
            return ""
        taken, self._pending = self._pending[:count], self._pending[count:]
        text = self._decode(self._context + taken)[len(self._decode(self._context)) :]
        self._context = taken[-1:]
        return text

    def _release(self, text: str) -> str:
        held = self._held + text
        start = None if self._stopped else _first_stop(held, self._stops)
        if start is not None:
            self._stopped = True
            self._held, self._pending = "", []
            return held[:start]
        split = len(held) - _open_stop(held, self._stops)
        self._held = held[split:]
        return held[:split]


def _open_stop(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest ending of `text` that begins, but is not, one of the stop strings."""
    longest = max((len(stop) for stop in stops), default=1)
    for length in range(min(longest - 1, len(text)), 0, -1):
        ending = text[len(text) - length :]
        if any(len(stop) > length and stop.startswith(ending) for stop in stops):
            return length
    return 0


def tokenizer_files(tokenizer: "PreTrainedTokenizerFast") -> dict[str, bytes]:
    """The files that make a folder's tokenizer, by name, as transformers writes them."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
