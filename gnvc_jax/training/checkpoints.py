"""Checkpoints of a run, by Orbax.

A run folder holds config.json and checkpoints/STEP/{state,data,statistics,config}: the train state,
the position of the data iterator, what the run measured of its data, and the configuration. A step
is written in the background under a temporary name and renamed when complete; nothing else knows
Orbax.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from gnvc_jax.errors import UsageError
from gnvc_jax.files import write_json
from gnvc_jax.training.config import Experiment, flatten

Tree = Any

# What a resumed run may change.
FREE_KEYS = ("run.", "mesh.", "optim.steps", "data.max_left_out")


class Checkpoints:
    """The checkpoints of one run, the newest `experiment.run.keep` of them.

    Raises UsageError if the folder belongs to a run with another configuration; `run.*`, `mesh.*`,
    `optim.steps` and `data.max_left_out` may differ.
    """

    def __init__(self, experiment: Experiment):
        out = Path(experiment.run.out).absolute()
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:  # such as a file at this place or above it
            raise UsageError(f"run.out: no folder {out} can be made ({error.strerror})") from None
        self.config = json.loads(json.dumps(dataclasses.asdict(experiment)))
        options = ocp.CheckpointManagerOptions(max_to_keep=experiment.run.keep)
        self.manager = ocp.CheckpointManager(out / "checkpoints", options=options)
        try:
            if self.latest() is not None:  # a run that failed before its first one binds nobody
                check_same_config(out / "config.json", self.config)
        except ValueError:
            self.manager.close()
            raise
        if jax.process_index() == 0:
            write_json(out / "config.json", self.config)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self.manager.latest_step()

    def save(
        self, step: int, state: Tree, data: dict, statistics: dict[str, np.ndarray] | None = None
    ) -> None:
        """Copy the state to the host, then write in the background; a saved step is left alone."""
        if step == self.latest():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(data),
            statistics=ocp.args.JsonSave({k: v.tolist() for k, v in (statistics or {}).items()}),
            config=ocp.args.JsonSave(self.config),
        )
        self.manager.save(step, args=items)

    def restore(self, step: int, like: Tree) -> tuple[Tree, dict]:
        """State and data position of a step; like: the state as shapes, types and shardings."""
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(like), data=ocp.args.JsonRestore()
        )
        restored = self.manager.restore(step, args=items)
        return restored["state"], restored["data"]

    def preempted(self, step: int) -> bool:
        """Whether the cluster has announced to all hosts that it will end this job."""
        return self.manager.reached_preemption(step)

    def close(self) -> None:
        """Wait for the last write."""
        self.manager.wait_until_finished()
        self.manager.close()


def check_same_config(path: Path, config: dict) -> None:
    """UsageError if the saved configuration differs in a key that a resumed run may not change."""
    if not path.exists():
        return
    # Keys that only the new configuration has came with a newer version of the program.
    new, old = flatten(config), flatten(read_config(path))
    differing = [
        f"{key} was {value!r}, is {new.get(key)!r}"
        for key, value in old.items()
        if not key.startswith(FREE_KEYS) and value != new.get(key)
    ]
    if differing:
        raise UsageError(f"{path}: belongs to another configuration: {'; '.join(differing)}")


def config_of(run: str | Path) -> dict:
    """The resolved configuration of a run. FileNotFoundError if there is no such run."""
    path = Path(run) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{run}: no training run")
    return read_config(path)


def read_config(path: Path) -> dict:
    """The configuration that a run folder holds. UsageError if the file is damaged."""
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise UsageError(
            f"{path}: damaged configuration ({error}); each folder of checkpoints/ has a copy of it"
        ) from None
    return found


def newest(run: str | Path) -> Path:
    """Folder of the newest checkpoint of a run. FileNotFoundError if there is none."""
    folder = Path(run).absolute() / "checkpoints"
    steps = ocp.utils.checkpoint_steps(folder) if folder.is_dir() else ()
    if not steps:
        raise FileNotFoundError(f"{run}: no checkpoint")
    return folder / str(max(steps))


def load_statistics(run: str | Path) -> dict[str, np.ndarray]:
    """What a run measured of its data when it began, float32; nothing for runs from before that
    was kept.

    Raises FileNotFoundError if there is no checkpoint.
    """
    folder = newest(run)
    if not (folder / "statistics").is_dir():
        return {}
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        found = checkpointer.restore(folder / "statistics")
    return {name: np.asarray(value, np.float32) for name, value in found.items()}


def load_params(run: str | Path, like: Tree, partial: bool = False) -> Tree:
    """Averaged weights of the newest checkpoint of a run, placed as `like`.

    like: a tree of arrays or of abstract arrays; those without a sharding come as NumPy arrays.
    partial: only what the run and `like` have in common.

    Raises FileNotFoundError if there is no checkpoint, UsageError if a name or shape differs.
    """
    saved = newest(run) / "state"
    with ocp.PyTreeCheckpointer() as checkpointer:
        found = shapes(checkpointer.metadata(saved).item_metadata.tree["ema"])
        if partial:
            flat = flatten_dict(like, sep="/")
            like = unflatten_dict({k: v for k, v in flat.items() if k in found}, sep="/")
        wanted = shapes(like)
        for name in sorted(wanted if partial else found | wanted):
            if found.get(name) != wanted.get(name):
                raise UsageError(
                    f"{run}: parameter {name} has shape {found.get(name)}, "
                    f"expected {wanted.get(name)}"
                )
        item = {"ema": jax.tree.map(ocp.utils.to_shape_dtype_struct, like)}
        args = ocp.args.PyTreeRestore(
            item, ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
        )
        return checkpointer.restore(saved, args)["ema"]


def shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    """Shape of each leaf by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): tuple(x.shape) for k, x in leaves}
