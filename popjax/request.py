"""What one run is asked to do, and whether this model and method can do it.

Everything that can be refused is refused here, before anything is compiled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from popjax.config import ModelConfig
from popjax.generate import Masks, Options
from popjax.methods import Method
from popjax.sampling import SamplingConfig
from popjax.sparsity import Partitions, checked_partitions

# Called after every chunk with tokens [B, n] so far and done [B]; returns rows to stop, [B] bool.
OnChunk = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Request:
    """What one run is asked to do, tokens in. `chunk`: steps between calls of `on_chunk`."""

    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    method: Method = Method()
    sampling: SamplingConfig = SamplingConfig()
    eos_ids: tuple[int, ...] = ()
    seed: int | Sequence[int] = 0
    partition: Partitions | None = None
    masks: Masks | None = None
    options: Options = Options()
    chunk: int = 8
    on_chunk: OnChunk | None = None


def settled(request: Request, config: ModelConfig, method: Method) -> Request:
    """The request as it will run: partitions as ascending arrays, a replay as long as its masks.

    A recorded run that met an end token early has fewer masks than it asked for tokens; its replay
    meets the same end. Raises ValueError for anything that this model and method cannot serve.
    """
    if request.partition is not None:
        given = checked_partitions(request.partition, config)
        request = dataclasses.replace(request, partition=given)
    check_request(request, config, method)
    if request.masks is not None:
        recorded = request.masks[0].shape[0] + 1
        longest = min(request.max_new_tokens, recorded)
        request = dataclasses.replace(request, max_new_tokens=longest)
    return request


def check_request(request: Request, config: ModelConfig, method: Method) -> None:
    """Raise ValueError for anything in the request that this model and method cannot serve."""
    asked = request.max_new_tokens
    if isinstance(asked, bool) or not isinstance(asked, int) or asked < 1:
        raise ValueError(f"max_new_tokens {asked!r} is not a whole number above 0: ask for one")
    if request.sampling.min_new_tokens > request.max_new_tokens:
        raise ValueError(
            f"min_new_tokens {request.sampling.min_new_tokens} exceeds max_new_tokens "
            f"{request.max_new_tokens}: lower it"
        )
    longest = max((len(prompt) for prompt in request.prompts), default=0)
    if longest + request.max_new_tokens > config.max_positions:
        raise ValueError(
            f"the prompt has {longest} tokens and {request.max_new_tokens} new ones were asked "
            f"for, above the model's maximum context length of {config.max_positions}: "
            "shorten either"
        )
    for i, prompt in enumerate(request.prompts):
        if len(prompt) and not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise ValueError(
                f"prompt {i} has a token id outside 0..{config.vocab_size - 1}: "
                "encode it with this model's tokenizer"
            )
    _check_replay(request, config, method)


def _check_replay(request: Request, config: ModelConfig, method: Method) -> None:
    if request.partition is None:
        if request.masks is not None:
            raise ValueError("masks were given without a partition: give the partition they index")
        return
    undecided = any(part.k_selected < part.num_candidate for part in request.partition)
    if type(method).selection is Method.selection and undecided and request.masks is None:
        raise ValueError(
            f"the partition leaves candidates to choose, which {type(method).__name__} cannot: "
            "give a method that masks, or masks, or a partition whose k_selected is all candidates"
        )
    if request.masks is None:
        return
    if len(request.masks) != config.num_layers:
        raise ValueError(
            f"masks have {len(request.masks)} layers, the model has {config.num_layers}: "
            "give one each"
        )
    steps = np.shape(request.masks[0])[:1]
    for i, (mask, part) in enumerate(zip(request.masks, request.partition, strict=True)):
        want = (*steps, len(request.prompts), part.evaluated)
        if not isinstance(mask, np.ndarray | jax.Array) or mask.dtype != bool:
            held = getattr(mask, "dtype", type(mask).__name__)
            raise ValueError(f"masks of layer {i} hold {held} values: give arrays of booleans")
        if mask.shape != want:
            raise ValueError(
                f"masks of layer {i} have shape {mask.shape}, expected {want}: steps as in layer "
                "0, rows of the prompts, evaluated channels of the partition"
            )
        counts = np.unique(np.asarray(mask).sum(axis=-1)).tolist()
        if request.options.implementation == "xla_gathered" and counts not in ([], [part.active]):
            raise ValueError(
                f"masks of layer {i} have {counts} channels on, 'xla_gathered' needs "
                f"{part.active} in every one: use 'xla' for masks of other counts"
            )
