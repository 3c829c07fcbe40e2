"""Stage I with VACE-14B in place of VACE-1.3B.

gnvc port --from Wan2.1-VACE-14B --to weights/vace-14b
gnvc train --config wan_14b/latent --data.latents cache --mesh fsdp=16

Wan's VAE is the same for both sizes, so cached latents and the codec's warm start are too. Not run
yet: no accelerator was at hand.
"""

import dataclasses

from configs.wan_1_3b import latent
from gnvc_jax.refiner import VACE_14B
from gnvc_jax.training.config import RunConfig

base = latent.experiment

experiment = dataclasses.replace(
    base,
    refiner=dataclasses.replace(base.refiner, dit=VACE_14B),
    init=dataclasses.replace(base.init, dit="weights/vace-14b"),
    run=RunConfig(out="runs/wan_14b/latent"),
)
