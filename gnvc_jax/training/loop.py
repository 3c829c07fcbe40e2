"""The train state, the train step and the loop around them."""

import collections
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gnvc_jax.errors import TrainingDiverged, UsageError
from gnvc_jax.parallel import make_mesh, shardings
from gnvc_jax.parallel.rules import BATCH
from gnvc_jax.training import inputs, metrics, stages
from gnvc_jax.training.batched_optimizer import StackedParameters, is_kernel
from gnvc_jax.training.checkpoints import Checkpoints, load_statistics
from gnvc_jax.training.config import Experiment, OptimConfig, RunConfig
from gnvc_jax.training.stages import Stage
from gnvc_jax.training.throughput import Clock, WorkPerStep
from gnvc_jax.training.weights import Statistics, agreed

Tree = Any

# A run whose gradients stay non-finite this long will not recover.
MAX_SKIPPED_IN_A_ROW = 100

# What the amounts of `WorkPerStep` become when divided by the time they took.
RATES = {"frames": "frames_per_s", "tokens": "tokens_per_s", "peak_s": "mfu"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Everything that a step changes or that makes it reproducible; arrays only.

    step: int32, updates done or skipped; ema: averaged params; key: of the whole run.
    """

    step: jax.Array
    params: Tree
    ema: Tree
    opt_state: Tree
    key: jax.Array


def learning_rate(config: OptimConfig) -> optax.Schedule:
    """Linear from 0 to `lr` in `warmup` steps, cosine to `final_lr_ratio * lr` at `steps`."""
    end = max(config.steps, config.warmup + 1)  # a run may be shorter than its warm-up
    return optax.warmup_cosine_decay_schedule(
        0.0, config.lr, config.warmup, end, config.lr * config.final_lr_ratio
    )


def optimizer(config: OptimConfig, decayed: Tree) -> optax.GradientTransformation:
    """Clipping and AdamW, without the learning rate, which the step applies.

    decayed: a tree of bools like the parameters or their stacks: which of them decay.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.scale_by_adam(*config.betas),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
    )


def init_state(config: OptimConfig, params: Tree, key: jax.Array) -> State:
    """The state before the first step."""
    kernels = jax.tree_util.tree_map_with_path(lambda path, _: is_kernel(path), params)
    return State(
        step=jnp.int32(0),
        params=params,
        ema=jax.tree.map(jnp.copy, params),  # a second buffer: the state is donated
        opt_state=optimizer(config, kernels).init(params),
        key=key,
    )


def gradient(loss: Callable, parts: int) -> Callable:
    """`jax.value_and_grad` of a stage's loss, as the mean over `parts` equal parts of the batch.

    Parts are interleaved, so that each is spread over all devices as the batch is.
    """
    whole = jax.value_and_grad(loss, has_aux=True)
    if parts == 1:
        return whole

    def divided(x: jax.Array) -> jax.Array:
        return rearrange(x, "(b parts) ... -> parts b ...", parts=parts)

    def mean(params: Tree, frozen: Tree, batch: Tree, key: jax.Array, step: jax.Array):
        def add(total, xs):
            part, i = xs
            done = whole(params, frozen, part, jax.random.fold_in(key, i), step)
            return jax.tree.map(lambda a, b: a + b / parts, total, done), None

        batch = jax.tree.map(divided, batch)
        first = jax.tree.map(lambda x: x[0], batch)
        like = jax.eval_shape(whole, params, frozen, first, key, step)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        return jax.lax.scan(add, zeros, (batch, jnp.arange(parts)))[0]

    return mean


def make_step(
    config: OptimConfig, loss: Callable
) -> Callable[[State, Tree, Tree], tuple[State, dict[str, jax.Array]]]:
    """The pure function (state, frozen, batch) -> (state, metrics).

    loss: function (params, frozen, batch, key, step), see `gnvc_jax.training.stages.objective`.
    An update whose gradient norm is not finite is left out: weights, moments and average stay, only
    the step counts on, and the metric `skipped` is 1.
    """
    schedule = learning_rate(config)

    def step(state: State, frozen: Tree, batch: Tree) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(state.key, state.step)
        (value, parts), grads = gradient(loss, config.accumulate)(
            state.params, frozen, batch, key, state.step
        )
        stacks = StackedParameters(state.params)
        grads, *old = stacks.pack((grads, state.params, state.ema, state.opt_state))
        params, ema, opt_state = old
        grad_norm = optax.tree.norm(grads)
        lr = schedule(state.step)
        update = optimizer(config, stacks.kernels).update
        updates, opt_state = update(grads, opt_state, params)
        params = jax.tree.map(lambda p, u: p - lr * u, params, updates)
        decay = jnp.minimum(config.ema, (1.0 + state.step) / (10.0 + state.step))
        ema = jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, ema, params)

        finite = jnp.isfinite(grad_norm)
        new = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), [params, ema, opt_state], old
        )
        params, ema, opt_state = (stacks.unpack(x) for x in new)
        values = {
            "loss": value,
            **parts,
            "grad_norm": grad_norm,
            "lr": lr,
            "skipped": jnp.where(finite, 0.0, 1.0),
        }
        return State(state.step + 1, params, ema, opt_state, state.key), values

    return step


class StopRequest:
    """Turns SIGINT and SIGTERM into a flag inside a `with` block; a second signal acts at once.

    With several processes the cluster's own notice is used instead, since all must stop together.
    """

    def __enter__(self) -> "StopRequest":
        self.received = False
        numbers = (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else ()
        self.previous = {n: signal.signal(n, self.receive) for n in numbers}
        return self

    def receive(self, number: int, frame: object) -> None:
        self.received = True
        signal.signal(number, self.previous[number])

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class Clips:
    """The batches of a run, in order; a new iterator wherever clips change their length.

    The new iterator goes on with the number of the next clip: draws are numbered through the whole
    run. One that began again at 0 would draw the same clips in every phase.

    position: what `get_state` gave, None at the start of a run.
    """

    def __init__(self, stage: Stage, step: int, position: dict | None):
        self.stage, self.lengths = stage, stage.experiment.data
        self.start(self.lengths.frames_at(step), position and position["batches"])

    def start(self, frames: int, batches: dict | None) -> None:
        """batches: the state of the iterator before."""
        self.frames, self.batches = frames, iter(self.stage.data.batches(frames))
        if batches is not None:
            self.batches.set_state(batches)

    def take(self, step: int) -> Tree:
        """The batch of the step after `step` others."""
        frames = self.lengths.frames_at(step)
        if frames != self.frames:
            self.start(frames, self.batches.get_state())
        return next(self.batches)

    def get_state(self) -> dict:
        return {"batches": self.batches.get_state()}


class Profiler:
    """Traces the steps `run.profile`; on the first process only."""

    def __init__(self, run: RunConfig):
        self.first, self.last = run.profile or (0, -1)
        self.folder, self.running = Path(run.out) / "profile", False

    def before(self, step: int) -> None:
        """Called before each step, counted from 1."""
        wanted = self.first <= step <= self.last and jax.process_index() == 0
        if wanted and not self.running:
            jax.profiler.start_trace(str(self.folder))
            self.running = True
        elif not wanted:
            self.close()

    def close(self) -> None:
        """Writes what was traced, which the device may still be working on."""
        if self.running:
            self.running = False
            jax.profiler.stop_trace()


class Meter:
    """Collects the metrics of each step and writes their means every `log_every` steps.

    A mean is over the steps where the metric is finite, so that a skipped step spoils none. Beside
    them: step_s (seconds of one), frames_per_s, tokens_per_s (of the refiner), mfu (where the peak
    of the devices is known), data_wait (share of the time spent waiting for batches), goodput (see
    `Clock`), device_gib (see `device_memory`), left_out (videos that this process could not read,
    wholly or in part, if any).
    """

    def __init__(self, stage: Stage, writer: metrics.Writer, clock: Clock):
        experiment = stage.experiment
        self.steps, self.log_every = experiment.optim.steps, experiment.run.log_every
        self.work, self.writer, self.clock, self.skipped = WorkPerStep(stage), writer, clock, 0
        self.left_out = inputs.left_out(experiment)
        self.restart()

    def restart(self) -> None:
        self.values, self.done = [], collections.Counter()
        self.waited, self.since = 0.0, time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        """These did not go into steps."""
        self.since += seconds

    def add(self, step: int, values: dict[str, jax.Array], frames: int) -> None:
        """frames: per clip. TrainingDiverged if all of the last updates had to be skipped."""
        self.values.append(jax.device_get(values))
        self.done.update(self.work.of(frames))
        self.skipped = self.skipped + 1 if self.values[-1]["skipped"] else 0
        if self.skipped == MAX_SKIPPED_IN_A_ROW:
            raise TrainingDiverged(f"step {step}: the last {self.skipped} gradients not finite")
        if step % self.log_every == 0 or step == self.steps:
            seconds = time.perf_counter() - self.since
            keys = sorted(values, key=lambda k: k != "loss")
            means = {k: mean_of_finite([v[k] for v in self.values]) for k in keys}
            rates = {
                "step_s": seconds / len(self.values),
                **{RATES[name]: amount / seconds for name, amount in self.done.items()},
                "data_wait": self.waited / seconds,
                "goodput": self.clock.goodput(),
            }
            count = len(self.left_out.read())
            data = {"left_out": count} if count else {}
            self.writer.write(step, means | rates | device_memory() | data)
            self.restart()


def mean_of_finite(values: Sequence[float]) -> float:
    """Mean of those values that are finite; NaN if none is."""
    finite = [x for x in values if np.isfinite(x)]
    return float(np.mean(finite)) if finite else math.nan


def abstract_state(stage: Stage, mesh: Mesh) -> State:
    """The train state as shapes, types and shardings: averages and moments lie as parameters do.

    Raises UsageError for parameters that the mesh does not divide.
    """

    def make(key):
        return init_state(stage.experiment.optim, stages.init_trained(stage, key), key)

    state = jax.eval_shape(make, jax.random.key(0))
    return jax.tree.map(lambda x, s: x.update(sharding=s), state, shardings(state, mesh))


def start_state(
    stage: Stage, checkpoints: Checkpoints, like: State
) -> tuple[State, dict | None, Statistics]:
    """The newest state that can be read, or a new one.

    Every leaf is placed as in `like`: one that is not costs a second compilation at step 1.

    Returns:
        The state, the data position that goes with it (None for a new run), and what the stage
        measured when the run began. The latter is kept in checkpoints, so that neither resuming nor
        other data change what the parameters were trained with.
    """
    saved = checkpoints.restore_newest(like)
    if saved is not None:
        return *saved, load_statistics(stage.experiment.run.out)
    statistics = agreed(stage.measure())
    init_key, run_key = jax.random.split(jax.random.key(stage.experiment.run.seed))
    places = jax.tree.map(lambda x: x.sharding, like)
    init = jax.jit(lambda key: stages.init_trained(stage, key), out_shardings=places.params)
    params = stages.start(stage, init(init_key), statistics)
    make = jax.jit(init_state, static_argnums=0, out_shardings=places)
    return make(stage.experiment.optim, params, run_key), None, statistics


def jit_step(stage: Stage, mesh: Mesh, state: State, frozen: Tree) -> Callable:
    """The train step for arrays placed by the rules, to run or to compile; the state is donated.

    state, frozen: as shapes with shardings, or arrays.
    """
    whole, batch = NamedSharding(mesh, P()), NamedSharding(mesh, P(BATCH))
    state, frozen = jax.tree.map(lambda x: x.sharding, (state, frozen))
    return jax.jit(
        make_step(stage.experiment.optim, stages.objective(stage)),
        in_shardings=(state, frozen, batch),
        out_shardings=(state, whole),
        donate_argnums=0,
    )


def train(stage: Stage) -> State | None:
    """Trains to `optim.steps`, resuming from the newest checkpoint in `run.out` if there is one.

    Returns the last state, or None if a signal ended the run early, after a checkpoint.
    Raises UsageError for sizes that do not fit the mesh and for a run folder of another experiment,
    TrainingDiverged if 100 updates in a row had to be skipped.
    """
    experiment = stage.experiment
    began, run, last = time.time(), experiment.run, experiment.optim.steps
    mesh = make_mesh(experiment.mesh)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    pieces = shards * experiment.optim.accumulate
    if experiment.data.batch % pieces:
        raise UsageError(
            f"data.batch {experiment.data.batch} does not divide by {shards} devices"
            f" times optim.accumulate {experiment.optim.accumulate}"
        )
    if shards % jax.process_count():
        raise UsageError(
            f"mesh data x fsdp = {shards}: each of {jax.process_count()} processes must feed "
            "devices of its own"
        )
    if jax.process_count() > 1 and run.checkpoint_every is None:
        raise UsageError("run.checkpoint_every: needed here, clocks of several processes differ")
    over_batch = NamedSharding(mesh, P(BATCH))

    with (
        jax.set_mesh(mesh),
        closing(Checkpoints(experiment)) as checkpoints,
        ExitStack() as stack,
        StopRequest() as stop,
    ):
        like = abstract_state(stage, mesh)
        state, position, statistics = start_state(stage, checkpoints, like)
        data = Clips(stage, int(state.step), position)
        clock = Clock(**(position or {}).get("clock", {"started": began}))
        frozen = stages.frozen(stage, statistics)
        frozen = jax.device_put(frozen, shardings(frozen, mesh))
        train_step = jit_step(stage, mesh, state, frozen)

        step = int(state.step)
        writer = stack.enter_context(closing(make_writer(experiment, step)))
        profiler = stack.enter_context(closing(Profiler(run)))
        meter, pending, saved_at = Meter(stage, writer, clock), None, time.monotonic()

        def save() -> None:
            jax.block_until_ready(state)  # the step in flight counts as one
            began = time.perf_counter()
            clock.stop()
            position = data.get_state() | {"clock": clock.get_state()}
            checkpoints.save(step, state, position, statistics)
            clock.run()
            meter.leave_out(time.perf_counter() - began)

        frames = None  # of the clips that the step is compiled for
        while step < last and not stop.received and not checkpoints.preempted(step):
            waiting = time.perf_counter()
            batch = put(data.take(step), over_batch)
            called = time.perf_counter()
            if compiles := data.frames != frames:
                frames = data.frames
                clock.stop()
                meter.work.of(frames)
            else:
                meter.waited += called - waiting
            profiler.before(step + 1)
            with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
                state, values = train_step(state, frozen, batch)
            step += 1
            if compiles:
                now = time.perf_counter()
                say(f"compiled in {now - called:.1f} s")
                meter.leave_out(now - waiting)  # the rates are those of the steps alone
                clock.run()
            if pending:
                meter.add(*pending)  # of the step before, while the device works on this one
            pending = step, values, data.frames
            if due(run, step, saved_at):
                save()
                saved_at = time.monotonic()
        if pending:
            meter.add(*pending)
            save()
    if step < last:
        say(f"stopped after step {step} of {last}; the same command continues")
        return None
    return state


def say(text: str) -> None:
    """Once, not by every process."""
    if jax.process_index() == 0:
        print(text, flush=True)


def put(batch: Tree, sharding: NamedSharding) -> Tree:
    """This process's part of a batch (numpy) as global arrays."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def device_memory() -> dict[str, float]:
    """Largest use of a device of this process so far, in GiB; empty where it is not known."""
    found = [d.memory_stats() or {} for d in jax.local_devices()]
    peaks = [stats["peak_bytes_in_use"] / 2**30 for stats in found if "peak_bytes_in_use" in stats]
    return {"device_gib": max(peaks)} if peaks else {}


def due(run: RunConfig, step: int, saved_at: float) -> bool:
    """Whether it is time for a checkpoint; saved_at: `time.monotonic()` of the last one."""
    if run.checkpoint_every is not None:
        return step % run.checkpoint_every == 0
    return time.monotonic() - saved_at >= run.checkpoint_every_s


def make_writer(experiment: Experiment, step: int) -> metrics.Writer:
    """The writers that the experiment asks for, none on other processes than the first.

    step: the run starts after it.
    """
    out = Path(experiment.run.out)
    if jax.process_index() != 0:
        return metrics.Many([])
    writers = [
        metrics.Console(experiment.optim.steps),
        metrics.JsonLines(out / "metrics.jsonl", step),
    ]
    if experiment.run.tensorboard:
        writers.append(metrics.TensorBoard(out / "tensorboard", step))
    return metrics.Many(writers)
