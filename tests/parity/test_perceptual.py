"""LPIPS and DISTS against the authors' packages, values and gradients, with shared random weights;
MS-SSIM against pytorch-msssim.

torchvision, from which both take their backbones, has a stand-in: its packages exist for few builds
of torch, and all that is needed of it is the order of layers.
"""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from gnvc_jax.metrics.backbones import load_weights
from gnvc_jax.metrics.dists import dists
from gnvc_jax.metrics.lpips import lpips
from gnvc_jax.metrics.ms_ssim import ms_ssim
from gnvc_jax.porting.perceptual import port_perceptual

torch = pytest.importorskip("torch", reason="torch is not installed: make test-parity")
pytestmark = pytest.mark.parity

VGG = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")
SIZE = 75, 66


def vgg16(**_):
    layers, width = [], 3
    for item in VGG:
        if item == "M":
            layers.append(torch.nn.MaxPool2d(2, 2))
        else:
            layers += [torch.nn.Conv2d(width, item, 3, padding=1), torch.nn.ReLU(inplace=True)]
            width = item
    return types.SimpleNamespace(features=torch.nn.Sequential(*layers))


def alexnet(**_):
    nn = torch.nn
    layers = [nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)]
    layers += [nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)]
    for a, b in ((192, 384), (384, 256), (256, 256)):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU(inplace=True)]
    return types.SimpleNamespace(features=nn.Sequential(*layers, nn.MaxPool2d(3, 2)))


@pytest.fixture
def torchvision(monkeypatch):
    models = types.ModuleType("torchvision.models")
    models.vgg16, models.alexnet = vgg16, alexnet
    package = types.ModuleType("torchvision")
    package.models, package.transforms = models, types.ModuleType("torchvision.transforms")
    for name in ("torchvision", "torchvision.models", "torchvision.transforms"):
        part = name.partition(".")[2]
        monkeypatch.setitem(sys.modules, name, getattr(package, part) if part else package)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    coarse = rng.uniform(0, 1, (2, 5, 5, 3)).repeat(15, 1).repeat(15, 2)[:, : SIZE[0], : SIZE[1]]
    noisy = np.clip(coarse + rng.normal(0, 0.1, coarse.shape), 0, 1)
    return coarse.astype(np.float32), noisy.astype(np.float32)


def spread(layers):
    """Random weights under which activations neither vanish nor explode."""
    for layer in layers:
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            torch.nn.init.normal_(layer.bias, std=0.1)


def theirs(function, x, y):
    """Values, and the gradient of their sum by y, channels last."""
    x, y = (torch.from_numpy(a).permute(0, 3, 1, 2).contiguous() for a in (x, y))
    y.requires_grad_(True)
    values = function(x, y).reshape(-1)
    values.sum().backward()
    return values.detach().numpy(), y.grad.permute(0, 2, 3, 1).numpy()


def ours(function, params, x, y):
    def total(y, params, x):
        values = function(params, x, y)
        return values.sum(), values

    grad, values = jax.jit(jax.grad(total, has_aux=True))(y, params, x)
    return values, grad


def close(record_property, what, got, expected):
    """Relative L2 error; of gradients 1e-3, since a ReLU at its kink may go either way."""
    for kind, a, b, limit in zip(("value", "gradient"), got, expected, (1e-5, 1e-3)):
        error = float(np.linalg.norm(a - b) / np.linalg.norm(b))
        record_property(f"{what} {kind}", error)
        assert error <= limit


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_through_gnvc_port(net, torchvision, images, tmp_path, record_property):
    from lpips import LPIPS

    reference = LPIPS(net=net, pnet_rand=True, pretrained=False, verbose=False, eval_mode=True)
    spread(reference.net.modules())
    for lin in reference.lins:
        torch.nn.init.uniform_(lin.model[-1].weight)
    torch.save(reference.state_dict(), tmp_path / "lpips.pth", _use_new_zipfile_serialization=False)
    file = port_perceptual(tmp_path / "lpips.pth", tmp_path / "ported")
    assert file.name == f"lpips_{net}.safetensors"
    x, y = (2 * image - 1 for image in images)
    expected = theirs(reference, x, y)
    close(record_property, net, ours(lpips, load_weights(net, file), x, y), expected)


def test_dists(torchvision, images, tmp_path, record_property):
    from DISTS_pytorch import DISTS

    reference = DISTS(load_weights=False)
    spread(reference.modules())
    tensors = {
        f"features.{name.split('.')[1]}.{name.split('.')[2]}": value
        for name, value in reference.state_dict().items()
        if name.startswith("stage") and not name.endswith("filter")
    } | {f"lin{k}.model.1.weight": torch.ones(1, 1, 1, 1) for k in range(5)}
    tensors = {name: np.ascontiguousarray(value.numpy()) for name, value in tensors.items()}
    save_file(tensors, tmp_path / "vgg.safetensors")
    weights = {
        k: jnp.asarray(getattr(reference, k).detach().numpy().reshape(-1))
        for k in ("alpha", "beta")
    }
    params = weights | {"backbone": load_weights("vgg", tmp_path / "vgg.safetensors")["backbone"]}
    expected = theirs(lambda x, y: reference(x, y, require_grad=True), *images)
    close(record_property, "dists", ours(dists, params, *images), expected)


@pytest.mark.parametrize("side", [256, 177])
def test_ms_ssim(side, record_property):
    from pytorch_msssim import ms_ssim as reference

    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (2, 256, side, 3), dtype=np.uint8)
    y = np.clip(x + rng.normal(0, 60, x.shape), 0, 255).astype(np.uint8)
    planes = [torch.from_numpy(a.astype(np.float32)).permute(0, 3, 1, 2) for a in (x, y)]
    expected = reference(*planes, data_range=255, size_average=False).numpy()
    assert 0.5 < expected.min() < expected.max() < 0.99
    error = float(np.abs(jax.jit(ms_ssim)(x, y) - expected).max())
    record_property("MS-SSIM", error)
    assert error <= 2e-5
