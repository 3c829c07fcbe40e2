"""LPIPS files through `gnvc port`: two files in one folder, and everything that does not fit."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from gnvc_jax import cli
from gnvc_jax.metrics.backbones import load_weights
from gnvc_jax.porting.errors import PortError
from gnvc_jax.porting.perceptual import expected_shapes, port_perceptual


@pytest.fixture
def folder(tmp_path):
    """A backbone with its classifier, as of torchvision, and linear weights, as of lpips."""
    rng = np.random.default_rng(0)
    backbone, lins = {"classifier.1.weight": np.zeros((2, 2), np.float32)}, {}
    for name, shape in expected_shapes("alex").items():
        value = rng.normal(size=shape).astype(np.float32)
        if name.startswith("lin"):
            lins[f"{name}.model.1.weight"] = value
        else:
            backbone[f"features.{name}"] = value
    (tmp_path / "in").mkdir()
    save_file(backbone, tmp_path / "in" / "alexnet.safetensors")
    save_file(lins, tmp_path / "in" / "alex.safetensors")
    return tmp_path / "in", backbone, lins


def test_two_files_become_one(folder, tmp_path, capsys):
    source, backbone, lins = folder
    assert cli.main(["port", "--from", str(source), "--to", str(tmp_path / "out")]) == 0
    file = tmp_path / "out" / "lpips_alex.safetensors"
    assert str(file) in capsys.readouterr().out
    weights = load_weights("alex", file)
    kernel = backbone["features.3.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(weights["backbone"][1]["kernel"], kernel)
    np.testing.assert_array_equal(weights["lins"][4], lins["lin4.model.1.weight"].ravel())


def test_all_mismatches_are_listed_and_nothing_is_written(folder, tmp_path):
    source, backbone, _ = folder
    backbone["features.6.weight"] = backbone["features.6.weight"][:1]
    backbone["features.7.bias"] = backbone.pop("features.3.bias")
    save_file(backbone, source / "alexnet.safetensors")
    (source / "alex.safetensors").unlink()
    with pytest.raises(PortError) as error:
        port_perceptual(source, tmp_path / "out")
    text = str(error.value)
    for problem in ("missing: lin0", "missing: 3.bias", "unexpected: 7.bias", "shape: 6.weight"):
        assert problem in text
    assert not (tmp_path / "out").exists()
