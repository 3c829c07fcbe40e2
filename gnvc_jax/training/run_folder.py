"""What a run folder holds, read for other purposes than to resume the run.

    experiment = model_of(run)  # sizes of its networks
    params = load_params(run, shapes)  # averaged weights of its newest checkpoint

Runs that start from this one and releases use these functions. The layout of the folder is
described in `gnvc_jax.training.checkpoints`, which writes it.
"""

import json
import logging
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from gnvc_jax.array_trees import load_tree, read_structure
from gnvc_jax.arrays import Tree
from gnvc_jax.buckets import AnyPath, absolute, as_path, for_orbax, is_remote, on_s3
from gnvc_jax.codec.config import CodecConfig
from gnvc_jax.errors import UsageError
from gnvc_jax.refiner.config import DiTConfig, RefinerConfig
from gnvc_jax.training.bucket_runs import complete_steps
from gnvc_jax.training.config import Experiment, InitConfig, RunConfig
from gnvc_jax.training.damaged_checkpoints import DAMAGE, first_line, quiet_failure
from gnvc_jax.vae.config import VAEConfig

log = logging.getLogger(__name__)


def config_of(run: str | os.PathLike) -> dict:
    """Reads the resolved configuration of a run.

    Raises:
        FileNotFoundError: If there is no such run.
        UsageError: If the file is damaged.
    """
    path = as_path(run) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{run}: no training run")
    return read_config(path)


def model_of(run: str | os.PathLike) -> Experiment:
    """Describes the model of a run by an experiment that starts from the run.

    The experiment has the sizes of the networks, `train` and `init.run`; loss, data and optimizer
    are defaults.

    Raises:
        FileNotFoundError: If there is no such run.
        UsageError: If its configuration is damaged.
    """
    facts = config_of(run)
    # Nested dataclasses are dictionaries in JSON, and are made again from the inside out.
    codec, refiner = facts["codec"], facts["refiner"]
    if refiner is not None:
        refiner = RefinerConfig(**refiner | {"dit": DiTConfig(**refiner["dit"])})
    return Experiment(
        facts["stage"],
        VAEConfig.from_json(facts["vae"]),
        None if codec is None else CodecConfig(**codec),
        refiner,
        init=InitConfig(run=str(run)),
        train=tuple(facts.get("train") or ()),
        run=RunConfig(out=str(as_path(run) / "after")),  # of no use, but not the run itself
    )


def read_config(path: AnyPath) -> dict:
    """Reads the configuration that a run folder holds.

    Raises:
        UsageError: If the file is damaged.
    """
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise UsageError(
            f"{path}: damaged configuration ({error}); each folder of checkpoints/ has a copy of it"
        ) from None
    return found


def steps_of(run: str | os.PathLike) -> list[int]:
    """Lists the steps of the complete checkpoints in a run folder, in rising order."""
    folder = absolute(as_path(run)) / "checkpoints"
    if on_s3(folder):
        return complete_steps(folder)
    # A checkpoint has its final name, the number of its step, when it is complete; on gs://, where
    # nothing can be renamed, it then has a file that says so.
    found = [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    whole = [p for p in found if not is_remote(p) or (p / "commit_success.txt").exists()]
    return sorted(int(path.name) for path in whole)


def read_newest(run: str | os.PathLike, read: Callable[[AnyPath], Any]) -> Any:
    """Reads from the newest checkpoint of a run that is not damaged.

    A damaged one is left out for the one before, with a warning.

    Args:
        run: Run folder.
        read: Function that reads from the folder of a checkpoint.

    Returns:
        What `read` returns.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        UsageError: If none can be read, or `read` raises a UsageError.
    """
    folder, steps = absolute(as_path(run)) / "checkpoints", steps_of(run)
    if not steps:
        raise FileNotFoundError(f"{run}: no checkpoint")
    for step in reversed(steps):
        try:
            with quiet_failure():
                return read(for_orbax(folder / str(step)))
        except UsageError as error:
            raise UsageError(f"{run}: {error}") from None
        except DAMAGE as error:
            log.warning("checkpoint %s is damaged: %s", folder / str(step), first_line(error))
    raise UsageError(f"{run}: no checkpoint in it can be read")


def load_statistics(run: str | os.PathLike) -> dict[str, np.ndarray]:
    """Loads the statistics that a run measured of its data when it began, as float32.

    It raises the errors of `read_newest`.
    """

    def read(folder: AnyPath) -> dict:
        # One item of the checkpoint, read without the others.
        with with_json():
            return ocp.load_checkpointables(str(folder), {"statistics": None})["statistics"]

    return {name: np.asarray(value, np.float32) for name, value in read_newest(run, read).items()}


def averaged_names(run: str | os.PathLike) -> set[str]:
    """Names the parameters whose averages a run has: those that it trained.

    It raises the errors of `read_newest`.
    """
    return read_newest(run, lambda folder: set(shapes(read_structure(folder)["ema"])))


def load_params(run: str | os.PathLike, like: Tree, partial: bool = False) -> Tree:
    """Loads averaged weights from the newest checkpoint of a run.

    Args:
        run: Run folder.
        like: Tree of arrays or of abstract arrays, which says where to place the weights; those
            without a sharding come as NumPy arrays.
        partial: Whether to load only what the run and `like` have in common.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        UsageError: If no checkpoint can be read, or a name or shape differs.
    """
    return read_newest(run, lambda folder: read_average(folder, like, partial))


def read_average(checkpoint: AnyPath, like: Tree, partial: bool) -> Tree:
    """Reads averaged weights from a checkpoint; see `load_params`."""
    found = shapes(read_structure(checkpoint)["ema"])
    if partial:
        flat = flatten_dict(like, sep="/")
        like = unflatten_dict({k: v for k, v in flat.items() if k in found}, sep="/")
    wanted = shapes(like)
    # If all must fit, so must names that only the run has.
    check_shapes({k: v for k, v in found.items() if k in wanted} if partial else found, wanted)
    if not wanted:
        return {}
    # Parameters and moments, three quarters of the file, are left on disk.
    return load_tree(checkpoint, {"ema": like})["ema"]


def with_json() -> ocp.Context:
    """Makes a context in which these items are JSON, although they look like trees of arrays."""
    context, registry = ocp.Context(), ocp.handlers.local_registry()
    for item in ("data", "statistics", "config"):
        registry.add(ocp.handlers.JsonHandler, checkpointable_name=item)
    context.checkpointables.registry = registry
    return context


def check_shapes(found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    """Checks that saved parameters have the wanted names and shapes.

    Raises:
        UsageError: If a name is missing on either side, or a shape differs.
    """
    for name in sorted(found | wanted):
        if found.get(name) != wanted.get(name):
            raise UsageError(
                f"parameter {name} has shape {found.get(name)}, expected {wanted.get(name)}"
            )


def shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    """Shape of each leaf by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): tuple(x.shape) for k, x in leaves}
