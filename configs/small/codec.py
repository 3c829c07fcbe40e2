"""First stage of the small model: codec and head, from statistics, on squared error.

gnvc train --config small/codec --data.path CLIPS

On two CPU cores: two minutes of compilation, then 0.8 s per step. `rollout.py` follows.
"""

from configs.small.models import CODEC, VAE
from gnvc_jax.training.config import DataConfig, Experiment, OptimConfig, RunConfig
from gnvc_jax.training.stages.transform import TransformLoss

experiment = Experiment(
    stage="transform",
    vae=VAE,
    codec=CODEC,
    loss=TransformLoss(),
    data=DataConfig(
        path="data/train",
        # Three latents: one of a single frame, and two of four frames each.
        frames=9,
        size=(128, 128),
        batch=8,
        workers=1,
        downscale_prob=0.4,
        statistics_batches=40,
    ),
    optim=OptimConfig(
        lr=1e-3,
        warmup=100,
        steps=4000,
        final_lr_ratio=0.05,
        betas=(0.9, 0.98),
        weight_decay=0.0,
        ema=0.998,
    ),
    run=RunConfig(out="runs/small/codec", log_every=50, checkpoint_every_s=300),
)
