"""Stage II as in `pixel`, with DISTS beside LPIPS.

gnvc train --config wan_1_3b_plus/pixel_dists --data.path CLIPS

DISTS compares textures by their statistics, where LPIPS compares them point by point. The paper
reports DISTS, but trains on LPIPS alone. The weight 0.5, half of that of LPIPS, is a start. Not run
yet: no accelerator was at hand.
"""

import dataclasses

from configs.wan_1_3b_plus.pixel import experiment as pixel
from gnvc_jax.training.config import RunConfig

experiment = dataclasses.replace(
    pixel,
    loss=dataclasses.replace(pixel.loss, dists=0.5),
    run=RunConfig(out="runs/wan_1_3b_plus/pixel_dists"),
)
