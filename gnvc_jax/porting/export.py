"""Checkpoint folders converted back to the model folders of diffusers (`gnvc export`).

`export` inverts `gnvc_jax.porting.port.port`: the same name tables (`gnvc_jax.porting.names`) are
read from right to left, parameter by parameter, and `Tensor.inverse` restores PyTorch's layout. A
light decoder is not exported, since diffusers has no such class.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from flax.traverse_util import unflatten_dict
from safetensors.numpy import save_file
from tqdm import tqdm

from gnvc_jax.porting.architectures import Architecture, diffusers_config
from gnvc_jax.porting.checkpoint import (
    has_component,
    leaves_by_path,
    new_folder,
    open_weights,
    read_architecture,
)

FOLDERS = {"vae": "vae", "dit": "transformer"}
WEIGHTS = "diffusion_pytorch_model"


def export(
    folder: str | Path, target: str | Path, shard_bytes: int = 2 << 30, progress: bool = True
) -> list[Path]:
    """Writes a checkpoint folder as model folders of diffusers (vae/, transformer/).

    Weights keep their stored type, so that what was ported with dtype "stored" comes back bit for
    bit. Memory: about twice the size of the largest file.

    Args:
        folder: Checkpoint folder.
        target: Folder to create.
        shard_bytes: Maximum size of a weight file.
        progress: Whether to show a progress bar.

    Returns:
        The folders that were written.

    Raises:
        FileNotFoundError: If the folder holds no component.
        FileExistsError: If the target exists.
    """
    components = [c for c in FOLDERS if has_component(folder, c)]
    if not components:
        raise FileNotFoundError(f"{folder}: holds no ported weights of a VAE or a DiT")
    with new_folder(target) as temporary:
        for component in components:
            architecture = read_architecture(folder, component)
            opened = open_weights(folder, component, architecture)
            place = temporary / FOLDERS[component]
            place.mkdir()
            export_one(architecture, *opened, place, shard_bytes, progress)
    return [Path(target) / FOLDERS[c] for c in components]


def export_one(
    architecture: Architecture,
    saved: str,
    found: dict,
    folder: Path,
    shard_bytes: int,
    progress: bool,
) -> None:
    """Writes one component: config.json, and its tensors in one file, or in several with an index.

    Args:
        architecture: Architecture of the component.
        saved: Path of its Orbax checkpoint.
        found: Metadata of its arrays by path.
        folder: Folder to write to.
        shard_bytes: Maximum size of a weight file.
        progress: Whether to show a progress bar.
    """
    facts = json.dumps(diffusers_config(architecture), indent=2)
    (folder / "config.json").write_text(facts + "\n")

    # One parameter is read at a time; the placeholders stand for those that are not.
    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for path, parts in architecture.by_parameter().items():
            # Orbax reads what has a shape, and skips placeholders.
            like = {k: x if k == path else ocp.PLACEHOLDER for k, x in found.items()}
            array = leaves_by_path(ocp.load(saved, unflatten_dict(like, sep="/")))[path]
            for tensor in parts:
                yield (
                    tensor.diffusers,
                    tensor.inverse(array[... if tensor.index is None else tensor.index]),
                )
                bar.update()

    # The number of files is part of their names and known at the end only, so they are renamed
    # then.
    contents, total = [], 0
    with tqdm(
        total=len(architecture.tensors),
        unit="tensor",
        desc=folder.name,
        disable=not progress or None,
    ) as bar:
        for shard in in_shards(tensors(), shard_bytes):
            save_file(shard, folder / f"{len(contents)}.safetensors", metadata={"format": "pt"})
            contents.append(list(shard))
            total += sum(value.nbytes for value in shard.values())
    if len(contents) == 1:
        (folder / "0.safetensors").rename(folder / f"{WEIGHTS}.safetensors")
        return
    names = {}
    for i, content in enumerate(contents):
        name = f"{WEIGHTS}-{i + 1:05d}-of-{len(contents):05d}.safetensors"
        (folder / f"{i}.safetensors").rename(folder / name)
        names |= dict.fromkeys(content, name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
    (folder / f"{WEIGHTS}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def in_shards(
    tensors: Iterable[tuple[str, np.ndarray]], limit: int
) -> Iterator[dict[str, np.ndarray]]:
    """Groups tensors into dictionaries of at most `limit` bytes each, or of one larger tensor."""
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, value in tensors:
        # A single tensor above the limit becomes a shard of its own.
        if shard and size + value.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = value
        size += value.nbytes
    yield shard
