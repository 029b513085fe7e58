"""How every test runs: on eight CPU devices, with jax at its strictest.

The settings are environment variables rather than `jax.config` calls so that the subprocesses some
tests start (the command line, an import in a clean interpreter) inherit them. jax reads them when
it is imported, and pytest loads this file before any test module. Fixtures used by one folder only
live in that folder's own conftest.
"""

import gc
import importlib.metadata
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

if "jax" in sys.modules:
    raise pytest.UsageError("jax was imported before tests/conftest.py could configure it")

os.environ.update(
    JAX_PLATFORMS="cpu",
    # Enough for every mesh the tests build. Each device is a thread pool, not a core.
    JAX_NUM_CPU_DEVICES="8",
    JAX_NUMPY_RANK_PROMOTION="raise",
    JAX_NUMPY_DTYPE_PROMOTION="strict",
    # A program found on disk would hide a retrace from the tests that count compilations.
    JAX_ENABLE_COMPILATION_CACHE="false",
    # Progress bars and colours would end up in captured output.
    NO_COLOR="1",
    TERM="dumb",
)

# Tiny programs take longer to compile than to run: two thirds of the suite's time with XLA's own
# settings. Not in one part, though that takes a seventh less: two programs then round the same sums
# differently. Those of the caller's environment win: `XLA_FLAGS= pytest` compiles as users do.
_QUICK_TO_COMPILE = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jax").startswith("0.10."):  # later ones have no such flag
    _QUICK_TO_COMPILE += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", _QUICK_TO_COMPILE)

# deadline: the first example of a property compiles, so its time says nothing.
# derandomize, database: a run depends on the checkout alone.
settings.register_profile("popjax", deadline=None, derandomize=True, database=None)
settings.load_profile("popjax")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks `weights` whatever asks for the default model, so that none can forget to."""
    for item in items:
        if "default_model" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.weights)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, and only where it runs workers
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Gives each file to one worker, so that what its tests share is compiled once.

    Tests that compile for accelerators share nothing and take minutes: they go one by one.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if nodeid.startswith("tests/aot/") else nodeid.split("::")[0]

    return Scheduling(config, log)


@pytest.fixture(autouse=True, scope="module")
def few_mappings() -> Iterator[None]:
    """Drops compiled programs between files once they hold half of what a process may map.

    Each takes a few mappings of memory, and LLVM crashes where no more are to be had. What tests
    remember of runs goes too, so that none is compared with a program that is gone.
    """
    yield
    maps, most = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
    if not maps.exists() or 2 * len(maps.read_bytes().splitlines()) < int(most.read_text()):
        return
    import jax

    from popjax.generate import PROGRAMS

    for name, module in list(sys.modules.items()):
        if name.startswith("tests."):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
    PROGRAMS.clear()
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def nan_checks() -> Iterator[None]:
    """Makes the first NaN that any computation of the test returns an error.

    For small tests: every result is fetched and looked at, and a failing one runs again op by op.
    """
    import jax

    with jax.debug_nans(True):
        yield


@pytest.fixture(scope="session")
def default_model() -> Any:
    """The default model with its real weights, as `popjax.load()` gives it."""
    import popjax

    return popjax.load()
