"""The small model as a whole: codec and VAE decoder, on decoded frames.

python train.py --config configs/tiny/pixel.py --data.path CLIPS

Two CPU cores: 5 min of compilation, then 2.5 s per step. The result is the shipped model
(gnvc_jax/pretrained/tiny.md).
"""

from configs.tiny.models import CODEC, VAE
from gnvc_jax.training.config import DataConfig, Experiment, OptimConfig, RunConfig
from gnvc_jax.training.stages.pixel import PixelLoss

experiment = Experiment(
    stage="pixel",
    vae=VAE,
    codec=CODEC,
    train=("codec/", "vae/decoder", "vae/post_quant"),
    loss=PixelLoss(
        lambda_low=0.025,
        lambda_high=43.0,
        decoded=0.25,
        mse=3.0,
        lpips=0.1,
        lpips_net="alex",
        vae="runs/tiny/vae",
    ),
    data=DataConfig(path="data/train", frames=9, size=(128, 128), batch=2, downscale_prob=0.5),
    optim=OptimConfig(
        lr=5e-4, warmup=30, steps=300, final_lr_ratio=0.05, betas=(0.9, 0.98), ema=0.99
    ),
    init_from="runs/tiny/codec",
    run=RunConfig(out="runs/tiny/pixel", log_every=10, checkpoint_every_s=150),
)
