"""One step that does what five do: after stage II.

python train.py --config configs/wan_1_3b/distill.py --data.path CLIPS

20,000 steps. Not run yet: no accelerator was at hand.
"""

import dataclasses

from configs.wan_1_3b import pixel
from gnvc_jax.training.config import RunConfig
from gnvc_jax.training.stages.pixel import DistillLoss

shared = dataclasses.asdict(pixel.experiment.loss)
del shared["single"]

experiment = dataclasses.replace(
    pixel.experiment,
    stage="distill",
    loss=DistillLoss(**shared),
    optim=dataclasses.replace(pixel.experiment.optim, lr=2e-5, steps=20_000),
    init_from="runs/wan_1_3b/pixel",
    run=RunConfig(out="runs/wan_1_3b/distill"),
)
