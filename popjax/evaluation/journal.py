"""A file of results that grows line by line, so that an interrupted run goes on where it was.

The first line holds the settings that decide the numbers; each other one is a key and a value,
written whole and handed to the disk before the next is computed. A last line that was cut off is
dropped; one damaged anywhere else is an error. Without a path everything is kept in memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NoReturn

_SETTINGS = "popjax-evaluation"


class Journal:
    """Values by key, those of an earlier run of the same settings included.

    Raises ValueError where `path` holds another run's results, or no results.
    """

    def __init__(self, settings: Mapping[str, Any], path: Path | None = None) -> None:
        self._settings: dict[str, Any] = json.loads(json.dumps(dict(settings)))
        self._values: dict[str, Any] = {}
        self._path, self._file = path, None
        if path is not None:
            self._file = self._opened(path)
        self.resumed = len(self._values)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def holds(self, key: str, fits: Callable[[Any], bool]) -> bool:
        """Whether there is a value by this key. Raises ValueError for one that does not fit."""
        if key not in self._values:
            return False
        if not fits(self._values[key]):
            raise ValueError(
                f"{self._path} is damaged: the value of {key!r} is {_brief(self._values[key])}, no "
                "result of its kind: remove that line, or give --out another name"
            )
        return True

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def put(self, key: str, value: Any) -> None:
        """Keep a value, on disk before this returns."""
        self._values[key] = value
        if self._file is not None:
            _append(self._file, {"key": key, "value": value})

    def _opened(self, path: Path) -> IO[bytes]:
        """The file, positioned after its last whole line, its values read."""
        try:
            if path.exists() and not path.is_file():
                kind = "folder" if path.is_dir() else "device"
                raise ValueError(f"{path} is a {kind}: give --out the name of a file")
            file = path.open("r+b") if path.exists() else path.open("x+b")
        except OSError as error:
            raise ValueError(
                f"{str(path)[:80]} cannot be opened ({error.strerror}): give --out another name, "
                "in a folder that exists"
            ) from error
        try:
            lines = file.read().split(b"\n")
            whole = sum(len(line) + 1 for line in lines[:-1])
            if lines[:-1]:
                self._read(path, lines[:-1])
            elif lines[0] and not lines[0].startswith(b'{"' + _SETTINGS.encode()):
                raise ValueError(_foreign(path))
            file.truncate(whole)
            file.seek(whole)
            if not lines[:-1]:
                _append(file, {_SETTINGS: self._settings})
        except BaseException:
            file.close()
            raise
        return file

    def _read(self, path: Path, lines: list[bytes]) -> None:
        for number, line in enumerate(lines, 1):
            settings = None
            try:
                held = json.loads(line, parse_constant=_no_number)
                if number == 1:
                    settings = dict(**held[_SETTINGS])
                else:
                    self._values[held["key"]] = held["value"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(
                    _foreign(path)
                    if number == 1
                    else f"{path} is damaged at line {number}: remove that line, or give --out "
                    "another name"
                ) from error
            if settings is not None and (others := list(_differences(settings, self._settings))):
                raise ValueError(
                    f"{path} holds results of other settings ({'; '.join(others)}): use the same "
                    "settings, or give --out another name"
                )


def _differences(held: Mapping[str, Any], mine: Mapping[str, Any], at: str = "") -> Iterator[str]:
    """Each setting that differs, those of a case or method one by one: what it was, what it is."""
    for name in dict.fromkeys((*held, *mine)):
        theirs, now = held.get(name), mine.get(name)
        if isinstance(theirs, dict) and isinstance(now, dict):
            yield from _differences(theirs, now, f"{at}{name}: ")
        elif theirs != now:
            yield f"{at}{name} {_brief(theirs)}, now {_brief(now)}"


def _brief(value: Any) -> str:
    """A setting in a few words."""
    if value is None or isinstance(value, dict):
        return "none" if value is None else "given"
    said = str(value)
    return said if len(said) <= 40 else f"{said[:37]}..."


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no result")


def _foreign(path: Path) -> str:
    return f"{path} exists and holds no results of an evaluation: give --out another name"


def _append(file: IO[bytes], record: Mapping[str, Any]) -> None:
    file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def is_number(value: Any) -> bool:
    """Whether a value is a number, as log-likelihoods are."""
    return isinstance(value, int | float) and not isinstance(value, bool)


__all__ = ["Journal", "is_number"]
