"""Tensors of a PyTorch file (.pth, .pt) without PyTorch, and without running anything in it.

Since version 1.6 such a file is a zip archive: `data.pkl` describes the tensors, `data/KEY` holds
their bytes. Before, it was a row of pickles (magic number, version, machine, tensors, keys of the
storages) and then each storage, its length in elements before it. A pickle can name any Python
function; here only the few that describe tensors are known, and they build descriptions, so a
hostile file has nothing to call.
"""

import collections
import dataclasses
import math
import pickle
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from gnvc_jax.porting.errors import PortError
from gnvc_jax.restricted_pickle import RestrictedUnpickler

STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
}
OLD_MAGIC = 0x1950A86A20F9469CFC6C


@dataclasses.dataclass(frozen=True)
class Described:
    """Where a tensor's numbers lie: storage, and offset, shape and strides in elements.

    place: byte of an old file where its storage begins, None in a zip archive.
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
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides))
        if math.prod(self.shape) and last >= self.count:
            raise pickle.UnpicklingError(f"tensor {self.shape} reaches beyond its storage")


def describe_tensor(storage, offset, shape, strides, *_) -> Described:
    """Stands in for torch._utils._rebuild_tensor_v2."""
    key, dtype, count = storage
    return Described(key, dtype, count, offset, tuple(shape), tuple(strides))


def describe_parameter(tensor: Described, *_) -> Described:
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


def load_pickle(file: BinaryIO) -> object:
    """The next pickle of a file, which can refer to nothing but KNOWN."""
    return RestrictedUnpickler(file, KNOWN, describe_storage).load()


def read_descriptions(path: Path) -> dict[str, Described]:
    """Tensors by name. PortError if the file is not a plain dictionary of tensors."""
    try:
        return (read_zip if zipfile.is_zipfile(path) else read_old)(path)
    except zipfile.BadZipFile as error:
        raise PortError(f"{path}: damaged PyTorch file ({error})") from error
    except pickle.UnpicklingError as error:
        raise PortError(f"{path}: not read, {error}") from error
    except (AttributeError, EOFError, IndexError, KeyError, TypeError, ValueError) as error:
        raise PortError(f"{path}: damaged PyTorch file ({error!r})") from error


def read_zip(path: Path) -> dict[str, Described]:
    with zipfile.ZipFile(path) as archive:
        with archive.open(member(archive, "data.pkl")) as file:
            found = named_tensors(load_pickle(file))
        for name, tensor in found.items():
            size = archive.getinfo(member(archive, f"data/{tensor.key}")).file_size
            if size != tensor.count * tensor.dtype.itemsize:
                raise pickle.UnpicklingError(f"storage of {name} has {size} bytes")
    return found


def read_old(path: Path) -> dict[str, Described]:
    with open(path, "rb") as file:
        if file.read(1) != b"\x80":
            raise pickle.UnpicklingError("it is no PyTorch file")
        file.seek(0)
        if load_pickle(file) != OLD_MAGIC:
            raise pickle.UnpicklingError("it is no PyTorch file")
        load_pickle(file), load_pickle(file)  # version of the format, machine
        found = named_tensors(load_pickle(file))
        storages = {tensor.key: tensor for tensor in found.values()}
        places = {key: skip_storage(file, storages[key]) for key in load_pickle(file)}
    return {k: dataclasses.replace(x, place=places[x.key]) for k, x in found.items()}


def skip_storage(file: BinaryIO, tensor: Described) -> int:
    """Where the numbers of the storage at this place begin; the file is left behind them."""
    (count,) = struct.unpack("<q", file.read(8).ljust(8, b"\xff"))
    place = file.tell()
    end = file.seek(0, 2)
    if count != tensor.count or place + count * tensor.dtype.itemsize > end:
        raise pickle.UnpicklingError(f"storage {tensor.key} has {count} numbers or is cut short")
    file.seek(place + count * tensor.dtype.itemsize)
    return place


def named_tensors(found: object) -> dict[str, Described]:
    if not isinstance(found, dict) or not all(
        isinstance(k, str) and isinstance(v, Described) for k, v in found.items()
    ):
        raise pickle.UnpicklingError("it is no dictionary of named tensors")
    return dict(found)


def read_tensor(path: Path, tensor: Described) -> np.ndarray:
    """The numbers of one tensor; memory for its storage only. PortError if they are damaged."""
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
    flat = np.frombuffer(data, tensor.dtype)[tensor.offset :]
    strides = [s * tensor.dtype.itemsize for s in tensor.strides]
    return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)


def member(archive: zipfile.ZipFile, name: str) -> str:
    """Full name of a member: all lie under one folder, whose name is free. KeyError if absent."""
    for full in archive.namelist():
        if full.partition("/")[2] == name:
            return full
    raise KeyError(name)
