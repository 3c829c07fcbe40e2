"""Stage I of a refiner for the small model, whose codec and VAE stay as they are.

gnvc cache-latents is not worth it here: the linear encoder costs next to nothing.
python train.py --config configs/tiny/latent.py --data.path CLIPS

Two CPU cores: 1 min of compilation, then 2 s per step. Result: gnvc_jax/pretrained/tiny.md.
"""

from configs.tiny.models import CODEC, REFINER, VAE
from gnvc_jax.training.config import DataConfig, Experiment, OptimConfig, RunConfig
from gnvc_jax.training.stages.latent import LatentLoss

experiment = Experiment(
    stage="latent",
    vae=VAE,
    codec=CODEC,
    refiner=REFINER,
    train=("refiner/",),
    loss=LatentLoss(lambda_low=0.025, lambda_high=43.0, decoded=0.0, vae="runs/tiny/vae"),
    data=DataConfig(path="data/train", frames=17, size=(128, 128), batch=8, downscale_prob=0.5),
    optim=OptimConfig(
        lr=8e-4, warmup=50, steps=600, final_lr_ratio=0.05, betas=(0.9, 0.98), ema=0.995
    ),
    init_from="runs/tiny/pixel",
    run=RunConfig(out="runs/tiny/latent", log_every=20, checkpoint_every_s=150),
)
