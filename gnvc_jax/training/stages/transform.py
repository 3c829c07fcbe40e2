"""Stage `transform`: the codec of a linear VAE with motion, on squared error of pixels.

A new run starts from statistics of training clips (`gnvc_jax.vae.klt.fit` and
`gnvc_jax.codec.fit.init_from_statistics`), so that its first step already codes. The last frame of
each latent goes through the VAE's head and becomes the reference of the next latent's motion, as
it will in use; codec and head train together.
"""

import dataclasses

import grain
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from gnvc_jax.codec.config import QUALITIES
from gnvc_jax.codec.fit import init_from_statistics
from gnvc_jax.codec.model import LatentCodec, space_to_depth
from gnvc_jax.errors import UsageError
from gnvc_jax.moments import Moments
from gnvc_jax.motion.warp import predict, to_eight_bits
from gnvc_jax.parallel import backend
from gnvc_jax.training.config import Experiment, LossConfig
from gnvc_jax.training.stages import Stage, Tree, agreed, placed_like
from gnvc_jax.training.stages.codec import check_crop
from gnvc_jax.training.stages.vae import init_vae, make_vae, pixels
from gnvc_jax.vae import klt

Array = jax.Array

LOSS_SCALE = 0.03  # keeps the norm of gradients well below `optim.clip`
LEVELS_PER_UNIT = 127.5  # 8-bit steps per unit of pixels in [-1, 1]


@dataclasses.dataclass(frozen=True)
class TransformLoss(LossConfig):
    """Mean over frames of (lambda * distortion + rate) / lambda^balance.

    Attributes:
      lambda_low, lambda_high: bits per pixel that a squared error of one 8-bit step is worth at
        quality 0 and 63, geometric between.
      balance: 0 counts a bit alike at all levels, 1 a squared error.
      intra_offset: range of levels by which the first latent is better, drawn for each clip.
      pattern: levels by which latents 1, 2, 3, 4 after the first (and so on) are better, in clips
        that have a pattern.
      pattern_prob: share of clips that have one.
      fit_batches: batches whose statistics a new run starts from.
    """

    lambda_low: float = 1e-5
    lambda_high: float = 1e-2
    balance: float = 0.5
    intra_offset: tuple[int, int] = (17, 33)
    pattern: tuple[int, ...] = (-4, -2, -4, 4)
    pattern_prob: float = 0.5
    fit_batches: int = 40


class TransformStage(Stage):
    """Parameters: "vae" (basis fixed, head trained) and "codec"."""

    def __init__(self, experiment: Experiment):
        super().__init__(experiment)
        check_crop(experiment)
        if experiment.codec is None or experiment.codec.motion is None:
            raise UsageError("codec.motion: the stage `transform` trains a codec with motion")
        self.vae = make_vae(experiment)
        self.codec = LatentCodec(experiment.codec)

    def init(self, key: Array) -> Tree:
        key_vae, key_codec, key_noise = jax.random.split(key, 3)
        latents = jnp.zeros((1, 2, 8, 8, self.experiment.codec.latent_channels))
        codec = self.codec.init(key_codec, latents, jnp.zeros((1,), jnp.int32), key_noise)
        return {"vae": init_vae(self.vae, key_vae), "codec": codec["params"]}

    def batch_shapes(self, frames: int) -> Tree:
        data = self.experiment.data
        latents, blocks = (frames - 1) // 4, tuple(side // 16 for side in data.size)
        shape = jax.ShapeDtypeStruct
        return {
            "video": shape((data.batch, frames, *data.size, 3), np.uint8),
            "vectors": shape((data.batch, latents, 4, *blocks, 2), np.int16),
            "motion_bits": shape((data.batch, latents), np.float32),
            "q_index": shape((data.batch,), np.int32),
        }

    def dataset(self, frames: int | None = None) -> grain.IterDataset:
        """Batches of dictionaries, see `gnvc_jax.data.clips.with_motion`."""
        return super().dataset(frames, motion=True)

    def frozen(self) -> Tree:
        """Latents of a linear VAE stay as they are: the transform keeps distances."""
        channels = self.experiment.codec.latent_channels
        return {"mean": np.zeros(channels, np.float32), "std": np.ones(channels, np.float32)}

    def frozen_shapes(self) -> Tree:
        return jax.eval_shape(self.frozen)

    def model_parts(self, params: Tree, frozen: Tree) -> dict[str, Tree]:
        """Parameters of the parts that go into a model file: "vae", "codec"."""
        return params

    def warm_start(self, params: Tree) -> Tree:
        """Statistics of training clips, unless a run is named to start from."""
        if self.experiment.init_from is not None:
            return super().warm_start(params)
        batches = iter(self.dataset())
        batches = [next(batches) for _ in range(self.experiment.loss.fit_batches)]
        return placed_like(params, agreed(self.fitted(jax.device_get(params), batches)))

    def fitted(self, params: Tree, batches: list[Tree]) -> Tree:
        """Parameters with VAE basis and codec fitted to batches of clips; networks as they are."""
        config, loss = self.experiment.codec, self.experiment.loss
        moments = klt.moments_of_blocks(8, 4)
        for batch in batches:
            klt.count_blocks(moments, np.asarray(pixels(batch["video"])), 8, 4)
        vae = params["vae"] | {"klt": klt.fit(moments, config.latent_channels)}

        @jax.jit
        def latents_of(batch):
            video = pixels(batch["video"])
            first = rearrange(video[:, ::4], "b t h w c -> (b t) 1 h w c")
            intra = self.encode(vae, first, True)
            groups = rearrange(video[:, 1:], "b (k f) h w c -> (b k) f h w c", f=4)
            reference = rearrange(video[:, :-1:4], "b k h w c -> (b k) h w c")
            vectors = rearrange(batch["vectors"], "b k f h w c -> (b k) f h w c")
            later = self.encode(vae, groups, False)
            return intra, later, later - self.encode(vae, predict(reference, vectors), False)

        channels = config.latent_channels
        plain = {kind: Moments(channels) for kind in ("intra", "inter")}
        cells = {kind: Moments(4 * channels) for kind in ("intra", "inter")}
        for batch in batches:
            intra, later, residual = latents_of(batch)
            for kind, latents, coded in (("intra", intra, intra), ("inter", later, residual)):
                plain[kind].add(latents)
                cells[kind].add(space_to_depth(coded))
        codec = dict(params["codec"])
        for kind, scale in (("intra", "first_scale"), ("inter", "later_scale")):
            # One latent unit is 1 / scale of an orthonormal coefficient of pixels; the squared
            # error of a pixel is the mean of three colours.
            worth = (LEVELS_PER_UNIT / vae["klt"][scale]) ** 2 / 3.0
            codec[kind] = init_from_statistics(
                codec,
                config,
                kind,
                cells[kind],
                np.diag(plain[kind].covariance),
                loss.lambda_low * worth,
                loss.lambda_high * worth,
            )
        return {"vae": vae, "codec": codec}

    def encode(self, vae: Tree, video: Array, first: bool) -> Array:
        """Latents (b, h, w, c) of one group of frames (b, t, h, w, 3)."""
        latents, _ = self.vae.apply({"params": vae}, video, first, method="encode")
        return latents[:, 0]

    def levels(self, key: Array, q_index: Array, latents: int) -> Array:
        """Quality level of every latent of every clip: (b, latents) int32."""
        loss, (b,) = self.experiment.loss, q_index.shape
        key_intra, key_pattern = jax.random.split(key)
        low, high = loss.intra_offset
        intra = jax.random.randint(key_intra, (b, 1), low, high + 1)
        pattern = jnp.resize(jnp.asarray(loss.pattern, jnp.int32), (1, latents - 1))
        on = jax.random.bernoulli(key_pattern, loss.pattern_prob, (b, 1))
        offsets = jnp.concatenate([intra, on * pattern], axis=1)
        return jnp.clip(q_index[:, None] + offsets, 0, QUALITIES - 1)

    def rd_lambda(self, q_index: Array) -> Array:
        """lambda(q), geometric between its ends."""
        low, high = self.experiment.loss.lambda_low, self.experiment.loss.lambda_high
        return low * (high / low) ** (q_index / (QUALITIES - 1))

    def loss(
        self, params: Tree, frozen: Tree, batch: Tree, key: Array, step: Array
    ) -> tuple[Array, dict[str, Array]]:
        """batch: see `batch_shapes`."""
        video = pixels(batch["video"])
        _, t, h, w, _ = video.shape
        key_levels, *keys = jax.random.split(key, 2 + t // 4)
        levels = self.levels(key_levels, batch["q_index"], len(keys))
        clip = {"video": video, "vectors": batch["vectors"], "levels": levels}
        coded, predicted = self.code(params, clip, jnp.stack(keys))

        counts = jnp.asarray([1.0] + [4.0] * (t // 4))  # frames per latent
        rd_lambda, size = self.rd_lambda(levels), h * w
        rate = (coded["bits"]) / size
        scale = rd_lambda**-self.experiment.loss.balance
        loss = jnp.mean(jnp.sum(scale * (rd_lambda * coded["error"] * counts + rate), 1) / t)

        written = coded["written"].sum(1) / (t * size)
        motion = batch["motion_bits"].sum(1) / (t * size)
        psnr = 10.0 * jnp.log10(255.0**2 / coded["error"])
        low = batch["q_index"] < QUALITIES // 2

        def mean_of(values, which):
            return jnp.sum(values * which) / jnp.maximum(1, jnp.sum(which))

        metrics = {
            "bpp": jnp.mean(written + motion),
            "motion_bpp": jnp.mean(motion),
            "intra_share": coded["written"][:, 0].sum() / coded["written"].sum(),
            "psnr": psnr.mean(),
            "psnr_intra": psnr[:, 0].mean(),
            "psnr_last": psnr[:, -1].mean(),
            "psnr_predicted": jnp.mean(10.0 * jnp.log10(255.0**2 / predicted)),
            "bpp_low": mean_of(written + motion, low),
            "psnr_low": mean_of(psnr.mean(1), low),
        }
        return LOSS_SCALE * loss, metrics

    def code(self, params: Tree, clip: Tree, keys: Array) -> tuple[Tree, Array]:
        """Codes clips in training form.

        Args:
          clip: "video" in [-1, 1], "vectors" and "levels" (b, latents).
          keys: (latents,).

        Returns "bits" (differentiable), "written" and "error" (squared 8-bit steps), all
        (b, latents), and the squared error of the motion's prediction (b, latents - 1).
        """
        vae, codec = params["vae"], {"params": params["codec"]}
        video, levels = clip["video"], clip["levels"]

        def result(coded, decoded, frames):
            bits = coded.y_bits + coded.z_bits
            return {"bits": bits, "written": coded.written_bits, "error": error(decoded, frames)}

        def error(a, b):
            return jnp.mean((a - b) ** 2, axis=(1, 2, 3, 4)) * LEVELS_PER_UNIT**2

        latent = self.encode(vae, video[:, :1], True)
        state, coded = self.codec.apply(codec, latent, None, levels[:, 0], keys[0], method="train")
        decoded = self.vae.apply({"params": vae}, coded.latent[:, None], method="decode")
        first = result(coded, decoded, video[:, :1])

        def step(carry, xs):
            last, state = carry
            frames, vectors, q_index, key = xs
            # The picture that a decoder has. Gradients flow through it into the past: what is
            # spent on a frame also serves all frames that are predicted from it.
            predicted = predict(to_eight_bits(last), vectors)
            prediction = self.encode(vae, predicted, False)
            latent = self.encode(vae, frames, False)
            state, coded = self.codec.apply(
                codec, latent, state, q_index, key, prediction, method="train"
            )
            # Only the last frame goes through the head here: it is the only one that later latents
            # depend on, and the head costs more than the codec.
            given = coded.latent, prediction, predicted, coded.fresh, coded.detail, 1
            decoded = self.vae.apply({"params": vae}, *given, method="compensate")
            done = result(coded, decoded, frames)
            return (decoded[:, -1], state), (done, error(predicted, frames))

        steps = (
            rearrange(video[:, 1:], "b (k f) h w c -> k b f h w c", f=4),
            jnp.moveaxis(clip["vectors"], 1, 0),
            levels[:, 1:].T,
            keys[1:],
        )
        # XLA's CPU code takes about half the time outside loops; the price is compilation.
        unroll = len(keys) - 1 if backend() == "cpu" else 1
        _, (later, predicted) = jax.lax.scan(
            step, (decoded[:, -1], state), steps, unroll=max(1, unroll)
        )
        joined = {k: jnp.concatenate([v[:, None], later[k].T], axis=1) for k, v in first.items()}
        return joined, predicted.T
