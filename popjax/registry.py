"""Methods by the names that the command line and files use: found, their options checked, named."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

Kind = TypeVar("Kind")


def resolved(
    kinds: Mapping[str, type[Kind]], what: str, name: str, options: Mapping[str, Any]
) -> tuple[type[Kind], dict[str, Any]]:
    """The dataclass called `name` and the options given to it, those that are None left out.

    what: what `kinds` are, in words, for errors. Raises ValueError for an unknown name or an option
    that the class does not have.
    """
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, n=1)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise ValueError(f"{what} {name!r} is unknown: use one of {', '.join(kinds)}{hint}")
    kind = kinds[name]
    known = options_of(kind)
    given = {key: value for key, value in options.items() if value is not None}
    extra = sorted(set(given) - known)
    if extra:
        takes = sorted(known) or "none"
        raise ValueError(f"{what} {name!r} has no option {extra[0]!r}: it takes {takes}")
    return kind, given


def options_of(kind: Any) -> set[str]:
    """Names of the options of a dataclass."""
    return {field.name for field in dataclasses.fields(kind)}


def name_of(kinds: Mapping[str, type[Any]], found: object) -> str:
    """The name under which the class of `found` is listed; of one that is not, the class's own."""
    names = (name for name, kind in kinds.items() if type(found) is kind)
    return next(names, type(found).__name__)


__all__ = ["name_of", "options_of", "resolved"]
