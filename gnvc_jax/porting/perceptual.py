"""Weights of LPIPS (and, with VGG, of DISTS) from files of torchvision and of the package lpips.

Unlike the weights of Wan, these stay one small safetensors file with public names, which
`gnvc_jax.metrics.backbones.load_weights` reads. `port_perceptual` gathers the convolutions and the
linear weights, which are published in separate files.
"""

import itertools
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from gnvc_jax.metrics.backbones import TORCH_INDEX, known_tensors
from gnvc_jax.porting.checkpoint import new_folder
from gnvc_jax.porting.errors import PortError
from gnvc_jax.porting.port import check_finite
from gnvc_jax.porting.sources import TensorEntry, list_tensors

# (input channels, output channels, kernel size) of each convolution; inputs of the linear weights.
_ALEX = ((3, 64, 11), (64, 192, 5), (192, 384, 3), (384, 256, 3), (256, 256, 3))
_VGG_WIDTHS = (3, 64, 64, 128, 128, 256, 256, 256, *(512,) * 6)
SHAPES = {"alex": _ALEX, "vgg": tuple((a, b, 3) for a, b in itertools.pairwise(_VGG_WIDTHS))}
LINS = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}


def expected_shapes(net: str) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor by the name that `known_tensors` gives it."""
    shapes = {f"lin{k}": (1, channels, 1, 1) for k, channels in enumerate(LINS[net])}
    for index, (inputs, outputs, side) in zip(TORCH_INDEX[net], SHAPES[net]):
        shapes |= {f"{index}.weight": (outputs, inputs, side, side), f"{index}.bias": (outputs,)}
    return shapes


def open_perceptual(path: str | Path) -> dict[str, TensorEntry]:
    """Finds the tensors of LPIPS in a file or in the files of a folder; empty if there are none.

    A file of torchvision has the convolutions, a file of the lpips package (weights/v0.1) the
    linear weights, and a state dictionary of the package's module has both.

    Raises:
        FileNotFoundError: If there is nothing at `path`.
        PortError: If a file is damaged, or two files hold the same tensor.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    files = [path] if path.is_file() else sorted((*path.glob("*.pth"), *path.glob("*.safetensors")))
    found: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in known_tensors(list_tensors(file)).items():
            if name in found and found[name].file != file:
                raise PortError(f"{path}: {name} is in {found[name].file} and in {file}")
            found[name] = entry
    return found


def port_perceptual(path: str | Path, target: str | Path) -> Path:
    """Writes `lpips_alex.safetensors` or `lpips_vgg.safetensors` into the new folder `target`.

    The network is recognised by the shape of its first convolution.

    Raises:
        FileExistsError: If the target exists.
        PortError: If tensors are missing or of another shape (all are listed), or contain NaN or
            infinities (the first one is named). Nothing is written.
    """
    found = open_perceptual(path)
    first = found.get("0.weight")
    # AlexNet begins with kernels of 11x11, VGG16 with 3x3.
    net = "alex" if first and first.shape[-1] == 11 else "vgg"
    wanted = expected_shapes(net)
    problems = [f"missing: {name}" for name in wanted if name not in found]
    problems += [f"unexpected: {name}" for name in found if name not in wanted]
    problems += [
        f"shape: {name} is {entry.shape}, expected {wanted[name]}"
        for name, entry in found.items()
        if name in wanted and entry.shape != wanted[name]
    ]
    if problems:
        text = "\n  ".join(problems)
        raise PortError(f"{path}: {len(problems)} tensors do not fit LPIPS {net}:\n  {text}")

    def public(name: str) -> str:
        return f"{name}.model.1.weight" if name.startswith("lin") else f"features.{name}"

    tensors = {}
    for name in wanted:
        tensors[public(name)] = np.ascontiguousarray(found[name].read(), np.float32)
        check_finite(found[name], public(name), tensors[public(name)])
    name = f"lpips_{net}.safetensors"
    with new_folder(target) as folder:
        save_file(tensors, folder / name)
    return Path(target) / name
