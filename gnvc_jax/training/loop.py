"""The train state, the train step and the loop around them."""

import dataclasses
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gnvc_jax.training import metrics
from gnvc_jax.training.checkpoints import Checkpoints
from gnvc_jax.training.config import Experiment, MeshConfig, OptimConfig
from gnvc_jax.training.stages import Stage

Tree = Any

# A run whose gradients stay non-finite this long will not recover.
MAX_SKIPPED_IN_A_ROW = 100


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


def make_mesh(config: MeshConfig) -> Mesh:
    """Mesh with the axes data, fsdp, context, tensor over the devices of all hosts.

    Raises ValueError if the sizes do not fit the number of devices.
    """
    sizes, devices = dataclasses.asdict(config), jax.devices()
    if sizes["data"] == -1:
        others = math.prod(sizes.values()) * -1
        sizes["data"] = max(1, len(devices) // others)
    used = math.prod(sizes.values())
    if used > len(devices) or (used < len(devices) and jax.process_count() > 1):
        raise ValueError(f"mesh {sizes} needs {used} devices, there are {len(devices)}")
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=devices[:used],
    )


def learning_rate(config: OptimConfig) -> optax.Schedule:
    """Linear from 0 over `warmup` steps to `lr`, then a cosine to `final_lr_ratio * lr` at `steps`."""
    return optax.warmup_cosine_decay_schedule(
        0.0, config.lr, config.warmup, config.steps, config.lr * config.final_lr_ratio
    )


def optimiser(config: OptimConfig) -> optax.GradientTransformation:
    """Clipping and AdamW without the learning rate, which the step applies."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.scale_by_adam(*config.betas),
        optax.add_decayed_weights(
            config.weight_decay, mask=lambda params: jax.tree.map(lambda x: x.ndim >= 2, params)
        ),
    )


def init_state(config: OptimConfig, params: Tree, key: jax.Array) -> State:
    """The state before the first step."""
    return State(
        step=jnp.int32(0),
        params=params,
        ema=jax.tree.map(jnp.copy, params),  # a second buffer: the state is donated
        opt_state=optimiser(config).init(params),
        key=key,
    )


def make_step(
    config: OptimConfig, loss: Callable
) -> Callable[[State, Tree, Tree], tuple[State, dict[str, jax.Array]]]:
    """The pure function (state, frozen, batch) -> (state, metrics); loss: see `Stage.loss`.

    An update whose gradient norm is not finite is left out: weights, moments and average stay, only
    the step counts on, and the metric `skipped` is 1.
    """
    schedule, optimise = learning_rate(config), optimiser(config)

    def step(state: State, frozen: Tree, batch: Tree) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(state.key, state.step)
        (value, parts), grads = jax.value_and_grad(loss, has_aux=True)(
            state.params, frozen, batch, key, state.step
        )
        grad_norm = optax.global_norm(grads)
        lr = schedule(state.step)
        updates, opt_state = optimise.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - lr * u, state.params, updates)
        decay = jnp.minimum(config.ema, (1.0 + state.step) / (10.0 + state.step))
        ema = jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, state.ema, params)

        finite = jnp.isfinite(grad_norm)
        old = (state.params, state.ema, state.opt_state)
        params, ema, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, ema, opt_state), old
        )
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


class Meter:
    """Means of the metrics since the last report, and the speed."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.values, self.waited, self.since = [], 0.0, time.perf_counter()

    def report(self) -> dict[str, float]:
        """Mean of each metric, steps per second, share of the time spent waiting for data."""
        seconds = time.perf_counter() - self.since
        means = {k: float(np.mean([v[k] for v in self.values])) for k in self.values[0]}
        speed = {"steps_per_s": len(self.values) / seconds, "data_wait": self.waited / seconds}
        self.reset()
        return means | speed


def train(experiment: Experiment, stage: Stage) -> State | None:
    """Train to `optim.steps`, resuming from the newest checkpoint in `run.out` if there is one.

    Returns the last state, or None if a signal ended the run early, after a checkpoint.
    Raises ValueError for sizes that do not fit the mesh and for a run folder of another experiment,
    FloatingPointError if 100 updates in a row had to be skipped.
    """
    optim, run = experiment.optim, experiment.run
    mesh = make_mesh(experiment.mesh)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if experiment.data.batch % shards:
        raise ValueError(
            f"data.batch {experiment.data.batch} is not a multiple of {shards} devices"
        )
    everywhere = NamedSharding(mesh, P())
    over_batch = NamedSharding(mesh, P(("data", "fsdp")))

    def put(batch: Tree) -> Tree:
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(over_batch, x), batch)

    with jax.set_mesh(mesh), StopRequest() as stop:
        checkpoints = Checkpoints(experiment)
        data = iter(stage.dataset())

        # Every leaf is placed explicitly: a leaf that is not costs a second compilation at step 1.
        init_key, run_key = jax.random.split(jax.random.key(run.seed))
        make_state = jax.jit(init_state, static_argnums=0, out_shardings=everywhere)
        first = checkpoints.latest() or 0
        if first:
            like = jax.eval_shape(lambda k: init_state(optim, stage.init(k), run_key), init_key)
            like = jax.tree.map(lambda x: x.update(sharding=everywhere), like)
            state, position = checkpoints.restore(first, like)
            data.set_state(position)
        else:
            params = jax.jit(stage.init, out_shardings=everywhere)(init_key)
            state = make_state(optim, stage.warm_start(params), run_key)
        frozen = jax.device_put(stage.frozen(), everywhere)
        step_fn = jax.jit(make_step(optim, stage.loss), donate_argnums=0)

        writer = make_writer(experiment)
        writer.start(first)
        meter, pending, skipped, saved_at = Meter(), None, 0, time.monotonic()

        def collect(step: int, values: dict[str, jax.Array]) -> None:
            nonlocal skipped
            meter.values.append(jax.device_get(values))
            skipped = skipped + 1 if meter.values[-1]["skipped"] else 0
            if skipped == MAX_SKIPPED_IN_A_ROW:
                raise FloatingPointError(
                    f"{skipped} gradients in a row were not finite: step {step}"
                )
            if step % run.log_every == 0 or step == optim.steps:
                writer.write(step, meter.report())

        step = first
        while step < optim.steps and not stop.received:
            waiting = time.perf_counter()
            batch = put(next(data))
            meter.waited += time.perf_counter() - waiting
            state, values = step_fn(state, frozen, batch)
            step += 1
            # The values of the step before: the device works on this one meanwhile.
            if pending:
                collect(*pending)
            pending = (step, values)
            if checkpoints.preempted(step):
                break
            if due(run, step, saved_at):
                checkpoints.save(step, state, data.get_state())
                saved_at = time.monotonic()
        if pending:
            collect(*pending)
            checkpoints.save(step, state, data.get_state())
        checkpoints.close()
        writer.close()
    if step < optim.steps:
        print(f"stopped at step {step}, saved in {run.out}; the same command continues", flush=True)
        return None
    return state


def due(run: Any, step: int, saved_at: float) -> bool:
    """Whether it is time for a checkpoint; saved_at: `time.monotonic()` of the last one."""
    if run.checkpoint_every is not None:
        return step % run.checkpoint_every == 0
    return time.monotonic() - saved_at >= run.checkpoint_every_s


def make_writer(experiment: Experiment) -> metrics.Writer:
    """The writers that the experiment asks for; none on other processes than the first."""
    out = Path(experiment.run.out)
    if jax.process_index() != 0:
        return metrics.Many([])
    writers = [metrics.Console(experiment.optim.steps), metrics.JsonLines(out / "metrics.jsonl")]
    if experiment.run.tensorboard:
        writers.append(metrics.TensorBoard(out / "tensorboard"))
    return metrics.Many(writers)
