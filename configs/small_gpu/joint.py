"""Fourth stage of the small model at twice the width: codec and refiner together.

gnvc train --config small_gpu/joint --data.path CLIPS

Not run yet: no accelerator was at hand.
"""

import dataclasses

from configs.small.joint import experiment as small
from configs.small_gpu.refiner import experiment as refiner
from gnvc_jax.training.config import InitConfig

experiment = dataclasses.replace(
    refiner,
    loss=small.loss,
    init=InitConfig(run=refiner.run.out),
    optim=dataclasses.replace(refiner.optim, lr=small.optim.lr),
    run=dataclasses.replace(refiner.run, out="runs/small_gpu/joint"),
)
