"""Third stage of the small model at twice the width: a refiner of 60 million parameters.

gnvc train --config small_gpu/refiner --data.path CLIPS

Not run yet: no accelerator was at hand.
"""

import dataclasses

from configs.small.refiner import experiment as small
from configs.small_gpu.models import REFINER
from configs.small_gpu.rollout import experiment as rollout
from gnvc_jax.training.config import ComputeConfig, InitConfig

experiment = dataclasses.replace(
    small,
    codec=rollout.codec,
    refiner=REFINER,
    compute=ComputeConfig(dtype="bfloat16", remat="attention"),
    init=InitConfig(run=rollout.run.out),
    data=rollout.data,
    optim=dataclasses.replace(small.optim, steps=40_000),
    run=dataclasses.replace(rollout.run, out="runs/small_gpu/refiner"),
)
