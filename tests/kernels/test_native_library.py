"""Finding, building and loading the CPU kernels, and what holds however they run.

A fake compiler stands in for the real one wherever what is tested is what happens around it.
"""

import concurrent.futures
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import choice, native
from kernels_pallas.masked_mlp import Selection, masked_mlp
from kernels_pallas.native import build, library

# Every kernel once, on more work than one thread takes: arrays by name, into the file argv[1].
COMPUTE = """
import itertools, os, sys
if os.environ.get("ONE_CORE"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import jax, jax.numpy as jnp, numpy as np
from kernels_pallas import native
from kernels_pallas.decode_attention import decode_attention
from kernels_pallas.masked_mlp import POINTS, Selection, masked_mlp
from kernels_pallas.ragged_decode import ragged_decode
from kernels_pallas.row_products import (
    contract_rows, dequantized, expand_many, expand_rows, quantized
)

rng = np.random.default_rng(0)
def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape) / shape[-1] ** 0.5, jnp.float32)

out = {}
F, D, B = 1501, 224, 5
x, h, w = normal(B, D), normal(B, F), normal(F, D)
rows = jnp.asarray(np.stack([rng.permutation(F) for _ in range(B)]), jnp.int32)
counts = jnp.asarray([0, 1, 700, F, 33])
kinds = {"f32": w, "bf16": w.astype("bfloat16")}
kinds |= {f"int{bits}": quantized(w, bits) for bits in (8, 6, 4)}
for name, matrix in kinds.items():
    out["expand " + name] = expand_rows(x, matrix, rows, counts, "native")
    out["contract " + name] = contract_rows(h, matrix, rows, counts, "native")
out["many 0"], out["many 1"] = expand_many(x, [w, w[:77]], "native")
weights = normal(B, 1, D - 1), normal(F, D - 1), normal(F, D - 1), normal(F, D - 1)
given = jnp.asarray(rng.random((B, 1, F)) < 0.4)
out["given"], _ = masked_mlp(*weights, activation="gelu", given=given, implementation="native")
# A scout's products in integers: with scales of one, float32 holds every sum.
def integers(most, group, *shape):
    values = rng.integers(-most, most + 1, shape)
    values[..., ::group] = most
    return jnp.asarray(values, jnp.float32)
widths = (32, 32), (96, 32), (192, 64), (288, 32), (384, 128)
for bits, (D, group) in itertools.product((4, 6), widths):
    most = 2 ** (bits - 1) - 1
    vectors, zeros = integers(127, 32, B, 1, D), jnp.zeros((D + 3, D))
    copies = [quantized(integers(most, group, D + 3, D), bits, group) for _ in range(2)]
    choice = Selection(num_candidate=D + 3, k_selected=D + 3, exact=0)
    out[f"foretold {bits} {D}"], _ = masked_mlp(
        vectors, zeros, zeros, jnp.eye(D + 3, D), activation="relu", selection=choice,
        scout=copies, implementation="native",
    )
    g, u = (np.asarray(vectors[:, 0]) @ np.asarray(dequantized(w))[:D].T for w in copies)
    out[f"plain {bits} {D}"] = (np.maximum(g, 0) * u)[:, None]
for point in POINTS:
    selection = Selection(num_candidate=F, k_selected=F // 3, point=point)
    y, mask = masked_mlp(
        *weights, activation="silu", selection=selection, implementation="native"
    )
    out["chosen y " + point], out["chosen mask " + point] = y, mask
positions = jnp.full((2,), 899), jnp.tile(jnp.arange(900), (2, 1))
q, k, v = normal(2, 6, 33), normal(2, 2, 900, 33), normal(2, 2, 900, 33)
out["attention"] = decode_attention(q, k, v, *positions)
starts, lengths = jnp.asarray([[700, 0], [900, 100]]), jnp.asarray([[1100, 700], [0, 900]])
ranges = normal(1800, 66), jnp.arange(1800) % 900, starts, lengths
cache = q[:, None], *ranges, k, v, positions[0][:, None], positions[1]
out["ragged"] = ragged_decode(*cache, softcap=2.0, implementation="native")
np.savez(sys.argv[1], **{name: np.asarray(array) for name, array in out.items()})
print(native.status().instruction_set)
"""

SETS = ("the compiler's baseline", "AVX2", "AVX-512", "AVX-512 with VNNI")

# As if nothing had been built before, wherever that would lie.
UNBUILT = """
from kernels_pallas.native import library
library.library_name = lambda jaxlib_version: "unbuilt.so"
"""


def run(script: str, *arguments: str, **environment: str) -> str:
    """What a Python program prints, in a process of its own with one CPU device."""
    inherited = {name: value for name, value in os.environ.items() if name != "POPJAX_NATIVE"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *arguments],
        env={**inherited, "JAX_NUM_CPU_DEVICES": "1", **environment},
        cwd=Path(build.ROOT).parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def program(folder: Path, text: str) -> str:
    path = folder / "fake-c++"
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def copying_compiler(folder: Path) -> str:
    """A compiler that writes the library that this process runs, whatever it is to compile."""
    shell, copy = shutil.which("sh"), shutil.which("cp")
    return program(folder, f'#!{shell}\nfor last; do :; done\n{copy} "{built()}" "$last"\n')


def built() -> Path:
    path = native.status().path
    assert path is not None, native.status().reason
    return path


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    return compute(tmp_path_factory.mktemp("computed"))[0]


def compute(folder: Path, **environment: str) -> tuple[dict[str, np.ndarray], str]:
    path = folder / "arrays.npz"
    said = run(COMPUTE, str(path), POPJAX_NATIVE=str(built()), **environment)
    with np.load(path) as arrays:
        return dict(arrays), said.strip()


@pytest.mark.parametrize(
    "threads",
    [{"ONE_CORE": "1"}, pytest.param({"NPROC": "1"}, marks=pytest.mark.slow), {"NPROC": "7"}],
    ids=str,
)
def test_the_number_of_threads_changes_nothing(
    threads: dict[str, str], computed: dict[str, np.ndarray], tmp_path: Path
) -> None:
    arrays, _ = compute(tmp_path, **threads)
    assert arrays.keys() == computed.keys()
    assert [name for name in arrays if arrays[name].tobytes() != computed[name].tobytes()] == []


@pytest.mark.parametrize(("isa", "at_most"), [("plain", 0), ("avx2", 1), ("avx512", 2)])
def test_every_instruction_set(
    isa: str, at_most: int, computed: dict[str, np.ndarray], tmp_path: Path
) -> None:
    arrays, name = compute(tmp_path, POPJAX_ISA=isa)
    assert name == SETS[min(at_most, SETS.index(native.status().instruction_set))]
    exact = [key for key in arrays if key.startswith("foretold")]
    assert len(exact) == 10
    for key in exact:
        wanted = arrays[key.replace("foretold", "plain")]
        assert (arrays[key] == wanted).all() and (computed[key] == wanted).all()
    for key in arrays:
        if not key.startswith(("chosen", "foretold")):  # a rounding may reorder two scores
            # Sums of 1501 products at most, whose terms are of order one together.
            assert np.abs(arrays[key] - computed[key]).max() <= 1501 * 2.0**-23


def test_calls_at_the_same_time_do_not_wait_for_each_other() -> None:
    rng = np.random.default_rng(0)
    weights = [jnp.asarray(rng.standard_normal((700, 120)), jnp.float32) for _ in range(3)]
    xs = jnp.asarray(rng.standard_normal((12, 1, 1, 120)), jnp.float32)
    options: Any = {"activation": "silu", "implementation": "native"}
    selection = Selection(num_candidate=700, k_selected=100)

    @jax.jit
    def one(x: jax.Array) -> jax.Array:
        return masked_mlp(x, *weights, selection=selection, **options)[0]

    @jax.jit
    def all_at_once(xs: jax.Array) -> list[jax.Array]:
        return [one(x) for x in xs]

    wanted = [np.asarray(one(x)).tobytes() for x in xs]
    for _ in range(20):
        assert [np.asarray(y).tobytes() for y in all_at_once(xs)] == wanted
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            ys = pool.map(lambda x: np.asarray(one(x)).tobytes(), xs)
            assert list(ys) == wanted


def test_calls_keep_no_memory() -> None:
    rng = np.random.default_rng(0)
    weights = [jnp.asarray(rng.standard_normal((300, 128)), jnp.float32) for _ in range(3)]
    selection = Selection(num_candidate=200, k_selected=100)

    @jax.jit
    def step(x: jax.Array) -> jax.Array:
        options: Any = {"selection": selection, "implementation": "native"}
        return masked_mlp(x, *weights, activation="silu", **options)[0]

    def resident(calls: int) -> int:
        for _ in range(calls):
            step(x).block_until_ready()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    x = jnp.ones((4, 1, 128))
    # One call makes 200 kB: kept, 2,000 of them would be 400 MB.
    before = resident(200)
    assert resident(2000) - before < 8 * 2**20


def test_the_name_changes_with_what_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "kernels_pallas"
    shutil.copytree(build.ROOT, root, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    here = build.library_name("1.0")
    monkeypatch.setattr(build, "ROOT", root)
    assert build.library_name("1.0") == here  # the same wherever it lies
    names = {here, build.library_name("1.1")}
    files = [*build.sources(), *sorted((root / "native").glob("*.h"))]
    assert {file.name for file in files} >= {"rows.cc", "cpu.cc", "isa.h", "team.h"}
    for file in files:
        file.write_text(file.read_text() + "\n// changed\n")
        names.add(build.library_name("1.0"))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    names.add(build.library_name("1.0"))
    assert len(names) == len(files) + 3
    assert all(name.startswith("popjax_cpu-") and name.endswith(".so") for name in names)


def test_the_kernels_run_here() -> None:
    status = native.status()
    assert status.available, status.reason
    asked = os.environ.get("POPJAX_NATIVE", "1")
    if asked == "1":
        assert built().name == build.library_name(version("jaxlib"))
    weights = {"w": jnp.ones((2, 2))}
    assert choice.implementation_for(None, weights) == "auto"
    assert choice.implementation_for("native", weights) == "native"
    assert choice.implementation_for("xla", weights) == "xla"
    with pytest.raises(ValueError, match="'fast' is unknown: use one of .*native"):
        choice.implementation_for("fast", weights)
    half = {"w": jnp.ones((2, 2), jnp.float16)}
    assert choice.implementation_for(None, half) == "xla"
    with pytest.raises(ValueError, match="are float16, which they do not read: use 'xla'"):
        choice.implementation_for("native", half)
    elsewhere = {**weights, "v": jax.device_put(jnp.ones(2), jax.devices()[1])}
    assert choice.implementation_for(None, elsewhere) == "xla"
    with pytest.raises(ValueError, match=r"lie on 2 device\(s\): use 'xla'"):
        choice.implementation_for("native", elsewhere)


SAYS = '#!/bin/sh\necho "warm words" >&2\necho "x.cc:1: fatal error: no such header" >&2\nexit 3\n'
GARBAGE = '#!/bin/sh\nfor last; do :; done\necho rubbish > "$last"\n'


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        (None, r"no C\+\+17 compiler on PATH \(c\+\+, g\+\+, clang\+\+\): install one, or set CXX"),
        ("no-such-tool -v", "CXX names 'no-such-tool', which is not on PATH: unset it or fix it"),
        (SAYS, "fake-c.. ended with 3 and said: x.cc:1: fatal error: no such header"),
        ("#!/bin/sh\nexit 1\n", "ended with 1 and said: nothing"),
        ("#!/bin/sh\nexit 0\n", "ended with 0 and said: nothing"),
        ("#!/no/such/shell\n", "fake-c.. did not run: .*No such file"),
        (GARBAGE, "unbuilt.so cannot be loaded: .*unbuilt.so"),
    ],
    ids=["none", "missing", "fails", "silent", "empty", "not a program", "rubbish"],
)
def test_why_nothing_could_be_built(
    compiler: str | None,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr(library, "library_name", lambda version: "unbuilt.so")
    monkeypatch.setenv("POPJAX_CACHE", str(cache))
    for name in ("CXX", "POPJAX_NATIVE"):
        monkeypatch.delenv(name, raising=False)
    if compiler is None:
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        is_text = compiler.startswith("#!")
        monkeypatch.setenv("CXX", program(tmp_path, compiler) if is_text else compiler)
    with caplog.at_level(logging.INFO):
        status = library.status.__wrapped__()
    assert not status.available and status.path is None
    assert re.search(reason, status.reason)
    assert caplog.messages[-1] == f"CPU products: XLA only ({status.reason})"
    # Nothing half-written stays behind.
    assert {file.name for file in cache.iterdir()} <= {"unbuilt.so"}


@pytest.mark.parametrize("off", ["0", "off", "No", "FALSE"])
def test_they_can_be_left_out(off: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POPJAX_NATIVE", off)
    assert library.status.__wrapped__() == library.Status(False, f"POPJAX_NATIVE={off}")


def test_a_file_that_is_no_such_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"\x7fELF rubbish")
    other = importlib.util.find_spec("numpy._core._multiarray_umath")
    assert other is not None and other.origin is not None
    for path, reason in (
        (str(broken), "broken.so cannot be loaded: "),
        (str(tmp_path / "absent.so"), "absent.so cannot be loaded: .*No such file"),
        (other.origin, "cannot be loaded: .*undefined symbol: popjax_expand"),
    ):
        monkeypatch.setenv("POPJAX_NATIVE", path)
        status = library.status.__wrapped__()
        assert not status.available and status.path is None
        assert re.search(reason, status.reason)


def test_without_a_compiler_xla_answers(tmp_path: Path) -> None:
    script = (
        UNBUILT
        + """
import jax.numpy as jnp
from kernels_pallas import choice, native
from kernels_pallas.masked_mlp import masked_mlp
assert not native.available()
arrays = jnp.ones((1, 1, 8)), *[jnp.ones((4, 8))] * 3
assert choice.implementation_for(None, arrays) == "xla"
assert masked_mlp(*arrays, activation="relu", implementation="xla")[0].tolist() == [[[256.0] * 8]]
for asked in ("native", "auto"):
    try:
        choice.implementation_for(asked, arrays)
    except ValueError as error:
        print(error)
try:
    masked_mlp(*arrays, activation="relu", implementation="native")
except RuntimeError as error:
    print(error)
"""
    )
    cache = str(tmp_path / "cache")
    told = run(script, PATH=str(tmp_path), CXX="", POPJAX_CACHE=cache).splitlines()
    reason = "no C++17 compiler on PATH (c++, g++, clang++): install one, or set CXX"
    assert told == [
        f"implementation {asked!r} needs the CPU kernels and one CPU, but {reason}: use 'xla'"
        for asked in ("native", "auto")
    ] + [f"the CPU kernels do not run here: {reason}"]


USE = (
    UNBUILT
    + """
import jax.numpy as jnp
from kernels_pallas import native
from kernels_pallas.row_products import expand
assert expand(jnp.ones((1, 3)), jnp.ones((2, 3)), "native").tolist() == [[3.0, 3.0]]
print(native.status().reason, native.status().path, sep="\\n")
"""
)


def test_built_once_and_kept(tmp_path: Path) -> None:
    cache, compiler = tmp_path / "a" / "cache", copying_compiler(tmp_path)
    told = run(USE, CXX=compiler, POPJAX_CACHE=str(cache)).splitlines()
    assert told == ["built just now", str(cache / "unbuilt.so")]
    assert [file.name for file in cache.iterdir()] == ["unbuilt.so"]
    told = run(USE, CXX="no-such-tool", POPJAX_CACHE=str(cache)).splitlines()
    assert told == ["built on first use", str(cache / "unbuilt.so")]


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    # Below a regular file, where not even root can make a folder.
    (tmp_path / "file").touch()
    cache, compiler = tmp_path / "file" / "cache", copying_compiler(tmp_path)
    told = run(USE, CXX=compiler, POPJAX_CACHE=str(cache)).splitlines()
    assert told[0] == f"built for this process: {cache}: Not a directory"
    assert told[1].endswith("unbuilt.so")
    assert not Path(told[1]).parent.exists()  # gone with the process
