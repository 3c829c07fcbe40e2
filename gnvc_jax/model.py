"""VAE, latent codec and refiner together: what a model is, and its file.

A model file is one safetensors file: float weights of VAE, codec and refiner (if it has one),
statistics of the latents, the exported integer scale networks and the integer probability tables.
A fingerprint is the SHA-256 of tensors and sizes in sorted order, independent of any framework. The
refiner has none: a stream decodes to the same integers with any refiner, or without.
"""

import dataclasses
import functools
import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gnvc_jax.bitstream import Tables, frequencies_from_probabilities, gaussian_frequencies
from gnvc_jax.bitstream.errors import ModelCorrupt
from gnvc_jax.codec import density, scales
from gnvc_jax.codec.config import SCALES, CodecConfig
from gnvc_jax.files import atomic_output, not_weights
from gnvc_jax.motion import coding as motion_coding
from gnvc_jax.refiner import DiTConfig, RefinerConfig
from gnvc_jax.vae import VAEConfig

Array = jax.Array
Tree = dict
KINDS = ("intra", "inter")
REFINER = ("refiner/", "text", "white")  # names of arrays that belong to the refiner


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """Everything that coding needs.

    vae, codec: float parameters; mean, std: (c,) of the VAE's latents; scale_networks: exported
    integers by kind of latent (0 intra, 1 predicted); tables: probability tables; self_test_crc:
    CRC32 of the index maps of fixed pseudo-random integers, where the model was made; refiner,
    text: its parameters and text condition (1, rows, width), None without; white: factors (2, c)
    that whiten first and later latents for the refiner, None for latents that need none; stored:
    see `configs`.
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
    stored: dict[str, dict] | None = None

    @functools.cached_property
    def configs(self) -> dict[str, dict]:
        """Configurations of "vae" and "codec" as a model file has them.

        Those of a loaded model are what its file says, without the fields that were added since:
        fingerprints cover them, and an old model must keep its own.
        """
        current = {"vae": self.vae_config, "codec": self.codec_config}
        return self.stored or {name: _json(config) for name, config in current.items()}

    @functools.cached_property
    def fingerprints(self) -> tuple[bytes, bytes]:
        """SHA-256 of the codec (32 bytes) and of the VAE (its first 16 bytes)."""
        arrays = to_arrays(self)
        later = ("vae/", *REFINER)  # what the integers do not depend on
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
    """A model from trained parameters: exports the scale networks and makes the tables.

    Kernels and bases are rounded to float16, which halves them; encoder and decoder read the same
    rounded ones. What the integer path needs is exported from the exact parameters.
    """
    z = np.stack([density.probabilities(codec[k]["entropy"]["density"]) for k in KINDS])
    networks = tuple(
        scales.export(codec_config, codec[kind]["entropy"]["scales"]) for kind in KINDS
    )
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
    """All arrays of a model under flat names."""
    flat = {"latents/mean": model.mean, "latents/std": model.std}
    flat |= {"tables/y": model.tables.y, "tables/z": model.tables.z}
    if len(model.tables.motion):
        flat["tables/motion"] = model.tables.motion
    for kind, network in zip(KINDS, model.scale_networks, strict=True):
        flat |= {f"scales/{kind}/{k}": v for k, v in network.items()}
    for part in ("vae", "codec", "refiner"):
        leaves = jax.tree_util.tree_leaves_with_path(getattr(model, part))
        flat |= {f"{part}/" + "/".join(p.key for p in path): np.asarray(v) for path, v in leaves}
    for name in ("text", "white"):
        if (value := getattr(model, name)) is not None:
            flat[name] = value
    return flat


def vae_fingerprint(config: VAEConfig, params: Tree) -> str:
    """Hexadecimal digest of a VAE that is not (yet) part of a model."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    arrays = {"/".join(p.key for p in path): np.asarray(x) for path, x in leaves}
    return _digest(arrays, _json(config))[:16].hex()


def _json(config) -> dict:
    """A configuration as it comes back from JSON, which has lists in place of tuples."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _digest(arrays: dict[str, np.ndarray], config: dict) -> bytes:
    sha = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    _update(sha, arrays)
    return sha.digest()


def _update(sha, arrays: dict[str, np.ndarray]) -> None:
    for name, value in sorted(arrays.items()):
        sha.update(f"{name} {value.dtype} {value.shape}\n".encode())
        sha.update(np.ascontiguousarray(value).tobytes())


def save_model(path: str | Path, model: Model) -> None:
    """Write the model file; its folder is created if needed. Raises OSError."""
    path = Path(path)
    facts = {
        "format": "gnvc-model/1",
        "name": model.name,
        **model.configs,
        "refiner": model.refiner_config and dataclasses.asdict(model.refiner_config),
        "self_test": model.self_test_crc,
        "fingerprints": [f.hex() for f in model.fingerprints],
    }
    arrays = to_arrays(model)
    facts["checksum"] = checksum(facts, arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_output(path) as temporary:
        save_file(arrays, temporary, metadata={"gnvc": json.dumps(facts)})


def load_model(path: str | Path) -> Model:
    """Read a model file. FileNotFoundError, or ModelCorrupt if it is not a whole, intact model."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such model file")
    if kind := not_weights(Path(path)):
        raise ModelCorrupt(f"{path}: not a model file but {kind}")
    try:
        with safe_open(path, framework="numpy") as file:
            facts = json.loads(file.metadata()["gnvc"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}
        nested = unflatten_dict(arrays, sep="/")
        config = CodecConfig(**facts["codec"])
        refiner = facts.get("refiner")
        if refiner is not None:
            refiner = RefinerConfig(**refiner | {"dit": DiTConfig(**refiner["dit"])})
        model = Model(
            facts["name"],
            VAEConfig.from_json(facts["vae"]),
            config,
            nested["vae"],
            nested["codec"],
            nested["latents"]["mean"],
            nested["latents"]["std"],
            tuple(nested["scales"][kind] for kind in KINDS),
            Tables(k_skip=config.k_skip, **nested["tables"]),
            facts["self_test"],
            refiner,
            nested.get("refiner"),
            nested.get("text"),
            nested.get("white"),
            {name: facts[name] for name in ("vae", "codec")},
        )
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ModelCorrupt(f"{path}: not a model file ({error!r})") from error
    if [f.hex() for f in model.fingerprints] != facts["fingerprints"]:
        raise ModelCorrupt(f"{path}: contents do not match the fingerprint")
    if facts.pop("checksum", None) not in (None, checksum(facts, arrays)):
        raise ModelCorrupt(f"{path}: contents do not match the checksum")
    return model


def checksum(facts: dict, arrays: dict[str, np.ndarray]) -> str:
    """Hexadecimal SHA-256 of what the fingerprints of codec and VAE leave out.

    That is the description itself (facts: without the checksum) and the arrays of the refiner.
    Files from before it was added have none.
    """
    sha = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    _update(sha, {k: v for k, v in arrays.items() if k.startswith(REFINER)})
    return sha.hexdigest()


def self_test(config: CodecConfig, networks: tuple[Tree, Tree], scale_index: Callable) -> int:
    """CRC32 of the index maps that `scale_index` gives for fixed integers (a 32-bit LCG)."""
    cz, cy = config.z_channels, config.y_channels
    state, crc = np.uint64(1), 0

    def draw(shape, low, high):
        nonlocal state
        out = np.empty(int(np.prod(shape)), np.int64)
        for i in range(out.size):
            state = (state * np.uint64(1664525) + np.uint64(1013904223)) & np.uint64(0xFFFFFFFF)
            out[i] = low + int(state >> np.uint64(16)) % (high - low + 1)
        return out.reshape(shape)

    for kind, q_index in ((0, 0), (0, 63), (1, 7), (1, 40)):
        z = draw((2, 2, cz), -15, 15)
        prev_y, prev_index = (draw((8, 8, cy), *r) if kind else np.zeros((8, 8, cy), np.int64)
                              for r in ((-127, 127), (0, 63)))  # fmt: skip
        index = scale_index(config, networks[kind], q_index, z, prev_y, prev_index)
        crc = zlib.crc32(np.asarray(index, np.uint8).tobytes(), crc)
    return crc


HALF = ("kernel", "basis", "inverse", "first_basis", "later_basis")


def stored_dtype(path: tuple) -> type:
    """Precision of a parameter in model files; a refiner's stay so on devices.

    Kernels and bases are what matters for size; layers cast them to what they compute in.
    """
    return np.float16 if getattr(path[-1], "key", None) in HALF else np.float32
