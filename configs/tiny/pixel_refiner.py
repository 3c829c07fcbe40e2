"""Stage II of a refiner for the small model: on decoded frames; codec and decoder stay as they are.

python train.py --config configs/tiny/pixel_refiner.py --data.path CLIPS

Half of the updates refine in one step, the others in five. The loss is balanced (1): where nothing
but the refiner trains, all quality levels count alike. Two CPU cores: 3 to 7 s per step.
"""

from configs.tiny.models import CODEC, REFINER, VAE
from gnvc_jax.training.config import DataConfig, Experiment, OptimConfig, RunConfig
from gnvc_jax.training.stages.pixel import PixelLoss

experiment = Experiment(
    stage="pixel",
    vae=VAE,
    codec=CODEC,
    refiner=REFINER,
    train=("refiner/",),
    loss=PixelLoss(
        lambda_low=0.025,
        lambda_high=43.0,
        balance=1.0,
        decoded=0.0,
        refined=0.25,
        mse=3.0,
        lpips=0.5,
        lpips_frames=1,
        single=0.5,
        vae="runs/tiny/vae",
    ),
    data=DataConfig(path="data/train", frames=9, size=(128, 128), batch=2, downscale_prob=0.5),
    optim=OptimConfig(
        lr=4e-4, warmup=20, steps=260, final_lr_ratio=0.05, betas=(0.9, 0.98), ema=0.99
    ),
    init_from="runs/tiny/latent",
    run=RunConfig(out="runs/tiny/refiner", log_every=10, checkpoint_every_s=150),
)
