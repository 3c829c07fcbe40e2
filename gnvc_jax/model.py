"""VAE, latent codec and refiner together: what a model is.

`build` makes a model of trained parameters: it exports the integer scale networks and makes the
integer probability tables. `gnvc_jax.model_file` writes and reads its file.

A fingerprint is the SHA-256 of tensors and sizes in sorted order, independent of any framework. The
refiner has none: a stream decodes to the same integers with any refiner, or without. The same holds
for a light decoder in place of the VAE's.
"""

import dataclasses
import functools
import hashlib
import json
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from gnvc_jax.arrays import Tree
from gnvc_jax.bitstream import Tables, frequencies_from_probabilities, gaussian_frequencies
from gnvc_jax.codec import density, scales
from gnvc_jax.codec.config import SCALES, CodecConfig
from gnvc_jax.motion import coding as motion_coding
from gnvc_jax.refiner import RefinerConfig
from gnvc_jax.vae import LightDecoderConfig, VAEConfig

KINDS = ("intra", "inter")
# Names of arrays that belong to refiner and light decoder, which no fingerprint covers.
REPLACEABLE = ("refiner/", "text", "white", "decoder/")


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """Everything that coding needs.

    Attributes:
        name: Name of the model, for people.
        vae_config, codec_config: Sizes of VAE and codec.
        vae, codec: Float parameters of VAE and codec.
        mean, std: Statistics (c,) of the VAE's latents.
        scale_networks: Exported integers by kind of latent (0 intra, 1 predicted).
        tables: Probability tables.
        self_test_crc: Result of `self_test` where the model was made.
        refiner_config: Sizes of the refiner, None without one.
        refiner: Parameters of the refiner, None without one.
        text: Text condition (1, rows, width) of the refiner, None without one.
        white: Factors (2, c) that whiten first and later latents for the refiner, None for latents
            that need none.
        decoder_config: Sizes of a light decoder that is used in place of the VAE's, or None.
        decoder: Its parameters, None without one.
        stored: Configurations as the model file has them, see `configs`.
    """

    name: str
    vae_config: VAEConfig
    codec_config: CodecConfig
    vae: Tree
    codec: Tree
    mean: np.ndarray
    std: np.ndarray
    scale_networks: tuple[Tree, Tree]
    tables: Tables
    self_test_crc: int
    refiner_config: RefinerConfig | None = None
    refiner: Tree | None = None
    text: np.ndarray | None = None
    white: np.ndarray | None = None
    decoder_config: LightDecoderConfig | None = None
    decoder: Tree | None = None
    stored: dict[str, dict] | None = None

    @functools.cached_property
    def configs(self) -> dict[str, dict]:
        """Configurations of "vae" and "codec" as a model file has them.

        A loaded model keeps what its file says, without the fields that were added since:
        fingerprints cover the configurations, and those of an old model must not change.
        """
        current = {"vae": self.vae_config, "codec": self.codec_config}
        return self.stored or {name: _json(config) for name, config in current.items()}

    @functools.cached_property
    def fingerprints(self) -> tuple[bytes, bytes]:
        """SHA-256 of the codec (32 bytes) and of the VAE (its first 16 bytes)."""
        arrays = to_arrays(self)
        later = ("vae/", *REPLACEABLE)  # what the integers do not depend on
        codec = {k: v for k, v in arrays.items() if not k.startswith(later)}
        vae = {k: v for k, v in arrays.items() if k.startswith("vae/")}
        return _digest(codec, self.configs["codec"]), _digest(vae, self.configs["vae"])[:16]


def build(
    name: str,
    vae_config: VAEConfig,
    codec_config: CodecConfig,
    vae: Tree,
    codec: Tree,
    mean: np.ndarray,
    std: np.ndarray,
    refiner_config: RefinerConfig | None = None,
    refiner: Tree | None = None,
    text: np.ndarray | None = None,
    white: np.ndarray | None = None,
) -> Model:
    """Makes a model of trained parameters: exports the scale networks and makes the tables.

    Kernels and bases are rounded to float16, which halves them; encoder and decoder read the same
    rounded ones. What the integer path needs is exported from the exact parameters.

    Args:
        name: Name of the model.
        vae_config, codec_config, refiner_config: Sizes of the networks.
        vae, codec, refiner: Parameters of the networks.
        mean, std: Statistics (c,) of the VAE's latents.
        text, white: See `Model`.
    """
    # (kinds, levels, cz, 31): each kind of latent has a density of its own at every level.
    z = np.stack([density.probabilities(codec[k]["entropy"]["density"]) for k in KINDS])
    intra, inter = (scales.export(codec_config, codec[kind]["entropy"]["scales"]) for kind in KINDS)
    # Probability tables of all symbols of y are chosen by these integers alone.
    networks = intra, inter
    # In float64: tables are made once, here, and every machine reads the integers that result.
    sigmas = np.asarray(scales.sigma_from_index(np.arange(SCALES, dtype=np.float64)), np.float64)
    tables = Tables(
        gaussian_frequencies(sigmas), frequencies_from_probabilities(z), codec_config.k_skip
    )
    if codec_config.motion:
        motion = frequencies_from_probabilities(motion_coding.probabilities())
        tables = dataclasses.replace(tables, motion=motion)
    # Row by row in memory, whatever was transposed on the way: safetensors writes bytes as is.
    vae, codec, refiner = jax.tree_util.tree_map_with_path(
        lambda path, x: np.asarray(x, stored_dtype(path), order="C"), (vae, codec, refiner)
    )
    mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    # Computed by NumPy, the reference that devices are compared with.
    crc = self_test(codec_config, networks, scales.scale_index_numpy)
    return Model(
        name,
        vae_config,
        codec_config,
        vae,
        codec,
        mean,
        std,
        networks,
        tables,
        crc,
        refiner_config,
        refiner,
        text,
        white,
    )


def to_arrays(model: Model) -> dict[str, np.ndarray]:
    """Returns all arrays of a model under flat names, such as "vae/klt/first_basis"."""
    flat = {"latents/mean": model.mean, "latents/std": model.std}
    flat |= {"tables/y": model.tables.y, "tables/z": model.tables.z}
    # Absent rather than empty: fingerprints of models without motion have no such name.
    if len(model.tables.motion):
        flat["tables/motion"] = model.tables.motion
    for kind, network in zip(KINDS, model.scale_networks, strict=True):
        flat |= {f"scales/{kind}/{k}": v for k, v in network.items()}
    for part in ("vae", "codec", "refiner", "decoder"):
        leaves = jax.tree_util.tree_leaves_with_path(getattr(model, part))
        flat |= {f"{part}/" + "/".join(p.key for p in path): np.asarray(v) for path, v in leaves}
    for name in ("text", "white"):
        if (value := getattr(model, name)) is not None:
            flat[name] = value
    return flat


def vae_fingerprint(config: VAEConfig, params: Tree) -> str:
    """Returns the fingerprint of a VAE that is not (yet) part of a model, in hexadecimal digits."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    arrays = {"/".join(p.key for p in path): np.asarray(x) for path, x in leaves}
    return _digest(arrays, _json(config))[:16].hex()


def _json(config: Any) -> dict:
    """Converts a configuration to what JSON gives back, which has lists in place of tuples."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _digest(arrays: dict[str, np.ndarray], config: dict) -> bytes:
    sha = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    update_digest(sha, arrays)
    return sha.digest()


def update_digest(sha: Any, arrays: Mapping[str, np.ndarray]) -> None:
    """Continues a digest of hashlib over arrays, with their names, types and shapes."""
    # Sorted, so that a fingerprint does not depend on the order in a file.
    for name, value in sorted(arrays.items()):
        sha.update(f"{name} {value.dtype} {value.shape}\n".encode())
        sha.update(np.ascontiguousarray(value).tobytes())


def self_test(config: CodecConfig, networks: tuple[Tree, Tree], scale_index: Callable) -> int:
    """Runs the scale networks on fixed pseudo-random integers.

    Args:
        config: Sizes of the codec.
        networks: Exported scale networks, see `Model`.
        scale_index: Function (config, network, q_index, z, previous y, previous indices) -> table
            indices, in the arithmetic to test.

    Returns:
        CRC32 of the index maps.
    """
    cz, cy = config.z_channels, config.y_channels
    state, crc = np.uint64(1), 0

    def draw(shape: tuple[int, ...], low: int, high: int) -> np.ndarray:
        """Integers from low to high by a linear congruential generator of 32 bits."""
        nonlocal state
        out = np.empty(int(np.prod(shape)), np.int64)
        for i in range(out.size):
            # Written out, since generators of libraries may change between versions.
            state = (state * np.uint64(1664525) + np.uint64(1013904223)) & np.uint64(0xFFFFFFFF)
            out[i] = low + int(state >> np.uint64(16)) % (high - low + 1)
        return out.reshape(shape)

    # Both networks, at the ends of the levels and between knots. An intra latent (kind 0) has no
    # latent before it. The grid of y is four times that of z.
    for kind, q_index in ((0, 0), (0, 63), (1, 7), (1, 40)):
        z = draw((2, 2, cz), -15, 15)
        prev_y, prev_index = (draw((8, 8, cy), *r) if kind else np.zeros((8, 8, cy), np.int64)
                              for r in ((-127, 127), (0, 63)))  # fmt: skip
        index = scale_index(config, networks[kind], q_index, z, prev_y, prev_index)
        crc = zlib.crc32(np.asarray(index, np.uint8).tobytes(), crc)
    return crc


# Last names of the parameters that files hold in float16: factors of matrix products. Biases, gains
# and steps are few, and errors of theirs would shift whole channels.
HALF = ("kernel", "basis", "inverse", "first_basis", "later_basis")


def stored_dtype(path: tuple) -> type:
    """Returns the type of a parameter in model files, which a refiner keeps on devices.

    Kernels and bases make up nearly all of a file; layers cast them to the type they compute in.
    """
    return np.float16 if getattr(path[-1], "key", None) in HALF else np.float32


def as_float32(params: Tree) -> Tree:
    """Converts parameters of a model file, whose kernels are float16, to float32 in host memory."""
    return jax.tree.map(lambda x: np.asarray(x, np.float32), params)
