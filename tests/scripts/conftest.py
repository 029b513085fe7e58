"""The tiny checkpoint of tests/popjax, for scripts that load a model by its folder."""

from tests.popjax.conftest import tiny_checkpoint

__all__ = ["tiny_checkpoint"]
