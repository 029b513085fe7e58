"""Compile the CPU kernels into one shared library, with whatever C++17 compiler there is.

Only the standard library is imported, so that the installer can run this file by itself. Leaves out
where a built library is looked for: `library.py`.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# No -march: the file must run on other machines; isa.h picks an instruction set when it is loaded.
# Contraction lets a product and a sum become one operation, which reassociates nothing.
FLAGS = (
    "-std=c++17",
    "-O2",
    "-fno-tree-vectorize",
    "-fPIC",
    "-shared",
    "-ffp-contract=fast",
    "-Wall",
    "-Wno-psabi",
)
COMPILERS = ("c++", "g++", "clang++")
_SECONDS = 600


class BuildError(RuntimeError):
    """The library could not be built; the message says which tool is missing or what it said."""


def sources() -> list[Path]:
    """The translation units: `cpu.cc` of every operation, and the inner loops they share."""
    return [*sorted((ROOT / "native").glob("*.cc")), *sorted(ROOT.glob("*/cpu.cc"))]


def library_name(jaxlib_version: str) -> str:
    """File name that changes with the sources, the flags, the headers and the machine."""
    digest = hashlib.sha256(" ".join((*FLAGS, jaxlib_version)).encode())
    for path in [*sources(), *sorted((ROOT / "native").glob("*.h"))]:
        digest.update(path.read_bytes())
    system = f"{sys.platform}-{platform.machine()}".lower()
    return f"popjax_cpu-{system}-{digest.hexdigest()[:16]}.so"


def compiler() -> list[str]:
    """The command of the C++ compiler: $CXX, or the first of COMPILERS on PATH.

    Raises BuildError when there is none.
    """
    if asked := os.environ.get("CXX"):
        command = shlex.split(asked)
        if shutil.which(command[0]) is None:
            raise BuildError(f"CXX names {command[0]!r}, which is not on PATH: unset it or fix it")
        return command
    for name in COMPILERS:
        if found := shutil.which(name):
            return [found]
    raise BuildError(f"no C++17 compiler on PATH ({', '.join(COMPILERS)}): install one, or set CXX")


def build(target: Path, include: str, flags: tuple[str, ...] = ()) -> None:
    """Compile the library to `target`, which appears whole or not at all.

    `include` is the folder of XLA's FFI headers. Raises BuildError when the compiler is missing or
    fails, OSError when the folder cannot be written.
    """
    command = compiler()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as folder:
        made = Path(folder) / target.name
        command += [*FLAGS, *flags, f"-I{ROOT}", "-isystem", include]
        command += [*map(str, sources()), "-o", str(made)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BuildError(f"{command[0]} did not run: {error}") from None
        if done.returncode or not made.is_file():
            lines = [line for line in done.stderr.splitlines() if "error:" in line.lower()]
            said = (lines or done.stderr.splitlines() or ["nothing"])[0]
            raise BuildError(f"{command[0]} ended with {done.returncode} and said: {said}")
        os.replace(made, target)
