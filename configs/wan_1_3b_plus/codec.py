"""Warm start of the latent codec, with quality levels that differ within a group.

gnvc cache-latents --data CLIPS --vae weights/vace-1.3b --to cache --frames 13
gnvc train --config wan_1_3b_plus/codec --data.latents cache

As `wan_1_3b/codec`, 10,000 steps, but for the levels of `models.py`. Not run yet: no accelerator
was at hand.
"""

import dataclasses

from configs.wan_1_3b import codec as paper
from configs.wan_1_3b_plus.models import CODEC, HIERARCHY
from gnvc_jax.training.config import RunConfig

experiment = dataclasses.replace(
    paper.experiment,
    codec=CODEC,
    loss=dataclasses.replace(paper.experiment.loss, **HIERARCHY),
    run=RunConfig(out="runs/wan_1_3b_plus/codec"),
)
