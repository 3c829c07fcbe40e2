"""Files: output that is whole or not there, and the nature of files that were taken for weights.

`atomic_output` is the one place where the package writes under a temporary name and renames. All
output goes through it: whole values by `write_whole` and `write_json`, large files and folders
piece by piece at the path that it gives.
"""

import contextlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gnvc_jax.buckets import AnyPath, make_folder, upload

MAX_NAME = 200  # bytes of a name that leave room for a key and a suffix in the 255 of file systems

# What people find in place of weights, by how it begins.
MISTAKEN = {
    b"version https://git-lfs": "a Git LFS pointer; fetch the weights with `git lfs pull`",
    b"GGUF": "a GGUF file, which is not supported; use the original safetensors",
    b"<": "an HTML or XML page; the download failed or needs a login",
    b"{": "a JSON text; the download failed or this is not the file with the weights",
}


@contextlib.contextmanager
def temporary_path(folder: Path, name: str) -> Iterator[Path]:
    """Gives a path where nothing is yet, in a hidden folder that is removed afterwards.

    The hidden folder lies in `folder`, thus on its file system. Its name is drawn by `tempfile`,
    because process ids repeat between containers that share a disk.

    Raises:
        OSError: If the hidden folder cannot be made.
    """
    with tempfile.TemporaryDirectory(
        prefix=".", suffix=".tmp", dir=folder, ignore_cleanup_errors=True
    ) as hidden:
        yield Path(hidden, name)


@contextlib.contextmanager
def atomic_output(path: AnyPath) -> Iterator[Path]:
    """Gives a path at which to make a file or folder; it replaces `path` if the block succeeds.

    If the block fails, `path` is left as it was. A symbolic link stays one, and the file that it
    points to is replaced. A device or named pipe is not replaced: the block writes straight into
    it. The folder of `path` must exist. What belongs in a bucket is made on the local disk and
    uploaded at the end; a folder arrives there file by file.

    Raises:
        OSError: If nothing can be written there.
    """
    if not isinstance(path, Path):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            yield Path(folder, path.name)
            upload(Path(folder, path.name), path)
        return
    if path.exists() and not (path.is_file() or path.is_dir()):
        yield path
        return
    # Through links to the file itself; the temporary one must lie on its file system.
    target = Path(os.path.realpath(path))
    with temporary_path(target.parent, target.name) as temporary:
        yield temporary
        os.replace(temporary, target)


def would_overwrite(path: Path) -> bool:
    """Whether writing to `path` destroys something; writing to a pipe or a terminal does not."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    return not (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISSOCK(mode))


def is_same_file(source: str | os.PathLike | int, output: str | os.PathLike) -> bool:
    """Whether both are one regular file, also by links; source may be a file descriptor."""
    try:
        return Path(output).is_file() and os.path.samestat(os.stat(source), os.stat(output))
    except OSError:  # one of them is not there
        return False


def write_whole(path: AnyPath, data: bytes | str) -> None:
    """Writes a file with `atomic_output`; its folder is created if needed.

    Raises:
        OSError: If the file cannot be written.
    """
    if isinstance(data, str):  # names of files may hold bytes that are not UTF-8
        data = data.encode(errors="backslashreplace")
    make_folder(path.parent)
    with atomic_output(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: AnyPath, value: Any) -> None:
    """Writes a value as JSON with `write_whole`.

    Raises:
        OSError: If the file cannot be written.
        ValueError: If the value holds NaN or infinities, which JSON lacks.
    """
    write_whole(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def keyed_name(name: str, key: str, limit: int = MAX_NAME) -> str:
    """Joins name and key to `NAME-KEY`, with the name cut to `limit` bytes."""
    return f"{os.fsencode(name)[:limit].decode(errors='ignore')}-{key}"


def not_weights(path: Path) -> str | None:
    """Recognises files that are not weights at all, such as a web page in place of a download.

    Returns:
        What the file is, in words, or None if it may hold weights.

    Raises:
        OSError: If the file cannot be read.
    """
    with open(path, "rb") as file:
        # Without the mark of UTF-8 that some editors put first.
        start = file.read(64).removeprefix(b"\xef\xbb\xbf")
    if not start:
        return "an empty file"
    if start[8:9] == b"{":  # safetensors: 8 bytes, which can look like anything, and then JSON
        return None
    start = start.lstrip()
    return next((kind for mark, kind in MISTAKEN.items() if start.startswith(mark)), None)
