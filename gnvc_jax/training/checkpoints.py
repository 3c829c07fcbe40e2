"""Checkpoints of a run, by Orbax.

A run folder holds config.json and checkpoints/STEP/{state,data,statistics,config}: the train state,
the position of the data iterator, statistics of the data, and the configuration. A step is written
in the background under a temporary name and renamed when complete.

`Checkpoints` saves and restores a run. `config_of`, `model_of`, `load_statistics` and `load_params`
read a run folder for other purposes: to start another run from it, or to release a model. What does
not train is kept beside the checkpoints, see `gnvc_jax.training.fixed_parameters`.
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils

from gnvc_jax.array_trees import load_tree, read_structure
from gnvc_jax.arrays import Tree
from gnvc_jax.buckets import (
    AnyPath,
    absolute,
    as_path,
    check_bucket,
    for_orbax,
    is_remote,
    make_folder,
    on_s3,
)
from gnvc_jax.codec.config import CodecConfig
from gnvc_jax.errors import UsageError
from gnvc_jax.files import write_json
from gnvc_jax.refiner.config import DiTConfig, RefinerConfig
from gnvc_jax.training.bucket_runs import StagedCheckpoints, complete_steps
from gnvc_jax.training.config import Experiment, InitConfig, RunConfig, flatten
from gnvc_jax.vae.config import VAEConfig

log = logging.getLogger(__name__)

# Settings that a resumed run may change: where and how it computes, writes and reads, not what.
FREE_KEYS = (
    "run.",
    "evaluate.",
    "mesh.",
    "compute.",
    "optim.steps",
    "data.path",
    "data.mixture",
    "data.workers",
    "data.decode_cache",
    "data.max_left_out",
)

# Exceptions of Orbax for files that are cut, changed or gone; their contents carry checksums. Orbax
# raises ValueError for another structure or shape, too, so these are compared before arrays are
# read. What differs is a UsageError, which is no damage: older checkpoints would raise it as well.
DAMAGE = (ValueError, OSError, KeyError)


class Checkpoints:
    """The checkpoints of one run, the newest `experiment.run.keep` of them.

    Args:
        experiment: Experiment of the run; `run.out` is its folder.

    Raises:
        UsageError: If the folder cannot be made, or belongs to a run whose configuration differs in
            more than FREE_KEYS.
    """

    def __init__(self, experiment: Experiment):
        out = absolute(as_path(experiment.run.out))
        check_bucket(out)
        try:
            make_folder(out)
        except OSError as error:  # such as a file at this place or above it
            raise UsageError(f"run.out: no folder {out} can be made ({error.strerror})") from None
        # Tuples become lists, as they are when the file is read back for comparison.
        self.config = json.loads(json.dumps(dataclasses.asdict(experiment)))
        folder = out / "checkpoints"
        self.staged = StagedCheckpoints(folder) if on_s3(out) else None
        self.directory = folder if self.staged is None else self.staged.folder
        self.keep = experiment.run.keep
        self.series = self.open()
        try:
            # Checked before the file is written: another experiment must not leave its
            # configuration here.
            if self.latest() is not None:  # a run that failed before its first one binds nobody
                check_same_config(out / "config.json", self.config)
        except ValueError:
            self.series.close()
            raise
        if jax.process_index() == 0:
            write_json(out / "config.json", self.config)

    def open(self) -> ocp.training.Checkpointer:
        """Lists the checkpoints in the folder."""
        newest: Any = ocp.training.preservation_policies.LatestN(self.keep)
        return ocp.training.Checkpointer(
            str(self.directory), context=with_json(), preservation_policy=newest
        )

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, None if there is none."""
        return None if self.series.latest is None else self.series.latest.step

    def save(
        self, step: int, state: Tree, data: dict, statistics: dict[str, np.ndarray] | None = None
    ) -> None:
        """Copies the state to the host, then writes it in the background.

        Nothing is done for a step that is saved already.

        Args:
            step: Number of steps done.
            state: Train state.
            data: Position of the data, JSON-ready.
            statistics: Statistics that the stage measured when the run began.
        """
        if step == self.latest():
            return
        # One folder for each item, so that others can be read without the state.
        items = {
            "state": state,
            "data": data,
            "statistics": {k: v.tolist() for k, v in (statistics or {}).items()},
            "config": self.config,
        }
        if self.staged is not None:
            self.staged.finish()  # Orbax is about to remove what is older
        # Returns once the state is copied, since the next step takes over its buffers. The policy
        # of the series would leave out a step while another is being written.
        response = self.series.save_checkpointables_async(step, items, force=True)
        assert response is not None  # a forced save is never left out
        if self.staged is not None:
            self.staged.start(response.result)

    def restore(self, step: int, like: Tree) -> tuple[Tree, dict]:
        """Restores the state and the position of the data of a step.

        Args:
            step: Step of a checkpoint.
            like: The state as shapes, types and shardings.

        Raises:
            UsageError: If a name or shape differs.
            ValueError, OSError, KeyError: If the checkpoint is damaged.
        """
        saved, wanted = shapes(read_structure(self.folder(step))), shapes(like)
        for found in (saved, wanted):
            found.pop("key", None)  # stored as integers, which have another shape
        check_shapes(saved, wanted)
        # Arrays are read into the shardings of `like`, not into those that they were saved with: a
        # run may go on with another mesh or number of processes.
        restored = self.series.load_checkpointables(step, {"state": like, "data": None})
        return restored["state"], restored["data"]

    def restore_newest(self, like: Tree) -> tuple[Tree, dict] | None:
        """Restores the newest step that can be read, see `restore`.

        Newer ones are set aside under another name: the run will come to these steps again.

        Returns:
            State and position of the data, or None for a run without checkpoints.

        Raises:
            UsageError: If there are checkpoints and none can be read, or the newest that can has
                other names or shapes; then none is set aside.
        """
        damaged = []
        # From the newest on. Damage to complete checkpoints shows only when they are read.
        for step in reversed([found.step for found in self.series.checkpoints]):
            try:
                with quiet_failure():
                    found = self.restore(step, like)
            except UsageError as error:
                raise UsageError(f"{self.folder(step)}: {error}") from None
            except DAMAGE as error:
                log.warning("checkpoint %s is damaged: %s", self.folder(step), first_line(error))
                damaged.append(step)
                continue
            if damaged:
                self.set_aside(damaged)
                log.warning("the run goes on from checkpoint %d", step)
            return found
        if damaged:
            raise UsageError(f"{self.directory}: no checkpoint in it can be read")
        return None

    def folder(self, step: int) -> AnyPath:
        """Folder of a checkpoint."""
        return self.directory / str(step)

    def set_aside(self, steps: list[int]) -> None:
        """Renames checkpoints so that Orbax no longer sees them, but nothing is lost."""
        if jax.process_index() == 0:
            for step in steps:
                # A name that is new, so that none set aside before is lost.
                place = self.folder(step).with_name(f"damaged-{step}-{uuid.uuid4().hex[:8]}")
                self.folder(step).rename(place)
        # All processes must list the folder after the renaming, not before.
        multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        self.series.close()
        self.series = self.open()

    def preempted(self, step: int) -> bool:
        """Whether the cluster has announced to all hosts that it will end this job."""
        try:
            return multihost_utils.reached_preemption_sync_point(step)
        except RuntimeError:  # the service that would know is switched off
            return False

    def close(self) -> None:
        """Waits for the last write."""
        self.series.close()
        if self.staged is not None:
            self.staged.close()


def check_same_config(path: AnyPath, config: dict) -> None:
    """Checks a configuration against the one that a run folder holds.

    Raises:
        UsageError: If they differ in a key that a resumed run may not change.
    """
    if not path.exists():
        return
    # Keys that only the new configuration has came with a newer version of the program, but for
    # those of a group that was None.
    # FREE_KEYS are prefixes, in which "run." stands for a whole group.
    new, old = flatten(config), flatten(read_config(path))
    groups = {key.rpartition(".")[0] for key in new}
    differing = [
        f"{key} was {value!r}, is {'set' if key in groups else repr(new.get(key))}"
        for key, value in old.items()
        if not key.startswith(FREE_KEYS) and (key in groups or value != new.get(key))
    ]
    if differing:
        raise UsageError(f"{path}: belongs to another configuration: {'; '.join(differing)}")


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


class PatientLoop(asyncio.SelectorEventLoop):
    """An event loop that lets its tasks end before it is closed."""

    def close(self) -> None:
        """Closes the loop after its tasks."""
        if not self.is_closed() and (tasks := asyncio.all_tasks(self)):
            self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        super().close()


@contextlib.contextmanager
def quiet_failure() -> Iterator[None]:
    """Lets a restore inside fail with its exception alone.

    Orbax reads all arrays at once. Where one fails, it closes the loop while others are in flight,
    and each of these would print a traceback to say that the loop is closed.
    """
    usual, asyncio.new_event_loop = asyncio.new_event_loop, PatientLoop
    try:
        yield
    finally:
        asyncio.new_event_loop = usual


def first_line(error: BaseException) -> str:
    """First line of the message of an exception."""
    return str(error).partition("\n")[0] or type(error).__name__


def shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    """Shape of each leaf by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): tuple(x.shape) for k, x in leaves}
