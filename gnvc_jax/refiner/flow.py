"""The flow that the refiner follows, in the paper's convention and in Wan's.

The paper: tau runs from 0 (noise) to 1 (data), x = tau * data + (1 - tau) * noise, and the velocity
is data minus noise. Wan: sigma = 1 - tau, the network is told the timestep 1000 * sigma and returns
noise minus data. States are the same, so a Wan network serves the paper's flow once its output
changes sign.

Source: GNVC-VD (arXiv 2512.05016) equations 1 to 6; Wan2.1 for the other convention. States are
normalised latents of any shape; times are scalars or broadcast against them.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gnvc_jax.errors import UsageError

Array = jax.Array

START = 0.7  # t_N: where refinement begins
TIMESTEPS = 1000.0


def wan_timestep(tau: float | Array) -> float | Array:
    """Wan's timestep in 1000 (noise) .. 0 (data) of flow time tau in 0 .. 1."""
    return TIMESTEPS * (1.0 - tau)


def flow_time(timestep: float | Array) -> float | Array:
    """Undoes `wan_timestep`."""
    return 1.0 - timestep / TIMESTEPS


def velocity_from_wan(output: Array) -> Array:
    """The paper's velocity, data minus noise, of what a Wan network returns; and the reverse."""
    return -output


def shifted(tau: float | Array, shift: float) -> float | Array:
    """Flow time with Wan's shift s of the noise scale: sigma' = s sigma / (1 + (s - 1) sigma).

    A shift above 1 moves steps towards noise.
    """
    return tau / (tau + shift * (1.0 - tau))


def mix(data: Array, noise: Array, tau: float | Array) -> Array:
    """State at tau between noise and data."""
    return tau * data + (1.0 - tau) * noise


def start_state(decoded: Array, noise: Array, start: float = START) -> Array:
    """Equation 2: decoded latents with noise down to flow time `start`."""
    return mix(decoded, noise, start)


def path_state(
    clean: Array, decoded: Array, noise: Array, tau: float | Array, start: float = START
) -> Array:
    """Equation 3: the straight path from `start_state` at tau = start to clean latents at tau = 1.

    The share of noise in it is 1 - tau, so it is an ordinary flow state of partly repaired latents.
    """
    done = (tau - start) / (1.0 - start)
    return mix(clean, start_state(decoded, noise, start), done)


def path_velocity(clean: Array, decoded: Array, noise: Array, start: float = START) -> Array:
    """Equation 4: the derivative of `path_state`, the same at every tau.

    Its first part is what a pretrained flow model predicts, its second what refinement adds.
    """
    pretrained = clean - noise
    correction = -start / (1.0 - start) * (decoded - clean)
    return pretrained + correction


def linear_velocity(
    state: Array, decoded: Array, tau: float | Array, deviation: float, start: float = START
) -> Array:
    """The best linear guess at `path_velocity` from the state and the decoded latents alone.

    It takes coding errors (decoded minus clean) as noise of this deviation, independent of the
    flow's. At tau = start one step along it gives the decoded latents back. A network that only has
    to correct it learns sooner than one that must find decoded latents and noise by itself (as
    the preconditioning of Karras et al. 2022, arXiv 2206.00364, for denoisers).
    """
    rest = state - tau * decoded  # (1 - tau) noise - done * error
    done, left = (tau - start) / (1.0 - start), 1.0 - tau
    variance = deviation**2
    share = left - done * variance / (1.0 - start)
    return decoded - rest * share / (left**2 + done**2 * variance)


def clean_estimate(state: Array, velocity: Array, tau: float | Array) -> Array:
    """Where the velocity leads in one step: state + (1 - tau) velocity."""
    return state + (1.0 - tau) * velocity


def noise_estimate(state: Array, velocity: Array, tau: float | Array) -> Array:
    """Where an ordinary flow state came from: state - tau velocity."""
    return state - tau * velocity


def step_times(steps: int, start: float = START, shift: float = 1.0) -> Array:
    """steps + 1 flow times from `start` to 1, uniform before the shift. (steps + 1,) float32.

    Raises UsageError for fewer than one step or a start outside 0 .. 1.
    """
    if steps < 1 or not 0.0 <= start < 1.0:
        raise UsageError(f"{steps} steps from {start}: expected at least 1 step, start in [0, 1)")
    # The shift must leave `start` in place: shift the uniform times of its preimage.
    first = shifted(start, 1.0 / shift)
    return shifted(jnp.linspace(first, 1.0, steps + 1, dtype=jnp.float32), shift)


def integrate(velocity: Callable[[Array, Array], Array], state: Array, times: Array) -> Array:
    """Euler's method: from `state` at times[0] through the others; velocity(state, tau).

    A loop of Python's: what a jitted velocity compiles to serves any number of steps.
    """
    for tau, after in itertools.pairwise(times):
        state = state + (after - tau) * velocity(state, tau)
    return state
