"""Saving and resuming a run, by Orbax.

A run folder holds config.json and checkpoints/STEP/{state,data,statistics,config}: the train state,
the position of the data iterator, statistics of the data, and the configuration. A step is written
in the background under a temporary name and renamed when complete.

Other programs read the folder by `gnvc_jax.training.run_folder`. What does not train is kept beside
the checkpoints, see `gnvc_jax.training.fixed_parameters`.
"""

import dataclasses
import json
import logging
import uuid
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from jax.experimental import multihost_utils

from gnvc_jax.array_trees import read_structure
from gnvc_jax.arrays import Tree
from gnvc_jax.buckets import AnyPath, absolute, as_path, check_bucket, make_folder, on_s3
from gnvc_jax.errors import UsageError
from gnvc_jax.files import write_json
from gnvc_jax.training.bucket_runs import StagedCheckpoints
from gnvc_jax.training.config import Experiment, flatten
from gnvc_jax.training.damaged_checkpoints import DAMAGE, first_line, quiet_failure
from gnvc_jax.training.run_folder import check_shapes, read_config, shapes, with_json

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


class Checkpoints:
    """The checkpoints of one run: the newest `experiment.run.keep`, and one of every `keep_every`.

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
        self.keep, self.keep_every = experiment.run.keep, experiment.run.keep_every
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
        policies = ocp.training.preservation_policies
        kept: Any = policies.LatestN(self.keep)
        if self.keep_every:
            # At least so many steps apart. Checkpoints that are timed hit no exact multiples.
            apart = policies.EveryNSteps(self.keep_every, exact_interval=False)
            kept = policies.AnyPreservationPolicy([kept, apart])
        return ocp.training.Checkpointer(
            str(self.directory), context=with_json(), preservation_policy=kept
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
        # Orbax gives keys the sharding of their integers, which have one more dimension. On a mesh
        # of one device, JAX 0.10 keeps that sharding and refuses it in the next step.
        state = jax.tree.map(
            lambda x, like: jax.device_put(x, like.sharding), restored["state"], like
        )
        return state, restored["data"]

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
