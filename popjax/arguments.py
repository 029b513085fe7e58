"""What `generate` was called with, checked and merged with what the checkpoint states.

A value the caller gave is held to its range and its effect; one from generation_config.json that
cannot apply to this call gives way. Leaves out the run itself (`request.py` checks that).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeGuard

import numpy as np

from popjax.depth import DEPTH_METHODS, DepthMethod, depth_method_named
from popjax.eviction import KV_METHODS, KvMethod, kv_method_named
from popjax.methods import METHODS, Method, method_named
from popjax.sampling import SamplingConfig

DEFAULT_NEW_TOKENS = 128
# These shape a draw, so they mean nothing to greedy decoding.
_DRAW = ("temperature", "top_k", "top_p", "min_p")


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether a value is an integer of Python or NumPy, and not a bool."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def given_end_ids(value: Any, vocab_size: int) -> tuple[int, ...]:
    """End-token ids that a caller gave. Raises ValueError for ids that the model does not have."""
    ids = end_ids(value, "generate")
    foreign = [token for token in ids if token >= vocab_size]
    if foreign:
        raise ValueError(
            f"eos_token_id {foreign[0]} is outside 0..{vocab_size - 1}: give ids of this model's "
            "tokenizer"
        )
    return ids


def end_ids(value: Any, origin: str) -> tuple[int, ...]:
    """End-token ids of one id, several or None. Raises ValueError naming `origin` for others."""
    if value is None:
        return ()
    listed: list[Any] = [value]
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | dict):
        listed = list(value)
    if not all(is_whole(token) and token >= 0 for token in listed):
        raise ValueError(f"eos_token_id {value!r} of {origin} is not a token id or a list of them")
    return tuple(int(token) for token in listed)


def is_ids(prompt: Any) -> bool:
    """Whether a prompt is a sequence of token ids."""
    if isinstance(prompt, str | bytes | dict) or not isinstance(prompt, Iterable):
        return False
    return all(is_whole(token) for token in prompt)


def prompt_list(prompts: Any, chat: bool) -> tuple[list[Any], bool]:
    """The prompts of any accepted form as a list, and whether they are conversations.

    Raises ValueError for what is neither text, token ids, messages nor a list of them.
    """
    if isinstance(prompts, dict):
        return [[prompts]], True
    if isinstance(prompts, str):
        return [prompts], chat
    if isinstance(prompts, bytes) or not isinstance(prompts, Iterable):
        raise ValueError(
            f"prompts {prompts!r} is neither text nor token ids: give a str, token ids, or a list "
            "of either"
        )
    listed = list(prompts)
    if not listed:
        raise ValueError("no prompts were given: give at least one")
    if isinstance(listed[0], dict):
        return [listed], True
    return ([listed] if is_whole(listed[0]) else listed), chat


def merged_sampling(given: dict[str, Any], stated: dict[str, Any], new: int) -> SamplingConfig:
    """Sampling of a call that yields at most `new` tokens: given values over stated ones.

    Raises ValueError for values out of range, or given ones that greedy decoding would ignore.
    """
    merged = {key: stated.get(key) if value is None else value for key, value in given.items()}
    sample = merged["do_sample"]
    if sample is not None and not isinstance(sample, bool):
        raise ValueError(f"do_sample {sample!r} is neither True nor False: give one of them")
    if not sample:
        idle = [key for key in _DRAW if given[key] is not None]
        if idle:
            raise ValueError(
                f"{idle[0]} {given[idle[0]]} has no effect on greedy decoding: pass do_sample=True"
            )
        merged = {key: value for key, value in merged.items() if key not in _DRAW}
    least = merged["min_new_tokens"]
    if given["min_new_tokens"] is None and is_whole(least):
        merged["min_new_tokens"] = min(least, new)
    return SamplingConfig(**{key: value for key, value in merged.items() if value is not None})


def new_tokens(asked: Any, stated: Any, room: int) -> int:
    """How many tokens to generate: as asked, else as stated but within `room`, else the default.

    Raises ValueError for a stated value that is no positive whole number.
    """
    if asked is not None:
        if not is_whole(asked):
            raise ValueError(f"max_new_tokens {asked!r} is not a whole number above 0: ask for one")
        return int(asked)
    if stated is not None and (not is_whole(stated) or stated < 1):
        raise ValueError(
            f"max_new_tokens {stated!r} in generation_config.json is not a whole number above 0: "
            "pass max_new_tokens"
        )
    return max(1, min(DEFAULT_NEW_TOKENS if stated is None else stated, room))


def repeated(prompts: list[list[int]], times: Any, sampling: SamplingConfig) -> list[list[int]]:
    """Every prompt `times` times in a row. Raises ValueError where that makes no sense."""
    if not is_whole(times) or times < 1:
        raise ValueError(f"num_return_sequences {times!r} is not a whole number above 0")
    if times > 1 and not sampling.do_sample:
        raise ValueError(
            f"num_return_sequences {times} of greedy decoding would be copies: pass do_sample=True"
        )
    return [prompt for prompt in prompts for _ in range(times)]


def chosen_method(method: Method | str, options: dict[str, Any]) -> Method:
    """The method meant by a Method, or by a name with its options. Raises ValueError otherwise."""
    if isinstance(method, str):
        return method_named(method, **options)
    if not isinstance(method, Method):
        raise ValueError(f"method {method!r} is not a Method: use one of {', '.join(METHODS)}")
    if options:
        raise ValueError(
            f"{sorted(options)[0]!r} is not an argument of generate: give method options to the "
            "method itself, or name the method by a string"
        )
    return method


def chosen_eviction(
    kv: KvMethod | str | None, keep: float | None, tokens: int | None
) -> KvMethod | None:
    """The eviction method meant by one, or by a name with its budget; None for no eviction.

    Raises ValueError for anything else, and for a name without a budget or a budget without a name.
    """
    if isinstance(kv, str):
        if keep is None and tokens is None:
            raise ValueError(f"kv {kv!r} needs a budget: give kv_keep (a share) or kv_tokens")
        return kv_method_named(kv, keep=keep, tokens=tokens)
    if kv is not None and not isinstance(kv, KvMethod):
        raise ValueError(f"kv {kv!r} is not a KvMethod: use one of {', '.join(KV_METHODS)}")
    if keep is not None or tokens is not None:
        raise ValueError(
            f"kv_keep={keep} and kv_tokens={tokens} go with the name of a method: give kv='laprox' "
            "with them, or the budget to the method itself"
        )
    return kv


def chosen_depth(depth: DepthMethod | str | None, skip: float | None) -> DepthMethod | None:
    """The depth method meant by one, or by a name with its share; None for every layer.

    Raises ValueError for anything else, and for a share without a name.
    """
    if isinstance(depth, str):
        return depth_method_named(depth, skip=skip)
    if depth is not None and not isinstance(depth, DepthMethod):
        raise ValueError(
            f"depth {depth!r} is not a DepthMethod: use one of {', '.join(DEPTH_METHODS)}"
        )
    if skip is not None:
        raise ValueError(
            f"skip={skip} goes with the name of a depth method: give depth='prefill-pruning' with "
            "it, or the share to the method itself"
        )
    return depth
