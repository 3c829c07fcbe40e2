"""Second stage of the small model: the codec over 33 frames, where drift shows.

gnvc train --config small/rollout --data.path CLIPS

Errors accumulate from latent to latent, so a codec that was trained on nine frames loses quality
along a group. Two clips of 33 frames cost about as much per step as eight of nine frames.
"""

import dataclasses

from configs.small.codec import experiment as codec
from gnvc_jax.training.config import InitConfig

experiment = dataclasses.replace(
    codec,
    init=InitConfig(run=codec.run.out),
    data=dataclasses.replace(codec.data, frames=33, batch=2),
    optim=dataclasses.replace(codec.optim, lr=4e-4, steps=4000),
    run=dataclasses.replace(codec.run, out="runs/small/rollout"),
)
