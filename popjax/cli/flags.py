"""An error in the words of the command line: arguments of Python become the options they are here.

The library has one message for every caller. Only what the running command has as an option is
renamed, so that nothing is advised that it does not take.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Callable
from typing import Any

from typer.models import OptionInfo

# Arguments of the library whose option has another name.
_ALIASES = {"local_files_only": "offline"}
# What a command without the option says of an argument instead.
_ELSEWHERE = {"check_tensors=True": "popjax generate --check-tensors", " or pass token=": ""}
# A dataclass as Python shows it is left as it is, and so is what stands in quotes or in a path.
_SHOWN = r"[A-Z]\w*\((?:[^()]|\([^()]*\))*\)"
_NAME = r"(?<![\w/.'\"-])(?P<name>[a-z]\w*)"
_VALUE = r"(?P<value>'[^'\s]*'|True|False|\d[\d.]*\d|\d)?"
_ASSIGNED = re.compile(rf"{_SHOWN}|(?P<verb>pass )?{_NAME}=(?!=){_VALUE}")
# Without "=", a name is told from a word by its underscore; of JSON files it is a key, no option.
_BARE = re.compile(rf"{_SHOWN}|{_NAME}(?!['\w=/.])(?! [^ ]+ (?:in|of) \w+\.json)")


def in_flags(message: str, function: Callable[..., Any]) -> str:
    """The message with arguments of Python written as the options of the command `function`."""
    options = _options(function)

    def assigned(found: re.Match[str]) -> str:
        option = options.get(found["name"] or "")
        if option is None:
            return found[0]
        flag, switch = option
        value = found["value"]
        if switch:
            verb = found["verb"] or ""
            return f"leave out {flag}" if value == "False" else f"{verb}{flag}"
        if value in ("True", "False"):
            return found[0]
        return f"{found['verb'] or ''}{flag}" + (f" {value.strip(chr(39))}" if value else "")

    def bare(found: re.Match[str]) -> str:
        name = found["name"] or ""
        return options[name][0] if "_" in name and name in options else found[0]

    message = _BARE.sub(bare, _ASSIGNED.sub(assigned, message))
    for argument, words in _ELSEWHERE.items():
        message = message.replace(argument, words)
    return message


def _options(function: Callable[..., Any]) -> dict[str, tuple[str, bool]]:
    """By the argument's name: the option as it is written, and whether it takes no value."""
    found = {}
    for name, hint in typing.get_type_hints(function, include_extras=True).items():
        for info in getattr(hint, "__metadata__", ()):
            if isinstance(info, OptionInfo):
                written = [flag for flag in info.param_decls or () if flag.startswith("--")]
                flag = written[0].split("/")[0] if written else f"--{name.replace('_', '-')}"
                kinds = typing.get_args(typing.get_args(hint)[0]) or typing.get_args(hint)[:1]
                found[name] = flag, bool in kinds
    for argument, name in _ALIASES.items():
        if name in found:
            found[argument] = found[name]
    return found


__all__ = ["in_flags"]
