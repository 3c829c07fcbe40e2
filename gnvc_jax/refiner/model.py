"""The refiner: a Wan DiT that sees what the codec knows, and the loops that run it.

Latents here are normalised, (b, t, h, w, c) with even h and w; times are the paper's (0 noise,
1 data), velocities are data minus noise.

Source: GNVC-VD (arXiv 2512.05016) sections 4 and 5; the context layout is VACE's (Wan2.1
``vace_model.py``), whose pretrained adapter thus finds what it was trained on.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from gnvc_jax.codec.config import KNOTS
from gnvc_jax.codec.quality import interpolate_levels
from gnvc_jax.refiner import flow
from gnvc_jax.refiner.config import MASKS, RefinerConfig
from gnvc_jax.refiner.dit import DiT, patchify

Array = jax.Array
Tree = dict


class Refiner(nn.Module):
    """The velocity at a state of the flow, conditioned on the codec.

    What a pretrained model does not know starts at zero, so a ported model is unchanged at first.

    Attributes:
        config: sizes.
        dtype, attention, remat: see `DiT`.
        precision: of float32 products, see `jax.default_matmul_precision`. Those of bfloat16 are
            exact whatever it says.
    """

    config: RefinerConfig
    dtype: jnp.dtype = jnp.float32
    attention: str | None = None
    remat: str = "none"
    precision: str = "highest"

    @nn.compact
    def __call__(
        self,
        state: Array,
        tau: Array,
        decoded: Array,
        features: Array,
        q_index: Array,
        text: Array | None = None,
    ) -> Array:
        """Velocity (b, t, h, w, c).

        state, decoded (b, t, h, w, c): of the flow at tau (b,), and from the codec; features
        (b, t, h, w, features): of the codec; q_index (b,) int32; text: of the DiT.
        """
        cfg, zeros = self.config.dit, nn.initializers.zeros
        condition = decoded
        if self.config.vace_layout:
            # Latents of a grey clip, a first and a later one: VACE's sign for nothing to keep.
            grey = self.param("grey", zeros, (2, cfg.channels), jnp.float32)
            condition = vace_context(decoded, grey)
        dit = DiT(cfg, self.dtype, self.attention, self.remat, name="dit")
        embed = nn.Dense(cfg.width, dtype=self.dtype, kernel_init=zeros, name="features")
        knots = self.param("quality", zeros, (KNOTS, cfg.width), jnp.float32)
        # The TPU kernel of attention takes bfloat16 with the default precision only.
        half = jnp.dtype(self.dtype) == jnp.bfloat16
        with jax.default_matmul_precision("default" if half else self.precision):
            velocity = dit(
                state,
                flow.wan_timestep(tau),
                text,
                condition,
                time_extra=interpolate_levels(knots)[q_index],
                context_extra=embed(patchify(features)),
            )
        velocity = flow.velocity_from_wan(velocity)
        if self.config.deviation:
            time = tau[:, None, None, None, None]
            inputs = state, decoded, time, self.config.deviation, self.config.start
            velocity += flow.linear_velocity(*inputs)
        return velocity


def vace_context(decoded: Array, grey: Array) -> Array:
    """VACE's "inactive", "reactive" and mask channels (b, t, h, w, 2c + 64).

    Everything is to be generated, guided by the decoded latents: inactive is grey, the mask is 1.
    """
    later = (jnp.arange(decoded.shape[1]) > 0).astype(int)
    inactive = jnp.broadcast_to(grey[later][None, :, None, None], decoded.shape)
    mask = jnp.ones((*decoded.shape[:-1], MASKS), decoded.dtype)
    return jnp.concatenate([inactive, decoded, mask], axis=-1)


def per_latent_factors(factors: Array, count: int) -> Array:
    """Factors (2, c) of first and later latents, for each of `count` latents: (count, 1, 1, c).

    The refiner works on latents that are whitened by such factors: in what a linear VAE gives,
    channels differ by a factor of twenty, and noise of one deviation would drown most of them while
    it hardly touches the first.
    """
    later = jnp.broadcast_to(factors[1:], (count - 1, factors.shape[1]))
    return jnp.concatenate([factors[:1], later])[:, None, None, :]


def latent_noise(key: Array, shape: tuple[int, ...], first: int = 0) -> Array:
    """Noise of latents (b, t, h, w, c): that of each latent depends on its place `first + i` only.

    So windows, and a decoder that starts in the middle, draw the same numbers.
    """
    b, t, *rest = shape
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(first + jnp.arange(t))
    noise = jax.vmap(lambda k: jax.random.normal(k, (b, *rest)))(keys)
    return rearrange(noise, "t b ... -> b t ...")


def window_starts(count: int, size: int, overlap: int) -> list[int]:
    """First latents of windows of `size` that cover `count` latents, sharing at least `overlap`.

    One window where all fit.
    """
    if count <= size:
        return [0]
    last = count - size
    number = 1 + -(-last // (size - overlap))
    return [round(i * last / (number - 1)) for i in range(number)]


def window_weights(size: int, overlap: int, first: bool, last: bool) -> Array:
    """Weights (size,) of a window's latents: linear over the shared ones, never zero."""
    rise = jnp.minimum(1.0, (jnp.arange(size) + 1.0) / (overlap + 1.0))
    one = jnp.ones(size)
    return (one if first else rise) * (one if last else rise[::-1])


def refine(
    velocity: Callable[..., Array],
    config: RefinerConfig,
    decoded: Array,
    features: Array,
    key: Array,
    steps: int,
) -> Array:
    """Refined latents of a group of any length; the decoded ones for 0 steps. Both are whitened.

    velocity(state, tau, decoded, features): of one window, tau a scalar; one compilation serves
    all windows of a group. In every step each window says how its latents move; where windows
    share latents they move by the weighted mean, so there is no seam. Memory: one window's
    activations, and a few copies of the group's latents.
    """
    if steps == 0:
        return decoded
    t = decoded.shape[1]
    size = min(t, config.window)
    starts = window_starts(t, config.window, config.overlap)
    weights = [window_weights(size, config.overlap, s == 0, s == starts[-1]) for s in starts]
    weights = [w[:, None, None, None] for w in weights]
    total = jnp.zeros((t, 1, 1, 1))
    for s, weight in zip(starts, weights):
        total = total.at[s : s + size].add(weight)

    def move(state: Array, tau: Array) -> Array:
        moves = jnp.zeros_like(state)
        for s, weight in zip(starts, weights):
            part = slice(s, s + size)
            v = velocity(state[:, part], tau, decoded[:, part], features[:, part])
            moves = moves.at[:, part].add(weight * v)
        return moves / total

    noise = config.noise * latent_noise(key, decoded.shape)
    state = flow.start_state(decoded, noise, config.start)
    return flow.integrate(move, state, flow.step_times(steps, config.start))
