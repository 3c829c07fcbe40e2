"""The small VAE on single frames: a fifth of the cost per step, and most of what is to be learned.

    python train.py --config configs/tiny/vae_image.py --data.path CLIPS

`configs/tiny/vae.py` continues from here on clips of five frames.
"""

from configs.tiny.models import VAE
from gnvc_jax.training.config import DataConfig, Experiment, OptimConfig, RunConfig
from gnvc_jax.training.stages.vae import VAELoss

experiment = Experiment(
    stage="vae",
    vae=VAE,
    loss=VAELoss(l1=1.0, mse=4.0, kl=1e-4, lpips=0.0),
    data=DataConfig(path="data/train", frames=1, size=(64, 64), batch=16, downscale_prob=0.5),
    optim=OptimConfig(lr=2e-3, warmup=100, steps=8000, final_lr_ratio=0.2, ema=0.998),
    run=RunConfig(out="runs/tiny/vae_image", log_every=20, checkpoint_every_s=300),
)
