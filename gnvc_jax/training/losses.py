"""Training losses as pure functions of arrays and callables.

None of them knows of a run, a stage or a config, so that each can be called from a notebook:

    q_index = losses.draw_quality(key, len(clips))
    rd_lambda = losses.rd_lambda(q_index, 0.05, 0.5)
    distortion = losses.squared_error(decoded, clips)
    loss = losses.rate_distortion(rate, distortion, rd_lambda).mean()

Every loss is a value per clip, (b,) float32, unless its docstring says otherwise; the caller takes
the mean. Networks come in as functions of arrays: `velocity(state, tau)` is a refiner's velocity of
one window of latents, `perceptual(x, y)` a distance (n,) of images (n, h, w, 3) in [-1, 1]. How the
stages combine the losses is in `gnvc_jax.training.stages`.

Sources: GNVC-VD (arXiv 2512.05016) equations 1 to 6 and section 6 for the losses of stages I and
II; Kingma and Welling (arXiv 1312.6114) appendix B for the divergence.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from gnvc_jax.arrays import Array, Tree
from gnvc_jax.codec.config import QUALITIES
from gnvc_jax.refiner import flow

Velocity = Callable[[Array, Array], Array]
Perceptual = Callable[[Array, Array], Array]

TAU_MAX = 0.999  # at flow time 1 nothing is left to learn


def per_clip(x: Array) -> Array:
    """Mean over all axes but the first: (b, ...) -> (b,)."""
    return x.mean(tuple(range(1, x.ndim)))


def squared_error(x: Array, y: Array) -> Array:
    """Mean squared error of each clip."""
    return per_clip((x - y) ** 2)


# Rate and distortion


def draw_quality(key: Array, count: int) -> Array:
    """Draws random quality levels, (count,) int32, rising.

    One level comes from each of `count` equal parts of the range, so that every batch sees all of
    it; the first is the lowest and the last the highest.
    """
    draws = (jnp.arange(count) + jax.random.uniform(key, (count,))) / count
    # Draws are below 1, but float32 may round their product to QUALITIES itself.
    return jnp.minimum(draws * QUALITIES, QUALITIES - 1).astype(jnp.int32)


def rd_lambda(q_index: Array, low: float, high: float) -> Array:
    """Weight of the distortion at quality levels of any shape: geometric from `low` to `high`."""
    return low * (high / low) ** (q_index / (QUALITIES - 1))


def rate_distortion(
    rate: Array, distortion: Array, rd_lambda: Array, balance: float = 0.0
) -> Array:
    """Rate-distortion loss (lambda * distortion + rate) / lambda^balance, elementwise.

    Args:
        rate: Rate, usually in bits per pixel; any shape.
        distortion: Distortion, same shape.
        rd_lambda: Lambda, same shape.
        balance: 0 is the paper's sum, which the best levels dominate, since their lambda is the
            largest; 1 weighs distortion equally at all levels. A small model whose lambda spans a
            factor of a thousand needs more than 0, or it learns only its best levels.
    """
    return rd_lambda**-balance * (rd_lambda * distortion + rate)


# Refinement


class FlowMatching(NamedTuple):
    """Result of `flow_matching`.

    Attributes:
        error: Mean squared error of the velocity, (b,).
        estimate: Clean latents (b, t, h, w, c) as estimated in one step from the drawn flow time.
    """

    error: Array
    estimate: Array


def draw_flow_time(key: Array, count: int, start: float = flow.START) -> Array:
    """Draws uniform flow times (count,) from `start` to just below 1."""
    return jax.random.uniform(key, (count,), jnp.float32, start, TAU_MAX)


def flow_matching(
    velocity: Velocity,
    clean: Array,
    decoded: Array,
    noise: Array,
    tau: Array,
    start: float = flow.START,
) -> FlowMatching:
    """Conditional flow matching from decoded to clean latents (GNVC-VD, equations 3 and 4).

    Args:
        velocity: Function (state, tau) -> velocity, (b, t, h, w, c) and (b,) to (b, t, h, w, c).
        clean: Latents of the source, (b, t, h, w, c), whitened as the refiner sees them.
        decoded: Latents as the codec decodes them, same shape.
        noise: Normal noise, same shape.
        tau: Flow time of each clip, (b,), see `draw_flow_time`.
        start: Flow time at which refinement begins.
    """
    # (b, 1, 1, 1, 1), to broadcast over latents.
    time = tau[:, None, None, None, None]
    state = jnp.asarray(flow.path_state(clean, decoded, noise, time, start))
    # Else the codec could lower the loss by moving the target. Its gradient comes through the
    # state.
    target = jax.lax.stop_gradient(jnp.asarray(flow.path_velocity(clean, decoded, noise, start)))
    # The target does not depend on tau: the path is straight. So one step from any point of it
    # would arrive, if the velocity were right.
    found = velocity(state, tau)
    estimate = jnp.asarray(flow.clean_estimate(state, found, time))
    return FlowMatching(squared_error(found, target), estimate)


def refine_through_last_step(
    velocity: Callable[[Tree, Array, Array], Array],
    inputs: Tree,
    decoded: Array,
    noise: Array,
    steps: Array | int,
    start: float = flow.START,
) -> Array:
    """Latents after `steps` Euler steps, with gradients through the last step only.

    Memory and time of the backward pass are those of one step, whatever their number.

    Args:
        velocity: Function (inputs, state, tau) -> velocity. Everything that gradients must reach
            has to be an argument, since the steps before the last run on constants.
        inputs: Parameters and conditions of the velocity, any tree.
        decoded: Decoded latents (b, t, h, w, c), whitened as the refiner sees them.
        noise: Normal noise, same shape.
        steps: Number of steps; may be traced.
        start: Flow time at which refinement begins.

    Returns:
        Refined latents (b, t, h, w, c).
    """

    def time(i: Array | int) -> Array | float:
        return start + (1.0 - start) * i / steps

    def move(inputs: Tree, state: Array, i: Array | int) -> Array:
        # All clips are at the same flow time: (b,).
        tau = jnp.full(state.shape[:1], time(i))
        return state + (time(i + 1) - time(i)) * velocity(inputs, state, tau)

    state = flow.start_state(decoded, noise, start)
    # No gradient passes through the loop, so its length may be traced.
    constant, first = jax.lax.stop_gradient((inputs, state))
    before = jax.lax.fori_loop(0, steps - 1, lambda i, state: move(constant, state, i), first)
    # The first step starts from the decoded latents, and gradients reach the codec through them.
    return move(inputs, jnp.where(steps == 1, state, before), steps - 1)


def distillation(student: Array, teacher: Array) -> Array:
    """Squared error (b,) of a student's latents against a teacher's, both (b, t, h, w, c).

    The teacher gets no gradient.
    """
    return squared_error(student, jax.lax.stop_gradient(teacher))


# Frames


class PixelErrors(NamedTuple):
    """Errors of decoded frames in [-1, 1], each (b,).

    Attributes:
        squared: Mean squared error.
        perceptual: Perceptual distance, zeros if there is none.
    """

    squared: Array
    perceptual: Array

    @property
    def psnr(self) -> Array:
        """PSNR in dB."""
        # Values span 2, whose square is 4.
        return 10.0 * jnp.log10(4.0 / self.squared)


def pixel(output: Array, video: Array, perceptual: Perceptual | None = None) -> PixelErrors:
    """Errors of decoded frames.

    Args:
        output: Decoded frames (b, t, h, w, 3) in [-1, 1] or slightly outside.
        video: Frames of the source, same shape.
        perceptual: Function (output, video) -> distance (b,), such as one made of
            `perceptual_of_frames`.
    """
    squared = squared_error(output, video)
    distance = jnp.zeros_like(squared) if perceptual is None else perceptual(output, video)
    return PixelErrors(squared, distance)


def perceptual_of_frames(
    perceptual: Perceptual, output: Array, video: Array, key: Array, count: int
) -> Array:
    """Mean perceptual distance (b,) of `count` random frames, the same ones of all clips.

    Args:
        perceptual: Function (x, y) -> distance (n,) of images (n, h, w, 3) in [-1, 1].
        output: Decoded frames (b, t, h, w, 3), clipped to [-1, 1] here.
        video: Frames of the source, same shape.
        key: Random key of the choice.
        count: Number of frames; all if clips have fewer.
    """
    # (b, t, h, w, c) -> (b, count, h, w, 3) -> (n, h, w, 3) with n = b * count.
    pair = frames_of_clips(output, video, key, count)
    pair = (rearrange(v, "b t h w c -> (b t) h w c") for v in pair)
    return perceptual(*pair).reshape(len(video), -1).mean(1)


def frames_of_clips(output: Array, video: Array, key: Array, count: int) -> tuple[Array, Array]:
    """Takes `count` random frames of all clips, the same ones of each, as (b, count, h, w, 3).

    Args:
        output: Decoded frames (b, t, h, w, 3), clipped to [-1, 1] here, as a decoder does.
        video: Frames of the source, same shape.
        key: Random key of the choice.
        count: Number of frames; all if clips have fewer.
    """
    t = video.shape[1]
    chosen = jax.random.choice(key, t, (min(t, count),), replace=False)
    return jnp.clip(output, -1.0, 1.0)[:, chosen], video[:, chosen]


def feature_matching(output: Sequence[Array], source: Sequence[Array]) -> Array:
    """Mean absolute difference of features of images, (n,), relative to those of the source.

    All layers count alike, however large their activations are. (Wang et al., arXiv 1711.11585,
    compare the features of a discriminator; those of a fixed network do not change while a model
    trains.)

    Args:
        output: Activations (n, h_l, w_l, c_l) of decoded images, such as
            `gnvc_jax.metrics.lpips.lpips_features` gives.
        source: Those of the source, which get no gradient.
    """
    found = []
    for a, b in zip(output, source, strict=True):
        b = jax.lax.stop_gradient(b)
        size = jnp.maximum(per_clip(jnp.abs(b)), 1e-6)
        found.append(per_clip(jnp.abs(a - b)) / size)
    return jnp.stack(found).mean(0)


# A discriminator's judgements are numbers of patches, larger for real ones: (b, ...).


def hinge_discriminator(real: Array, decoded: Array) -> Array:
    """Loss (b,) of a discriminator: real patches should get 1 or more, decoded ones -1 or less."""
    return per_clip(jax.nn.relu(1.0 - real)) + per_clip(jax.nn.relu(1.0 + decoded))


def hinge_generator(decoded: Array) -> Array:
    """Loss (b,) of a generator, whose decoded patches should look real."""
    return -per_clip(decoded)


def kl_divergence(mean: Array, logvar: Array) -> Array:
    """Divergence of N(mean, exp(logvar)) from N(0, 1), mean over the elements of each clip."""
    return 0.5 * per_clip(mean**2 + jnp.exp(logvar) - 1.0 - logvar)
