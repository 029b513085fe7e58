"""The checkpoint folder of a tiny llama, as `tests/popjax` makes it."""

from tests.popjax.conftest import tiny_checkpoint

__all__ = ["tiny_checkpoint"]
