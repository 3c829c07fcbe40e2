"""The small VAE: principal components of training clips, and a decoder that improves on them.

python train.py --config configs/tiny/vae.py --data.path CLIPS

Two CPU cores: 1.1 s per step. The shipped model stopped at step 289, since the stage `pixel` goes
on with the decoder: 30.0 and 30.7 dB on two 256-pixel clips, little above the components alone.
"""

from configs.tiny.models import VAE
from gnvc_jax.training.config import DataConfig, Experiment, OptimConfig, RunConfig
from gnvc_jax.training.stages.vae import VAELoss

experiment = Experiment(
    stage="vae",
    vae=VAE,
    loss=VAELoss(l1=1.0, mse=4.0, kl=0.0, lpips=0.0),
    data=DataConfig(path="data/train", frames=9, size=(64, 64), batch=4, downscale_prob=0.5),
    optim=OptimConfig(
        lr=1e-3,
        warmup=20,
        steps=900,
        final_lr_ratio=0.1,
        betas=(0.9, 0.98),
        weight_decay=0.0,
        ema=0.99,
    ),
    run=RunConfig(out="runs/tiny/vae", log_every=20, checkpoint_every_s=120),
)
