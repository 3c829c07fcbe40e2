"""Samplers of the flow: from noise to latents, with the schedules that diffusers gives Wan2.1.

A sampler follows a velocity, data minus noise, from flow time 0 to 1 (see `flow`). `SAMPLERS` has
them by name. Their coefficients depend on the schedule alone and are computed in float64 on the
host; only the velocity is worth compiling.

Sources: `FlowMatchEulerDiscreteScheduler`, and `UniPCMultistepScheduler` with `flow_prediction`,
`use_flow_sigmas`, order 2 and "bh2", both in diffusers (Apache-2.0); UniPC is by Zhao et al. 2023
(arXiv 2302.04867).
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gnvc_jax.errors import UsageError
from gnvc_jax.refiner import flow

Velocity = Callable[[Array, Array], Array]
Times = Float[np.ndarray, " n"]

LAST = 1.0 - 1.0 / flow.TIMESTEPS  # the flow time of Wan's last timestep, 1
FIRST = 1e-6  # for UniPC in place of 0, where the logarithm of the signal-to-noise ratio is -inf
ORDER = 2


def euler_times(steps: int, shift: float) -> Times:
    """The steps + 1 flow times of Euler's method, from 0 to 1.

    The last step starts at the shifted last timestep, and the shift is applied to all of them: to
    that one twice, as in diffusers.
    """
    times = np.linspace(0.0, flow.shift_time(LAST, shift), steps)
    return np.append(flow.shift_time(times, shift), 1.0)


def euler(velocity: Velocity, noise: Array, steps: int, shift: float) -> Array:
    """Integrates the flow by Euler's method.

    Args:
        velocity: Function (state, flow time) -> velocity.
        noise: State to begin with, standard normal noise.
        steps: Number of calls of `velocity`.
        shift: Wan's shift, see `flow.shift_time`.

    Returns:
        The state at time 1.

    Raises:
        UsageError: If there are no steps, or the shift is not positive.
    """
    _check(steps, shift)
    return flow.integrate(velocity, noise, jnp.asarray(euler_times(steps, shift), jnp.float32))


def unipc_times(steps: int, shift: float) -> Times:
    """The steps + 1 flow times of UniPC, from almost 0 to 1."""
    times = flow.shift_time(np.linspace(0.0, LAST, steps + 1)[:-1], shift)
    # The noise is a float32 in diffusers; at the start, rounding moves the logarithm noticeably.
    noise = np.float32(1.0 - np.maximum(times, FIRST)).astype(np.float64)
    return np.append(1.0 - noise, 1.0)


def unipc(velocity: Velocity, noise: Array, steps: int, shift: float) -> Array:
    """UniPC: a multistep predictor and corrector of second order. Arguments as for `euler`.

    The velocity at the end of each step also corrects that step, so there is one call per step.
    """
    _check(steps, shift)
    times = unipc_times(steps, shift)
    # Wan was trained on whole timesteps. Rounding errors must not take 750 to 749.
    # The network is told the whole timestep, while the step itself goes by the exact time.
    whole = np.floor(np.round(flow.wan_timestep(times), 6))
    told = jnp.asarray(flow.flow_time(whole), jnp.float32)
    state, start, estimates, order = noise, noise, [], 0
    for i in range(steps):
        # Multistep methods for data prediction keep estimates of the data rather than velocities.
        estimate = flow.clean_estimate(state, velocity(state, told[i]), float(times[i]))
        if i:
            # Corrector: the last step is taken again from where it started, now that the estimate
            # at its end is known. `order` is still that of the predictor of this step.
            state = unipc_step(start, estimates, times[: i + 1], order, estimate)
        start, estimates = state, [estimate, *estimates][:ORDER]
        # No more estimates than there are, and a last step that simply ends at the data.
        order = min(ORDER, i + 1, steps - i)
        # Predictor: the step from times[i] to times[i + 1].
        state = unipc_step(start, estimates, times[: i + 2], order)
    return state


def unipc_step(
    state: Array,
    estimates: Sequence[Array],
    times: Times,
    order: int,
    ahead: Array | None = None,
) -> Array:
    """Takes one step of UniPC with B(h) = exp(-h) - 1, a combination of data estimates.

    Args:
        state: State at times[-2].
        estimates: Data estimated at times[-2], times[-3] and so on.
        times: Flow times up to times[-1], where the step ends.
        order: 1 or 2: number of estimates to use.
        ahead: Data estimated at times[-1], for the corrector; None for the predictor.

    Returns:
        The state at times[-1].
    """
    with np.errstate(divide="ignore"):  # infinite at time 1
        # Half the logarithm of the signal-to-noise ratio, in which steps are measured.
        log_snr = np.log(times) - np.log1p(-times)
    h = log_snr[-1] - log_snr[-2]
    decay = np.expm1(-h)
    known = estimates[0]
    ratio = (1.0 - times[-1]) / (1.0 - times[-2])
    # The first-order part, exact if the data estimate did not change along the step.
    end = float(ratio) * state - float(times[-1] * decay) * known

    # Where the other estimates lie, in units of the step; and how far they are from the first.
    places, others = [], []
    if order == 2:
        places.append((log_snr[-3] - log_snr[-2]) / h)
        others.append((estimates[1] - known) / float(places[0]))
    if ahead is None:
        weights = [0.5]  # the method's choice in place of solving for a single unknown
    else:
        places.append(1.0)
        others.append(ahead - known)
        weights = [0.5] if order == 1 else _corrector_weights(places, h, decay)
    for weight, other in zip(weights, others):
        end = end - float(times[-1] * decay * weight) * other
    return end


def _corrector_weights(places: Sequence[float], h: float, decay: float) -> np.ndarray:
    """Weights of two differences for which the step is exact to second order (equation 5)."""
    second = -decay / h - 1.0  # the functions phi of exponential integrators, times powers of h
    third = -second / h - 0.5
    # Two conditions, one per order, for the two weights.
    return np.linalg.solve(np.array([[1.0, 1.0], places]), np.array([second, 2.0 * third]) / decay)


def _check(steps: int, shift: float) -> None:
    if steps < 1 or shift <= 0.0:
        raise UsageError(
            f"sampling needs at least 1 step and a positive shift, got {steps} and {shift:g}"
        )


SAMPLERS = {"unipc": unipc, "euler": euler}
