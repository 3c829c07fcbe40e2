"""Stage II of a refiner for the small model: on decoded frames; codec and decoder stay as they are.

python train.py --config configs/tiny/pixel_refiner.py --data.path CLIPS

Half of the updates refine in one step, the others in five. The loss is balanced (1): where nothing
but the refiner trains, all quality levels count alike. Two CPU cores: 3 to 7 s per step.
"""

import dataclasses

from configs.tiny import latent
from gnvc_jax.training.config import RunConfig
from gnvc_jax.training.stages.pixel import PixelLoss

source = latent.experiment

experiment = dataclasses.replace(
    source,
    stage="pixel",
    loss=PixelLoss(
        lambda_low=source.loss.lambda_low,
        lambda_high=source.loss.lambda_high,
        balance=1.0,
        decoded=0.0,
        refined=0.25,
        mse=3.0,
        lpips=0.5,
        lpips_frames=1,
        single=0.5,
        vae=source.loss.vae,
    ),
    data=dataclasses.replace(source.data, frames=9, batch=2),
    optim=dataclasses.replace(source.optim, lr=4e-4, warmup=20, steps=260, ema=0.99),
    init_from="runs/tiny/latent",
    run=RunConfig(out="runs/tiny/refiner", log_every=10, checkpoint_every_s=150),
)
