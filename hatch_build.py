"""Build hook: compile the CPU kernels into the wheel where there is a C++17 compiler.

Without one the installation succeeds all the same and says so; popjax then runs through XLA, and
`popjax doctor` tells why.
"""

from __future__ import annotations

import importlib.util
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CpuKernels(BuildHookInterface):
    """Adds kernels_pallas/native/popjax_cpu-*.so to wheels, and beside the sources if editable."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        folder = Path(self.root) / "kernels_pallas" / "native"
        builder = _module(folder / "build.py")
        target = folder / builder.library_name(_jaxlib_version())
        for stale in set(folder.glob("popjax_cpu-*.so")) - {target}:
            stale.unlink()
        try:
            if not target.is_file():  # the name changes with all that goes into it
                builder.build(target, str(_jaxlib_folder() / "include"))
        except (builder.BuildError, OSError) as error:
            self.app.display_warning(f"popjax goes without its CPU kernels: {error}")
            return
        build_data["artifacts"].append(f"kernels_pallas/native/{target.name}")
        build_data["pure_python"] = False
        build_data["infer_tag"] = True


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("popjax_cpu_build", path)
    assert spec is not None and spec.loader is not None, f"{path} is not a Python file"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _jaxlib_version() -> str:
    return version("jaxlib")


def _jaxlib_folder() -> Path:
    # Found, not imported: importing it loads the whole backend for a few header files.
    spec = importlib.util.find_spec("jaxlib")
    assert spec is not None and spec.submodule_search_locations, (
        "pyproject requires jaxlib to build"
    )
    return Path(spec.submodule_search_locations[0])
