"""Stage II as in `pixel`, with feature matching beside LPIPS.

gnvc train --config wan_1_3b_plus/pixel_features --data.path CLIPS

All features of VGG16 are compared alike, without the weights that LPIPS gives to channels. It
stands in for the features of DINO that VoRTeC (arXiv 2609.02291) compares, with weight 0.2, and
without which it needs 13 % more rate at equal LPIPS. Whether VGG16 gains as much is not known. Not
run yet: no accelerator was at hand.
"""

import dataclasses

from configs.wan_1_3b_plus.pixel import experiment as pixel
from gnvc_jax.training.config import RunConfig

experiment = dataclasses.replace(
    pixel,
    loss=dataclasses.replace(pixel.loss, features=0.2),
    run=RunConfig(out="runs/wan_1_3b_plus/pixel_features"),
)
