"""Stage I with quality levels that differ within a group.

gnvc train --config wan_1_3b_plus/latent --data.latents cache

As `wan_1_3b/latent`, 100,000 steps on 5, 9 and 13 frames, but for the levels of `models.py`. Not
run yet: no accelerator was at hand.
"""

import dataclasses

from configs.wan_1_3b import latent as paper
from configs.wan_1_3b_plus.codec import experiment as codec
from configs.wan_1_3b_plus.models import CODEC, HIERARCHY
from gnvc_jax.training.config import RunConfig

experiment = dataclasses.replace(
    paper.experiment,
    codec=CODEC,
    init=dataclasses.replace(paper.experiment.init, run=codec.run.out),
    loss=dataclasses.replace(paper.experiment.loss, **HIERARCHY),
    run=RunConfig(out="runs/wan_1_3b_plus/latent"),
)
