"""The file of a model: `save_model` and `load_model`.

A model file is one safetensors file: float weights of VAE and codec (and of refiner and light
decoder, if it has them), statistics of the latents, the exported integer scale networks and the
integer probability tables. Its metadata describe the model in JSON: sizes, fingerprints, and a
checksum of what these leave out. Nothing in it is trusted: `load_model` gives a model that is
whole, or `ModelCorrupt`.
"""

import dataclasses
import hashlib
import json
import os

import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gnvc_jax.bitstream import Tables
from gnvc_jax.bitstream.errors import ModelCorrupt
from gnvc_jax.buckets import as_path, local_copy, make_folder
from gnvc_jax.codec.config import CodecConfig
from gnvc_jax.files import atomic_output, not_weights
from gnvc_jax.model import KINDS, REPLACEABLE, Model, to_arrays, update_digest
from gnvc_jax.refiner import DiTConfig, RefinerConfig
from gnvc_jax.vae import LightDecoderConfig, VAEConfig
from gnvc_jax.vae.config import with_tuples


def save_model(path: str | os.PathLike, model: Model) -> None:
    """Writes a model file.

    Args:
        path: File to write; its folder is created if needed.
        model: The model.

    Raises:
        OSError: If the file cannot be written.
    """
    path = as_path(path)
    facts = {
        "format": "gnvc-model/1",
        "name": model.name,
        **model.configs,
        # None without a refiner. A config holds nothing but numbers, strings and tuples of these.
        "refiner": model.refiner_config and dataclasses.asdict(model.refiner_config),
        "decoder": model.decoder_config and dataclasses.asdict(model.decoder_config),
        "self_test": model.self_test_crc,
        "fingerprints": [f.hex() for f in model.fingerprints],
    }
    # Fingerprints cover codec and VAE; the checksum covers the rest: refiner, light decoder and
    # these facts.
    arrays = to_arrays(model)
    facts["checksum"] = checksum(facts, arrays)
    make_folder(path.parent)
    # Written under another name and renamed, so that a file of this name is always whole.
    with atomic_output(path) as temporary:
        save_file(arrays, temporary, metadata={"gnvc": json.dumps(facts)})


def load_model(path: str | os.PathLike) -> Model:
    """Reads a model file.

    Raises:
        FileNotFoundError: If there is no such file.
        ModelCorrupt: If it is not a whole, intact model.
    """
    if not as_path(path).is_file():
        raise FileNotFoundError(f"{path}: no such model file")
    file_path = local_copy(path)
    if kind := not_weights(file_path):
        raise ModelCorrupt(f"{path}: not a model file but {kind}")
    try:
        # Names such as "codec/intra/basis" become nested dictionaries, as Flax wants them.
        with safe_open(file_path, framework="numpy") as file:
            facts = json.loads(file.metadata()["gnvc"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}
        nested = unflatten_dict(arrays, sep="/")
        config = CodecConfig(**facts["codec"])
        refiner = facts.get("refiner")
        if refiner is not None:
            refiner = RefinerConfig(**refiner | {"dit": DiTConfig(**refiner["dit"])})
        decoder = facts.get("decoder")
        if decoder is not None:
            decoder = LightDecoderConfig(**with_tuples(decoder))
        model = Model(
            facts["name"],
            VAEConfig.from_json(facts["vae"]),
            config,
            nested["vae"],
            nested["codec"],
            nested["latents"]["mean"],
            nested["latents"]["std"],
            (nested["scales"][KINDS[0]], nested["scales"][KINDS[1]]),
            Tables(k_skip=config.k_skip, **nested["tables"]),
            facts["self_test"],
            refiner,
            nested.get("refiner"),
            nested.get("text"),
            nested.get("white"),
            decoder,
            nested.get("decoder"),
            # As stored, not as parsed: fingerprints must not change when a config gets a new field.
            {name: facts[name] for name in ("vae", "codec")},
        )
    # Whatever is missing, superfluous or of another type: TypeError for a field that a config does
    # not know, as in a file of a later version.
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ModelCorrupt(f"{path}: not a model file ({error!r})") from error
    if [f.hex() for f in model.fingerprints] != facts["fingerprints"]:
        raise ModelCorrupt(f"{path}: contents do not match the fingerprint")
    # The checksum was taken of the facts without itself, so it is removed before the comparison.
    if facts.pop("checksum", None) not in (None, checksum(facts, arrays)):
        raise ModelCorrupt(f"{path}: contents do not match the checksum")
    return model


def checksum(facts: dict, arrays: dict[str, np.ndarray]) -> str:
    """Returns the SHA-256 of what the fingerprints of codec and VAE leave out, in hexadecimal.

    Files from before it was added have none.

    Args:
        facts: Description of the model, without the checksum.
        arrays: Arrays of the model, of which those that no fingerprint covers count.
    """
    sha = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    update_digest(sha, {k: v for k, v in arrays.items() if k.startswith(REPLACEABLE)})
    return sha.hexdigest()
