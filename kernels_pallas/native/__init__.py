"""The CPU kernels: C++ beside each operation (`cpu.cc`), built once, called through `jax.ffi`.

XLA's CPU backend cannot profit from rows that need not be read, and leaves bandwidth unused in
small products; these kernels run on XLA's own threads. Without them everything runs through XLA.
"""

from kernels_pallas.native.library import available, call, status

__all__ = ["available", "call", "status"]
