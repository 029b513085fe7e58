"""Folders by name: local ones, a hub cache made by hand, and a hub played by a server here.

The hub client reads its environment when it is imported, so each case runs in a process of its own.
"""

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from checkpoints import CheckpointError, fetch_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CHILD = """
import json, sys
from checkpoints import CheckpointError, fetch_folder, open_folder
try:
    folder = fetch_folder(*json.loads(sys.argv[1]), **json.loads(sys.argv[2]))
    files = sorted(p.name for p in folder.iterdir())
    print(json.dumps({"folder": str(folder), "files": files, "names": open_folder(folder).names()}))
except CheckpointError as error:
    print(json.dumps({"error": str(error), "cause": type(error.__cause__).__name__}))
"""


def fetch(home: Path, *arguments: str, environment: dict[str, str] | None = None, **options):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CHILD, json.dumps(arguments), json.dumps(options)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
        env={**inherited, "HF_HOME": str(home), **(environment or {})},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def weights() -> bytes:
    return save({"w": np.ones(2, np.float32)})


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A hub cache that holds owner/name: a ref, blobs, and a snapshot of links to them."""
    repository = tmp_path / "hub" / "models--owner--name"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for name, content in {"model.safetensors": weights(), "config.json": b"{}"}.items():
        (repository / "blobs" / f"blob-{name}").write_bytes(content)
        (snapshot / name).symlink_to(f"../../blobs/blob-{name}")
    return tmp_path


OFFLINE = {"HF_HUB_OFFLINE": "1"}


# Local folders


def test_local_folder_is_returned_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert fetch_folder(tmp_path / "owner") == tmp_path / "owner"
    assert fetch_folder(tmp_path, subfolder="owner/name") == tmp_path / "owner" / "name"
    monkeypatch.chdir(tmp_path)
    assert fetch_folder("owner/name") == Path("owner/name")


@pytest.mark.parametrize("name", ["./gone", "../gone", "/gone/gone", "~/gone", "a/b/c"])
def test_absent_local_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=f"the folder {name} does not exist"):
        fetch_folder(name)


def test_file(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(CheckpointError, match="x is a file: pass the folder"):
        fetch_folder(tmp_path / "x")


def test_subfolders(tmp_path):
    with pytest.raises(CheckpointError, match="has no folder 'gone': check subfolder="):
        fetch_folder(tmp_path, subfolder="gone")
    for outside in ("../x", "/x", "a/../../x"):
        with pytest.raises(CheckpointError, match="must lie inside the model's folder"):
            fetch_folder(tmp_path, subfolder=outside)


# The cache


def test_cached_snapshot_offline(cache):
    got = fetch(cache, "owner/name", environment=OFFLINE)
    assert got["folder"].endswith(f"models--owner--name/snapshots/{COMMIT}")
    assert got["names"] == ["w"], "its links into the blobs are followed"


def test_cached_snapshot_by_commit_and_cache_dir(cache):
    options = {"revision": COMMIT, "cache_dir": str(cache / "hub"), "local_files_only": True}
    assert fetch(cache / "other", "owner/name", **options)["names"] == ["w"]


def test_offline_and_not_cached(cache):
    got = fetch(cache, "owner/other", environment=OFFLINE)
    assert got["error"] == (
        f"owner/other is missing or incomplete in the hub cache {cache}/hub (HF_HUB_CACHE) and "
        "HF_HUB_OFFLINE is set: set HF_HUB_OFFLINE=0, or pass a local folder"
    )
    assert got["cause"] == "LocalEntryNotFoundError"


def test_local_files_only_and_not_cached(cache):
    got = fetch(cache, "owner/name", revision="v2", local_files_only=True)
    assert "owner/name at revision 'v2' is missing" in got["error"]
    assert "local_files_only is set: pass local_files_only=False" in got["error"]


def test_bad_name(cache):
    got = fetch(cache, "-bad-/na me", environment=OFFLINE)
    assert got["error"] == (
        "'-bad-/na me' is neither a folder here nor a hub id such as 'owner/name'"
    )
    assert got["cause"] == "HFValidationError"


# A hub

FILES = {
    "model.safetensors": weights(),
    "config.json": b"{}",
    "tokenizer.model": b"t",
    "pytorch_model.bin": b"pickle",
    "modeling.py": b"code",
    "consolidated.safetensors": b"twice",
    "onnx/config.json": b"{}",
    "sub/model.safetensors": weights(),
    "sub/deep/config.json": b"{}",
}
PROBLEMS = {
    "owner/gated": (403, "GatedRepo"),
    "owner/gone": (404, "RepoNotFound"),
    "owner/broken": (500, ""),
}


class Hub(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        for name, (status, code) in PROBLEMS.items():
            if name in path:
                return self.answer(status, b"{}", {"X-Error-Code": code})
        if path.endswith("/revision/v9"):
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if path.startswith("/api/models/owner/name/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": f"{i:040x}"}
                for i, (name, content) in enumerate(FILES.items())
            ]
            return self.answer(200, json.dumps(tree).encode())
        if path.startswith("/api/models/owner/name"):
            return self.answer(200, json.dumps({"id": "owner/name", "sha": COMMIT}).encode())
        name = path.removeprefix(f"/owner/name/resolve/{COMMIT}/")
        tag = f'"{list(FILES).index(name):040x}"'
        return self.answer(200, FILES[name], {"X-Repo-Commit": COMMIT, "ETag": tag})

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Quiet."""


@pytest.fixture
def hub() -> Iterator[dict[str, str]]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    server.shutdown()
    thread.join()
    server.server_close()


def test_download_takes_only_what_is_needed(tmp_path, hub):
    got = fetch(tmp_path, "owner/name", environment=hub)
    assert got["files"] == ["config.json", "model.safetensors", "tokenizer.model"]
    assert got["names"] == ["w"]
    again = fetch(tmp_path, "owner/name", environment=OFFLINE)
    assert again["folder"] == got["folder"]


def test_download_of_a_subfolder(tmp_path, hub):
    got = fetch(tmp_path, "owner/name", subfolder="sub", environment=hub)
    assert got["files"] == ["model.safetensors"]
    assert Path(got["folder"]).name == "sub"


@pytest.mark.parametrize(
    ("name", "options", "sentence", "cause"),
    [
        ("owner/gated", {}, "owner/gated is gated: accept its terms at https://", "GatedRepoError"),
        (
            "owner/gone",
            {},
            "owner/gone is not on the hub, or is private",
            "RepositoryNotFoundError",
        ),
        ("owner/name", {"revision": "v9"}, "has no revision 'v9' on the hub", "RevisionNotFoundE"),
        ("owner/broken", {}, "(HF_ENDPOINT) cannot be reached", "LocalEntryNotFoundError"),
    ],
)
def test_refusals(tmp_path, hub, name, options, sentence, cause):
    got = fetch(tmp_path, name, environment=hub, **options)
    assert sentence in got["error"]
    assert got["cause"].startswith(cause)


def test_no_hub(tmp_path):
    # Port 9 (discard) of this machine: the connection is refused.
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "no_proxy": "127.0.0.1"}
    got = fetch(tmp_path, "owner/name", environment=nowhere)
    assert "not in the hub cache and http://127.0.0.1:9 (HF_ENDPOINT) cannot be" in got["error"]
