"""Compiling for accelerators that are not there: libtpu's compiler, on a machine without a TPU."""

import os

import pytest
from jax.sharding import SingleDeviceSharding

from tests.aot.chips import CHIPS, first_chip

# Before jax starts: else libtpu asks the cloud's metadata server what machine this is.
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
# No device is opened, so nothing is shared with another process that compiles.
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

FIRST, *OTHERS = CHIPS


# What compiles for one chip rarely fails for another: the others once, not on every Python.
@pytest.fixture(
    params=[FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)],
    scope="module",
)
def chip(request: pytest.FixtureRequest) -> SingleDeviceSharding:
    return first_chip(request.param)
