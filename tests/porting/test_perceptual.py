"""LPIPS files through `gnvc port`: two files in one folder, and everything that does not fit."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from gnvc_jax import cli
from gnvc_jax.metrics.trunks import load_weights
from gnvc_jax.porting.errors import PortError
from gnvc_jax.porting.perceptual import expected_shapes, port_perceptual


@pytest.fixture
def folder(tmp_path):
    """A trunk with its classifier, as of torchvision, and linear weights, as of lpips."""
    rng = np.random.default_rng(0)
    trunk, lins = {"classifier.1.weight": np.zeros((2, 2), np.float32)}, {}
    for name, shape in expected_shapes("alex").items():
        value = rng.normal(size=shape).astype(np.float32)
        if name.startswith("lin"):
            lins[f"{name}.model.1.weight"] = value
        else:
            trunk[f"features.{name}"] = value
    (tmp_path / "in").mkdir()
    save_file(trunk, tmp_path / "in" / "alexnet.safetensors")
    save_file(lins, tmp_path / "in" / "alex.safetensors")
    return tmp_path / "in", trunk, lins


def test_two_files_become_one(folder, tmp_path, capsys):
    source, trunk, lins = folder
    assert cli.main(["port", "--from", str(source), "--to", str(tmp_path / "out")]) == 0
    file = tmp_path / "out" / "lpips_alex.safetensors"
    assert str(file) in capsys.readouterr().out
    weights = load_weights("alex", file)
    kernel = trunk["features.3.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(weights["trunk"][1]["kernel"], kernel)
    np.testing.assert_array_equal(weights["lins"][4], lins["lin4.model.1.weight"].ravel())


def test_all_that_does_not_fit_is_listed_and_nothing_written(folder, tmp_path):
    source, trunk, _ = folder
    trunk["features.6.weight"] = trunk["features.6.weight"][:1]
    trunk["features.7.bias"] = trunk.pop("features.3.bias")
    save_file(trunk, source / "alexnet.safetensors")
    (source / "alex.safetensors").unlink()
    with pytest.raises(PortError) as error:
        port_perceptual(source, tmp_path / "out")
    text = str(error.value)
    for problem in ("missing: lin0", "missing: 3.bias", "unexpected: 7.bias", "shape: 6.weight"):
        assert problem in text
    assert not (tmp_path / "out").exists()
