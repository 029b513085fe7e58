"""Find, build and load the CPU kernels, and say which runs and why.

Looked for beside this file (made by `pip install`), then in the cache folder; made there when it is
in neither and there is a compiler, or for this process alone where the cache cannot be written.
POPJAX_NATIVE=0 leaves the kernels out, POPJAX_NATIVE=/path/to/library loads that one.
"""

from __future__ import annotations

import atexit
import ctypes
import dataclasses
import functools
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from kernels_pallas.native.build import BuildError, build, library_name
from kernels_pallas.native.cache import cache_folder

_LOG = logging.getLogger(__name__)
_OFF = ("0", "off", "no", "false")
TARGETS = (
    "popjax_expand",
    "popjax_contract",
    "popjax_expand_many",
    "popjax_masked_mlp",
    "popjax_top",
    "popjax_decode_attention",
    "popjax_ragged_decode",
    "popjax_read",
)


@dataclasses.dataclass(frozen=True)
class Status:
    """Whether the kernels run, why in one sentence, the file, and the instruction set in use."""

    available: bool
    reason: str
    path: Path | None = None
    instruction_set: str = ""


@functools.cache
def status() -> Status:
    """Load and register the kernels on first use; log one line of what runs and why."""
    found = _found()
    if found.path is not None:
        try:
            library = ctypes.CDLL(str(found.path))
            for name in TARGETS:
                target = jax.ffi.pycapsule(getattr(library, name))
                jax.ffi.register_ffi_target(name, target, platform="cpu")
            library.popjax_instruction_set.restype = ctypes.c_char_p
            found = dataclasses.replace(
                found, instruction_set=library.popjax_instruction_set().decode()
            )
        except (OSError, AttributeError) as error:
            found = Status(False, f"{found.path} cannot be loaded: {error}")
    runs = f"C++ kernels with {found.instruction_set}" if found.available else "XLA only"
    # Going without is worth a line on stderr, unless it was asked for.
    level = logging.INFO if found.available or _asked_off() else logging.WARNING
    _LOG.log(level, "CPU products: %s (%s)", runs, found.reason)
    return found


def available() -> bool:
    """Whether the kernels run in this process."""
    return status().available


def call(
    name: str, results: Sequence[Any], *arguments: jax.Array, **attributes: Any
) -> Sequence[jax.Array]:
    """Results of one kernel of TARGETS; RuntimeError with the reason when there are none."""
    if not available():
        raise RuntimeError(f"the CPU kernels do not run here: {status().reason}")
    return jax.ffi.ffi_call(name, tuple(results))(*arguments, **attributes)


def _asked_off() -> bool:
    return os.environ.get("POPJAX_NATIVE", "").lower() in _OFF


def _found() -> Status:
    asked = os.environ.get("POPJAX_NATIVE", "")
    if _asked_off():
        return Status(False, f"POPJAX_NATIVE={asked}")
    if asked and asked != "1":
        return Status(True, f"POPJAX_NATIVE={asked}", Path(asked))
    name = library_name(version("jaxlib"))
    installed, cached = Path(__file__).with_name(name), cache_folder() / name
    for path, reason in ((installed, "built when installed"), (cached, "built on first use")):
        if path.is_file():
            return Status(True, reason, path)
    return _built(cached)


def _built(cached: Path) -> Status:
    _LOG.info("building the CPU kernels, once: about 20 seconds")
    try:
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            build(cached, jax.ffi.include_dir())
            return Status(True, "built just now", cached)
        except OSError as error:
            folder = tempfile.mkdtemp(prefix="popjax-")
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            own = Path(folder) / cached.name
            build(own, jax.ffi.include_dir())
            return Status(True, f"built for this process: {cached.parent}: {error.strerror}", own)
    except BuildError as error:
        return Status(False, str(error))
