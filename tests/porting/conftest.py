"""Public model folders with random weights, in both naming schemes, without torch."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

FOLDERS = {"vae": "vae", "vae22": "vae", "dit": "transformer", "vace": "transformer"}


@pytest.fixture(scope="session")
def golden(wan_tensor):
    """The golden file of a model, its configuration and its public tensors."""

    def load(name: str) -> tuple[dict, dict, dict]:
        with np.load(Path(__file__).parent / "golden" / f"{name}.npz") as file:
            arrays = dict(file)
        facts = json.loads(str(arrays.pop("facts")))
        tensors = {k: wan_tensor(k, tuple(shape)) for k, shape in facts["shapes"].items()}
        return arrays, facts["config"], tensors

    return load


@pytest.fixture
def public(tmp_path, golden):
    """Writes the model folder that diffusers would: `public(name, edit)` -> the folder above it.

    edit: changes the dictionary of tensors before it is written.
    """

    def write(name: str, edit=lambda tensors: tensors) -> Path:
        _, config, tensors = golden(name)
        folder = tmp_path / "public" / FOLDERS[name]
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        save_file(edit(tensors), folder / "diffusion_pytorch_model.safetensors")
        return folder.parent

    return write
