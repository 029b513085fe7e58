"""Text to token pairs as lm-eval makes them, so that its numbers and ours are of the same tokens.

Leaves out batches and scores (`scoring.py`). A pair that is too long loses context on its left, as
in lm-eval, and is counted; a continuation that is too long by itself is refused.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from popjax.evaluation.protocols import SPLIT
from popjax.text import first_line


@dataclasses.dataclass(frozen=True)
class Pair:
    """Tokens of a context and of the continuation that is scored after it; both have some.

    cut: how many tokens the context lost on its left.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    cut: int = 0


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A tokenizer and how many tokens the model takes at once."""

    tokenizer: Any
    max_length: int
    protocol: str = SPLIT

    @property
    def prefix_token(self) -> int:
        """The token before an empty context: BOS, else EOS. Raises ValueError without either."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise ValueError(
            "this model's tokenizer has no BOS and no EOS token to put before a text without "
            "context: give every item a context"
        )

    @property
    def room(self) -> int:
        """Tokens of a pair at most: decoding holds a slot for the last one, a prefill does not."""
        return self.max_length + (self.protocol != SPLIT)

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        """Token ids; with the special tokens of the tokenizer unless the text begins with BOS."""
        if special is None:
            bos = self.tokenizer.bos_token
            special = not (bos and text.startswith(bos))
        found = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return [int(token) for token in found]

    def pair(self, context: str, continuation: str, where: str = "a request") -> Pair:
        """The two texts as tokens. Raises ValueError naming `where` for what cannot be scored.

        Spaces that end the context count to the continuation, whose tokens are those that the whole
        text has beyond the context's.
        """
        if not context:
            ids = self.encode(continuation, special=False)
            before, prefix = [], self.prefix_token
            if ids[:1] != [prefix]:
                before = [prefix]
            else:
                before, ids = ids[:1], ids[1:]
            return self.fitted(before, ids, where)
        bare = context.rstrip()
        before = self.encode(bare) if bare else [self.prefix_token]
        if not bare:
            return self.fitted(before, self.encode(context + continuation, special=False), where)
        return self.fitted(before, self.encode(context + continuation)[len(before) :], where)

    def fitted(self, context: list[int], continuation: list[int], where: str) -> Pair:
        """The pair within `room`, by dropping the first tokens of the context."""
        if not continuation:
            raise ValueError(
                f"{where} has no tokens of its own after its context: give it some text"
            )
        if len(continuation) >= self.room:
            raise ValueError(
                f"{where} has {len(continuation)} tokens, above the model's maximum context length "
                f"of {self.max_length}: shorten it"
            )
        over = max(0, len(context) + len(continuation) - self.room)
        return Pair(tuple(context[over:]), tuple(continuation), over)

    def chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as the model's template writes them; without a prompt the last one goes on.

        Raises ValueError where there is no template or it refuses.
        """
        if not self.tokenizer.chat_template:
            raise ValueError(
                "this model's tokenizer has no chat template: leave the template out (--chat)"
            )
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )
        # Templates are foreign programs: they refuse roles or turn orders with errors of any kind.
        except Exception as error:
            raise ValueError(
                f"the chat template refused the messages: {first_line(error)}"
            ) from error


__all__ = ["Encoder", "Pair"]
