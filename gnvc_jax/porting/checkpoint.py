"""Checkpoint folders of ported weights.

A folder holds, for each component (`vae`, `dit`, or `decoder` for a light decoder),

    COMPONENT/architecture.json   what it is
    COMPONENT/report.csv          every tensor: where it came from, where it went
    COMPONENT/weights/            the parameters, an Orbax checkpoint in chunks

and `prompt.npy`, the text condition, if one was given.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file

from gnvc_jax.array_trees import in_chunks, load_tree, read_leaves
from gnvc_jax.arrays import Tree
from gnvc_jax.buckets import absolute, as_path, for_orbax, local_copy, make_folder
from gnvc_jax.files import atomic_output
from gnvc_jax.porting.architectures import Architecture
from gnvc_jax.porting.errors import PortError
from gnvc_jax.porting.sources import check_kind
from gnvc_jax.refiner import DiTConfig

COMPONENTS = ("vae", "dit", "decoder")
PROMPT = "prompt.npy"
BATCH_BYTES = 256 << 20  # small parameters are written so many bytes at a time


@contextmanager
def new_folder(target: str | os.PathLike) -> Iterator[Path]:
    """Context with a new folder, which becomes `target` if the block succeeds.

    Raises:
        FileExistsError: If the target exists.
    """
    target = as_path(target)
    if target.exists():
        raise FileExistsError(f"{target}: exists")
    make_folder(target.parent)
    with atomic_output(target) as temporary:
        temporary.mkdir()
        yield temporary


def write_component(
    folder: Path, architecture: Architecture, arrays: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Writes the parameters and the architecture of a component into a new folder.

    Args:
        folder: Folder to create.
        architecture: Architecture of the component.
        arrays: (path, array) of each parameter, in any order. They are consumed one by one, so that
            a generator need not hold all of them.
    """
    folder.mkdir()
    weights = os.fspath(folder.absolute() / "weights")
    with in_chunks():
        batch: dict[str, np.ndarray] = {}
        for path, array in arrays:
            # Orbax writes a batch at a time, so memory holds one batch and not the whole model.
            batch[path] = array
            del array  # otherwise it stays in memory while the next one is made
            if sum(a.nbytes for a in batch.values()) > BATCH_BYTES:
                ocp.partial.save(weights, unflatten_dict(batch, sep="/"))
                batch = {}
        if batch:
            ocp.partial.save(weights, unflatten_dict(batch, sep="/"))
    # Until then the checkpoint has a temporary name, and no reader takes it for complete.
    ocp.partial.finalize(weights)
    (folder / "architecture.json").write_text(json.dumps(architecture.to_json(), indent=2) + "\n")


def leaves_by_path(tree: Tree) -> dict[str, Any]:
    """Leaves of a nested dictionary by path, such as "groups/ffn_in/kernel"."""
    return cast(dict[str, Any], flatten_dict(tree, sep="/"))


def has_component(folder: str | os.PathLike, component: str) -> bool:
    """Whether a folder holds this component in ported form."""
    return (as_path(folder) / component / "architecture.json").is_file()


def refuse_other_components(folder: str | os.PathLike, wanted: str) -> None:
    """Refuses a folder of ported weights that lacks the wanted component.

    Raises:
        FileNotFoundError: If the folder holds other components only.
    """
    # A folder of something else is left to the caller, who may know what it is.
    if others := [name for name in COMPONENTS if has_component(folder, name)]:
        raise FileNotFoundError(f"{folder}: holds {', '.join(others)}, but no ported {wanted}")


def read_architecture(folder: str | os.PathLike, component: str) -> Architecture:
    """Reads the architecture of a component of a checkpoint folder.

    Raises:
        FileNotFoundError: If the folder has no such component.
        PortError: If its description is damaged.
    """
    path = as_path(folder) / component / "architecture.json"
    if not has_component(folder, component):
        raise FileNotFoundError(f"{folder}: no ported {component} in this folder")
    try:
        return Architecture.from_json(json.loads(path.read_text()))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise PortError(f"{path}: not a description of weights ({error!r})") from error


def load_weights(
    folder: str | os.PathLike,
    component: str,
    dtype: jax.typing.DTypeLike | None = None,
    shardings: Tree = None,
    *,
    wanted: Tree = None,
) -> tuple[Architecture, Tree]:
    """Loads a ported component.

    Args:
        folder: Checkpoint folder, as `gnvc port` makes it.
        component: One of COMPONENTS.
        dtype: Type of the parameters; if None, each as stored.
        shardings: Tree of shardings like the parameters. If given, each device reads its own part;
            otherwise the parameters are NumPy arrays.
        wanted: Tree of shapes of some of the parameters. If given, only these are read, with their
            types, and onto devices if they have a sharding; `dtype` and `shardings` are ignored.

    Returns:
        The architecture, and the parameters as a nested dictionary.

    Raises:
        FileNotFoundError: If the folder has no such component.
        PortError: If the description is damaged, or does not match the parameters.
    """
    architecture = read_architecture(folder, component)
    saved, like = open_weights(folder, component, architecture)
    # `like` says how each parameter is to be read: its type, and where it is to lie.
    if wanted is not None:
        return architecture, load_tree(saved, wanted)
    if dtype is not None:
        like = {k: dataclasses.replace(x, dtype=np.dtype(dtype)) for k, x in like.items()}
    if shardings is not None:
        shardings = leaves_by_path(shardings)
        like = {
            k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[k])
            for k, x in like.items()
        }
    return architecture, ocp.load(saved, unflatten_dict(like, sep="/"))


def open_weights(
    folder: str | os.PathLike, component: str, architecture: Architecture
) -> tuple[str, dict[str, Any]]:
    """Opens the Orbax checkpoint of a component and checks that it matches the architecture.

    Returns:
        Path of the checkpoint, and the metadata (shape, dtype) of its arrays by path.

    Raises:
        PortError: If the weights are missing or do not match.
    """
    saved = absolute(as_path(folder)) / component / "weights"
    if not saved.is_dir():
        raise PortError(f"{saved}: the weights are missing")
    saved = os.fspath(for_orbax(saved))
    try:
        found = read_leaves(saved)
    except (ValueError, OSError, KeyError) as error:
        raise PortError(f"{saved}: cannot be read ({error})") from error
    # Compared both ways: neither may have a parameter that the other lacks.
    wanted = leaves_by_path(architecture.abstract())
    problems = [
        f"{path} is {getattr(found.get(path), 'shape', 'missing')}, expected "
        f"{getattr(wanted.get(path), 'shape', 'nothing')}"
        for path in sorted(found.keys() | wanted.keys())
        if path not in found or path not in wanted or found[path].shape != wanted[path].shape
    ]
    if problems:
        raise PortError(f"{saved}: not the weights described beside it: {'; '.join(problems)}")
    return saved, found


def load_prompt(path: str | os.PathLike, config: DiTConfig | None = None) -> np.ndarray:
    """Loads a text condition.

    Args:
        path: .npy file, or .safetensors file with one tensor, of shape (rows, width) or (1, rows,
            width): the output of the text encoder for the tokens of a prompt, without padding.
        config: Sizes of the DiT that it must fit.

    Returns:
        Text condition (1, rows, width), float32.

    Raises:
        FileNotFoundError: If there is no such file.
        PortError: If the file cannot be read or does not fit.
    """
    config = config or DiTConfig()
    path = local_copy(path)
    check_kind(path)
    try:
        if path.suffix == ".safetensors":
            (array,) = load_file(path).values()
        else:
            array = np.load(path, allow_pickle=False)
        array = np.asarray(array, np.float32)
    except (SafetensorError, ValueError, EOFError) as error:
        raise PortError(f"{path}: not one array ({error})") from error
    # One prompt serves all clips of a batch: (1, rows, width).
    array = array[None] if array.ndim == 2 else array
    rows, width = config.text_length, config.text_width
    if array.ndim != 3 or array.shape[::2] != (1, width) or not 0 < array.shape[1] <= rows:
        raise PortError(f"{path}: shape {array.shape}, expected (1, 1 to {rows}, {width})")
    if not np.isfinite(array).all():
        raise PortError(f"{path}: contains NaN or infinite values")
    return array
