"""Samplers on a Gaussian prior, whose velocity and flow are known in closed form."""

import jax.numpy as jnp
import numpy as np
import pytest

from gnvc_jax.errors import UsageError
from gnvc_jax.refiner.sampling import SAMPLERS, euler, unipc

MEAN, DEVIATION = 0.7, np.array([0.1, 0.5, 1.0, 2.0], np.float32)


def velocity(state, tau):
    """E[data - noise | state], for independent data of the given mean and deviation."""
    variance = (tau * DEVIATION) ** 2 + (1 - tau) ** 2
    return MEAN + (tau * DEVIATION**2 - (1 - tau)) / variance * (state - tau * MEAN)


def errors(sampler, steps, shift=1.0):
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(50, 4)), jnp.float32)
    exact = MEAN + DEVIATION * noise  # the flow keeps each quantile in its place
    return np.abs(np.asarray(sampler(velocity, noise, steps, shift) - exact)).max(axis=0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_transport_noise_to_the_data(name, shift):
    assert errors(SAMPLERS[name], 200, shift).max() < 0.05


def test_second_order_needs_fewer_steps():
    assert np.all(errors(unipc, 12)[1:] < 0.5 * errors(euler, 24)[1:])


def test_one_step_gives_the_estimated_data():
    for sampler in SAMPLERS.values():
        noise = jnp.ones(4)
        # Nearly: UniPC tells the network timestep 999 instead of 1000.
        np.testing.assert_allclose(sampler(velocity, noise, 1, 5.0), MEAN, atol=5e-3)


@pytest.mark.parametrize(("steps", "shift"), [(0, 1.0), (5, 0.0)])
def test_schedules_that_make_no_sense_are_refused(steps, shift):
    for sampler in SAMPLERS.values():
        with pytest.raises(UsageError, match="at least 1 step and a positive shift"):
            sampler(velocity, jnp.ones(4), steps, shift)
