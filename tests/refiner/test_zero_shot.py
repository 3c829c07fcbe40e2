"""Refinement by a prior alone, for Gaussian latents, whose flow is known in closed form.

Latents have mean MEAN and a spectrum over rows and columns, and are independent in time, so that
windows do not change the velocity. Decoded latents are such latents with a bias and white errors.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnvc_jax.refiner import DiTConfig, RefinerConfig, refine

SIDE, MEAN, BIAS, ERROR = 8, 0.7, 0.2, 0.3
FREQUENCY = np.hypot(*np.meshgrid(*[np.fft.fftfreq(SIDE) * SIDE] * 2))
SPECTRUM = 4.0 / (1.0 + FREQUENCY**2)  # variance of each unitary Fourier coefficient
PRIOR = RefinerConfig(DiTConfig(channels=4), features=1, window=3, overlap=1)


def filtered(x, gain):
    """Latents (..., h, w, c) whose Fourier coefficients are multiplied by a real gain."""
    axes = (-3, -2)
    return jnp.fft.ifft2(jnp.fft.fft2(x, axes=axes) * gain[..., None], axes=axes).real


def velocity(state, tau, decoded, features, q_index):
    """E[data - noise | state]: for each frequency, a regression on the state."""
    variance = tau**2 * SPECTRUM + (1 - tau) ** 2
    gain = (tau * SPECTRUM - (1 - tau)) / variance
    return MEAN + filtered(state - tau * MEAN, gain)


def spectrum(x):
    """Power of each frequency, for each latent and channel: (n, h, w)."""
    power = np.abs(np.fft.fft2(np.asarray(x), axes=(-3, -2), norm="ortho")) ** 2
    return np.moveaxis(power, -1, 0).reshape(-1, SIDE, SIDE)


def within(samples, expected, standard_errors=3.0):
    error = samples.std(axis=0) / np.sqrt(len(samples))
    return np.all(np.abs(samples.mean(axis=0) - expected) < standard_errors * error)


@pytest.mark.parametrize("start", [0.0, 0.5, 0.8])
def test_zero_shot_refinement_follows_the_gaussian_flow(start):
    rng = np.random.default_rng(0)
    shape = (64, 5, SIDE, SIDE, 4)
    clean = MEAN + filtered(rng.normal(size=shape).astype(np.float32), np.sqrt(SPECTRUM))
    decoded = clean + BIAS + ERROR * rng.normal(size=shape).astype(np.float32)
    config = RefinerConfig(**{**vars(PRIOR), "start": start})
    conditions = jnp.zeros((*shape[:-1], 1)), jnp.zeros(shape[:2], int)
    refined = refine(velocity, config, decoded, *conditions, jax.random.key(1), 300)
    # From start to 1, the flow scales each frequency as its standard deviation changes.
    gain = np.sqrt(SPECTRUM / (start**2 * SPECTRUM + (1 - start) ** 2))
    mean = MEAN + gain[0, 0] * start * BIAS
    assert within(np.asarray(refined).mean(axis=(2, 3)).reshape(-1), mean)

    begun = start**2 * (SPECTRUM + ERROR**2) + (1 - start) ** 2
    power = spectrum(refined - mean)
    rings = FREQUENCY.round().astype(int)
    for ring in range(rings.max() + 1):
        part = rings == ring
        assert within(power[:, part].mean(axis=1), (gain**2 * begun)[part].mean()), ring
    # The errors that noise drowns are gone: less is left of them, the earlier it begins.
    assert (gain**2 * begun - SPECTRUM).max() < ERROR**2
