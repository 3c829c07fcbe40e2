"""The algebra of the flow, and Wan's convention against the paper's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnvc_jax.refiner import flow

KEYS = jax.random.split(jax.random.key(0), 3)
CLEAN, NOISE = (jax.random.normal(k, (2, 3, 4, 4, 16)) for k in KEYS[:2])
DECODED = CLEAN + 0.3 * jax.random.normal(KEYS[2], CLEAN.shape)
TAUS = (0.7, 0.75, 0.9, 0.999)


def close(a, b, tolerance=2e-6):
    np.testing.assert_allclose(a, b, atol=tolerance, rtol=0)


def test_the_path_leads_from_noisy_decoded_to_clean_latents():
    close(flow.path_state(CLEAN, DECODED, NOISE, 0.7), 0.7 * DECODED + 0.3 * NOISE)
    close(flow.path_state(CLEAN, DECODED, NOISE, 1.0), CLEAN)


@pytest.mark.parametrize("tau", TAUS)
def test_velocity_is_the_derivative_of_the_path(tau):
    _, slope = jax.jvp(lambda t: flow.path_state(CLEAN, DECODED, NOISE, t), (tau,), (1.0,))
    velocity = flow.path_velocity(CLEAN, DECODED, NOISE)
    close(velocity, slope, 2e-5)
    state = flow.path_state(CLEAN, DECODED, NOISE, tau)
    close(flow.clean_estimate(state, velocity, tau), CLEAN, 1e-5)


def test_without_coding_error_the_velocity_is_the_pretrained_one():
    close(flow.path_velocity(CLEAN, CLEAN, NOISE), CLEAN - NOISE)
    # The correction is -7/3 of the coding error at t_N = 0.7.
    extra = flow.path_velocity(CLEAN, DECODED, NOISE) - (CLEAN - NOISE)
    close(extra, -7 / 3 * (DECODED - CLEAN), 1e-5)


@pytest.mark.parametrize("tau", TAUS)
def test_the_share_of_noise_is_one_minus_tau(tau):
    start = 0.7
    repaired = ((tau - start) * CLEAN + start * (1 - tau) * DECODED) / (tau * (1 - start))
    close(flow.path_state(CLEAN, DECODED, NOISE, tau), flow.mix(repaired, NOISE, tau), 1e-5)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_any_number_of_steps_is_exact_with_the_exact_velocity(steps):
    times = flow.step_times(steps)
    start = flow.start_state(DECODED, NOISE)
    velocity = flow.path_velocity(CLEAN, DECODED, NOISE)
    close(flow.integrate(lambda x, t: velocity, start, times), CLEAN, 1e-5)


def test_euler_converges_on_a_field_that_is_known():
    # dx/dtau = x from 0 to 1: the solution is e times the start, the error falls as 1/steps.
    errors = [
        abs(float(flow.integrate(lambda x, t: x, jnp.ones(()), flow.step_times(n, 0.0))) - np.e)
        for n in (50, 100)
    ]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.03)


def test_step_times_are_uniform_before_the_shift():
    close(flow.step_times(5), [0.7, 0.76, 0.82, 0.88, 0.94, 1.0])
    close(flow.wan_timestep(flow.step_times(5))[:-1], [300, 240, 180, 120, 60], 2e-4)
    # Published: five steps of diffusers' FlowMatchEuler with shift 5 go through these sigmas (it
    # places its uniform times otherwise); here the shift itself is checked.
    sigma = np.array([1.0, 0.5, 0.25])
    close(1 - flow.shift_time(1 - sigma, 5.0), 5 * sigma / (1 + 4 * sigma))
    shifted = flow.step_times(4, 0.7, 3.0)
    close(shifted[jnp.array([0, -1])], [0.7, 1.0])
    assert (np.diff(shifted) > 0).all() and shifted[1] < 0.775
    for bad in ((0, 0.7), (3, 1.0), (3, -0.1)):
        with pytest.raises(ValueError, match="step"):
            flow.step_times(*bad)


@pytest.mark.parametrize("tau", TAUS)
def test_wan_convention_matches_the_papers(tau):
    sigma = 1 - tau
    state = (1 - sigma) * CLEAN + sigma * NOISE  # Wan's
    close(state, flow.mix(CLEAN, NOISE, tau))
    output = NOISE - CLEAN  # what a Wan network is trained to return
    velocity = flow.velocity_from_wan(output)
    close(flow.wan_timestep(tau), 1000 * sigma, 1e-3)
    close(flow.flow_time(flow.wan_timestep(tau)), tau)
    close(flow.clean_estimate(state, velocity, tau), state - sigma * output, 1e-5)
    close(flow.clean_estimate(state, velocity, tau), CLEAN, 1e-5)
    close(flow.noise_estimate(state, velocity, tau), state + (1 - sigma) * output, 1e-5)
    close(flow.noise_estimate(state, velocity, tau), NOISE, 1e-5)
    # One step in either convention.
    after, step = tau + 0.0005, -0.0005
    ours = flow.integrate(lambda x, t: velocity, state, jnp.array([tau, after]))
    close(ours, state + step * output, 1e-5)


@pytest.mark.parametrize("tau", TAUS)
def test_the_linear_velocity_is_the_best_linear_guess(tau):
    """Against least squares on samples: v - decoded on (state - tau decoded)."""
    keys = jax.random.split(jax.random.key(1), 3)
    clean, noise, error = (jax.random.normal(k, (200_000,)) for k in keys)
    decoded = clean + 0.4 * error
    state = flow.path_state(clean, decoded, noise, tau)
    target = flow.path_velocity(clean, decoded, noise)
    rest = state - tau * decoded
    slope = np.vdot(rest, target - decoded) / np.vdot(rest, rest)
    guess = flow.linear_velocity(state, decoded, tau, 0.4)
    # Both slopes to three digits of the noise that remains.
    scale = np.std(target - guess) / np.std(rest) / np.sqrt(rest.size)
    ours = np.vdot(rest, guess - decoded) / np.vdot(rest, rest)
    assert abs(ours - slope) < 5 * scale


def test_one_linear_step_gives_the_decoded_latents():
    state = flow.start_state(DECODED, NOISE)
    velocity = flow.linear_velocity(state, DECODED, 0.7, 0.3)
    close(flow.clean_estimate(state, velocity, 0.7), DECODED, 1e-5)
