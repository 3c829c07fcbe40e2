"""Checkpoint folders of ported weights.

A folder holds, for each component (`vae`, `dit`),

    COMPONENT/architecture.json   what it is
    COMPONENT/report.csv          every tensor: where it came from, where it went
    COMPONENT/weights/            the parameters, an Orbax checkpoint in chunks

and `prompt.npy`, the text condition, if one was given.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file

from gnvc_jax.files import atomic_output
from gnvc_jax.porting.architectures import Architecture
from gnvc_jax.porting.errors import PortError
from gnvc_jax.porting.sources import check_kind
from gnvc_jax.refiner import DiTConfig

Tree = Any

COMPONENTS = ("vae", "dit")
PROMPT = "prompt.npy"
BATCH_BYTES = 256 << 20  # small parameters are written so many bytes at a time
CHUNK_BYTES = 64 << 20  # a host reads only the chunks that its devices need


@contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """A new folder to fill, which becomes `target` if the block succeeds. FileExistsError."""
    target = Path(target)
    if target.exists():
        raise FileExistsError(f"{target}: exists")
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_output(target) as temporary:
        temporary.mkdir()
        yield temporary


def write_component(
    folder: Path, architecture: Architecture, arrays: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Write parameters, as (path, array) in any order, and what they are, into a new folder."""
    folder.mkdir()
    weights = folder.absolute() / "weights"
    context = ocp.Context()
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    with context:
        batch: dict[str, np.ndarray] = {}
        for path, array in arrays:
            batch[path] = array
            del array  # or it would live on while the next one is made
            if sum(a.nbytes for a in batch.values()) > BATCH_BYTES:
                ocp.partial.save(weights, unflatten_dict(batch, sep="/"))
                batch = {}
        if batch:
            ocp.partial.save(weights, unflatten_dict(batch, sep="/"))
    ocp.partial.finalize(weights)
    (folder / "architecture.json").write_text(json.dumps(architecture.to_json(), indent=2) + "\n")


def has_component(folder: str | Path, component: str) -> bool:
    """Whether a folder holds this component in ported form."""
    return (Path(folder) / component / "architecture.json").is_file()


def read_architecture(folder: str | Path, component: str) -> Architecture:
    """What a component of a checkpoint folder is.

    Raises FileNotFoundError if it is not there, PortError if its description is damaged.
    """
    path = Path(folder) / component / "architecture.json"
    if not has_component(folder, component):
        raise FileNotFoundError(f"{folder}: no ported {component} in this folder")
    try:
        return Architecture.from_json(json.loads(path.read_text()))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise PortError(f"{path}: not a description of weights ({error!r})") from error


def load_weights(
    folder: str | Path,
    component: str,
    dtype: jnp.dtype | None = None,
    shardings: Tree = None,
    *,
    wanted: Tree = None,
) -> tuple[Architecture, Tree]:
    """A ported component: what it is, and its parameters.

    dtype: by default each as stored. shardings: a tree like the parameters, to read onto devices,
    each its own part; without it arrays are NumPy's. wanted: shapes of some parameters, to read
    these alone; each with its type, and its sharding if it has one, in place of the other two.
    Errors as `read_architecture`, and PortError if the parameters are not those of the described
    component.
    """
    architecture = read_architecture(folder, component)
    saved, like = open_weights(folder, component, architecture)
    if wanted is not None:
        part = {
            k: x if x.sharding else dataclasses.replace(like[k], dtype=np.dtype(x.dtype))
            for k, x in flatten_dict(wanted, sep="/").items()
        }
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            return architecture, ocp.load(saved, unflatten_dict(part, sep="/"))
    if dtype is not None:
        like = {k: dataclasses.replace(x, dtype=np.dtype(dtype)) for k, x in like.items()}
    if shardings is not None:
        shardings = flatten_dict(shardings, sep="/")
        like = {
            k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[k])
            for k, x in like.items()
        }
    return architecture, ocp.load(saved, unflatten_dict(like, sep="/"))


def open_weights(folder: str | Path, component: str, architecture: Architecture):
    """Path of the Orbax checkpoint of a component, and its arrays as metadata by path."""
    saved = Path(folder).absolute() / component / "weights"
    if not saved.is_dir():
        raise PortError(f"{saved}: the weights are missing")
    found = flatten_dict(ocp.metadata(saved).metadata, sep="/")
    wanted = flatten_dict(architecture.abstract(), sep="/")
    problems = [
        f"{path} is {getattr(found.get(path), 'shape', 'missing')}, expected "
        f"{getattr(wanted.get(path), 'shape', 'nothing')}"
        for path in sorted(found.keys() | wanted.keys())
        if path not in found or path not in wanted or found[path].shape != wanted[path].shape
    ]
    if problems:
        raise PortError(f"{saved}: not the weights described beside it: {'; '.join(problems)}")
    return saved, found


def load_prompt(path: str | Path, config: DiTConfig | None = None) -> np.ndarray:
    """Text condition (1, rows, width) float32 from .npy or a .safetensors file with one tensor.

    The file holds (rows, width) or (1, rows, width): the encoder's output for the tokens of a
    prompt, without padding. Raises FileNotFoundError, and PortError if it does not fit.
    """
    config = config or DiTConfig()
    path = Path(path)
    check_kind(path)
    try:
        if path.suffix == ".safetensors":
            (array,) = load_file(path).values()
        else:
            array = np.load(path, allow_pickle=False)
        array = np.asarray(array, np.float32)
    except (SafetensorError, ValueError, EOFError) as error:
        raise PortError(f"{path}: not one array ({error})") from error
    array = array[None] if array.ndim == 2 else array
    rows, width = config.text_length, config.text_width
    if array.ndim != 3 or array.shape[::2] != (1, width) or not 0 < array.shape[1] <= rows:
        raise PortError(f"{path}: shape {array.shape}, expected (1, 1 to {rows}, {width})")
    if not np.isfinite(array).all():
        raise PortError(f"{path}: has values that are not finite")
    return array
