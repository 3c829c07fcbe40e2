"""The flow that the refiner follows, in the paper's convention and in Wan's.

The paper: tau runs from 0 (noise) to 1 (data), x = tau * data + (1 - tau) * noise, and the velocity
is data minus noise. Wan: sigma = 1 - tau, the network is told the timestep 1000 * sigma and returns
noise minus data. States are the same, so a Wan network serves the paper's flow once its output
changes sign (`wan_timestep`, `velocity_from_wan`).

Training draws states with `path_state` and regresses `path_velocity`; refinement starts at
`start_state` and follows the network's velocity by `integrate` over `step_times`.

Source: GNVC-VD (arXiv 2512.05016) equations 1 to 6; Wan2.1 for the other convention. States are
normalised latents of any shape; times are scalars or broadcast against them. The algebra works on
NumPy and JAX arrays alike.
"""

import itertools
from collections.abc import Callable
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gnvc_jax.errors import UsageError

# For functions of a flow time alone, which may be a plain number.
Time = TypeVar("Time", Array, np.ndarray, float)

START = 0.7  # t_N: flow time at which refinement begins
TIMESTEPS = 1000.0  # Wan's timestep of pure noise


def wan_timestep(tau: Time) -> Time:
    """Converts flow time tau in [0, 1] to Wan's timestep, 1000 (noise) to 0 (data)."""
    # sigma = 1 - tau, so t_N = 0.7 is timestep 300.
    return TIMESTEPS * (1.0 - tau)


def flow_time(timestep: Time) -> Time:
    """Undoes `wan_timestep`."""
    return 1.0 - timestep / TIMESTEPS


def velocity_from_wan(output: Array) -> Array:
    """Converts the output of a Wan network to the paper's velocity, and the reverse."""
    return -output


def shift_time(tau: Time, shift: float) -> Time:
    """Applies Wan's shift s of the noise scale: sigma' = s sigma / (1 + (s - 1) sigma).

    A shift above 1 moves steps towards noise.
    """
    # The same in tau = 1 - sigma: tau' = tau / (tau + s (1 - tau)). Both ends, 0 and 1, stay.
    return tau / (tau + shift * (1.0 - tau))


def mix(data: Array, noise: Array, tau: Array | float) -> Array:
    """State at tau between noise and data."""
    return tau * data + (1.0 - tau) * noise


def start_state(decoded: Array, noise: Array, start: float = START) -> Array:
    """Equation 2: decoded latents with noise down to flow time `start`."""
    return mix(decoded, noise, start)


def path_state(
    clean: Array, decoded: Array, noise: Array, tau: Array | float, start: float = START
) -> Array:
    """Equation 3: the straight path from `start_state` at tau = start to clean latents at tau = 1.

    Its weight of noise is 1 - tau, so it is an ordinary flow state of partly repaired latents.
    """
    # Equation 3 as a mixture: its two weights are `done` and 1 - done, and add up to 1.
    done = (tau - start) / (1.0 - start)  # part of the path behind us, 0 to 1
    return mix(clean, start_state(decoded, noise, start), done)


def path_velocity(clean: Array, decoded: Array, noise: Array, start: float = START) -> Array:
    """Equation 4: the derivative of `path_state`, the same at every tau.

    The first term is what a pretrained flow model predicts, the second what refinement adds.
    """
    pretrained = clean - noise
    # For t_N = 0.7 coding errors are weighted by 7/3, so they dominate the target where the codec
    # is coarse.
    correction = -start / (1.0 - start) * (decoded - clean)
    return pretrained + correction


def linear_velocity(
    state: Array, decoded: Array, tau: Array | float, error_std: float, start: float = START
) -> Array:
    """The best linear guess at `path_velocity` from the state and the decoded latents alone.

    Coding errors (decoded minus clean) count as noise, independent of the flow's. At tau = start
    one step along this velocity gives the decoded latents back. A network that only corrects it
    learns sooner than one that must separate decoded latents and noise by itself (as with the
    preconditioning of denoisers by Karras et al. 2022, arXiv 2206.00364).

    Args:
        state: State of the flow at tau.
        decoded: Latents from the codec.
        tau: Flow time.
        error_std: Standard deviation of coding errors.
        start: Flow time at which refinement begins.
    """
    rest = state - tau * decoded  # (1 - tau) noise - done * error
    done, left = (tau - start) / (1.0 - start), 1.0 - tau
    variance = error_std**2
    # Regression of the velocity on `rest`: their covariance over the variance of `rest`. The
    # velocity is decoded - noise - error / (1 - start), see `path_velocity`.
    share = left - done * variance / (1.0 - start)
    return decoded - rest * share / (left**2 + done**2 * variance)


def clean_estimate(state: Array, velocity: Array, tau: Array | float) -> Array:
    """The data that the velocity leads to in one step: state + (1 - tau) velocity."""
    # The rest of the path takes 1 - tau and is straight: the exact velocity leads to the data.
    return state + (1.0 - tau) * velocity


def noise_estimate(state: Array, velocity: Array, tau: Array | float) -> Array:
    """The noise that an ordinary flow state came from: state - tau velocity."""
    return state - tau * velocity


def step_times(steps: int, start: float = START, shift: float = 1.0) -> Array:
    """The steps + 1 flow times from `start` to 1, uniform before the shift.

    Raises:
        UsageError: If there is no step, or the start is outside [0, 1).
    """
    if steps < 1 or not 0.0 <= start < 1.0:
        raise UsageError(
            f"expected at least 1 refinement step and a start in [0, 1), got {steps} steps "
            f"from {start}"
        )
    # A shift by 1 / s undoes a shift by s.
    # The shifted times must begin at `start`, so the uniform ones begin at its preimage.
    first = shift_time(start, 1.0 / shift)
    return shift_time(jnp.linspace(first, 1.0, steps + 1, dtype=jnp.float32), shift)


def integrate(velocity: Callable[[Array, Array], Array], state: Array, times: Array) -> Array:
    """Integrates the flow by Euler's method (equation 5 of GNVC-VD).

    The loop is Python's: a jitted `velocity(state, tau)` compiles once for any number of steps.

    Args:
        velocity: Velocity at a state and a flow time.
        state: State at times[0].
        times: Flow times, see `step_times`.

    Returns:
        The state at the last of the times.
    """
    for tau, after in itertools.pairwise(times):
        # x(tau') = x(tau) + (tau' - tau) v(x(tau), tau)
        state = state + (after - tau) * velocity(state, tau)
    return state
