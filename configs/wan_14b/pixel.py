"""Stage II with VACE-14B in place of VACE-1.3B.

gnvc train --config wan_14b/pixel --data.path CLIPS --mesh fsdp=32 --data.batch 32

Everything else is as in wan_1_3b/pixel. Not run yet: no accelerator was at hand.
"""

import dataclasses

from configs.wan_1_3b import pixel
from configs.wan_14b import latent
from gnvc_jax.training.config import RunConfig

experiment = dataclasses.replace(
    pixel.experiment,
    refiner=latent.experiment.refiner,
    init=dataclasses.replace(latent.experiment.init, run="runs/wan_14b/latent"),
    run=RunConfig(out="runs/wan_14b/pixel"),
)
