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

import numpy as np
from jaxtyping import Float

from gnvc_jax.codec.config import SCALE_MAX, SCALE_MIN, SCALES, CodecConfig
from gnvc_jax.codec.quality import POSITIONS
from gnvc_jax.codec.scales import BIAS_UNIT, MULT_UNIT, scale_layers
from gnvc_jax.moments import Moments

WHITENING_FLOOR = 0.1  # of the mean variance: channels that hardly vary are not amplified


def quantiser_step(worth: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Step of a uniform quantiser where a squared error is worth `worth` bits.

    At the optimum -dR/dD = worth. With D = step^2 / 12 and a slope of 6.02 dB a bit that gives
    step^2 = 6 / (worth ln 2).
    """
    return np.sqrt(6.0 / (worth * np.log(2.0)))


def whitening(variances: Float[np.ndarray, " c"]) -> Float[np.ndarray, " c"]:
    """Factors that give latent channels of these variances about equal standard deviations."""
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
    """Parameters of one `gnvc_jax.codec.model.ResidualTransform`, started from statistics.

    Args:
      params: parameters of the whole codec; not changed.
      config: sizes.
      kind: which transform.
      cells: moments of cells of 2x2 latents (4c,), of the residual if kind is "inter".
      latent_variances: variances of the latents themselves.
      worth_low, worth_high: bits that a squared error of one latent element is worth at the lowest
        and at the best quality level, geometric between them.

    Returns:
      The parameters of `kind`, NumPy arrays where they were fitted.
    """
    part, y = dict(params[kind]), config.y_channels
    variances, vectors = cells.principal_components()
    # y may have more channels than a cell has values; those beyond start at zero.
    kept = min(y, len(vectors))
    basis = np.zeros((len(vectors), y))
    basis[:, :kept] = vectors[:, :kept]
    steps = quantiser_step(worth_low * (worth_high / worth_low) ** POSITIONS)  # (knots,)
    deviation = np.sqrt(np.maximum(np.pad(variances[:kept], (0, y - kept)), 1e-12))
    # (knots, y): where sigma = deviation / step lies on the logarithmic scale of tables, 0 to 1.
    tables = np.log(deviation / steps[:, None] / SCALE_MIN) / np.log(SCALE_MAX / SCALE_MIN)

    part["basis"] = basis.astype(np.float32)
    part["inverse"] = basis.T.astype(np.float32)
    part["whitening"] = whitening(latent_variances)
    log_steps = np.repeat(np.log(steps)[:, None], y, 1).astype(np.float32)
    part["y_gain"], part["y_inverse"] = {"log_gain": -log_steps}, {"log_gain": log_steps}

    # With kernels at zero, the biases of the last layer alone give the table index.
    last = scale_layers(config)[-1]
    unit = 2.0**last.shift / MULT_UNIT / BIAS_UNIT  # of a bias that moves the index by one
    index = np.clip((SCALES - 1) * tables, 0, SCALES - 1)
    scales = dict(part["entropy"]["scales"])
    scales["P3_bias"] = (index * unit).astype(np.float32)
    scales["P3_kernel"] = np.zeros_like(scales["P3_kernel"])
    part["entropy"] = {**part["entropy"], "scales": scales}
    return part
