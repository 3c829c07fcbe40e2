"""Stage II as in `pixel`, with a patch discriminator.

gnvc train --config wan_1_3b_plus/pixel_adversarial --data.path CLIPS

The paper trains without one. VoRTeC (arXiv 2609.02291), on the same latents, has one with weight
0.1, without which it needs 18 % more rate at equal LPIPS. Here it joins after 10,000 steps and
trains alone for 1,000 more. It adds 1.7 million parameters, of which a release has none. Not run
yet: no accelerator was at hand.
"""

import dataclasses

from configs.wan_1_3b_plus.pixel import experiment as pixel
from gnvc_jax.training.config import RunConfig
from gnvc_jax.training.discriminator import AdversarialConfig

experiment = dataclasses.replace(
    pixel,
    loss=dataclasses.replace(pixel.loss, adversarial=AdversarialConfig(weight=0.1, start=10_000)),
    run=RunConfig(out="runs/wan_1_3b_plus/pixel_adversarial"),
)
