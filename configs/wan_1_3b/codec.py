"""Warm start of the latent codec under Wan's VAE, before stage I.

gnvc cache-latents --data CLIPS --vae weights/vace-1.3b --to cache
gnvc train --config wan_1_3b/codec --data.latents cache

10,000 steps. Not run yet: no accelerator was at hand.
"""

from configs.wan_1_3b.models import CODEC, VAE, WEIGHTS
from gnvc_jax.training.config import DataConfig, Experiment, InitConfig, OptimConfig, RunConfig
from gnvc_jax.training.stages.codec import CodecLoss

experiment = Experiment(
    stage="codec",
    vae=VAE,
    codec=CODEC,
    init=InitConfig(vae=WEIGHTS),
    # Lambdas of the paper's rates; balance 0 is the paper's sum.
    loss=CodecLoss(lambda_low=0.05, lambda_high=0.5, balance=0.0),
    data=DataConfig(frames=13, size=(256, 256), batch=8),
    optim=OptimConfig(lr=1e-4, warmup=1000, steps=10_000),
    run=RunConfig(out="runs/wan_1_3b/codec"),
)
