"""Stage `pixel`: codec and VAE decoder of a small model together, measured on decoded frames.

The decoder learns what frames look like whose latents were quantised, at every quality level. With
Wan's VAE, which stays as it is, the refiner takes this place.
"""

import dataclasses

import jax
import jax.numpy as jnp

from gnvc_jax.metrics.lpips import load_lpips
from gnvc_jax.training.checkpoints import load_params
from gnvc_jax.training.config import Experiment
from gnvc_jax.training.stages import Tree, placed_like
from gnvc_jax.training.stages.codec import CodecLoss, CodecStage, balanced
from gnvc_jax.training.stages.vae import init_vae, lpips_of_frames, pixels

Array = jax.Array

DECODER = ("decoder", "post_quant")  # parts of the VAE that train


@dataclasses.dataclass(frozen=True)
class PixelLoss(CodecLoss):
    """lambda * (latent * E_latent + mse * E_pixel + lpips * LPIPS) + rate (GNVC-VD, stage II).

    E_latent: mean squared error of normalised latents; E_pixel: of pixels in [-1, 1]; LPIPS: alex,
    on `lpips_frames` random frames of each clip.
    """

    latent: float = 0.25
    mse: float = 3.0
    lpips: float = 0.1
    lpips_frames: int = 2


class PixelStage(CodecStage):
    """Starts from the codec of the run `init_from` and the VAE of the run `loss.vae`."""

    def __init__(self, experiment: Experiment):
        super().__init__(experiment)
        self.perceptual = load_lpips("alex")

    def init(self, key: Array) -> Tree:
        vae = init_vae(self.vae, key)
        return {"codec": super().init(key), "vae": {part: vae[part] for part in DECODER}}

    def warm_start(self, params: Tree) -> Tree:
        if self.experiment.init_from is None:
            raise ValueError("init_from: the stage `pixel` starts from a run of the stage `codec`")
        vae = self.load_vae()
        return {
            "codec": load_params(self.experiment.init_from, like=params["codec"]),
            "vae": placed_like(params["vae"], {part: vae[part] for part in DECODER}),
        }

    def frozen(self) -> Tree:
        return super().frozen() | {"lpips": self.perceptual}

    def model_parts(self, params: Tree, frozen: Tree) -> tuple[Tree, Tree]:
        return frozen["vae"] | params["vae"], params["codec"]

    def loss(
        self, params: Tree, frozen: Tree, batch: Array, key: Array, step: Array
    ) -> tuple[Array, dict[str, Array]]:
        """batch: uint8 (b, t, h, w, 3), h and w multiples of 64."""
        weights, video = self.experiment.loss, pixels(batch)
        key_code, key_frames = jax.random.split(key)
        coded, rate, error, multiplier, parts = self.code(params["codec"], frozen, batch, key_code)
        latents = coded.latent * frozen["std"] + frozen["mean"]
        variables = {"params": self.model_parts(params, frozen)[0]}
        output = self.vae.apply(variables, latents, method="decode")
        mse = jnp.mean((output - video) ** 2, axis=(1, 2, 3, 4))
        perceptual = lpips_of_frames(
            frozen["lpips"], output, video, key_frames, weights.lpips_frames
        )
        distortion = weights.latent * error.mean(1) + weights.mse * mse + weights.lpips * perceptual
        psnr = 10.0 * jnp.log10(4.0 / mse)
        parts |= {
            "psnr_lowest": psnr[0],
            "psnr_highest": psnr[-1],
            "lpips_lowest": perceptual[0],
            "lpips_highest": perceptual[-1],
        }
        return balanced(multiplier, distortion, rate.mean(1)), parts
