"""What a run keeps beside its checkpoints, so that its folder alone gives the whole model.

Checkpoints hold what trains. Everything else is written once, when a run begins:

    fixed/parameters/     an Orbax checkpoint {"fixed": parameters that do not train, by part,
                          "teacher": starting weights, in a stage with a teacher}
    fixed/prompt.npy      text condition (1, rows, width), if the model has one
    fixed/sources.json    where all this came from, with absolute paths

Kernels of the DiT have the type that the run computes in (see `weights.stored`), which halves a
large one; everything else is float32. Runs of earlier versions lack this folder: what they did not
train is read from where they read it.
"""

import json
import os
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils

from gnvc_jax.array_trees import load_tree, read_leaves, save_tree
from gnvc_jax.arrays import Tree
from gnvc_jax.buckets import AnyPath, absolute, as_path, local_copy, make_folder, remove_folder
from gnvc_jax.errors import UsageError
from gnvc_jax.files import atomic_output, write_json
from gnvc_jax.training.damaged_checkpoints import DAMAGE, first_line, quiet_failure
from gnvc_jax.training.run_folder import check_shapes, steps_of
from gnvc_jax.training.settings import InitConfig


def find(run: str | os.PathLike) -> AnyPath | None:
    """Returns the folder in which a run keeps its fixed parameters, None if it keeps none.

    One that was left by a start without any checkpoint does not count: the next start may be that
    of another experiment.
    """
    folder = as_path(run) / "fixed"
    return folder if (folder / "sources.json").is_file() and steps_of(run) else None


def save(
    run: str | os.PathLike, trees: Tree, text: np.ndarray | None, sources: dict[str, str | None]
) -> None:
    """Keeps fixed parameters in the folder of a run that begins; all processes call it together.

    Args:
        run: Run folder.
        trees: Nested dictionary of arrays, {"fixed": ..., "teacher": ...}.
        text: Text condition, None for a model without one.
        sources: Paths or names of where the parameters came from, as in `InitConfig`.
    """
    folder = as_path(run) / "fixed"
    # What is there was left by a start that ended before its first checkpoint.
    if jax.process_index() == 0 and folder.exists():
        remove_folder(folder)
    multihost_utils.sync_global_devices("old fixed parameters are gone")
    if jax.tree.leaves(trees):  # Orbax writes no empty tree
        save_tree(folder / "parameters", trees)
    if jax.process_index() == 0:
        make_folder(folder)
        if text is not None:
            with atomic_output(folder / "prompt.npy") as temporary:
                np.save(temporary, text)
        # Written last: `find` takes a folder with this file for complete.
        write_json(folder / "sources.json", absolute_sources(sources))
    multihost_utils.sync_global_devices("fixed parameters are kept")


def absolute_sources(sources: dict[str, str | None]) -> dict[str, str | None]:
    """Makes paths absolute; names of shipped models, which are no paths, stay as they are."""
    return {
        name: str(absolute(path)) if path is not None and as_path(path).exists() else path
        for name, path in sources.items()
    }


def load(folder: AnyPath, wanted: Tree, tree: str = "fixed") -> Tree:
    """Loads those of the wanted parameters that a run keeps.

    Args:
        folder: Folder from `find`.
        wanted: Shapes of parameters by part, with the type and, if it has one, the sharding to read
            each in; others become NumPy arrays.
        tree: "fixed" or "teacher".

    Raises:
        UsageError: If a shape differs, or a file is damaged.
    """
    parameters = folder / "parameters"
    if not parameters.is_dir():
        return {}
    flat: dict[str, Any] = flatten_dict(wanted, sep="/")
    try:
        with quiet_failure():
            # Shapes are compared first, since Orbax reports another shape as it reports damage.
            kept = {path: tuple(x.shape) for path, x in read_leaves(parameters).items()}
            flat = {path: x for path, x in flat.items() if f"{tree}/{path}" in kept}
            if not flat:
                return {}
            found = {path: kept[f"{tree}/{path}"] for path in flat}
            check_shapes(found, {path: tuple(x.shape) for path, x in flat.items()})
            return load_tree(parameters, {tree: unflatten_dict(flat, sep="/")})[tree]
    except UsageError as error:
        raise UsageError(f"{folder}: {error}") from None
    except DAMAGE as error:
        raise UsageError(f"{parameters}: cannot be read ({first_line(error)})") from None


def load_text(folder: AnyPath) -> np.ndarray | None:
    """Loads the text condition, None if the model has none.

    Raises:
        UsageError: If the file is damaged.
    """
    path = folder / "prompt.npy"
    if not path.is_file():
        return None
    try:
        return np.load(local_copy(path), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UsageError(f"{path}: cannot be read ({first_line(error)})") from None


def load_sources(folder: AnyPath) -> InitConfig:
    """Loads where the parameters came from.

    Raises:
        UsageError: If the file is damaged.
    """
    path = folder / "sources.json"
    try:
        return InitConfig(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path}: cannot be read ({first_line(error)})") from None
