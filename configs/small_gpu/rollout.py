"""Second stage of the small model at twice the width: the codec over 33 frames.

gnvc train --config small_gpu/rollout --data.path CLIPS

Not run yet: no accelerator was at hand.
"""

import dataclasses

from configs.small.rollout import experiment as small
from configs.small_gpu.codec import experiment as codec
from gnvc_jax.training.config import InitConfig

experiment = dataclasses.replace(
    small,
    codec=codec.codec,
    init=InitConfig(run=codec.run.out),
    data=dataclasses.replace(codec.data, frames=small.data.frames, batch=16),
    optim=dataclasses.replace(small.optim, steps=20_000),
    run=dataclasses.replace(codec.run, out="runs/small_gpu/rollout"),
)
