"""LPIPS v0.1: learned perceptual distance on AlexNet or VGG16 features.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018;
version 0.1 of the authors' repository (linear weights on a frozen ImageNet backbone, with the input
scaling layer). Pure functions of a parameter tree, see `gnvc_jax.metrics.backbones`:

    {"backbone": [{"kernel": (k, k, in, out), "bias": (out,)}, ...], "lins": [(channels,), ...]}
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from gnvc_jax.metrics.backbones import check_images, features

# ImageNet mean and standard deviation, moved from [0, 1] to [-1, 1]: 2 mean - 1 and 2 std, with the
# digits of the authors' ScalingLayer.
_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
_SCALE = np.array([0.458, 0.448, 0.450], np.float32)


def lpips(
    params: dict,
    x: Array | np.ndarray,
    y: Array | np.ndarray,
    dtype: jax.typing.DTypeLike = jnp.float32,
    precision: str = "highest",
) -> Float32[Array, " b"]:
    """LPIPS distance of image pairs, differentiable everywhere.

    Args:
        params: `gnvc_jax.metrics.backbones.load_weights("alex")`, or "vgg".
        x: (b, h, w, 3) float RGB in [-1, 1], both sides at least 32.
        y: Images to compare with, of the same shape.
        dtype: Type that the convolutions compute in; bfloat16 is good enough for a loss, but not
            for a report.
        precision: Precision of the convolutions, see `jax.default_matmul_precision`; less than
            "highest" is good enough for a loss, too.

    Returns:
        (b,) float32, 0 for identical images, larger is worse.

    Raises:
        ValueError: If the shape is wrong, or a side is shorter than 32.
        TypeError: If the images are integers.
    """
    check_images("lpips", x, y, "[-1, 1]")
    # Two passes rather than one on the concatenation: where only one side is differentiated,
    # the other then costs no backward pass and keeps no activations.
    fx = lpips_features(params, x, dtype, precision)
    fy = lpips_features(params, y, dtype, precision)
    # Sum over layers of the mean over positions of the weighted squares over channels (their
    # equation 1). Weights are not negative, so the distance is not, either.
    distance = jnp.zeros(x.shape[0], jnp.float32)
    for lin, a, b in zip(params["lins"], fx, fy, strict=True):
        squares = jnp.square(_unit(a) - _unit(b))
        weighted = jnp.dot(squares, lin.astype(jnp.float32), precision="highest")
        distance += jnp.mean(weighted, axis=(1, 2))
    return distance


def lpips_features(
    params: dict,
    x: Array | np.ndarray,
    dtype: jax.typing.DTypeLike = jnp.float32,
    precision: str = "highest",
) -> list[Float[Array, "b _h _w _c"]]:
    """Computes the five activations that LPIPS compares, not scaled; arguments as for `lpips`."""
    return features(params["backbone"], (x - _SHIFT) / _SCALE, dtype, precision=precision)


def _unit(f: Float[Array, "b h w c"]) -> Float32[Array, "b h w c"]:
    """Channels scaled to unit length; (b, h, w, c) -> float32."""
    f = f.astype(jnp.float32)
    square = jnp.sum(jnp.square(f), axis=-1, keepdims=True)
    # sqrt has an infinite slope where every channel is dead; the inner `where` keeps it finite.
    alive = square > 0
    norm = jnp.where(alive, jnp.sqrt(jnp.where(alive, square, 1.0)), 0.0)
    return f / (norm + 1e-10)
