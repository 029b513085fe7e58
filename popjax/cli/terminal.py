"""Where output goes and what an error becomes: results on stdout, all else on stderr.

Leaves out what is said: commands and `tables.py` know that.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import logging
import re
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import typer

from popjax.cli.flags import in_flags

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status as Spinner

P = ParamSpec("P")
T = TypeVar("T")
INTERRUPTED = 130
# The size that could not be had, as XLA on CPU, numpy, and XLA on TPU ("Used 21G of 16G") put it.
_ASKED_BYTES = re.compile(r"allocat\w*\s+(\d+) bytes")
_ASKED_UNITS = re.compile(r"(?:[Aa]llocat\w*|Used)\s+([\d.]+) ?([KMGT](?:i?B)?)")


@dataclasses.dataclass
class Settings:
    """What the options before the command say, for the length of one command."""

    debug: bool = False


SETTINGS = Settings()


def forgiving_streams() -> None:
    """Let a terminal that cannot show a character show "?" instead of ending the run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


class _Said(logging.Handler):
    """Log records as lines on whatever stderr is then."""

    def emit(self, record: logging.LogRecord) -> None:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        say(f"popjax: {level}{record.getMessage()}")


_SAID = _Said()


def log_to_stderr(verbose: bool) -> None:
    """Send what popjax and its kernels log to stderr: warnings, and all else where asked for."""
    for name in ("popjax", "kernels_pallas"):
        logger = logging.getLogger(name)
        logger.addHandler(_SAID)
        logger.setLevel(logging.INFO if verbose else logging.NOTSET)


def stderr_console() -> Console:
    """A console for reports; plain where stderr is not a terminal or NO_COLOR is set."""
    return _console(stderr=True)


def stdout_console() -> Console:
    """A console for tables that are a command's result."""
    return _console(stderr=False)


def _console(stderr: bool) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False)
    # rich takes 80 columns where it cannot ask: a table in a file need not be cut to that.
    if not console.is_terminal:
        console.width = max(console.width, 110)
    return console


def say(message: str) -> None:
    """One line on stderr."""
    print(message, file=sys.stderr, flush=True)


def write(text: str) -> None:
    """Text on stdout at once, exactly as it is."""
    sys.stdout.write(text)
    sys.stdout.flush()


class Status:
    """One line on stderr that says what is being done; nothing where stderr is no terminal."""

    def __init__(self) -> None:
        self._spinner: Spinner | None = None

    def __enter__(self) -> Status:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.clear()

    def say(self, message: str) -> None:
        """Show `message` in place of the last one."""
        if not sys.stderr.isatty():
            return
        if self._spinner is None:
            spinner = stderr_console().status(message)
            spinner.start()
            self._spinner = spinner
        else:
            self._spinner.update(message)

    def clear(self) -> None:
        """Take the line away, so that something else can be written there."""
        if self._spinner is not None:
            self._spinner.stop()
            self._spinner = None


def command(function: Callable[P, T]) -> Callable[P, T]:
    """A command whose failures become one sentence on stderr and an exit code.

    130 for Ctrl-C, 1 for everything else that the body raises. Wrong usage (typer.BadParameter:
    what options, and the files they name, show without a model) and a closed pipe pass through:
    typer ends those with 2, and with 1 and no word. Arguments of Python that an error names are
    written as the command's options.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            result = function(*args, **kwargs)
            sys.stdout.flush()
            return result
        except typer.BadParameter as error:
            error.message = in_flags(error.message, function)
            raise
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            say("\npopjax: interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            if SETTINGS.debug:
                traceback.print_exc()
            say(f"popjax: error: {in_flags(sentence(error), function)}")
            raise typer.Exit(1) from error

    return run


def sentence(error: Exception) -> str:
    """What went wrong, in one sentence a user can act on."""
    message = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in message:
        return _memory_sentence(message)
    if isinstance(error, ValueError | OSError | RuntimeError | ImportError) and message:
        return message
    # Not one of the errors that popjax explains, so a defect of its own.
    return (
        f"unexpected {type(error).__name__}: {message or 'no message'}; `popjax --debug ...` shows "
        "where it happened"
    )


def _memory_sentence(message: str) -> str:
    from popjax.inspection import format_bytes, free_memory

    exact, rounded = _ASKED_BYTES.search(message), _ASKED_UNITS.search(message)
    needed = "more memory than there is"
    if exact:
        needed = format_bytes(int(exact.group(1)))
    elif rounded:
        needed = " ".join(rounded.groups())
    memory = free_memory()
    free = f"{format_bytes(memory.free)} are" if memory.free is not None else "an unknown amount is"
    return (
        f"out of memory: {needed} needed in one piece, {free} free in {memory.where}: use --dtype "
        "bfloat16, fewer --max-new-tokens, a shorter prompt or a smaller --model "
        "(`popjax inspect MODEL` says what fits)"
    )


__all__ = [
    "INTERRUPTED",
    "SETTINGS",
    "Status",
    "command",
    "forgiving_streams",
    "log_to_stderr",
    "say",
    "stderr_console",
    "stdout_console",
    "write",
]
