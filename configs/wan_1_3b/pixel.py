"""Stage II: codec and adapter on decoded frames at all rates (GNVC-VD sections 6 and 7).

gnvc train --config wan_1_3b/pixel --data.path CLIPS

100,000 steps on 13 frames, quality drawn for every clip, lambda from 0.05 to 0.5. Low-rank changes
of the DiT: --lora 32. The VAE's decoder and the perceptual network run in bfloat16, and the
backward pass computes again what it would have to keep: about 30 GB in float32 for the decoder
alone. Not run yet: no accelerator was at hand.
"""

import dataclasses

from configs.wan_1_3b import latent
from gnvc_jax.training.config import DataConfig, OptimConfig, Policy, RunConfig
from gnvc_jax.training.stages.pixel import PixelLoss

FRUGAL = Policy(dtype="bfloat16", remat="full")

experiment = dataclasses.replace(
    latent.experiment,
    stage="pixel",
    compute=dataclasses.replace(latent.experiment.compute, vae=FRUGAL, perceptual=FRUGAL),
    init=dataclasses.replace(latent.experiment.init, run="runs/wan_1_3b/latent"),
    loss=PixelLoss(lambda_low=0.05, lambda_high=0.5, balance=0.0),
    data=DataConfig(frames=13, size=(256, 256), batch=2),
    # From 5e-5 to 1e-5, as in the paper, although by a cosine rather than in steps.
    optim=OptimConfig(lr=5e-5, warmup=1000, steps=100_000, final_lr_ratio=0.2),
    run=RunConfig(out="runs/wan_1_3b/pixel"),
)
