"""The refiner: a Wan DiT that is conditioned on the codec, and the loops that run it.

`Refiner` is the network: the velocity at one state. `refine` follows it for the latents of a whole
group, in overlapping windows; its noise comes from `latent_noise`.

Latents here are normalised, (b, t, h, w, c) with even h and w; times are the paper's (0 noise,
1 data), velocities are data minus noise.

Source: GNVC-VD (arXiv 2512.05016) sections 4 and 5; the context layout is VACE's (Wan2.1
``vace_model.py``), whose pretrained adapter thus finds what it was trained on.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from gnvc_jax.arrays import AnyArray, Tree
from gnvc_jax.codec.config import KNOTS
from gnvc_jax.codec.quality import interpolate_levels
from gnvc_jax.refiner import flow
from gnvc_jax.refiner.config import MASKS, PATCH, RefinerConfig
from gnvc_jax.refiner.dit import DiT, patchify


class Refiner(nn.Module):
    """The velocity at a state of the flow, conditioned on the codec.

    Conditions that a pretrained model does not know start at zero, so a ported model is unchanged
    at first.

    Attributes:
        config: Sizes of the refiner.
        dtype, attention, remat: See `DiT`.
        precision: Precision of float32 products, see `jax.default_matmul_precision`. Products of
            bfloat16 are exact in any case.
    """

    config: RefinerConfig
    dtype: DTypeLike = jnp.float32
    attention: str | None = None
    remat: str = "none"
    precision: str = "highest"

    @nn.compact
    def __call__(
        self,
        state: Float[AnyArray, "b t h w c"],
        tau: Float[AnyArray, " b"],
        decoded: Float[AnyArray, "b t h w c"],
        features: Float[AnyArray, "b t h w f"],
        q_index: Int[AnyArray, "b t"],
        text: Float[AnyArray, "b m text_width"] | None = None,
    ) -> Float[Array, "b t h w c"]:
        """Computes the velocity, data minus noise.

        Args:
            state: State of the flow at time tau.
            tau: Flow time, 0 (noise) to 1 (data).
            decoded: Latents from the codec.
            features: Features from the codec.
            q_index: Quality levels of the latents.
            text: Embedded prompt, for a DiT with text.
        """
        cfg, zeros = self.config.dit, nn.initializers.zeros
        state, decoded, tau = jnp.asarray(state), jnp.asarray(decoded), jnp.asarray(tau)
        # Without an adapter, decoded latents are in the state alone.
        condition = decoded if cfg.context_every else None
        if self.config.vace_layout:
            # Latents of a grey clip, a first and a later one: nothing to keep, for VACE.
            grey = self.param("grey", zeros, (2, cfg.channels), jnp.float32)
            condition = vace_context(decoded, grey)
        dit = DiT(cfg, self.dtype, self.attention, self.remat, name="dit")
        # The quality level enters where time does, so that it scales and shifts every block. The
        # (KNOTS, d) parameters become (QUALITIES, d), then (b, t, d) by the level of each latent.
        knots = self.param("quality", zeros, (KNOTS, cfg.width), jnp.float32)
        # The TPU kernel of attention takes bfloat16 with the default precision only.
        half = jnp.dtype(self.dtype) == jnp.bfloat16
        with jax.default_matmul_precision("default" if half else self.precision):
            extra = 0.0
            if cfg.context_every:
                # The adapter's own embedding keeps the width of a pretrained one, so features get a
                # second one beside it, (b, n, 4f) -> (b, n, d), whose output is added.
                embed = nn.Dense(cfg.width, dtype=self.dtype, kernel_init=zeros, name="features")
                extra = embed(patchify(features))
            velocity = dit(
                state,
                flow.wan_timestep(tau),
                text,
                condition,
                time_extra=interpolate_levels(knots)[q_index],
                context_extra=extra,
            )
        velocity = flow.velocity_from_wan(velocity)
        if self.config.deviation:
            # The DiT is then a correction to the best linear guess. `deviation` says how large
            # coding errors are: with a wrong value even the guess makes latents worse.
            time = tau[:, None, None, None, None]
            inputs = state, decoded, time, self.config.deviation, self.config.start
            velocity += flow.linear_velocity(*inputs)
        return velocity


@functools.partial(jax.jit, static_argnums=0)  # also traced once only, for shapes and for values
def init_refiner(refiner: Refiner, key: Key[Array, ""]) -> Tree:
    """Draws random parameters of a refiner."""
    config = refiner.config
    # No parameter depends on the number of clips, latents or tokens, so the smallest inputs do.
    latents = jnp.zeros((1, 1, PATCH, PATCH, config.dit.channels))
    features = jnp.zeros((1, 1, PATCH, PATCH, config.features))
    text = jnp.zeros((1, 1, config.dit.text_width)) if config.dit.text_length else None
    tau, q_index = jnp.zeros((1,)), jnp.zeros((1, 1), jnp.int32)
    return refiner.init(key, latents, tau, latents, features, q_index, text)["params"]


def vace_context(
    decoded: Float[AnyArray, "b t h w c"], grey: Float[AnyArray, "2 c"]
) -> Float[Array, "b t h w c2"]:
    """Builds VACE's condition: "inactive", "reactive" and mask channels, 2c + 64 in all.

    Everything is to be generated, guided by the decoded latents: inactive is grey, the mask is 1.

    Args:
        decoded: Latents from the codec.
        grey: Latents of a grey clip, a first and a later one.
    """
    # Index 0 for the first latent and 1 for the others: (t, c) -> (1, t, 1, 1, c).
    later = (jnp.arange(decoded.shape[1]) > 0).astype(int)
    inactive = jnp.broadcast_to(grey[later][None, :, None, None], decoded.shape)
    mask = jnp.ones((*decoded.shape[:-1], MASKS), decoded.dtype)
    return jnp.concatenate([inactive, decoded, mask], axis=-1)


def per_latent_factors(
    factors: Float[AnyArray, "2 c"], count: int
) -> Float[Array, "{count} 1 1 c"]:
    """Spreads factors of a first and a later latent over the `count` latents of a group.

    The refiner works on latents that are whitened by such factors. Channels of a linear VAE differ
    by a factor of twenty: noise of one standard deviation would drown most of them and hardly touch
    the first.
    """
    later = jnp.broadcast_to(factors[1:], (count - 1, factors.shape[1]))
    return jnp.concatenate([factors[:1], later])[:, None, None, :]


def latent_noise(
    key: Key[Array, ""], shape: tuple[int, ...], first: int = 0
) -> Float[Array, "b t h w c"]:
    """Draws standard normal noise that depends on each latent's place in the group alone.

    All windows, and a decoder that starts in the middle, thus draw the same numbers.

    Args:
        key: Key of the group.
        shape: Shape (b, t, h, w, c) of the latents.
        first: Place of the first latent.
    """
    b, t, *rest = shape
    # One key for each place, then (t, b, h, w, c).
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(first + jnp.arange(t))
    noise = jax.vmap(lambda k: jax.random.normal(k, (b, *rest)))(keys)
    return rearrange(noise, "t b ... -> b t ...")


def window_starts(count: int, size: int, overlap: int) -> list[int]:
    """Places windows of `size` latents so that they cover `count` latents.

    Neighbouring windows share at least `overlap` latents. If all latents fit, there is one window.

    Returns:
        The first latent of each window.
    """
    if count <= size:
        return [0]
    # The fewest windows whose starts are at most size - overlap apart, spread evenly between 0 and
    # the last possible start.
    last = count - size
    number = 1 + -(-last // (size - overlap))
    return [round(i * last / (number - 1)) for i in range(number)]


def window_weights(size: int, overlap: int, first: bool, last: bool) -> Float[Array, " {size}"]:
    """Weights of a window's latents: linear ramps over the shared ones, never zero.

    Args:
        size: Latents in the window.
        overlap: Length of a ramp.
        first, last: Whether the window is at the start or the end, where there is no ramp.
    """
    # 1/(overlap + 1), 2/(overlap + 1), ..., then 1. Opposite ramps add up to 1 where windows share
    # `overlap` latents; where they share more, `refine` divides by the sum.
    rise = jnp.minimum(1.0, (jnp.arange(size) + 1.0) / (overlap + 1.0))
    one = jnp.ones(size)
    return (one if first else rise) * (one if last else rise[::-1])


def refine(
    velocity: Callable[[Array, Array, Array, Array, Array], Array],
    config: RefinerConfig,
    decoded: Float[AnyArray, "b t h w c"],
    features: Float[AnyArray, "b t h w f"],
    q_index: Int[AnyArray, "b t"],
    key: Key[Array, ""],
    steps: int,
    white: Float[AnyArray, "2 c"] | None = None,
) -> Float[Array, "b t h w c"]:
    """Refines the latents of a group of any length.

    In every step each window gives the velocity of its latents. Latents that windows share move by
    the weighted mean, so there is no seam. The memory needed is that of the activations of one
    window, and of a few copies of the group's latents.

    Args:
        velocity: Called with state, tau (a scalar), decoded, features and levels of one window; all
            windows have the same size, so one compilation serves them all.
        config: Sizes of windows, and where refinement begins.
        decoded: Latents from the codec.
        features: Features from the codec.
        q_index: Quality levels of the latents.
        key: Key of the noise.
        steps: Number of steps of Euler's method; with 0, the decoded latents are returned.
        white: Factors that whiten the first and the later latents, see `per_latent_factors`; None
            if the latents are whitened already.

    Returns:
        Refined latents, in the scale of those that were given.
    """
    decoded, features, q_index = map(jnp.asarray, (decoded, features, q_index))
    if steps == 0:
        return decoded
    # From here on everything is whitened: noise, windows and velocities.
    factors = 1.0
    if white is not None:
        factors = per_latent_factors(jnp.asarray(white), decoded.shape[1])
    decoded = decoded * factors
    t = decoded.shape[1]
    size = min(t, config.window)
    starts = window_starts(t, config.window, config.overlap)
    # Windows and their weights are the same in all steps, so they are made once.
    weights = [window_weights(size, config.overlap, s == 0, s == starts[-1]) for s in starts]
    weights = [w[:, None, None, None] for w in weights]  # (size, 1, 1, 1)
    total = jnp.zeros((t, 1, 1, 1))
    for s, weight in zip(starts, weights):
        total = total.at[s : s + size].add(weight)

    def mean_velocity(state: Array, tau: Array) -> Array:
        # Weighted sum of the velocities of all windows that hold a latent, over the sum of weights.
        moves = jnp.zeros_like(state)
        for s, weight in zip(starts, weights):
            part = slice(s, s + size)
            given = decoded[:, part], features[:, part], q_index[:, part]
            v = velocity(state[:, part], tau, *given)
            moves = moves.at[:, part].add(weight * v)
        return moves / total

    noise = config.noise * latent_noise(key, decoded.shape)
    # Equation 2 gives the state at t_N, of decoded latents and noise; Euler steps follow the mean
    # velocity from there to 1. The result goes back to the scale of the codec's latents.
    # With `start` at t_N the noise counts (1 - t_N): 0.3 of a standard deviation for the default.
    state = flow.start_state(decoded, noise, config.start)
    return flow.integrate(mean_velocity, state, flow.step_times(steps, config.start)) / factors
