"""Which files of a model folder may be opened: the right names, inside the folder, not pickle.

A Hugging Face hub snapshot is a folder of links into its repository's blobs; those are the only
links that may leave the folder. Leaves out what the files hold.
"""

from pathlib import Path

from checkpoints.errors import CheckpointError, few

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def is_plain_name(name: str) -> bool:
    """Whether a string is a bare file name: no folder part, no `..`, no drive, of sane length."""
    sane = 0 < len(name) <= 200 and name.isprintable() and name not in (".", "..")
    return sane and not any(c in name for c in "/\\:")


def _hub_repository(folder: Path) -> Path | None:
    """`<cache>/models--owner--name` when a resolved folder lies in one of its snapshots."""
    for parent in (folder, *folder.parents):
        repository = parent.parent.parent
        if parent.parent.name == "snapshots" and repository.name.startswith("models--"):
            return repository
    return None


def checked_file(folder: Path, name: str) -> Path:
    """The file `name` directly in `folder`; `CheckpointError` if absent or linked to elsewhere."""
    path = folder / name
    if not path.exists():
        if path.is_symlink():
            raise CheckpointError(
                f"{path} links to {path.readlink()}, which does not exist: download it again"
            )
        raise CheckpointError(f"{path} is missing{_other_case(folder, name)}")
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file")
    root, real = folder.resolve(), path.resolve()
    repository = _hub_repository(root)
    if real.is_relative_to(root) or (repository and real.is_relative_to(repository)):
        return path
    raise CheckpointError(
        f"{path} links to {real}, outside its folder: copy the file in, or pass the folder it is in"
    )


def _other_case(folder: Path, name: str) -> str:
    for entry in folder.iterdir():
        if entry.name.lower() == name.lower():
            return f"; {entry.name!r} differs only in case: rename it to {name!r}"
    return ""


def no_weights(folder: Path) -> CheckpointError:
    """The error for a folder with neither `SINGLE` nor `INDEX`, by what lies there instead."""
    names = sorted(entry.name for entry in folder.iterdir())
    for wanted in (SINGLE, INDEX):
        for name in names:
            if name.lower() == wanted:
                return CheckpointError(
                    f"{folder} has no {wanted!r}, but {name!r}, which differs only in case: "
                    f"rename it to {wanted!r}"
                )
    shards = [name for name in names if name.endswith(".safetensors")]
    if shards:
        return CheckpointError(
            f"{folder} holds {few(shards, 'safetensors file')}, but neither {SINGLE!r} nor "
            f"{INDEX!r}: fetch the index that belongs to them"
        )
    pickles = [name for name in names if name.lower().endswith(_PICKLES)]
    if pickles:
        return CheckpointError(
            f"{folder} holds only pickle weights ({few(pickles, 'file')}), which can run code and "
            "are never read: convert them to safetensors (transformers' save_pretrained)"
        )
    ggufs = [name for name in names if name.lower().endswith(".gguf")]
    if ggufs:
        return CheckpointError(
            f"{folder} holds {few(ggufs, 'GGUF file')}: pass the .gguf file itself, not its folder"
        )
    return CheckpointError(f"{folder} holds no weights: looked for {SINGLE!r} and {INDEX!r}")
