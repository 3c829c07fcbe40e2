"""Trees of arrays on disk: Orbax checkpoints that are written in chunks and read in parts.

    save_tree(folder, {"vae": {"kernel": array}})
    load_tree(folder, {"vae": {"kernel": jax.ShapeDtypeStruct((3, 3), jnp.bfloat16)}})

With several processes, all call these functions together; each writes and reads its own part of an
array that is sharded.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from flax.traverse_util import flatten_dict

from gnvc_jax.arrays import Tree
from gnvc_jax.buckets import absolute, as_path, for_orbax, on_s3
from gnvc_jax.files import atomic_output

CHUNK_BYTES = 64 << 20  # a host reads only the chunks that its devices need


@contextmanager
def in_chunks() -> Iterator[None]:
    """Context in which Orbax splits large arrays into chunks."""
    context = ocp.Context()
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    with context:
        yield


def save_tree(folder: str | os.PathLike, tree: Tree) -> None:
    """Writes a tree of arrays under a temporary name, and renames it when it is complete.

    Args:
        folder: Folder to make.
        tree: Nested dictionary of arrays, not empty.
    """
    target = absolute(as_path(folder))
    with atomic_output(target) if on_s3(target) else nullcontext(target) as place, in_chunks():
        ocp.save(os.fspath(place), tree)


def read_leaves(folder: str | os.PathLike) -> dict[str, Any]:
    """Reads shape and type of each array by path, such as "vae/kernel", but not the arrays.

    It raises the errors of `read_structure`.
    """
    return flatten_dict(read_structure(folder), sep="/")


def read_structure(folder: str | os.PathLike) -> Tree:
    """Reads a tree with shape and type in place of each array.

    Raises:
        ValueError, OSError, KeyError: If files are damaged or missing.
    """
    found = ocp.metadata(_readable(folder)).metadata
    if found is None:  # Orbax logs the reason
        raise ValueError("the description of its arrays is damaged")
    return found


def load_tree(folder: str | os.PathLike, wanted: Tree) -> Tree:
    """Reads a part of a tree of arrays.

    Args:
        folder: Folder to read.
        wanted: Nested dictionary of the arrays to read, by shape and type. Those with a sharding
            are read onto devices, the others become NumPy arrays.
    """
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        return ocp.load(_readable(folder), jax.tree.map(abstract_leaf, wanted))


def _readable(folder: str | os.PathLike) -> str:
    """Path at which Orbax reads a folder."""
    return os.fspath(for_orbax(absolute(as_path(folder))))


def abstract_leaf(x: Any) -> Any:
    """Describes an array as Orbax wants it, which tells by the type where it belongs."""
    if getattr(x, "sharding", None) is not None:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    return np.broadcast_to(np.zeros((), x.dtype), x.shape)  # one element in memory
