"""Codec and head of the small model: transform by statistics, then squared error.

python train.py --config configs/small/codec.py --data.path CLIPS

Two CPU cores: 2 min of compilation, then 0.8 s per step of nine frames. Not finished yet; result so
far: gnvc_jax/pretrained/small.md.
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
        frames=9,
        longer=((3500, 17),),
        size=(128, 128),
        batch=8,
        workers=1,
        downscale_prob=0.4,
    ),
    optim=OptimConfig(
        lr=1e-3,
        warmup=100,
        steps=5500,
        final_lr_ratio=0.05,
        betas=(0.9, 0.98),
        weight_decay=0.0,
        ema=0.998,
    ),
    run=RunConfig(out="runs/small/codec", log_every=50, checkpoint_every_s=300),
)
