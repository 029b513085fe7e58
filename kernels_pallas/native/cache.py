"""Where popjax keeps what can be made or fetched again."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where popjax keeps downloads: $POPJAX_CACHE, $XDG_CACHE_HOME/popjax or ~/.cache/popjax."""
    if own := os.environ.get("POPJAX_CACHE"):
        return Path(own).expanduser()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification: a relative path is to be ignored.
    return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "popjax"
