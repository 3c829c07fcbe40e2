"""The functions that coding a video consists of, for one model.

`CodecFunctions` binds the programs of `gnvc_jax.programs` to the parameters of a model, placed on
devices; the coder calls these. Models of equal configurations share their programs.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gnvc_jax.arrays import Array, Tree
from gnvc_jax.bitstream.errors import DeviceNotExact
from gnvc_jax.codec import scales
from gnvc_jax.codec.entropy import LatentSymbols
from gnvc_jax.codec.model import CodecState
from gnvc_jax.codec.transform import DecodedLatent
from gnvc_jax.errors import UsageError
from gnvc_jax.model import Model, self_test, stored_dtype
from gnvc_jax.programs import shared_programs
from gnvc_jax.refiner import refine

# (tables, q_index, z, previous y, previous indices) -> table indices, in exact arithmetic.
ScaleNetwork = Callable[..., np.ndarray]


class CodecFunctions:
    """The programs of a model with its parameters on devices, see `gnvc_jax.programs`.

    If it is made and used under `jax.set_mesh`, the columns of each frame, and of all that is made
    of it, are shared among the devices along the axis `context`, which exchange what convolutions
    see beyond the edges.

    Attributes:
        model: The model.
        programs: Its programs.
        vae_params, codec_params, refiner_params: Parameters on devices; the last are None for a
            model without a refiner.
        decoder_params: Parameters of the light decoder, or of the VAE if there is none.
    """

    def __init__(self, model: Model):
        self.model = model
        self.programs, self._scale_index = shared_programs(model)
        # Parameters lie on every device of the mesh; only frames and what is made of them are
        # divided.
        mesh = jax.sharding.get_mesh()
        everywhere = None if mesh.empty else NamedSharding(mesh, P())

        def place(params: Tree, dtype: Callable = lambda path: np.float32) -> Tree:
            # Model files hold kernels in float16. VAE and codec compute in float32, encoder and
            # decoder from the same rounded values; the refiner keeps the stored type, which halves
            # its memory.
            cast = jax.tree_util.tree_map_with_path(
                lambda path, x: np.asarray(x, dtype(path)), params
            )
            return jax.device_put(cast, everywhere)

        self.vae_params, self.codec_params = place(model.vae), place(model.codec)
        self.decoder_params = self.vae_params if model.decoder is None else place(model.decoder)
        self.refiner_params = None
        if model.refiner is not None:
            self.refiner_params = place(model.refiner, stored_dtype)
        self._network = self._exact_network()

    def encode_video(self, cache: Tree | None, frames: np.ndarray) -> tuple[Array, Tree]:
        """Encodes the next frames of a group to latents; returns the VAE's cache, too."""
        return self.programs.encode_video(self.vae_params, cache, frames)

    def decode_latents(self, cache: Tree | None, latents: Array) -> tuple[Array, Tree]:
        """Decodes the next latents of a group to uint8 frames; returns the VAE's cache, too."""
        return self.programs.decode_latents(self.decoder_params, cache, latents)

    def predict(self, reference: Array, vectors: np.ndarray) -> tuple[Array, Array]:
        """Predicts frames by block motion, and their latent.

        Args:
            reference: Last decoded frame, uint8 (h, w, 3).
            vectors: Motion vectors (4, h / 16, w / 16, 2), see `gnvc_jax.motion.expand`.

        Returns:
            Frames (1, 4, h, w, 3) in [-1, 1] and latent (1, h / 8, w / 8, c).
        """
        return self.programs.predict(self.vae_params, reference[None], vectors[None])

    def compensate(self, decoded: DecodedLatent, prediction: Array, predicted: Array) -> Array:
        """Decodes a latent with motion to uint8 frames (1, 4, h, w, 3), see `VAE.compensate`."""
        return self.programs.compensate(self.vae_params, decoded, prediction, predicted)

    def add_latent(self, frames: Array, latent: Array, first: bool) -> Array:
        """Adds the frames of a latent of a linear VAE to uint8 frames.

        Args:
            frames: Frames of the latent before the addition, uint8 (1, t, h, w, 3).
            latent: Latent (1, h, w, c) to add.
            first: Whether the latent stands for the first frame of a group.
        """
        return self.programs.add_latent(self.vae_params, frames, latent, first)

    def analyse(
        self,
        latent: Array,
        state: CodecState | None,
        q_index: int,
        prediction: Array | None = None,
        worth: float | None = None,
    ) -> LatentSymbols:
        """Codes a latent to symbols, without the batch axis; an intra latent has no state.

        `worth` makes the choice of symbols depend on their bits, see `LatentCodec.encode`.
        """
        # Arrays rather than Python numbers, so that another level does not compile again.
        q = jnp.full((1,), q_index)
        bits = None if worth is None else jnp.full((1,), worth, jnp.float32)
        return self.programs.analyse(self.codec_params, latent, state, q, prediction, bits)

    def reconstruct(
        self,
        symbols: LatentSymbols,
        state: CodecState | None,
        q_index: int,
        prediction: Array | None = None,
    ) -> tuple[DecodedLatent, CodecState]:
        """Decodes symbols to their latent; returns the codec's state after it, too."""
        q = jnp.full((1,), q_index)
        return self.programs.reconstruct(self.codec_params, symbols, state, q, prediction)

    def refine(
        self, latents: Array, features: Array, q_index: Array, seed: int, steps: int
    ) -> Array:
        """Refines the latents of a group; the same seed gives the same result on one device.

        Args:
            latents: Decoded latents (1, t, h, w, c).
            features: Features of the codec after each latent, (1, t, h, w, f).
            q_index: Quality levels of the latents, (1, t).
            seed: Seed of the noise.
            steps: Steps of the flow; 0 returns the latents as they are.

        Raises:
            UsageError: If the model has no refiner.
        """
        if not steps:
            return latents
        config, program = self.model.refiner_config, self.programs.velocity
        if config is None or program is None:
            raise UsageError(f"model {self.model.name!r} has no refiner; use 0 steps")

        def velocity(state: Array, tau: Array, *conditions: Array) -> Array:
            # The sampler knows neither parameters nor a batch axis of tau.
            return program(self.refiner_params, state, jnp.full((1,), tau), *conditions)

        # The seed comes from the stream, so every decoding of a group draws the same noise.
        key, white = jax.random.key(seed), self.model.white
        return refine(velocity, config, latents, features, q_index, key, steps, white)

    def scale_index(
        self,
        kind: int,
        q_index: int,
        z: np.ndarray,
        prev_y: np.ndarray | None,
        prev_index: np.ndarray | None,
    ) -> np.ndarray:
        """Table indices (h, w, cy) uint8 of one latent; see `gnvc_jax.bitstream.ScaleIndex`."""
        if prev_y is None or prev_index is None:
            # The latent before an intra latent: all zeros, on the grid of y.
            h, w, _ = z.shape
            prev_y = prev_index = np.zeros((4 * h, 4 * w, self.model.codec_config.y_channels))
        return self._network(
            self.model.scale_networks[kind], q_index, z, prev_y.astype(int), prev_index.astype(int)
        )

    def _exact_network(self) -> ScaleNetwork:
        """Chooses the first of float32, int32 and NumPy arithmetic that passes the self-test.

        All are compared with the value in the model file, which comes from the machine that made
        the model: NumPy, too, may be wrong here.

        Raises:
            DeviceNotExact: If none of them passes.
        """
        model = self.model

        def jitted(dtype: jnp.dtype) -> ScaleNetwork:
            def network(tables: Tree, q_index: int, *integers: np.ndarray) -> np.ndarray:
                inputs = (np.asarray(v, np.int32) for v in integers)
                return np.asarray(self._scale_index(tables, q_index, *inputs, dtype=dtype))

            return network

        def reference(tables: Tree, q_index: int, *integers: np.ndarray) -> np.ndarray:
            return scales.scale_index_numpy(model.codec_config, tables, q_index, *integers)

        # The fastest first: the matrix units of accelerators take floats, but not int32, and NumPy
        # runs on the host.
        for network in (jitted(jnp.float32), jitted(jnp.int32), reference):
            # `f=network` binds this turn's network; a plain closure would see the variable change.
            crc = self_test(
                model.codec_config, model.scale_networks, lambda _, *args, f=network: f(*args)
            )
            if crc == model.self_test_crc:
                return network
        raise DeviceNotExact(f"integer self-test fails on {jax.default_backend()}; use a CPU")
