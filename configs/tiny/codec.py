"""The latent codec of the small model, under the frozen small VAE.

python train.py --config configs/tiny/codec.py --data.path CLIPS

Two CPU cores: 3 min of compilation, then 0.75 s per step.
"""

from configs.tiny.models import CODEC, VAE
from gnvc_jax.training.config import DataConfig, Experiment, OptimConfig, RunConfig
from gnvc_jax.training.stages.codec import CodecLoss

experiment = Experiment(
    stage="codec",
    vae=VAE,
    codec=CODEC,
    loss=CodecLoss(lambda_low=0.022, lambda_high=9.4, vae="runs/tiny/vae"),
    data=DataConfig(path="data/train", frames=17, size=(128, 128), batch=4, downscale_prob=0.5),
    optim=OptimConfig(
        lr=1.5e-3, warmup=50, steps=1500, final_lr_ratio=0.05, betas=(0.9, 0.98), ema=0.995
    ),
    run=RunConfig(out="runs/tiny/codec", log_every=20, checkpoint_every_s=150),
)
