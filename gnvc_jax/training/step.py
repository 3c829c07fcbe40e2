"""The train step: gradient, AdamW and the average of the weights, as one pure function.

`make_step` builds the function from a loss, and `jit_step` compiles it for the arrays of a stage on
a mesh. Nothing else in training is jitted in the loop.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gnvc_jax.arrays import Tree
from gnvc_jax.parallel.rules import BATCH
from gnvc_jax.training import stages
from gnvc_jax.training.batched_optimizer import StackedParameters
from gnvc_jax.training.config import OptimConfig
from gnvc_jax.training.stages import Stage
from gnvc_jax.training.state import State, learning_rate, optimizer


def gradient(loss: Callable, parts: int) -> Callable:
    """Makes `jax.value_and_grad` of a loss, as the mean over equal parts of the batch.

    Args:
        loss: Function (params, frozen, batch, key, step) -> (loss, metrics).
        parts: Number of parts, which are computed one after another to save memory.
    """
    whole = jax.value_and_grad(loss, has_aux=True)
    if parts == 1:
        return whole

    def divided(x: jax.Array) -> jax.Array:
        # Parts are interleaved: clips are sharded in blocks, so each part has clips of all devices.
        return rearrange(x, "(b parts) ... -> parts b ...", parts=parts)

    def mean(params: Tree, frozen: Tree, batch: Tree, key: jax.Array, step: jax.Array) -> Tree:
        # A scan over parts, whose carry adds up their shares of ((loss, metrics), gradients).
        def add(total: Tree, xs: Tree) -> tuple[Tree, None]:
            part, i = xs
            # Each part draws noise and levels of its own.
            done = whole(params, frozen, part, jax.random.fold_in(key, i), step)
            return jax.tree.map(lambda a, b: a + b / parts, total, done), None

        batch = jax.tree.map(divided, batch)  # (parts, b / parts, ...)
        first = jax.tree.map(lambda x: x[0], batch)
        # Only traced: which metrics there are is known to the loss alone.
        like = jax.eval_shape(whole, params, frozen, first, key, step)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        return jax.lax.scan(add, zeros, (batch, jnp.arange(parts)))[0]

    return mean


def make_step(
    config: OptimConfig, loss: Callable
) -> Callable[[State, Tree, Tree], tuple[State, dict[str, jax.Array]]]:
    """Makes the pure function (state, frozen, batch) -> (state, metrics).

    An update whose gradient norm is not finite is left out: weights, moments and average stay, only
    the step counts on, and the metric `skipped` is 1.

    Metrics have, for each part of the model that trains, the norms of its parameters before the
    update, of their gradient before clipping, and of the update: norm/param_codec,
    norm/grad_codec, norm/update_codec.

    Args:
        config: Settings of the optimizer.
        loss: Function (params, frozen, batch, key, step) -> (loss, metrics), see
            `gnvc_jax.training.stages.objective`.
    """
    schedule = learning_rate(config)

    def step(state: State, frozen: Tree, batch: Tree) -> tuple[State, dict[str, jax.Array]]:
        # Gradient of the loss on the whole batch. The key is a function of run and step alone, so a
        # resumed run draws the same numbers.
        key = jax.random.fold_in(state.key, state.step)
        (value, parts), grads = gradient(loss, config.accumulate)(
            state.params, frozen, batch, key, state.step
        )

        # Update by AdamW. Many small parameters become few arrays first; `old` keeps what an
        # unusable gradient would spoil.
        stacks = StackedParameters(state.params)
        grads, *old = stacks.pack((grads, state.params, state.ema, state.opt_state))
        params, ema, opt_state = old
        grad_norm = optax.tree.norm(grads)  # before clipping
        # By `state.step`, which counts skipped updates, too. Counters of optax stand still then.
        lr = schedule(state.step)
        update = optimizer(config, stacks.kernels, stacks.adversary).update
        updates, opt_state = update(grads, opt_state, params)
        updates = jax.tree.map(lambda u: lr * u, updates)
        norms = {
            f"norm/{name}_{part}": norm
            for name, tree in (("param", params), ("grad", grads), ("update", updates))
            for part, norm in stacks.norms(tree).items()
        }
        params = jax.tree.map(jnp.subtract, params, updates)
        # In the first steps the average follows closely, so that it forgets the initialisation.
        decay = jnp.minimum(config.ema, (1.0 + state.step) / (10.0 + state.step))
        ema = jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, ema, params)

        # One NaN anywhere makes the norm NaN. `where` keeps the old values on the device, without a
        # round trip to the host.
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
            **norms,
        }
        return State(state.step + 1, params, ema, opt_state, state.key), values

    return step


def jit_step(stage: Stage, mesh: Mesh, state: State, frozen: Tree) -> Callable:
    """Jits the train step of a stage, to run it or to compile it; the state is donated.

    Args:
        stage: The stage.
        mesh: Mesh that the step runs on.
        state: Train state, arrays or shapes with shardings.
        frozen: Arrays or shapes with shardings that do not train, see
            `gnvc_jax.training.stages.frozen`.
    """
    # Metrics are whole on every device, so that each process can read them. The state leaves as it
    # came in: its buffers can be reused, and the next call compiles nothing.
    whole, batch = NamedSharding(mesh, P()), NamedSharding(mesh, P(BATCH))
    state, frozen = jax.tree.map(lambda x: x.sharding, (state, frozen))
    return jax.jit(
        make_step(stage.experiment.optim, stages.objective(stage)),
        in_shardings=(state, frozen, batch),
        out_shardings=(state, whole),
        donate_argnums=0,
    )
