"""The stage `codec` without the cost of compiling its networks, for tests of all that is around it.

Parameters are those of the stage. They start at a constant and are pulled towards zero.
"""

import dataclasses

import jax
import jax.numpy as jnp

from gnvc_jax.training.stages import model_shapes
from gnvc_jax.training.stages.codec import codec_stage


def cheap_codec_stage(experiment):
    stage = codec_stage(experiment)
    shapes = model_shapes(stage)

    def loss(params, constants, batch, key, step):
        # The mean of the batch takes part, so that what is logged depends on the data.
        error = sum(jnp.sum(x**2) for x in jax.tree.leaves(params))
        return error + jnp.mean(batch), {}

    return dataclasses.replace(
        stage,
        init=lambda key: jax.tree.map(lambda x: jnp.full(x.shape, 0.1, x.dtype), shapes),
        loss=loss,
    )
