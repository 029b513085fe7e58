"""What the repository promises as a whole: quiet imports, an exact wheel, one-way dependencies.

Reads source text and starts subprocesses. What the packages compute is tested elsewhere.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from kernels_pallas.native.build import library_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("checkpoints", "kernels_pallas", "popjax")
# A package, and the parts of this repository that it must not know.
FORBIDDEN_IMPORTS = {
    "checkpoints": {"kernels_pallas", "popjax", "scripts", "tests"},
    "kernels_pallas": {"checkpoints", "popjax", "scripts", "tests"},
    "popjax": {"scripts", "tests"},
}
UNWANTED_ON_IMPORT = ("fastapi", "matplotlib", "torch", "uvicorn")
# Modules that run code found in the data they read.
UNSAFE_LOADERS = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
MAX_LINES = 350

IMPORT_PROBE = """
import importlib, json, os, sys
import jax  # sets variables of its own, for TPUs
before = dict(os.environ)
importlib.import_module(sys.argv[1])
from jax._src import xla_bridge  # no public function tells without starting one
print(json.dumps({
    "loaded": [name for name in sys.argv[2:] if name in sys.modules],
    "backend": xla_bridge.backends_are_initialized(),
    "changed": sorted(dict(os.environ).items() ^ before.items()),
}))
"""


def python_files(*folders: str) -> list[Path]:
    """Every Python file under the named folders of the repository."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def parsed(*folders: str) -> Iterator[tuple[str, ast.Module]]:
    """The path, relative to the repository, and syntax tree of every file under the folders."""
    for path in python_files(*folders):
        yield str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))


def imported_roots(tree: ast.Module) -> set[str]:
    """Top-level names of the modules a file imports anywhere, its own relative imports aside."""
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            roots.add(node.module.split(".")[0])
    return roots


def enabled_flags(tree: ast.Module) -> set[str]:
    """Keyword arguments and string dictionary keys whose value is anything but a literal False."""
    pairs: list[tuple[object, ast.expr]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword):
            pairs.append((node.arg, node.value))
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                pairs.append((key.value if isinstance(key, ast.Constant) else None, value))
    return {
        name
        for name, value in pairs
        if isinstance(name, str) and not (isinstance(value, ast.Constant) and value.value is False)
    }


def test_every_package_has_source() -> None:
    """The checks below loop over files; with none they would pass and mean nothing."""
    for package in PACKAGES:
        assert (ROOT / package / "__init__.py") in python_files(package)


@pytest.mark.parametrize("package", PACKAGES)
def test_import_is_quiet(package: str, tmp_path: Path) -> None:
    # Empty stand-ins, found first: an import of torch shows whether or not torch is installed.
    # They have metadata because transformers, finding none, imports torch to ask its version.
    for name in UNWANTED_ON_IMPORT:
        info = tmp_path / f"{name}-9.9.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n")
        (info / "top_level.txt").write_text(name)
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORT_PROBE, package, *UNWANTED_ON_IMPORT],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"loaded": [], "backend": False, "changed": []}
    assert done.stderr == ""


def test_wheel_holds_exactly_the_three_packages(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=120,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = archive.read("popjax-0.1.0.dist-info/entry_points.txt").decode()
    assert {name.split("/")[0] for name in names} == {*PACKAGES, "popjax-0.1.0.dist-info"}
    sources = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix in {".py", ".cc", ".h"}
    }
    assert {name for name in names if ".dist-info/" not in name} >= sources
    (library,) = [name for name in names if name.endswith(".so")]
    assert library == f"kernels_pallas/native/{library_name(version('jaxlib'))}"
    assert not wheel.name.endswith("py3-none-any.whl")
    assert "popjax = popjax.cli:main" in entry_points
    assert "popjax-0.1.0.dist-info/licenses/LICENSE" in names


def test_without_a_compiler_the_wheel_is_pure_and_says_so(tmp_path: Path) -> None:
    copy = tmp_path / "sources"
    unwanted = shutil.ignore_patterns("*.so", ".git", ".venv*", "__pycache__", "tests")
    shutil.copytree(ROOT, copy, ignore=unwanted)
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=copy,
        env={**os.environ, "CXX": "no-such-compiler"},
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "goes without its CPU kernels: CXX names 'no-such-compiler'" in done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == "popjax-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]


@pytest.mark.parametrize("package", PACKAGES)
def test_dependencies_run_one_way(package: str) -> None:
    broken = {
        path: sorted(imported_roots(tree) & FORBIDDEN_IMPORTS[package])
        for path, tree in parsed(package)
        if imported_roots(tree) & FORBIDDEN_IMPORTS[package]
    }
    assert broken == {}


def test_no_file_runs_code_from_data() -> None:
    """Neither unpickling nor remote model code, in the tests and scripts either."""
    unsafe = {
        path: sorted(found)
        for path, tree in parsed(*PACKAGES, "scripts", "tests")
        if (
            found := (imported_roots(tree) & UNSAFE_LOADERS)
            | (enabled_flags(tree) & {"allow_pickle", "trust_remote_code"})
        )
    }
    assert unsafe == {}


def test_every_file_says_what_it_is() -> None:
    silent = [
        path
        for path, tree in parsed(*PACKAGES, "scripts", "tests")
        if not (ast.get_docstring(tree) or "").strip()
    ]
    assert silent == []


def test_files_stay_short() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in python_files(*PACKAGES)
    }
    assert {path: lines for path, lines in lengths.items() if lines > MAX_LINES} == {}


def test_jax_runs_at_its_strictest(nan_checks: None) -> None:
    """The settings of conftest took effect: a spelling jax no longer knows would be ignored."""
    import jax
    import jax.numpy as jnp

    assert [device.platform for device in jax.devices()] == ["cpu"] * 8
    assert not jax.config.jax_enable_compilation_cache
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((2, 3)) + jnp.ones(3)
    with pytest.raises(ValueError, match="dtype_promotion"):
        jnp.ones(3, jnp.float32) + jnp.ones(3, jnp.bfloat16)
    with pytest.raises(FloatingPointError):
        jnp.log(jnp.float32(-1))
