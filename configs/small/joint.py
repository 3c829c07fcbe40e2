"""Fourth stage of the small model: codec and refiner together, on what is seen and on the rate.

gnvc train --config small/joint --data.path CLIPS

The codec was trained on squared error alone. Here it learns to spend its bits where refined frames
gain most in LPIPS and DISTS; a part of the PSNR is the price.
"""

import dataclasses

from configs.small.refiner import experiment as refiner
from gnvc_jax.training.config import InitConfig
from gnvc_jax.training.stages.refine import RefineLoss

experiment = dataclasses.replace(
    refiner,
    # Beside the codec's loss, whose squared error is enough to keep colours and shapes in place.
    loss=RefineLoss(squared=0.4, lpips=0.6, dists=1.0, temporal=0.2, latent=0.01, codec=1.0),
    init=InitConfig(run=refiner.run.out),
    optim=dataclasses.replace(refiner.optim, lr=3e-4),
    run=dataclasses.replace(refiner.run, out="runs/small/joint"),
)
