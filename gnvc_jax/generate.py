"""Video from the embedding of a prompt, with the public DiT and VAE: what `gnvc generate` does.

    generator = load_generator("weights/t2v-1.3b")        # a folder of `gnvc port`
    noise = generator.noise(frames=81, height=480, width=832, seed=0)
    latents = generator.sample(noise, prompt, negative)   # see `load_prompt`
    for frame in generator.vae.decode_frames(latents): ...

A DiT with VACE's adapter is told that there is no source video, as VACE does it.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gnvc_jax.api import PretrainedVAE, load_vae
from gnvc_jax.api.parts import check_channels, with_light_decoder
from gnvc_jax.arrays import Tree
from gnvc_jax.errors import UsageError
from gnvc_jax.parallel import backend
from gnvc_jax.porting.checkpoint import load_weights, read_architecture
from gnvc_jax.refiner import DiT, DiTConfig, flow
from gnvc_jax.refiner.config import MASKS, PATCH
from gnvc_jax.refiner.model import latent_noise
from gnvc_jax.refiner.sampling import SAMPLERS
from gnvc_jax.vae import VAE, encode_stream

Latents = Float[Array, "1 t h w c"]
Text = Float[np.ndarray, "1 rows width"]


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
    """A DiT and the VAE of its latents.

    Attributes:
        path: Folder with the weights of the DiT, which are read when they are needed.
        dit: Sizes of the DiT.
        vae: The VAE.
    """

    path: str | Path
    dit: DiTConfig
    vae: PretrainedVAE

    def noise(self, frames: int, height: int, width: int, seed: int) -> Latents:
        """Draws the standard normal latents that sampling of a clip begins with.

        Args:
            frames: Number of frames, 1 + 4k for Wan2.1.
            height: Height of the frames in pixels, a multiple of 16 for Wan2.1.
            width: Their width, likewise.
            seed: Seed; the same one gives the same noise.

        Returns:
            Latents (1, t, h, w, c), float32.

        Raises:
            UsageError: If the networks cannot make a clip of this length or size.
        """
        cfg = self.vae.config
        step, side = cfg.temporal_stride, cfg.stride * PATCH
        if frames < 1 or (frames - 1) % step:
            raise UsageError(f"the number of frames must be 1 + {step}k, got {frames}")
        if min(height, width) < side or height % side or width % side:
            raise UsageError(f"height and width must be multiples of {side}, got {width}x{height}")
        # (1, t, h, w, c): the first frame is a latent of its own.
        shape = (1, 1 + (frames - 1) // step, height // cfg.stride, width // cfg.stride)
        return latent_noise(jax.random.key(seed), (*shape, self.dit.channels))

    def sample(
        self,
        noise: Latents,
        prompt: Text,
        negative: Text | None = None,
        *,
        steps: int = 50,
        guidance: float = 5.0,
        shift: float = 5.0,
        sampler: str = "unipc",
        progress: Callable[[], object] = lambda: None,
    ) -> Latents:
        """Follows the flow from noise to latents, with classifier-free guidance.

        Args:
            noise: See `noise`.
            prompt: Text condition, see `gnvc_jax.porting.checkpoint.load_prompt`.
            negative: Text condition to keep away from; not needed for guidance 1.
            steps: Number of steps of the sampler.
            guidance: Factor of the difference that the prompt makes: 1 for none of it added.
            shift: Wan's shift; above 1, more steps are taken where there is much noise.
            sampler: Key of `gnvc_jax.refiner.sampling.SAMPLERS`.
            progress: Called after each step.

        Returns:
            Normalised latents.

        Raises:
            UsageError: If `negative` is needed and missing, or an option is out of range.
        """
        if sampler not in SAMPLERS:
            raise UsageError(f"the sampler must be {' or '.join(SAMPLERS)}, got {sampler!r}")
        if guidance != 1.0 and negative is None:
            raise UsageError(
                f"guidance {guidance:g} needs the embedding of a negative prompt; without one, use "
                "guidance 1"
            )
        context = self._no_video(noise.shape) if self.dit.context_every else None

        def velocity(state: Array, tau: Array) -> Array:
            found = self._velocity(state, tau, prompt, context)
            if guidance != 1.0:
                # Classifier-free guidance, Ho and Salimans 2022 (arXiv 2207.12598), in two passes
                # rather than a batch of two, which would need twice the memory for activations.
                without = self._velocity(state, tau, negative, context)
                found = without + guidance * (found - without)
            found.block_until_ready()  # so that progress tells what is done
            progress()
            return found

        return SAMPLERS[sampler](velocity, noise, steps, shift)

    @functools.cached_property
    def _velocity(self) -> Callable[..., Array]:
        """(state, flow time, text, context) -> data minus noise, with the weights on devices."""
        # Accelerators are fast in bfloat16, CPUs are not; see `Refiner` for the precision that goes
        # with it.
        half = backend() != "cpu"
        dit = DiT(self.dit, jnp.bfloat16 if half else jnp.float32)
        placed = jax.device_put(load_weights(self.path, "dit")[1])

        @jax.jit
        def velocity(
            params: Tree, state: Array, tau: Array, text: Array, context: Array | None
        ) -> Array:
            time = flow.wan_timestep(jnp.full((1,), tau))
            with jax.default_matmul_precision("default" if half else "highest"):
                output = dit.apply({"params": params}, state, time, text, context)
            return flow.velocity_from_wan(cast(Array, output))

        return functools.partial(velocity, placed)

    def _no_video(self, shape: tuple[int, ...]) -> Float[Array, "1 t h w c"]:
        """VACE's condition without a source: a grey clip, twice, and masks that keep nothing."""
        vae, cfg = VAE(self.vae.config), self.vae.config
        _, t, h, w, _ = shape
        grey = jnp.zeros((1, 1 + (t - 1) * cfg.temporal_stride, h * cfg.stride, w * cfg.stride, 3))
        latents = jax.jit(functools.partial(encode_stream, vae))(self.vae.params, grey)
        latents = (latents - self.vae.mean) / self.vae.std
        # "Inactive" and "reactive" latents, then the mask, in VACE's order: see
        # `refiner.model.vace_context`.
        return jnp.concatenate([latents, latents, jnp.ones((*shape[:-1], MASKS))], axis=-1)


def load_generator(
    path: str | Path, vae: str | Path | None = None, decoder: str | Path | None = None
) -> Generator:
    """Loads a generator.

    Args:
        path: Folder of `gnvc port` with a DiT.
        vae: VAE as `gnvc_jax.load_vae` takes it, by default the one in the same folder.
        decoder: Folder of `gnvc port` with a light decoder to use in place of the VAE's, or None.

    Raises:
        FileNotFoundError: If there is no DiT, VAE or light decoder.
        UsageError: If the VAE or the light decoder has other latents than the DiT.
        PortError, ModelCorrupt: If the files are damaged.
    """
    dit = read_architecture(path, "dit").config
    assert isinstance(dit, DiTConfig)
    loaded = load_vae(vae or path)
    check_channels(dit, path, loaded.config.latent_channels, vae or path)
    if decoder is not None:
        loaded = with_light_decoder(loaded, decoder)
    return Generator(path, dit, loaded)
