"""Parameters of a latent codec from statistics alone, where training starts.

What a transform coder needs is known at once. The basis of y is the Karhunen-Loeve transform of
cells of 2x2 latents (of their residual, for predicted ones); the step of the quantiser follows from
lambda; and the standard deviation of each coefficient, in steps, says which probability table it
wants. All networks stay at zero and learn what the transform cannot.

`init_from_statistics` does this for one kind of latent; the statistics are moments of training
clips (see the training stage `transform`).
"""

from collections.abc import Mapping
from typing import Literal

import jax
import numpy as np
from jaxtyping import Float
from scipy.special import ndtr

from gnvc_jax.codec.config import SCALE_MAX, SCALE_MIN, SCALES, SYMBOL_BOUND, CodecConfig
from gnvc_jax.codec.quality import POSITIONS
from gnvc_jax.codec.scales import BIAS_UNIT, MULT_UNIT, scale_layers
from gnvc_jax.moments import Moments

WHITENING_FLOOR = 0.1  # of the mean variance: channels that hardly vary are not amplified


def quantiser_step(worth: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """The best step of a uniform quantiser.

    At the optimum -dR/dD = worth. Each bit quarters D (6.02 dB), so dD/dR = -2 ln 2 D. With
    D = step^2 / 12 that gives step^2 = 6 / (worth ln 2).

    Args:
        worth: Bits that one unit of squared error is worth.
    """
    return np.sqrt(6.0 / (worth * np.log(2.0)))


def worth_of_step(step: float) -> float:
    """Undoes `quantiser_step`."""
    return 6.0 / (step**2 * np.log(2.0))


def table_bias(
    config: CodecConfig, deviation: Float[np.ndarray, "*levels y"]
) -> Float[np.ndarray, "*levels y"]:
    """Biases of the scale network's last layer for symbols of given standard deviations.

    With the kernel of that layer at zero, its biases alone choose the probability table.

    Args:
        config: Sizes of the codec.
        deviation: Standard deviation of each channel of y, in steps of the quantiser.
    """
    # `requantise` without products, and with the multiplier that training starts with: the
    # index is bias * BIAS_UNIT * MULT_UNIT / 2**shift.
    last = scale_layers(config)[-1]
    unit = 2.0**last.shift / MULT_UNIT / BIAS_UNIT  # of a bias that moves the index by one
    # Tables are spaced evenly in the logarithm of their deviation.
    place = np.log(np.maximum(deviation, 1e-12) / SCALE_MIN) / np.log(SCALE_MAX / SCALE_MIN)
    index = np.clip((SCALES - 1) * place, 0, SCALES - 1)
    return (index * unit).astype(np.float32)


def deviation_of_symbols(mean_square: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Standard deviation, in steps, of a Gaussian whose rounded values have a given mean square.

    It is about sqrt(mean_square - 1/12) where that is large; rounding hides values below a half.
    The result is limited to the deviations that have a table.
    """
    # Sixteen times as dense as the tables; values up to eight of the largest deviations.
    sigmas = np.geomspace(SCALE_MIN, SCALE_MAX, 16 * SCALES)
    edges = np.arange(int(8 * SCALE_MAX)) + 0.5
    # E[q^2] = sum over k >= 1 of (k^2 - (k - 1)^2) P(|q| >= k). The probabilities are `tails`, with
    # a row for each sigma and a column for each k.
    tails = 2.0 * ndtr(-edges / sigmas[:, None])
    # k^2 - (k - 1)^2 = 2k - 1 is twice the edge k - 1/2. The mean square grows with sigma, so that
    # interpolation inverts it.
    squares = tails @ (2.0 * edges)
    return np.interp(mean_square, squares, sigmas)


def quiet_hyperprior(entropy: Mapping) -> dict:
    """Makes the hyperlatents of an entropy model zero, at next to no cost in bits.

    A random hyperprior would spend bits on noise. Training finds it again: the layers after it
    keep their random weights.

    Args:
        entropy: Parameters of a `gnvc_jax.codec.entropy.EntropyModel`; not changed.
    """
    # Zeros in the last block before rounding make every z zero.
    last = jax.tree.map(np.zeros_like, entropy["hyper_down_1"])
    # Four layers of slope softplus(h) make F a logistic function of slope 18: P(0) = 0.9998.
    # log(expm1(s)) is the h with softplus(h) = s. With a at zero, the layers are linear.
    steep = np.log(np.expm1(18.0**0.25))
    density = {name: np.zeros_like(x) for name, x in entropy["density"].items()}
    density["h"] = density["h"] + np.float32(steep)
    return {**entropy, "hyper_down_1": last, "density": density}


def whitening(variances: Float[np.ndarray, " c"]) -> Float[np.ndarray, " c"]:
    """Factors that bring latent channels of given variances to about equal standard deviations."""
    # Otherwise a channel that is nearly constant would be all noise to the networks.
    floor = WHITENING_FLOOR * variances.mean()
    return (1.0 / np.sqrt(variances + floor)).astype(np.float32)


def init_from_statistics(
    params: Mapping,
    config: CodecConfig,
    kind: Literal["intra", "inter"],
    cells: Moments,
    latent_variances: Float[np.ndarray, " c"],
    worth_low: float | np.floating,
    worth_high: float | np.floating,
) -> dict:
    """Parameters of one `gnvc_jax.codec.transform.ResidualTransform`, started from statistics.

    Args:
        params: Parameters of the whole codec; not changed.
        config: Sizes of the codec.
        kind: The transform to start.
        cells: Moments of cells of 2x2 latents (4c,), of the residual if kind is "inter".
        latent_variances: Variances of the latents themselves, per channel.
        worth_low, worth_high: Bits that a squared error of one latent element is worth at the
            lowest and at the best quality level, geometric between them.

    Returns:
        The parameters of the transform; those that were fitted are NumPy arrays.
    """
    part, y = dict(params[kind]), config.y_channels
    variances, vectors = cells.principal_components()
    # y may have more channels than a cell has values; those beyond start at zero.
    kept = min(y, len(vectors))
    # The linear part of the transform: (4c,) values of a cell to (y,) coefficients.
    basis = np.zeros((len(vectors), y))
    basis[:, :kept] = vectors[:, :kept]
    deviation = np.sqrt(np.pad(variances[:kept], (0, y - kept)))
    # All coefficients of a level share one step, unless the range of symbols forces a coarser one.
    steps = quantiser_step(worth_low * (worth_high / worth_low) ** POSITIONS)  # (knots,)
    # (knots, y): the largest symbol must reach six standard deviations; tails are heavy.
    steps = np.maximum(steps[:, None], 6.0 * deviation / SYMBOL_BOUND)

    # The columns are orthonormal, so the transpose is the inverse of the transform.
    part["basis"] = basis.astype(np.float32)
    part["inverse"] = basis.T.astype(np.float32)
    part["whitening"] = whitening(latent_variances)
    # Gains are stored as logarithms: y is divided by the step, and multiplied by it again.
    log_steps = np.log(steps).astype(np.float32)
    part["y_gain"], part["y_inverse"] = {"log_gain": -log_steps}, {"log_gain": log_steps}

    # P3 is the last layer of the scale network, see `gnvc_jax.codec.scales.scale_layers`.
    # At first the table of a channel depends on the quality level alone; training lets it follow
    # the content.
    scales = dict(part["entropy"]["scales"])
    scales["P3_bias"] = table_bias(config, deviation / steps)
    scales["P3_kernel"] = np.zeros_like(scales["P3_kernel"])
    part["entropy"] = {**part["entropy"], "scales": scales}
    return part
