"""Tensors of a PyTorch file (.pth, .pt), read without PyTorch and without running anything in it.

Since PyTorch 1.6 such a file is a zip archive: `data.pkl` describes the tensors, `data/KEY` holds
their bytes. Before, it was a series of pickles (magic number, version, machine, tensors, keys of
the storages), followed by the storages, each preceded by its number of elements. The pickle is read
by `gnvc_jax.restricted_pickle`, with functions that build descriptions in place of torch's.

`read_descriptions` lists the tensors of a file, `read_tensor` reads one of them.
"""

import collections
import dataclasses
import math
import pickle
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from gnvc_jax.porting.errors import PortError
from gnvc_jax.restricted_pickle import RestrictedUnpickler

# Types of float tensors; others have no place in these networks.
STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
}
OLD_MAGIC = 0x1950A86A20F9469CFC6C


@dataclasses.dataclass(frozen=True)
class TensorLocation:
    """Location of a tensor in a file.

    Attributes:
        key: Key of its storage.
        dtype: Type of its elements.
        count: Number of elements of the storage.
        offset: Element of the storage at which the tensor begins.
        shape: Shape.
        strides: Strides in elements.
        place: Byte of an old file where the storage begins; None in a zip archive.
    """

    key: str
    dtype: np.dtype
    count: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    place: int | None = None

    def __post_init__(self):
        numbers = (self.count, self.offset, *self.shape, *self.strides)
        if not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise pickle.UnpicklingError(f"tensor with sizes {numbers}")
        # Place of the last element. A tensor that reaches beyond its storage would be read from
        # other memory.
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides))
        if math.prod(self.shape) and last >= self.count:
            raise pickle.UnpicklingError(f"tensor {self.shape} reaches beyond its storage")


def describe_tensor(
    storage: tuple[str, np.dtype, int],
    offset: int,
    shape: Sequence[int],
    strides: Sequence[int],
    *_: object,
) -> TensorLocation:
    """Stands in for torch._utils._rebuild_tensor_v2."""
    key, dtype, count = storage
    return TensorLocation(key, dtype, count, offset, tuple(shape), tuple(strides))


def describe_parameter(tensor: TensorLocation, *_: object) -> TensorLocation:
    """Stands in for torch._utils._rebuild_parameter."""
    return tensor


KNOWN = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): describe_tensor,
    ("torch._utils", "_rebuild_parameter"): describe_parameter,
} | {("torch", name): np.dtype(dtype) for name, dtype in STORAGES.items()}


def describe_storage(pid: object) -> tuple[str, np.dtype, int]:
    """Stands in for the storage that a persistent id refers to: its key, dtype and length."""
    match pid:
        case ("storage", np.dtype() as dtype, str(key), _, count, *_):
            return key, dtype, count
    raise pickle.UnpicklingError(f"unknown storage {pid!r}")


def load_pickle(file: IO[bytes]) -> Any:
    """The next pickle of a file, which can refer to nothing but KNOWN."""
    return RestrictedUnpickler(file, KNOWN, describe_storage).load()


def read_descriptions(path: Path) -> dict[str, TensorLocation]:
    """Lists the tensors of a file.

    Raises:
        PortError: If it is not a plain dictionary of tensors.
    """
    # Whatever a hostile or damaged file makes the parsers raise becomes one kind of error.
    try:
        return (read_zip if zipfile.is_zipfile(path) else read_old)(path)
    except zipfile.BadZipFile as error:
        raise PortError(f"{path}: damaged PyTorch file ({error})") from error
    except pickle.UnpicklingError as error:
        raise PortError(f"{path}: not read, {error}") from error
    except (AttributeError, EOFError, IndexError, KeyError, TypeError, ValueError) as error:
        raise PortError(f"{path}: damaged PyTorch file ({error!r})") from error


def read_zip(path: Path) -> dict[str, TensorLocation]:
    """Lists the tensors of a zip archive."""
    with zipfile.ZipFile(path) as archive:
        # One pickle describes all tensors; their bytes are members of their own.
        with archive.open(member(archive, "data.pkl")) as file:
            found = named_tensors(load_pickle(file))
        for name, tensor in found.items():
            size = archive.getinfo(member(archive, f"data/{tensor.key}")).file_size
            if size != tensor.count * tensor.dtype.itemsize:
                raise pickle.UnpicklingError(f"storage of {name} has {size} bytes")
    return found


def read_old(path: Path) -> dict[str, TensorLocation]:
    """Lists the tensors of a file in the format before PyTorch 1.6."""
    with open(path, "rb") as file:
        # Every pickle of protocol 2 and later begins so; anything else need not be parsed.
        if file.read(1) != b"\x80":
            raise pickle.UnpicklingError("it is not a PyTorch file")
        file.seek(0)
        if load_pickle(file) != OLD_MAGIC:
            raise pickle.UnpicklingError("it is not a PyTorch file")
        _ = load_pickle(file), load_pickle(file)  # version of the format, machine
        found = named_tensors(load_pickle(file))
        # Tensors may share a storage. After their descriptions come the keys of the storages, in
        # the order in which their bytes follow.
        storages = {tensor.key: tensor for tensor in found.values()}
        places = {key: skip_storage(file, storages[key]) for key in load_pickle(file)}
    return {k: dataclasses.replace(x, place=places[x.key]) for k, x in found.items()}


def skip_storage(file: IO[bytes], tensor: TensorLocation) -> int:
    """Skips the storage at the current position; returns the byte at which its elements begin."""
    # A short read becomes a negative number, which no storage has.
    (count,) = struct.unpack("<q", file.read(8).ljust(8, b"\xff"))
    place = file.tell()
    end = file.seek(0, 2)
    if count != tensor.count or place + count * tensor.dtype.itemsize > end:
        raise pickle.UnpicklingError(f"storage {tensor.key} has {count} numbers or is cut short")
    file.seek(place + count * tensor.dtype.itemsize)
    return place


def named_tensors(found: object) -> dict[str, TensorLocation]:
    """Returns the contents of a pickle.

    Raises:
        UnpicklingError: If it is not a dictionary of tensors.
    """
    if not isinstance(found, dict) or not all(
        isinstance(k, str) and isinstance(v, TensorLocation) for k, v in found.items()
    ):
        raise pickle.UnpicklingError("it is not a dictionary of named tensors")
    return dict(found)


def read_tensor(path: Path, tensor: TensorLocation) -> np.ndarray:
    """Reads one tensor; only its storage is held in memory.

    Raises:
        PortError: If it is damaged.
    """
    try:
        if tensor.place is None:
            with zipfile.ZipFile(path) as archive:
                data = archive.read(member(archive, f"data/{tensor.key}"))
        else:
            with open(path, "rb") as file:
                file.seek(tensor.place)
                data = file.read(tensor.count * tensor.dtype.itemsize)
    except (zipfile.BadZipFile, KeyError) as error:
        raise PortError(f"{path}: damaged PyTorch file ({error})") from error
    # `TensorLocation` has checked that the tensor lies within its storage.
    flat = np.frombuffer(data, tensor.dtype)[tensor.offset :]
    # Strides of torch are in elements, those of NumPy in bytes.
    strides = [s * tensor.dtype.itemsize for s in tensor.strides]
    return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)


def member(archive: zipfile.ZipFile, name: str) -> str:
    """Finds the full name of a member: all are in one folder of any name.

    Raises:
        KeyError: If there is no such member.
    """
    for full in archive.namelist():
        if full.partition("/")[2] == name:
            return full
    raise KeyError(name)
