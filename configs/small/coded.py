"""Fifth stage of the small model: the refiner again, on what the finished codec decodes.

gnvc release runs/small/joint runs/small/joint.safetensors
gnvc cache-coded --data CLIPS --to runs/small/coded_clips --model runs/small/joint.safetensors
gnvc train --config small/coded

The codec stays as it is, so it need not be rolled out, and the refiner sees groups of full length.
Crops are larger than a window of its attention, which spans 128 pixels. Squared error hardly
counts: who wants the most PSNR decodes without refinement.
"""

import dataclasses

from configs.small.joint import experiment as joint
from gnvc_jax.training.config import InitConfig
from gnvc_jax.training.stages.refine import RefineLoss

experiment = dataclasses.replace(
    joint,
    loss=RefineLoss(
        part=128, squared=0.5, lpips=1.0, vgg=0.5, dists=2.0, temporal=1.0, latent=0.005
    ),
    init=InitConfig(model="runs/small/joint.safetensors"),
    data=dataclasses.replace(
        joint.data, latents="runs/small/coded_clips", frames=97, size=(192, 192), batch=3
    ),
    optim=dataclasses.replace(joint.optim, lr=1e-3, steps=3000, ema=0.997),
    run=dataclasses.replace(joint.run, out="runs/small/coded"),
)
