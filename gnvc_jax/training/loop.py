"""The training loop: `train` runs one stage from start, or from its newest checkpoint, to end.

`train` reads as a table of contents: mesh, model, data, hooks, loop. All state of a run is in
`TrainingRun`, which hooks see; all that a resumed run needs is in its checkpoints.
"""

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gnvc_jax.arrays import Tree
from gnvc_jax.buckets import is_remote
from gnvc_jax.errors import UsageError
from gnvc_jax.parallel import make_mesh, shardings
from gnvc_jax.parallel.rules import BATCH
from gnvc_jax.training import stages
from gnvc_jax.training.checkpoints import Checkpoints
from gnvc_jax.training.config import Experiment
from gnvc_jax.training.evaluator import Evaluator
from gnvc_jax.training.hooks import (
    CopyLogs,
    Hook,
    Meter,
    Profiler,
    SaveCheckpoints,
    TrainingRun,
    Watchdog,
)
from gnvc_jax.training.inputs import Clips
from gnvc_jax.training.metrics import make_writer, say
from gnvc_jax.training.run_folder import load_statistics
from gnvc_jax.training.stages import Stage
from gnvc_jax.training.stalls import StallAlarm
from gnvc_jax.training.startup import describe_run
from gnvc_jax.training.state import State, abstract_state, init_state
from gnvc_jax.training.step import jit_step
from gnvc_jax.training.throughput import Clock
from gnvc_jax.training.weights import Statistics, agreed


def train(stage: Stage, hooks: Sequence[Hook] = ()) -> State | None:
    """Trains to `optim.steps`, resuming from the newest checkpoint in `run.out` if there is one.

    Args:
        stage: Stage to train.
        hooks: Hooks to call around each step, beside logging and checkpoints.

    Returns:
        The last state, or None if a signal ended the run early, after a checkpoint.

    Raises:
        UsageError: If sizes do not fit the mesh, or the run folder belongs to another experiment.
        TrainingDiverged: If 100 updates in a row had to be skipped.
    """
    experiment, began = stage.experiment, time.time()
    mesh = make_mesh(experiment.mesh)
    check_mesh(experiment, mesh)

    # Left from the last to the first: hooks and writer close, signals are given back, and the last
    # checkpoint is waited for.
    with (
        jax.set_mesh(mesh),
        closing(Checkpoints(experiment)) as checkpoints,
        StopRequest() as stop,
        ExitStack() as stack,
    ):
        # Model: what trains, new or restored, and what does not, each where the rules place it.
        # `like` allocates nothing: it is shapes, types and shardings, into which state is restored.
        like = abstract_state(stage, mesh)
        state, position, statistics = start_state(stage, checkpoints, like)
        if position is None:  # a new run: from now on its folder has the whole model
            stages.keep(stage, statistics)
        frozen = stages.frozen(stage, statistics)
        frozen = jax.device_put(frozen, shardings(frozen, mesh))
        step = int(state.step)  # 0 for a new run

        # Data, from where the checkpoint left off.
        clips = Clips(stage.data, experiment.data, step, position)
        say(describe_run(experiment, state, frozen, clips.shape))

        # Log, checkpoints, and what else looks at the run.
        saver = SaveCheckpoints(checkpoints, experiment.run)
        copies = [CopyLogs(saver, experiment.run)] if is_remote(experiment.run.out) else []
        for hook in copies:  # before the writer, so that it closes after it
            stack.callback(hook.close)
        writer = stack.enter_context(closing(make_writer(experiment, step)))
        # A resumed run takes over the clock, so that goodput counts from the very first start.
        clock = Clock(**(position or {}).get("clock", {"started": began}))
        run = TrainingRun(stage, state, statistics, clips, clock, writer, step)
        own = [
            Profiler(experiment.run),
            Meter(stage, clock),
            saver,
            *copies,
        ]
        if experiment.run.watchdog_s:
            own.insert(0, Watchdog(experiment.run))
        if experiment.evaluate.every:
            own.append(Evaluator(stage, statistics))
        hooks = [*own, *hooks, StallAlarm(clock)]
        for hook in hooks:
            stack.enter_context(closing(hook))

        # Compiled at its first call, and again for each new shape of clips.
        train_step = jit_step(stage, mesh, state, frozen)
        over_batch = NamedSharding(mesh, P(BATCH))
        # Steps are dispatched ahead of the device: metrics are read one step late (see `Meter`), so
        # that the next batch is taken while the device works.
        # `shape` of the run is zeros at first, so that the first step counts as one of a new shape.
        while not run.ending:
            began = time.perf_counter()
            batch = put(clips.take(run.step), over_batch)
            run.waited = time.perf_counter() - began
            with compilation(run) if clips.shape != run.shape else nullcontext():
                run.shape = clips.shape
                for hook in hooks:
                    hook.before_step(run)
                with jax.profiler.StepTraceAnnotation("train", step_num=run.step + 1):
                    run.state, run.metrics = train_step(run.state, frozen, batch)
            run.step += 1
            # After a whole step. Hooks see it before the loop ends: they save, and write what is
            # left.
            run.stopped = stop.received or checkpoints.preempted(run.step)
            for hook in hooks:
                hook.after_step(run)
    if not run.finished:
        steps = experiment.optim.steps
        say(f"stopped after step {run.step} of {steps}; the same command continues")
        return None
    return run.state


def check_mesh(experiment: Experiment, mesh: Mesh) -> None:
    """Checks that batches can be spread over a mesh.

    Raises:
        UsageError: If they cannot, or if checkpoints are timed by clocks that differ between
            processes.
    """
    # All devices along context and tensor work on the same clips.
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if experiment.data.batch % (shards * experiment.optim.accumulate):
        raise UsageError(
            f"data.batch {experiment.data.batch} does not divide by {shards} devices"
            f" times optim.accumulate {experiment.optim.accumulate}"
        )
    if shards % jax.process_count():
        raise UsageError(
            f"mesh data x fsdp = {shards}: each of {jax.process_count()} processes must feed "
            "devices of its own"
        )
    if jax.process_count() > 1 and experiment.run.checkpoint_every is None:
        raise UsageError("run.checkpoint_every: needed here, clocks of several processes differ")


def start_state(
    stage: Stage, checkpoints: Checkpoints, like: State
) -> tuple[State, dict | None, Statistics]:
    """Restores the newest state that can be read, or makes a new one.

    Args:
        stage: Stage to train.
        checkpoints: Checkpoints of the run.
        like: State as shapes with shardings. Every leaf is placed as there: one that is not costs a
            second compilation at step 1.

    Returns:
        The state, the data position that goes with it (None for a new run), and the statistics that
        the stage measured when the run began. The latter are kept in checkpoints, so that neither
        resuming nor other data change what the parameters were trained with.
    """
    saved = checkpoints.restore_newest(like)
    if saved is not None:
        return *saved, load_statistics(stage.experiment.run.out)
    # Statistics come first, since starting weights may depend on them; then random parameters,
    # weights from elsewhere in their place, and averages and moments of the result.
    statistics = agreed(stage.measure())
    init_key, run_key = jax.random.split(jax.random.key(stage.experiment.run.seed))
    places = jax.tree.map(lambda x: x.sharding, like)
    # Drawn in their shardings: no single device has to hold the whole model.
    init = jax.jit(lambda key: stages.init_trained(stage, key), out_shardings=places.params)
    params = stages.start(stage, init(init_key), statistics)
    # Jitted for its `out_shardings`: counters and the key are placed by it, too.
    make = jax.jit(init_state, static_argnums=0, out_shardings=places)
    return make(stage.experiment.optim, params, run_key), None, statistics


@contextmanager
def compilation(run: TrainingRun) -> Iterator[None]:
    """Surrounds the first step with clips of a new shape, which is compiled; no rate counts it."""
    run.waited, began = 0.0, time.perf_counter()
    with run.paused():
        yield
    say(f"compiled in {time.perf_counter() - began:.1f} s")


def put(batch: Tree, sharding: NamedSharding) -> Tree:
    """Makes global arrays from this process's part of a batch, which is in NumPy."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


class StopRequest:
    """Turns SIGINT and SIGTERM into a flag inside a `with` block; a second signal acts at once.

    With several processes the cluster's own notice is used instead, since all must stop together.

    Attributes:
        received: Whether a signal came.
    """

    def __enter__(self) -> "StopRequest":
        self.received = False
        numbers = (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else ()
        self.previous: dict[int, Any] = {n: signal.signal(n, self.receive) for n in numbers}
        return self

    def receive(self, number: int, frame: object) -> None:
        """Handles a signal."""
        self.received = True
        signal.signal(number, self.previous[number])

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
