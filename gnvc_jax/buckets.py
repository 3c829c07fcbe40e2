"""Paths in buckets (gs://, s3://) beside those of the local file system.

`as_path` makes a path of what a user names: a `pathlib.Path`, or for a bucket an `etils.epath.Path`
with the same methods. Small files are read and written through it. Libraries that need files on the
local disk, such as decoders, read `local_copy`, which keeps what was downloaded. Output goes
through `gnvc_jax.files`, which makes it locally and calls `upload`.

Objects of a bucket are replaced whole, so a reader never sees half of a file. Credentials and
endpoints are those of the packages gcsfs and s3fs, which read the usual environment variables.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from etils import epath

from gnvc_jax.errors import UsageError

if TYPE_CHECKING:
    import fsspec

AnyPath: TypeAlias = Path | epath.Path

PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
FREE_SHARE = 0.1  # share of a disk that copies leave free


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is in a bucket."""
    return os.fspath(path).startswith(tuple(f"{scheme}://" for scheme in PACKAGES))


def as_path(path: str | os.PathLike) -> AnyPath:
    """Makes a path, local or in a bucket.

    Raises:
        UsageError: If the package that reads such a bucket is not installed.
    """
    if not is_remote(path):
        return Path(path)
    _prepare(os.fspath(path).partition("://")[0])
    return epath.Path(path)


@functools.cache
def _prepare(scheme: str) -> None:
    """Checks that a kind of bucket can be read, and configures how."""
    package = PACKAGES[scheme]
    if importlib.util.find_spec(package) is None:
        raise UsageError(
            f"{scheme}:// needs the package {package}; pip install 'gnvc-jax[buckets]'"
        )
    from fsspec.config import conf  # fsspec is installed with these packages

    # Other processes write to the bucket as well, so lists of files are never kept.
    conf.setdefault(scheme, {})["use_listings_cache"] = False


def filesystem(path: AnyPath) -> fsspec.AbstractFileSystem:
    """File system of a path in a bucket."""
    import fsspec

    return fsspec.filesystem(os.fspath(path).partition("://")[0])


def check_bucket(path: AnyPath) -> None:
    """Checks that the bucket of a path can be reached; a local path needs no check.

    Raises:
        UsageError: If it cannot.
    """
    if not is_remote(path):
        return
    bucket = "/".join(os.fspath(path).split("/")[:3])
    try:
        if filesystem(path).exists(bucket):
            return
        problem = "no such bucket"
    except Exception as error:  # each provider has its own for credentials and for networks
        problem = f"{type(error).__name__}: {error}"
    raise UsageError(f"{path}: the bucket cannot be reached ({problem})")


def on_s3(path: str | os.PathLike) -> bool:
    """Whether a path is in a bucket of S3, where Orbax neither reads nor writes."""
    return os.fspath(path).startswith("s3://")


def absolute(path: str | os.PathLike, links: bool = False) -> AnyPath:
    """Makes a path absolute, which those in buckets are; `links` are followed if wanted."""
    if is_remote(path):
        return epath.Path(path)
    return Path(path).resolve() if links else Path(path).absolute()


def make_folder(path: AnyPath) -> None:
    """Makes a folder where it is missing; in buckets, folders are part of the names of files.

    Raises:
        OSError: If it cannot be made.
    """
    if isinstance(path, Path):
        path.mkdir(parents=True, exist_ok=True)


def stamp(path: AnyPath) -> tuple[int, Any]:
    """Size of a file in bytes, and a value that changes when the file does.

    Raises:
        OSError: If there is no such file.
    """
    if isinstance(path, Path):
        facts = path.stat()
        # In place of a checksum, which would read the whole file.
        return facts.st_size, facts.st_mtime_ns
    return _stamp(filesystem(path).info(os.fspath(path)))


def _stamp(facts: dict[str, Any]) -> tuple[int, Any]:
    """`stamp` of what a file system says of a file."""
    return int(facts["size"] or 0), facts.get("ETag") or facts.get("generation")


def read_range(path: AnyPath, start: int, size: int) -> bytes:
    """Reads `size` bytes of a file from `start` on, in a bucket without the rest of it.

    Raises:
        OSError: If they cannot be read.
    """
    if isinstance(path, Path):
        with path.open("rb") as file:
            file.seek(start)
            return file.read(size)
    data: Any = filesystem(path).cat_file(os.fspath(path), start=start, end=start + size)
    return data


def files_below(folder: AnyPath) -> list[AnyPath]:
    """All files in a folder of a bucket and in its subfolders, sorted."""
    scheme = os.fspath(folder).partition("://")[0]
    return [as_path(f"{scheme}://{name}") for name in filesystem(folder).find(os.fspath(folder))]


def local_copy(path: str | os.PathLike) -> Path:
    """Copies a file or folder of a bucket to the local disk, unless an equal copy is there.

    Copies are kept in the user's cache folder. Those that were used longest ago are removed where
    less than FREE_SHARE of the disk would stay free.

    Returns:
        Path of the copy; a local path itself.

    Raises:
        FileNotFoundError: If there is nothing at a path in a bucket.
        OSError: If it cannot be read.
    """
    if not is_remote(path):
        return Path(path)
    source = as_path(path)
    known: Any = filesystem(source).find(os.fspath(source), detail=True)
    if not known:
        raise FileNotFoundError(f"{source}: no such file or folder")
    # The copy's name depends on what is in the bucket now, so an old copy is never taken for it.
    stamps = {name: _stamp(facts) for name, facts in sorted(known.items())}
    key = hashlib.sha256(f"{source} {stamps}".encode()).hexdigest()[:24]
    folder = cache_folder() / "buckets"
    copy = folder / key / source.name
    if not copy.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _make_room(folder, sum(size for size, _ in stamps.values()))
        # Downloaded under a temporary name and renamed: a copy that is there is complete.
        with tempfile.TemporaryDirectory(prefix=".", dir=folder) as temporary:
            new = Path(temporary, key)
            new.mkdir()
            download(source, new / source.name)
            try:
                new.rename(folder / key)
            except OSError:  # another process was faster
                if not copy.exists():
                    raise
    os.utime(copy.parent)  # used now, see `_make_room`
    return copy


def for_orbax(path: AnyPath) -> AnyPath:
    """Path at which Orbax reads a checkpoint: it knows gs://, but of s3:// needs a local copy.

    Raises:
        OSError: If it cannot be copied.
    """
    return local_copy(path) if on_s3(path) else path


def _make_room(folder: Path, size: int) -> None:
    """Removes copies, from the longest unused on, so that `size` more bytes fit."""
    disk = shutil.disk_usage(folder)
    missing = size + FREE_SHARE * disk.total - disk.free
    # Names with a dot are downloads under way.
    used = sorted((p.stat().st_mtime, p) for p in folder.iterdir() if not p.name.startswith("."))
    for _, copy in used:
        if missing <= 0:
            return
        missing -= sum(file.stat().st_size for file in copy.rglob("*") if file.is_file())
        shutil.rmtree(copy, ignore_errors=True)


def download(source: AnyPath, target: Path) -> None:
    """Downloads a file or folder to a place where nothing is yet.

    Raises:
        OSError: If it cannot be read or written.
    """
    # A single file is the only one below itself, and adds nothing to the path of the target.
    below = len(os.fspath(source))
    for file in files_below(source):
        place = Path(f"{target}{os.fspath(file)[below:]}")
        place.parent.mkdir(parents=True, exist_ok=True)
        filesystem(source).get_file(os.fspath(file), os.fspath(place))


def upload(source: Path, target: AnyPath) -> None:
    """Uploads a file, or all files of a folder; each replaces what is there.

    Raises:
        OSError: If it cannot be read or written.
    """
    files = [source] if source.is_file() else sorted(p for p in source.rglob("*") if p.is_file())
    for file in files:
        place = target / file.relative_to(source).as_posix() if file != source else target
        filesystem(target).put_file(os.fspath(file), os.fspath(place))


def remove_folder(path: AnyPath) -> None:
    """Removes a folder with all that is in it.

    Raises:
        OSError: If it cannot be removed.
    """
    if isinstance(path, Path):
        shutil.rmtree(path)
    else:
        path.rmtree()


def cache_folder() -> Path:
    """Folder of the project below the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gnvc_jax"
