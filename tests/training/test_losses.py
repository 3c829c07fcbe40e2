"""The losses as anyone would call them: on arrays, without a stage or a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnvc_jax.training import losses


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_quality_levels_cover_the_range_in_every_batch():
    levels = np.asarray(losses.draw_quality(jax.random.key(1), 16))
    np.testing.assert_array_equal(levels // 4, np.arange(16))
    assert losses.draw_quality(jax.random.key(2), 1).shape == (1,)


def test_lambda_is_geometric_in_quality():
    found = losses.rd_lambda(np.array([0, 63, 21]), 0.01, 10.0)
    np.testing.assert_allclose(found, [0.01, 10.0, 0.1], rtol=1e-5)


def test_rate_distortion_is_the_lagrangian_and_its_balance():
    rate, distortion, weight = np.array([2.0, 3.0]), np.array([0.5, 4.0]), np.array([4.0, 0.25])
    found = losses.rate_distortion(rate, distortion, weight)
    np.testing.assert_allclose(found, [4.0, 4.0])
    found = losses.rate_distortion(rate, distortion, weight, balance=0.5)
    np.testing.assert_allclose(found, [2.0, 8.0])


def test_flow_matching_vanishes_for_the_velocity_of_the_path():
    """The path is straight, from decoded latents with noise at time 0.7 to clean ones at 1."""
    clean, decoded, noise = (normal(seed, 2, 3, 4, 4, 5) for seed in range(3))
    tau = np.float32([0.75, 0.9])
    velocity = (clean - (0.7 * decoded + 0.3 * noise)) / 0.3
    seen = []

    def known(state, tau):
        seen.append(state)
        return velocity

    found = losses.flow_matching(known, clean, decoded, noise, tau)
    np.testing.assert_allclose(found.error, 0.0, atol=1e-9)
    np.testing.assert_allclose(found.estimate, clean, atol=1e-5)
    part = ((tau - 0.7) / 0.3)[:, None, None, None, None]
    want = part * clean + (1 - part) * (0.7 * decoded + 0.3 * noise)
    np.testing.assert_allclose(seen[0], want, atol=1e-5)
    off = losses.flow_matching(lambda *_: velocity + 2.0, clean, decoded, noise, tau)
    np.testing.assert_allclose(off.error, 4.0, rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 3])
def test_refinement_has_gradients_of_its_last_step_only(steps):
    """A velocity w * state multiplies the state in every step; w counts in the last one alone."""
    decoded = jnp.full((1, 1, 1, 1, 1), 2.0)
    size = 0.5 / steps

    def refined(w, steps):
        return losses.refine_through_last_step(
            lambda w, state, tau: w * state, w, decoded, jnp.zeros_like(decoded), steps, 0.5
        ).sum()

    value, slope = jax.jit(jax.value_and_grad(refined))(3.0, steps)
    before = 0.5 * 2.0 * (1 + 3.0 * size) ** (steps - 1)
    assert value == pytest.approx(before * (1 + 3.0 * size), rel=1e-5)
    assert slope == pytest.approx(before * size, rel=1e-5)


def test_distillation_teaches_the_student_alone():
    student, teacher = normal(0, 2, 3), normal(1, 2, 3)
    slopes = jax.grad(lambda *pair: losses.distillation(*pair).sum(), (0, 1))(student, teacher)
    np.testing.assert_allclose(slopes[0], 2 / 3 * (student - teacher), rtol=1e-5)
    np.testing.assert_array_equal(slopes[1], 0.0)


def test_pixel_errors_and_a_perceptual_function():
    video, output = np.zeros((2, 5, 4, 4, 3), np.float32), np.full((2, 5, 4, 4, 3), 0.5, np.float32)
    found = losses.pixel(output, video)
    np.testing.assert_allclose(found.squared, 0.25)
    np.testing.assert_allclose(found.psnr, 20 * np.log10(2 / 0.5), rtol=1e-6)
    np.testing.assert_array_equal(found.perceptual, 0.0)
    output[0], output[1] = 3.0, np.arange(5)[:, None, None, None] / 10

    def distance(x, y):
        return jnp.mean(jnp.abs(x - y), axis=(1, 2, 3))

    def perceptual(output, video):
        return losses.perceptual_of_frames(distance, output, video, jax.random.key(0), 9)

    # Three is clipped to one; the other clip has frames of 0, 0.1, ... 0.4.
    np.testing.assert_allclose(losses.pixel(output, video, perceptual).perceptual, [1, 0.2], 1e-5)
    few = losses.perceptual_of_frames(distance, output, video, jax.random.key(0), 2)
    chosen = {round(float(10 * x), 3) for x in few[1:]}
    assert few.shape == (2,) and chosen <= {(i + j) / 2 for i in range(5) for j in range(i)}


def test_divergence_is_that_of_samples():
    mean, logvar = np.full((1, 4), 0.7, np.float32), np.full((1, 4), -0.9, np.float32)
    x = 0.7 + np.exp(-0.45) * np.random.default_rng(0).normal(size=400_000)
    log_ratio = -0.5 * (x - 0.7) ** 2 / np.exp(-0.9) + 0.45 + 0.5 * x**2
    assert losses.kl_divergence(mean, logvar)[0] == pytest.approx(log_ratio.mean(), abs=0.01)
