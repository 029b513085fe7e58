"""What a checkpoint looks like to the converter: names, shapes, one tensor at a time.

Leaves out where the bytes lie: `safetensors_files.py` and `gguf_files.py` know that.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

# Plain float types of both formats, then the quantised GGUF types that dequantise to float32.
PLAIN_FLOATS = ("F64", "F32", "F16", "BF16")
QUANTISED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


@dataclass(frozen=True)
class TensorInfo:
    """Shape and stored type (the file format's own name, such as "BF16") of one tensor."""

    shape: tuple[int, ...]
    dtype: str


class TensorSource(Protocol):
    """A checkpoint open for reading; opening it has already checked its layout."""

    @property
    def location(self) -> str:
        """The file or folder, for messages."""
        ...

    def names(self) -> tuple[str, ...]:
        """Every tensor name, in file order, so that reading in this order is sequential."""
        ...

    def info(self, name: str) -> TensorInfo:
        """Shape and type of a tensor without reading it."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One tensor as a fresh array; quantised types arrive as float32."""
        ...
