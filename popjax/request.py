"""What one run is asked to do, and whether this model and method can do it.

Everything that can be refused is refused here, before anything is compiled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from popjax.config import ModelConfig
from popjax.context import Context
from popjax.depth import DepthMethod
from popjax.eviction import KvMethod
from popjax.eviction.evict import check_model
from popjax.expert_partition import ExpertPartition
from popjax.generate import Masks, Options
from popjax.given_partition import checked_partitions
from popjax.methods import Method, check_evaluated
from popjax.sampling import SamplingConfig
from popjax.sparsity import Partitions

# Called after every chunk with tokens [B, n] so far and done [B]; returns rows to stop, [B] bool.
OnChunk = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Request:
    """What one run is asked to do, tokens in.

    eviction: what of the prompts stays in the cache; context: one prefilled before, which every
    prompt continues; prefill_chunk: prompt tokens run at a time. chunk: steps between calls of
    `on_chunk`. depth: layers that prompts skip, or that are dropped.
    """

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
    eviction: KvMethod | None = None
    context: Context | None = None
    prefill_chunk: int | None = None
    evict_every: int | None = None
    depth: DepthMethod | None = None

    def eviction_for(self, config: ModelConfig, mesh: Mesh | None) -> KvMethod | None:
        """The eviction method settled for a model. Raises ValueError on several devices."""
        if mesh is not None and (self.eviction is not None or self.context is not None):
            raise ValueError(
                f"cache eviction runs on one device, and these weights lie on {mesh.size}: leave "
                "out kv= and context="
            )
        return None if self.eviction is None else self.eviction.for_model(config)


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
    longest += 0 if request.context is None else len(request.context.tokens)
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
    if not isinstance(request.options.pack, bool):
        raise ValueError(f"pack {request.options.pack!r} is not a bool: give True or False")
    if request.partition is None:
        check_evaluated(method, config)
    _check_cache(request, config, method)
    _check_replay(request, config, method)


def _check_cache(request: Request, config: ModelConfig, method: Method) -> None:
    """Raise ValueError for a prefill or an eviction that cannot be done."""
    eviction = request.eviction
    if eviction is not None and not isinstance(eviction, KvMethod):
        raise ValueError(f"eviction {eviction!r} is not a KvMethod: give one")
    check_chunk(request.prefill_chunk, method, eviction)
    check_again(request.evict_every, eviction)
    if eviction is not None:
        if request.context is not None:
            raise ValueError(
                "a context has been evicted when it was prefilled: give kv= there, not here"
            )
        check_model(config)


def check_chunk(chunk: int | None, method: Method, eviction: KvMethod | None) -> None:
    """Raise ValueError for a prompt that cannot be run so many tokens at a time."""
    if chunk is None:
        return
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"prefill_chunk {chunk!r} is not a whole number above 0: give tokens")
    if method.whole_prompt:
        raise ValueError(
            f"{method} prunes while the prompt runs, which needs it in one piece: leave out "
            "prefill_chunk, or let the prompt run dense (online-pruning with prefill='dense')"
        )
    if eviction is not None and chunk < eviction.window:
        raise ValueError(
            f"prefill_chunk {chunk} is below the window of {eviction.window} tokens whose queries "
            "score the cache: make the chunk longer"
        )


def check_again(every: int | None, eviction: KvMethod | None) -> None:
    """Raise ValueError for an eviction that cannot be repeated every so many new tokens."""
    if every is None:
        return
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"kv_every {every!r} is not a whole number above 0: give tokens")
    if eviction is None or eviction.tokens is None:
        raise ValueError(
            "kv_every needs a method with a budget in tokens, since a share of a text that grows "
            "is no limit: give kv_tokens=256, or tokens=256 to the method itself"
        )
    if not eviction.repeats:
        raise ValueError(
            f"{type(eviction).__name__} scores entries by more than the last tokens' queries and "
            "cannot evict while decoding: use laprox, snapkv, adakv, criticalkv, tova or "
            "streaming-llm"
        )
    if every < eviction.window:
        raise ValueError(
            f"kv_every {every} is below the window of {eviction.window} tokens whose queries "
            "score the cache: evict less often, or make the window smaller"
        )


def _check_replay(request: Request, config: ModelConfig, method: Method) -> None:
    if request.partition is None:
        if request.masks is not None:
            raise ValueError("masks were given without a partition: give the partition they index")
        return
    besides = [p.shared for p in request.partition if isinstance(p, ExpertPartition) and p.shared]
    decided = (*request.partition, *besides)
    undecided = any(not part.decided for part in decided)
    if type(method).selection is Method.selection and undecided and request.masks is None:
        raise ValueError(
            f"the partition leaves candidates to choose, which {type(method).__name__} cannot: "
            "give a method that masks, or masks, or a partition whose k_selected is all candidates"
        )
    if besides and type(method) is not Method and type(method.beside()) is Method:
        raise ValueError(
            f"the partition prunes what every token uses beside experts, which {method} leaves "
            "dense: give shared='pruned' as in the run that made it, or partitions without `shared`"
        )
    if request.masks is not None:
        _check_masks(request, request.partition, request.masks, config)


def _check_masks(
    request: Request, partition: Partitions, masks: Masks, config: ModelConfig
) -> None:
    if len(masks) != config.num_layers:
        raise ValueError(
            f"masks have {len(masks)} layers, the model has {config.num_layers}: give one each"
        )
    steps = np.shape(masks[0])[:1]
    for i, (mask, part) in enumerate(zip(masks, partition, strict=True)):
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
