"""Stage `codec`: rate and latent error of the latent codec under a frozen VAE (the warm start)."""

import dataclasses

import grain
import jax
import jax.numpy as jnp
import numpy as np

from gnvc_jax.codec.config import QUALITIES
from gnvc_jax.codec.fit import whitening
from gnvc_jax.codec.model import LATENT_MULTIPLE, LatentCodec, LatentCodecOutput
from gnvc_jax.errors import UsageError
from gnvc_jax.model import vae_fingerprint
from gnvc_jax.parallel import constrain
from gnvc_jax.porting.checkpoint import has_component, load_weights, read_architecture
from gnvc_jax.training.checkpoints import load_params
from gnvc_jax.training.config import Experiment, LossConfig
from gnvc_jax.training.stages import Stage, Tree
from gnvc_jax.training.stages.vae import init_vae, make_vae, pixels
from gnvc_jax.vae import encode_clip

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class CodecLoss(LossConfig):
    """lambda * distortion + rate, divided by lambda^balance (see `weighted`).

    The rate is in bits per pixel of the source, squared errors are means, latents are normalised.
    lambda_low, lambda_high: weight of the distortion at quality 0 and 63, geometric between;
    vae: run of the stage `vae` whose averaged weights are frozen here, or a folder that `gnvc port`
    made; statistics_batches: batches that the mean and deviation of each latent channel are taken
    from, where the folder does not tell.
    """

    lambda_low: float = 0.05
    lambda_high: float = 0.5
    balance: float = 0.5
    vae: str = "weights/vae"
    statistics_batches: int = 8

    def __post_init__(self):
        if not 0 < self.lambda_low < self.lambda_high:
            raise UsageError(
                f"loss.lambda_low: expected 0 < lambda_low < lambda_high, got {self.lambda_low} and"
                f" {self.lambda_high}; equal ones would make all quality levels the same"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coding:
    """A batch of clips after the codec.

    latents: of the VAE, normalised; coded: with an axis t; q_index (b,); rate (b,) in bits per
    pixel; error (b,) mean squared; multiplier (b,): lambda, rising along the batch.
    """

    latents: Array
    coded: LatentCodecOutput
    q_index: Array
    rate: Array
    error: Array
    multiplier: Array
    metrics: dict[str, Array]


def check_crop(experiment: Experiment) -> None:
    """UsageError unless the sides of crops are multiples of what one hyperlatent stands for."""
    unit = experiment.vae.stride * LATENT_MULTIPLE
    if any(side < unit or side % unit for side in experiment.data.size):
        raise UsageError(f"data.size: must be multiples of {unit}, got {experiment.data.size}")


class CodecStage(Stage):
    """Rate-distortion training with a quality level drawn for every clip."""

    def __init__(self, experiment: Experiment):
        super().__init__(experiment)
        check_crop(experiment)
        self.vae = make_vae(experiment)
        self.codec = LatentCodec(experiment.codec)

    def init(self, key: Array) -> Tree:
        latents = jnp.zeros((1, 2, 8, 8, self.experiment.codec.latent_channels))
        key_params, key_noise = jax.random.split(key)
        return self.codec.init(key_params, latents, jnp.zeros((1,), jnp.int32), key_noise)["params"]

    @property
    def vae_shapes(self) -> Tree:
        return jax.eval_shape(lambda key: init_vae(self.vae, key), jax.random.key(0))

    def load_vae(self) -> Tree:
        """The VAE's weights on the host."""
        folder = self.experiment.loss.vae
        if has_component(folder, "vae"):
            architecture, params = load_weights(folder, "vae", np.float32)
            if architecture.config != self.experiment.vae:
                raise UsageError(f"{folder}: holds {architecture.config}, not {self.vae.config}")
            return params
        return load_params(folder, self.vae_shapes)

    def measure(self) -> dict[str, np.ndarray]:
        """Statistics of the VAE's latents.

        Returns "mean" and "std" (c,), by which the codec's latents are normalised, and "white"
        (2, c), factors that whiten the first and the later of those for a refiner. A ported VAE
        brings them: its DiT knows latents as they are. Those of a linear VAE are not normalised for
        the codec: the transform keeps distances, so that equal errors in any two channels are equal
        errors of pixels. Everything else is taken from some batches of clips.
        """
        folder, linear = self.experiment.loss.vae, self.experiment.vae.linear
        channels = self.experiment.vae.latent_channels
        mean, std, white = np.zeros(channels), np.ones(channels), np.ones((2, channels))
        if has_component(folder, "vae"):
            known = read_architecture(folder, "vae")
            mean, std = known.latents_mean, known.latents_std
        else:
            params = self.load_vae()
            encode = jax.jit(lambda batch: encode_clip(self.vae, params, pixels(batch)))
            batches = iter(Stage.dataset(self))
            count = self.experiment.loss.statistics_batches
            latents = np.concatenate([np.asarray(encode(next(batches))) for _ in range(count)])
            axes = (0, 1, 2, 3)
            if not linear:
                mean, std = latents.mean(axes), latents.std(axes)
            first, later = ((x / std).var(axes) for x in (latents[:, :1], latents[:, 1:]))
            white = np.stack([whitening(first), whitening(later)])
        statistics = {"mean": mean, "std": std, "white": white}
        return {name: np.asarray(value, np.float32) for name, value in statistics.items()}

    def frozen(self) -> Tree:
        """The VAE's weights, and mean and deviation of each channel of its latents."""
        return {"vae": self.load_vae(), **self.statistics}

    def frozen_shapes(self) -> Tree:
        channel = jax.ShapeDtypeStruct((self.experiment.vae.latent_channels,), jnp.float32)
        white = jax.ShapeDtypeStruct((2, self.experiment.vae.latent_channels), jnp.float32)
        return {"vae": self.vae_shapes, "mean": channel, "std": channel, "white": white}

    def batch_shapes(self, frames: int) -> jax.ShapeDtypeStruct:
        data, cfg = self.experiment.data, self.experiment.vae
        if data.latents is None:
            return super().batch_shapes(frames)
        h, w = (side // cfg.stride for side in data.size)
        t = 1 + (frames - 1) // cfg.temporal_stride
        return jax.ShapeDtypeStruct((data.batch, t, h, w, cfg.latent_channels), jnp.float32)

    def model_parts(self, params: Tree, frozen: Tree) -> dict[str, Tree]:
        """Parameters of the parts that go into a model file: "vae", "codec"."""
        return {"vae": frozen["vae"], "codec": params}

    def loss(
        self, params: Tree, frozen: Tree, batch: Array, key: Array, step: Array
    ) -> tuple[Array, dict[str, Array]]:
        """batch: uint8 (b, t, h, w, 3), h and w multiples of 64, or latents of such clips."""
        done = self.code(params, frozen, batch, key)
        return self.weighted(done, done.error), done.metrics

    def dataset(self, frames: int | None = None) -> grain.IterDataset:
        """As of every stage; or float32 (b, t, h, w, c), normalised latents from `data.latents`.

        Raises UsageError for latents of another VAE.
        """
        from gnvc_jax.data.latents import latent_dataset, read_info

        data = self.experiment.data
        if data.latents is None:
            return super().dataset(frames)
        fingerprint = vae_fingerprint(self.experiment.vae, self.load_vae())
        if read_info(data.latents).vae != fingerprint:
            raise UsageError(
                f"{data.latents}: latents of another VAE than {self.experiment.loss.vae}"
            )
        return latent_dataset(
            data.latents,
            frames=frames or data.frames,
            size=data.size,
            left_out=self.left_out,
            batch=data.batch // jax.process_count(),
            seed=data.seed,
            num_workers=data.workers,
            shard=(jax.process_index(), jax.process_count()),
        )

    def code(self, params: Tree, frozen: Tree, batch: Array, key: Array) -> Coding:
        """Code a batch at random quality levels, in training form.

        params: of the codec; batch: frames, or latents from a cache.
        """
        key_q, key_noise = jax.random.split(key)
        # Devices along `context` share the columns of each clip, here and in the codec.
        latents = constrain(batch, batch=0, context=3)
        if batch.dtype == jnp.uint8:
            latents = encode_clip(self.vae, frozen["vae"], pixels(latents))
            latents = (latents - frozen["mean"]) / frozen["std"]
        latents = constrain(jax.lax.stop_gradient(latents), batch=0, context=3)
        count, t, h, w, _ = latents.shape
        strides = self.vae.config.temporal_stride, self.vae.config.stride
        size = (1 + (t - 1) * strides[0]) * h * w * strides[1] ** 2  # pixels of a clip
        # One level from each of `count` equal ranges: every batch sees the whole scale.
        draws = (jnp.arange(count) + jax.random.uniform(key_q, (count,))) / count
        q_index = jnp.minimum(draws * QUALITIES, QUALITIES - 1).astype(jnp.int32)

        coded = self.codec.apply({"params": params}, latents, q_index, key_noise)
        bits = coded.y_bits + coded.z_bits
        rate = bits.sum(1) / size
        error = jnp.mean((coded.latent - latents) ** 2, axis=(1, 2, 3, 4))
        # The rate that trains bills noise where nothing is sent; what is logged is what a file has.
        written = coded.written_bits.sum(1) / size
        metrics = {
            "distortion": jnp.mean(error),
            "bpp": jnp.mean(written),
            "bpp_lowest": written[0],
            "bpp_highest": written[-1],
            "intra_share": bits[:, 0].sum() / bits.sum(),
            "z_share": coded.z_bits.sum() / bits.sum(),
        }
        return Coding(latents, coded, q_index, rate, error, self.multiplier(q_index), metrics)

    def multiplier(self, q_index: Array) -> Array:
        """lambda(q): geometric between the two ends."""
        low, high = self.experiment.loss.lambda_low, self.experiment.loss.lambda_high
        return low * (high / low) ** (q_index / (QUALITIES - 1))

    def weighted(self, done: Coding, distortion: Array) -> Array:
        """Mean of (lambda * distortion + rate) / lambda^balance; distortion (b,).

        With balance 0, as in the paper, the best levels, whose loss is the largest, count most; a
        small model, whose lambda spans a factor of a thousand, would learn for nothing else.
        """
        scale = done.multiplier**-self.experiment.loss.balance
        return jnp.mean(scale * (done.multiplier * distortion + done.rate))
