"""One step that does what five do: after stage II.

gnvc train --config wan_1_3b/distill --data.path CLIPS

20,000 steps. Not run yet: no accelerator was at hand.
"""

import dataclasses

from configs.wan_1_3b import pixel
from gnvc_jax.training.config import RunConfig

experiment = dataclasses.replace(
    pixel.experiment,
    stage="distill",
    refiner=dataclasses.replace(pixel.experiment.refiner, steps=1),
    init=dataclasses.replace(pixel.experiment.init, run="runs/wan_1_3b/pixel"),
    # Mostly single steps, which are what this stage is for; the rest keeps several steps working.
    loss=dataclasses.replace(pixel.experiment.loss, single=0.75, distill=1.0),
    optim=dataclasses.replace(pixel.experiment.optim, lr=2e-5, steps=20_000),
    run=RunConfig(out="runs/wan_1_3b/distill"),
)
