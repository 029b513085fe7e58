"""Compiling for accelerators that are not there: libtpu's compiler, on a machine without a TPU."""

import os

# Before jax starts: else libtpu asks the cloud's metadata server what machine this is.
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
# No device is opened, so nothing is shared with another process that compiles.
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
