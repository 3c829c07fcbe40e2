"""The small VAE, from scratch.

python train.py --config configs/tiny/vae.py --data.path CLIPS
"""

from configs.tiny.models import VAE
from gnvc_jax.training.config import DataConfig, Experiment, OptimConfig, RunConfig
from gnvc_jax.training.stages.vae import VAELoss

experiment = Experiment(
    stage="vae",
    vae=VAE,
    loss=VAELoss(l1=1.0, mse=4.0, kl=1e-4, lpips=0.1, lpips_from=4000),
    data=DataConfig(path="data/train", frames=5, size=(64, 64), batch=8, downscale_prob=0.5),
    optim=OptimConfig(lr=2e-3, warmup=100, steps=6000, final_lr_ratio=0.02, ema=0.998),
    init_from="runs/tiny/vae_image",
    run=RunConfig(out="runs/tiny/vae", log_every=20, checkpoint_every_s=300),
)
