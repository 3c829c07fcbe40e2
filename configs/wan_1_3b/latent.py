"""Stage I: codec and adapter on latents, the DiT frozen (GNVC-VD sections 6 and 7).

gnvc cache-latents --data CLIPS --vae weights/vace-1.3b --to cache
gnvc train --config wan_1_3b/latent --data.latents cache

100,000 steps: 40,000 on 5 frames, 30,000 each on 9 and 13, as in the paper. The paper trains this
stage at lambda 0.5 alone. Here it starts from a codec of 64 quality levels and keeps their lambdas,
0.05 to 0.5: one lambda for all levels would make them one again. Not run yet: no accelerator was at
hand.
"""

from configs.wan_1_3b.models import ADAPTER, CODEC, REFINER, VAE, WEIGHTS
from gnvc_jax.training.config import (
    ComputeConfig,
    DataConfig,
    Experiment,
    InitConfig,
    OptimConfig,
    RunConfig,
)
from gnvc_jax.training.stages.latent import LatentLoss

experiment = Experiment(
    stage="latent",
    vae=VAE,
    codec=CODEC,
    refiner=REFINER,
    compute=ComputeConfig(dtype="bfloat16", remat="attention"),
    init=InitConfig(vae=WEIGHTS, dit=WEIGHTS, run="runs/wan_1_3b/codec"),
    train=("codec/", *ADAPTER),
    loss=LatentLoss(lambda_low=0.05, lambda_high=0.5, balance=0.0),
    data=DataConfig(
        frames=5, clip_length_schedule=((40_000, 9), (70_000, 13)), size=(256, 256), batch=8
    ),
    # 1e-4 throughout after the warm-up, as in the paper.
    optim=OptimConfig(lr=1e-4, warmup=1000, steps=100_000, final_lr_ratio=1.0),
    run=RunConfig(out="runs/wan_1_3b/latent"),
)
