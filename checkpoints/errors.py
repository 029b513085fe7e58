"""The one exception of this package. Programming mistakes (a bad row table) stay `ValueError`."""


class CheckpointError(ValueError):
    """A file, folder or hub id cannot be used; the message names it, the limit and the fix."""


def few(items: list[str], noun: str, shown: int = 5) -> str:
    """A count, a noun and the first few items, for messages that collect many mismatches."""
    plural = noun if len(items) == 1 else noun + "s"
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return f"{len(items)} {plural}: {', '.join(items[:shown])}{more}"
