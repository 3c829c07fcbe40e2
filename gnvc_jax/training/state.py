"""The train state: weights, their average, optimizer moments, and the key of all randomness.

`init_state` makes a new one and `abstract_state` describes it before there is any; the step of
`gnvc_jax.training.step` changes it, and `gnvc_jax.training.checkpoints` saves it.
"""

import dataclasses
import operator

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gnvc_jax.arrays import Tree
from gnvc_jax.parallel import shardings
from gnvc_jax.training import stages
from gnvc_jax.training.batched_optimizer import is_adversary, is_kernel
from gnvc_jax.training.config import OptimConfig
from gnvc_jax.training.stages import Stage


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Everything that a step changes or that makes it reproducible; arrays only.

    Attributes:
        step: Number of updates done or skipped, int32.
        params: Parameters that train.
        ema: Exponential moving average of the parameters.
        opt_state: Moments of the optimizer.
        key: Random key of the whole run.
    """

    step: jax.Array
    params: Tree
    ema: Tree
    opt_state: Tree
    key: jax.Array


def learning_rate(config: OptimConfig) -> optax.Schedule:
    """Learning rate by step.

    It rises linearly from 0 to `lr` in `warmup` steps and falls as a cosine to
    `final_lr_ratio * lr` at `steps`.
    """
    end = max(config.steps, config.warmup + 1)  # a run may be shorter than its warm-up
    return optax.warmup_cosine_decay_schedule(
        0.0, config.lr, config.warmup, end, config.lr * config.final_lr_ratio
    )


def optimizer(config: OptimConfig, decayed: Tree, adversary: Tree) -> optax.GradientTransformation:
    """Clipping and AdamW, without the learning rate, which the step applies.

    A discriminator's gradient is clipped by itself, so that neither side of the game slows the
    other one.

    Args:
        config: Settings of the optimizer.
        decayed: Tree of bools like the parameters or their stacks: which of them decay.
        adversary: The same: which of them are a discriminator's.
    """
    clip = optax.clip_by_global_norm(config.clip)
    if any(jax.tree.leaves(adversary)):
        model = jax.tree.map(operator.not_, adversary)
        clip = optax.chain(optax.masked(clip, model), optax.masked(clip, adversary))
    # Moments see clipped gradients. Decay comes after them: it is decoupled, as in AdamW
    # (Loshchilov and Hutter, arXiv 1711.05101), and scaled by the learning rate alone.
    return optax.chain(
        clip,
        optax.scale_by_adam(*config.betas),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
    )


def init_state(config: OptimConfig, params: Tree, key: jax.Array) -> State:
    """Makes the state before the first step."""
    # Moments have the shapes of parameters here; the step stacks both.
    kernels, adversary = (
        jax.tree_util.tree_map_with_path(lambda path, _, which=which: which(path), params)
        for which in (is_kernel, is_adversary)
    )
    return State(
        step=jnp.int32(0),
        params=params,
        ema=jax.tree.map(jnp.copy, params),  # a second buffer: the state is donated
        opt_state=optimizer(config, kernels, adversary).init(params),
        key=key,
    )


def abstract_state(stage: Stage, mesh: Mesh) -> State:
    """Describes the train state by shapes, types and shardings.

    Averages and moments lie as parameters do.

    Raises:
        UsageError: If the mesh does not divide a parameter that must be split.
    """

    def make(key: jax.Array) -> State:
        return init_state(stage.experiment.optim, stages.init_trained(stage, key), key)

    # Nothing is computed. Paths of averages and moments end as those of parameters, and so get the
    # same shardings; step, counters and key are replicated.
    state = jax.eval_shape(make, jax.random.key(0))
    return jax.tree.map(lambda x, s: x.update(sharding=s), state, shardings(state, mesh))
