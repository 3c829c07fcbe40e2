"""DISTS: structure and texture similarity on VGG16 features.

Ding et al., "Image Quality Assessment: Unifying Structure and Texture Similarity", TPAMI 2020, as
in the authors' package DISTS-pytorch 0.1. dists.safetensors beside this file holds its 2 x 1475
channel weights (MIT licence, copyright 2020 Keyan Ding; the licence is in the file's metadata).
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32
from safetensors.numpy import load_file

from gnvc_jax.metrics.backbones import check_images, features, load_weights

WEIGHTS = Path(__file__).with_name("dists.safetensors")
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # of ImageNet
_STD = np.array([0.229, 0.224, 0.225], np.float32)
_EPS = 1e-6  # c1 and c2 of the paper


@jax.default_matmul_precision("highest")
def dists(params: dict, x: Array | np.ndarray, y: Array | np.ndarray) -> Float32[Array, " b"]:
    """DISTS distance of image pairs.

    Args:
        params: Parameters from `load_dists`.
        x: (b, h, w, 3) float RGB in [0, 1], both sides at least 32.
        y: Images to compare with, of the same shape.

    Returns:
        (b,) float32, 0 for identical images, larger is worse.

    Raises:
        ValueError: If the shape is wrong, or a side is shorter than 32.
        TypeError: If the images are integers.
    """
    check_images("dists", x, y, "[0, 1]")
    # Per stage: (b, h, w, c) to statistics (b, c) over all positions, unlike SSIM's local windows,
    # so that resampled texture still matches.
    structure, texture = [], []
    for a, b in zip(_stages(params["backbone"], x), _stages(params["backbone"], y)):
        mean_a, mean_b = a.mean((1, 2)), b.mean((1, 2))
        var_a = jnp.square(a - mean_a[:, None, None]).mean((1, 2))
        var_b = jnp.square(b - mean_b[:, None, None]).mean((1, 2))
        covariance = (a * b).mean((1, 2)) - mean_a * mean_b
        # Texture compares means, structure covariances; both as in SSIM, over whole feature maps.
        texture.append((2 * mean_a * mean_b + _EPS) / (mean_a**2 + mean_b**2 + _EPS))
        structure.append((2 * covariance + _EPS) / (var_a + var_b + _EPS))
    # Trained weights of texture and structure, (1475,): 3 + 64 + 128 + 256 + 512 + 512 channels.
    alpha, beta = params["alpha"], params["beta"]
    total = alpha.sum() + beta.sum()
    similarity = jnp.concatenate(texture, 1) @ alpha + jnp.concatenate(structure, 1) @ beta
    return 1.0 - similarity / total


def _stages(
    backbone: list, x: Float[Array | np.ndarray, "b h w 3"]
) -> list[Float[Array | np.ndarray, "b _h _w _c"]]:
    """The image itself and five activations of VGG."""
    # ImageNet's statistics, for values in [0, 1].
    return [x, *features(backbone, (x - _MEAN) / _STD, pool=_l2_pool)]


def _l2_pool(z: Float[Array, "b h w c"], _: int) -> Float[Array, "b h2 w2 c"]:
    """L2 pooling of (b, h, w, c) with a 3x3 Hann window and a stride of 2, in place of max pooling.

    The window is separable, so that each axis takes a weighted sum of three shifted slices.
    """
    z = jnp.square(z)
    for axis in (1, 2):
        # Every other position with a zero at either end, as in the reference: odd sides round up.
        size = (z.shape[axis] + 1) // 2
        z = jnp.pad(z, [(1, 1) if i == axis else (0, 0) for i in range(4)])
        left, middle, right = (
            jax.lax.slice_in_dim(z, k, k + 2 * size - 1, 2, axis) for k in range(3)
        )
        z = 0.25 * left + 0.5 * middle + 0.25 * right
    return jnp.sqrt(z + 1e-12)  # the square root has no finite gradient at 0


def load_dists(path: str | Path | None = None) -> dict:
    """Loads the parameters for `dists`; path: see `gnvc_jax.metrics.backbones.load_weights`."""
    weights = {k: jnp.asarray(v.reshape(-1)) for k, v in load_file(WEIGHTS).items()}
    return weights | {"backbone": load_weights("vgg", path)["backbone"]}
