"""Model files: what they keep, and how damage to any part of them shows."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from gnvc_jax.bitstream.errors import DeviceNotExact, ModelCorrupt
from gnvc_jax.coder import Coder
from gnvc_jax.model_file import load_model, save_model


@pytest.fixture(scope="module")
def coder(tiny_model):
    return Coder(tiny_model())


def test_model_file_keeps_everything(tmp_path, coder):
    path = tmp_path / "m.safetensors"
    save_model(path, coder.model)
    loaded = load_model(path)
    assert loaded.fingerprints == coder.model.fingerprints
    assert loaded.vae_config == coder.model.vae_config
    assert loaded.codec_config == coder.model.codec_config
    assert list(tmp_path.iterdir()) == [path]

    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelCorrupt, match="fingerprint"):
        load_model(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ModelCorrupt, match="Git LFS pointer"):
        load_model(path)
    path.write_bytes(b"not a model")
    with pytest.raises(ModelCorrupt, match="not a model file"):
        load_model(path)
    with pytest.raises(FileNotFoundError, match="no such model file"):
        load_model(tmp_path / "absent")


def edit_facts(path, **changes):
    """Change the description in a model file and nothing else."""
    with safe_open(path, "numpy") as file:
        facts = json.loads(file.metadata()["gnvc"])
    facts |= changes
    facts = {k: v for k, v in facts.items() if v is not None}
    save_file(load_file(path), path, metadata={"gnvc": json.dumps(facts)})


def test_every_part_of_a_model_file_is_checked(tmp_path, tiny_model):
    path = tmp_path / "m.safetensors"
    model = tiny_model(refiner=True)
    model = dataclasses.replace(model, text=np.ones((1, 2, 3), np.float32))
    save_model(path, model)
    whole = path.read_bytes()
    with open(path, "rb") as file:
        places = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        start = file.tell()
    del places["__metadata__"]
    assert {name.split("/")[0] for name in places} >= {"refiner", "text", "vae", "codec"}
    parts = {name.split("/")[0]: place["data_offsets"][0] for name, place in places.items()}
    for at in parts.values():
        damaged = bytearray(whole)
        damaged[start + at] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ModelCorrupt):
            load_model(path)
    path.write_bytes(whole)
    edit_facts(path, name="other")
    with pytest.raises(ModelCorrupt, match="checksum"):
        load_model(path)
    path.write_bytes(whole)
    edit_facts(path, checksum=None)  # as in files of earlier versions
    assert load_model(path).self_test_crc == model.self_test_crc


def test_the_stored_self_test_decides(tmp_path, coder):
    """A device, and NumPy on it, that gets other values than the maker's is refused."""
    path = tmp_path / "m.safetensors"
    save_model(path, coder.model)
    edit_facts(path, checksum=None, self_test=coder.model.self_test_crc ^ 1)
    with pytest.raises(DeviceNotExact, match="self-test fails"):
        Coder(load_model(path))


def test_a_field_added_later_leaves_old_models_readable(tmp_path, coder):
    """A file without the newest field keeps its fingerprints, and its streams."""
    path = tmp_path / "m.safetensors"
    stored = {k: dict(v) for k, v in coder.model.configs.items()}
    del stored["codec"]["level_pattern"], stored["vae"]["head"]
    old = dataclasses.replace(coder.model, stored=stored)
    assert old.fingerprints != coder.model.fingerprints
    save_model(path, old)
    again = load_model(path)
    assert again.fingerprints == old.fingerprints
    assert again.codec_config == coder.model.codec_config
    save_model(path, again)
    assert load_model(path).fingerprints == old.fingerprints


def test_a_refiner_survives_its_file(tiny_model, tmp_path):
    path, model = tmp_path / "m.safetensors", tiny_model(refiner=True)
    save_model(path, model)
    again = load_model(path)
    assert again.refiner_config == model.refiner_config
    assert again.fingerprints == model.fingerprints
    jax.tree.map(np.testing.assert_array_equal, again.refiner, model.refiner)
