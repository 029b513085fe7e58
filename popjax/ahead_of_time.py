"""The whole programs of a run compiled for chips that are not here, from a ModelConfig alone.

Every figure is the compiler's own or counted from shapes and shardings; no weight exists and
nothing runs, so nothing here says how fast a chip is. Roofline figures divide bandwidth by bytes.
Leaves out choosing another request where one does not fit: that is `planning.py`.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.masked_mlp import pallas_obstacle
from popjax.abstract_run import Place, decode_arguments, outputs_of, packed
from popjax.buckets import bucket
from popjax.config import LayerConfig, ModelConfig
from popjax.expert_partition import ExpertPartition
from popjax.generate import Options, Programs
from popjax.methods import Method, Scout, check_evaluated, method_name
from popjax.methods.scout import scouts_for
from popjax.nn.expert_rows import listing
from popjax.nn.transformer import Inputs
from popjax.report import read_of_experts
from popjax.sampling import SamplingConfig
from popjax.scouts import with_scouts
from popjax.sparsity import Params, Partitions
from popjax.targets import Target, devices

NEW_TOKENS = 256
_COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast)"
    r"(?:-start)?\("
)
# How the TPU compiler puts that a program is too large, early and late: "required for HLO
# temporaries (20.00G) exceeds available HBM (15.75G)", "Used 21.51G of 15.75G hbm".
_REFUSED = re.compile(r"(?:Used |temporaries \()([\d.]+)([KMGT]?)")


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is to run where. context: tokens of a row, prompt and `new_tokens` together.

    Raises ValueError for a context that the model or the new tokens do not allow, and for a method
    that cannot apply to the model or leaves a layer no channel.
    """

    config: ModelConfig
    method: Method
    target: Target
    context: int
    batch: int = 1
    new_tokens: int = NEW_TOKENS
    dtype: str = "bfloat16"
    implementation: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.new_tokens < self.context:
            raise ValueError(
                f"context {self.context} holds prompt and new tokens, so it must exceed the "
                f"{self.new_tokens} new ones: raise it"
            )
        if self.context > self.config.max_positions:
            raise ValueError(
                f"context {self.context} is above the model's longest, "
                f"{self.config.max_positions}: lower it"
            )
        if self.batch < 1:
            raise ValueError(f"batch {self.batch} is not above 0: give the number of rows")
        check_evaluated(self.method.for_model(self.config), self.config)

    @property
    def prompt_slots(self) -> int:
        """Length of the padded prompt, as a run would round it up."""
        return bucket(self.context - self.new_tokens)

    @property
    def room(self) -> int:
        """New tokens that a run would make room for."""
        return bucket(self.new_tokens)

    @property
    def slots(self) -> int:
        """Slots of the cache, a row."""
        return self.prompt_slots + self.room


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiler says of one program, bytes a chip.

    refused: its own words where it does not compile for want of memory; sizes are 0 then, but for
    `temporaries`, which is what it wanted beyond the arguments.
    """

    compile_seconds: float
    arguments: int = 0
    outputs: int = 0
    aliased: int = 0
    temporaries: int = 0
    code: int = 0
    collectives: dict[str, int] = dataclasses.field(default_factory=dict)
    refused: str | None = None


@dataclasses.dataclass(frozen=True)
class Held:
    """Bytes a chip holds while a program runs. other: inputs, outputs, padding of layouts."""

    weights: int
    packed: int
    cache: int
    other: int
    temporaries: int
    program: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Forecast:
    """One method on a target: its two programs, what a chip holds in each, and the roofline.

    read_weights, read_cache: bytes a chip reads for one decode step of the batch, at full context;
    tokens_per_second: bandwidth over those bytes, all rows together: computed, never measured.
    """

    method: str
    implementation: str
    mesh: dict[str, int]
    prefill: Program
    decode: Program
    prefill_held: Held
    decode_held: Held
    usable: int
    read_weights: int
    read_cache: int
    tokens_per_second: float

    @property
    def compiles(self) -> bool:
        return self.prefill.refused is None and self.decode.refused is None

    @property
    def peak(self) -> int:
        """The most that a chip holds."""
        return max(self.prefill_held.total, self.decode_held.total)

    @property
    def fits(self) -> bool:
        return self.compiles and self.peak <= self.usable


class Rehearsal:
    """The programs of a workload, compiled one by one when asked for.

    Raises ValueError for a model that the target's chips cannot share, ImportError without the
    compiler.
    """

    def __init__(self, workload: Workload) -> None:
        config, rows = workload.config, workload.batch
        self.workload = workload
        self.method = workload.method.for_model(config)
        self.place = Place.of(config, devices(workload.target))
        self.params = self.place.as_loaded(self.place.params(config, jnp.dtype(workload.dtype)))
        if isinstance(self.method, Scout):
            added = scouts_for(self.method, self.params, config)
            self.params = with_scouts(self.params, self.place.abstract(added, "F"))
        tokens: Any = jax.ShapeDtypeStruct((rows, workload.prompt_slots), jnp.int32)
        self._inputs = self.place.abstract(Inputs(tokens, tokens), "B")
        static = {"config": config, "method": self.method, "capacity": workload.slots}
        self._prefill_static = static | {"mesh": self.place.mesh}
        outputs = outputs_of(self.place, self.params, self._inputs, static)
        made = packed(self.place, self.params, config, self.method, outputs)
        self.packed_params, self._narrow, self.parts = made
        sampling = SamplingConfig()
        self._flags = sampling.flags()
        decoding = (self.place, outputs, self._inputs, config, workload.room, sampling)
        self.state, self._values, self._until = decode_arguments(*decoding)

    def prefill(self) -> Program:
        """Prefill of a whole prompt."""
        arguments = (self.params, self._inputs, None)
        return _compiled(Programs().prefill, arguments, self._prefill_static)

    def decode(self) -> Program:
        """The decode loop over packed weights."""
        static = {"config": self._narrow, "method": self.method, "flags": self._flags}
        static["options"] = Options(implementation=implementation_of(self.workload))
        given = (self.packed_params, self.parts, None, self._values, None)
        arguments = (self.state, *given, self._until)
        return _compiled(Programs().decode, arguments, static | {"mesh": self.place.mesh})

    def forecast(self) -> Forecast:
        """Both programs compiled, side by side, and what a chip holds and reads counted."""
        with ThreadPoolExecutor(2) as pool:
            prefill, decode = pool.submit(self.prefill), pool.submit(self.decode)
            return counted(self, prefill.result(), decode.result())


def implementation_of(workload: Workload) -> str:
    """How the decode steps of a run on TPUs would be computed, by what the kernels serve."""
    if workload.implementation is not None:
        return workload.implementation
    width = next((layer.mlp_dim for layer in workload.config.layers if layer.mlp_dim), None)
    if width is None:
        return "pallas_tpu"  # experts only: for attention
    shape = (width, workload.config.embed_dim)
    matrix = jax.ShapeDtypeStruct(shape, jnp.dtype(workload.dtype))
    return "pallas_tpu" if pallas_obstacle("pallas_tpu", matrix, workload.batch) is None else "xla"


def forecast(workload: Workload) -> Forecast:
    """What the compiler says of a workload; raises as `Rehearsal` does."""
    return Rehearsal(workload).forecast()


def weights_and_cache(workload: Workload) -> tuple[int, int]:
    """Bytes of weights and of the cache on each chip, without compiling or tracing a model.

    Raises as `forecast` does.
    """
    config, dtype = workload.config, jnp.dtype(workload.dtype)
    place = Place.of(config, devices(workload.target))
    cache = place.cache(config, workload.batch, workload.slots, dtype)
    return shard_bytes(place.params(config, dtype)), shard_bytes(cache.layers)


def _compiled(program: Any, arguments: tuple, static: dict[str, Any]) -> Program:
    started = time.perf_counter()
    argued = shard_bytes(arguments)
    try:
        compiled = program.compiled(*arguments, **static)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        wanted = max(0, bytes_wanted(str(error)) - argued)
        seconds = time.perf_counter() - started
        return Program(seconds, argued, temporaries=wanted, refused=str(error))
    memory = compiled.memory_analysis()
    return Program(
        compile_seconds=time.perf_counter() - started,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        collectives=collectives(compiled.as_text()),
    )


def collectives(text: str) -> dict[str, int]:
    """How often a compiled program's text calls each collective; one in a loop counts once."""
    return dict(collections.Counter(_COLLECTIVE.findall(text)))


def bytes_wanted(message: str) -> int:
    """Bytes that the compiler says a program needs where it refuses it; 0 where it does not say."""
    found = _REFUSED.search(message)
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " ")) if found else 0


def shard_bytes(tree: Any) -> int:
    """Bytes of the arrays of a pytree that lie on each chip, without the padding of layouts."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def counted(made: Rehearsal, prefill: Program, decode: Program) -> Forecast:
    """The forecast of a rehearsal whose programs are compiled."""
    full, rows, workload = made.params, made.packed_params, made.workload
    weights, cached = shard_bytes(full), shard_bytes(made.state.cache.layers)
    # Packed rows lie beside the full weights, which stay for the next prompt.
    ffns = {f"layer_{i}": layer.ffn for i, layer in enumerate(workload.config.layers)}
    extra = sum(shard_bytes(rows[k][ffn]) for k, ffn in ffns.items() if rows[k] is not full[k])
    read = read_weights(rows, workload, made.parts)
    mesh, chip = made.place.mesh, workload.target.chip
    return Forecast(
        method=method_name(workload.method),
        implementation=implementation_of(workload),
        mesh={} if mesh is None else dict(mesh.shape),
        prefill=prefill,
        decode=decode,
        prefill_held=_held(prefill, weights, 0, cached, weights),
        decode_held=_held(decode, weights, extra, cached, shard_bytes(rows)),
        usable=chip.usable,
        read_weights=read,
        read_cache=cached,
        tokens_per_second=workload.batch * chip.bandwidth / (read + cached),
    )


def _held(program: Program, weights: int, packed: int, cache: int, given: int) -> Held:
    """Bytes by kind; `given`: those of the parameters among the program's arguments."""
    moving = program.arguments + program.outputs - program.aliased - given
    return Held(
        weights=weights,
        packed=packed,
        cache=cache,
        other=max(0, moving - cache),
        temporaries=program.temporaries,
        program=program.code,
    )


def read_weights(params: Params, workload: Workload, parts: Partitions | None = None) -> int:
    """Bytes of weights on a chip that a decode step reads: `report.bytes_per_token`, a shard's.

    Of experts the most that the rows of the batch can go to on one chip; of these whole matrices,
    or the rows that a partition of `parts` leaves to be fetched by index.
    """
    total, config = shard_bytes(params), workload.config
    for i, layer in enumerate(config.layers):
        if layer.moe is not None:
            part = None if parts is None else parts[i]
            total -= _unread(params[f"layer_{i}"]["moe"], layer, part, workload)
    if config.position_offset is not None:
        positions = params["positions"]["table"]
        total -= shard_bytes(positions) - config.embed_dim * positions.dtype.itemsize
    if not config.tie_embeddings:
        table = params["embed"]["table"]
        total -= shard_bytes(table) - config.embed_dim * table.dtype.itemsize
    return total


def _unread(moe: Params, layer: LayerConfig, part: Any, workload: Workload) -> int:
    """Bytes of a layer's experts on a chip that a decode step leaves alone."""
    assert layer.moe is not None, "only layers with experts have any"
    experts = [moe[name] for name in ("gate", "up", "down")]
    held = experts[0].sharding.shard_shape(experts[0].shape)[0]
    every, tiled = shard_bytes(experts), experts[0].ndim > 3
    how = listing(implementation_of(workload), tiled, workload.batch, layer.moe, part)
    if how is None:
        return every - every // held * min(held, workload.batch * layer.moe.top_k)
    assert isinstance(part, ExpertPartition), "only partitions name rows"
    row = workload.config.embed_dim * experts[0].dtype.itemsize
    channel = row * len(experts)
    return every - workload.batch * read_of_experts(part, channel, row, how)
