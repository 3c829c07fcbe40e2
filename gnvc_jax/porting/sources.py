"""Files and folders with public weights of Wan2.1, opened without reading the weights.

Supported are safetensors (a single file, or shards with or without their index), PyTorch files, and
folders of either: the component folders of diffusers (vae/, transformer/) and the repositories of
Wan-AI. `open_sources` returns one `Source` for each component, whose entries read a tensor when
they are asked to.
"""

import dataclasses
import functools
import json
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from gnvc_jax.errors import UsageError
from gnvc_jax.files import not_weights
from gnvc_jax.porting import torch_file
from gnvc_jax.porting.errors import PortError

log = logging.getLogger(__name__)

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
DTYPES |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
INDEX = ".safetensors.index.json"
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")

# Prefixes that other programs add to the public names: ComfyUI, adapter trainers, module wrappers.
PREFIX = re.compile(r"^(model\.diffusion_model|diffusion_model|model|module)\.")

# Folders of the two experts of Wan2.2's A14B models, for low and for high noise, as diffusers and
# Wan-AI name them.
EXPERTS = (("transformer_2", "transformer"), ("low_noise_model", "high_noise_model"))

# What stands beside tensors of 8 bits: a factor for each, named as in ComfyUI's older files or as
# in its newer ones and lightx2v's; and what only the kernels of others use: a scale of activations,
# a description of the format, an empty tensor that marks the file.
SCALES = re.compile(r"\.(scale_weight|weight_scale)$")
UNUSED = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")

# (component, scheme) by the prefix of a tensor that only it has.
MARKS = {
    "condition_embedder.": ("dit", "diffusers"),
    "time_embedding.": ("dit", "original"),
    "decoder.up_blocks.": ("vae", "diffusers"),
    "decoder.upsamples.": ("vae", "original"),
    "decoder.7.conv.": ("decoder", "original"),
}
# The same for VACE's adapter, where it stands alone.
ADAPTER_MARKS = {
    "vace_blocks.0.proj_in.": ("vace", "diffusers"),
    "vace_blocks.0.before_proj.": ("vace", "original"),
}


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file.

    Attributes:
        file: File that holds it.
        shape: Shape.
        dtype: Name of the dtype.
        read: Function that reads the tensor.
        origin: What the tensor was made of, for people; the file if not given.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]
    origin: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "origin", self.origin or str(self.file))


@dataclasses.dataclass(frozen=True)
class Source:
    """Tensors of one component by public name.

    Attributes:
        path: File, index or folder that it was found in.
        component: "vae", "dit", "decoder" for a light decoder, or "vace" for VACE's adapter without
            the DiT that it belongs to.
        scheme: Naming scheme, "original" or "diffusers".
        facts: Contents of the config.json beside the weights; empty without one.
        entries: Tensors by name.
    """

    path: Path
    component: str
    scheme: str
    facts: dict
    entries: dict[str, TensorEntry]


def open_sources(path: str | Path, low_noise: bool = False) -> list[Source]:
    """Finds the components in a file or folder.

    Args:
        path: File or folder.
        low_noise: Whether to take the expert for low noise of a Wan2.2 model, which has two DiTs.

    Raises:
        FileNotFoundError: If there is nothing at `path`.
        PortError: If it holds no known component, or one of them twice, or two experts of which
            none was chosen.
        UsageError: If one is chosen where there are no two.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    expert, other = next((pair for pair in EXPERTS if (path / pair[0]).is_dir()), (None, None))
    if low_noise and expert is None:
        raise UsageError(f"{path}: holds no Wan2.2 model with an expert for low noise")
    if expert and not low_noise:
        raise PortError(
            f"{path}: {other}/ and {expert}/ are two experts of a Wan2.2 model, for high and low "
            "noise; refinement works at low noise: give --low-noise to port that one"
        )
    if path.is_file():
        if (shard := SHARD.fullmatch(path.name)) and int(shard[3]) > 1:
            raise PortError(f"{path}: one of {int(shard[3])} shards; name the folder that has all")
        files = index_files(path) if path.name.endswith(INDEX) else [path]
        source = open_files(path, files, path.parent)
        if source is None:
            raise PortError(f"{path}: holds no VAE or DiT of Wan2.1")
        return [source]
    folders = [f for name in ("vae", expert or "transformer") if (f := path / name).is_dir()]
    if expert == "low_noise_model" or not folders:  # Wan-AI has the VAE at the top
        folders.append(path)
    sources = [source for folder in folders for source in open_folder(folder)]
    if not sources:
        raise PortError(f"{path}: no .safetensors or .pth file with a VAE or DiT of Wan2.1")
    components = [s.component for s in sources]
    for source in sources:
        if components.count(source.component) > 1:
            files = ", ".join(str(s.path) for s in sources if s.component == source.component)
            raise PortError(f"{path}: several files hold a {source.component}, name one: {files}")
    return sources


def open_folder(folder: Path) -> list[Source]:
    """Finds the components in the files of one folder; files with other contents are skipped."""
    # Shards are taken by their index, or as a complete set, before files are looked at one by one:
    # a shard alone would look like a component with missing tensors.
    parts: set[Path] = set()
    found = []
    for index in sorted(folder.glob("*" + INDEX)):
        files = index_files(index)
        parts.update(files)
        found.append(open_files(index, files, folder))
    for index, files in shards_without_index(folder, parts).items():
        parts.update(files)
        found.append(open_files(index, files, folder))
    for file in sorted((*folder.glob("*.safetensors"), *folder.glob("*.pth"))):
        if file not in parts:
            found.append(open_files(file, [file], folder))
    return [source for source in found if source]


def index_files(index: Path) -> list[Path]:
    """Reads the files that an index lists.

    Raises:
        PortError: If the index is unreadable or one of the files is missing.
    """
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
        files = sorted(index.parent / name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PortError(f"{index}: not an index of safetensors files ({error!r})") from error
    missing = [str(f) for f in files if f.parent != index.parent or not f.is_file()]
    if missing:
        raise PortError(f"{index}: lists missing files: {', '.join(missing)}")
    return files


def shards_without_index(folder: Path, known: set[Path]) -> dict[Path, list[Path]]:
    """Finds complete sets of shards that no index lists.

    Args:
        folder: Folder to search.
        known: Files that an index lists.

    Returns:
        The files of each set, by the path where their index should be.

    Raises:
        PortError: If a set is incomplete.
    """
    sets: dict[tuple[str, int], dict[int, Path]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if file not in known and (shard := SHARD.fullmatch(file.name)) and int(shard[3]) > 1:
            sets.setdefault((shard[1], int(shard[3])), {})[int(shard[2])] = file
    found = {}
    for (stem, count), files in sets.items():
        index = folder / (stem + INDEX)
        if absent := ", ".join(str(n) for n in range(1, count + 1) if n not in files):
            raise PortError(
                f"{index}: missing, and so are the shards {', '.join(absent)} of {count}"
            )
        log.warning("%s: missing; all %d shards are there and are read without it", index, count)
        found[index] = list(files.values())
    return found


def open_files(path: Path, files: list[Path], folder: Path) -> Source | None:
    """Opens the component whose tensors are in `files`; None if it is not a known component."""
    entries: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in list_tensors(file).items():
            name = PREFIX.sub("", name)
            if name in entries:
                raise PortError(f"{path}: {name} is in {entries[name].file} and in {file}")
            entries[name] = entry
    entries = dequantised(path, entries)

    def found(marks: dict[str, tuple[str, str]]) -> set[tuple[str, str]]:
        return {kind for mark, kind in marks.items() if any(n.startswith(mark) for n in entries)}

    # A DiT with its adapter has both marks; only an adapter alone is recognised by its own.
    kinds = found(MARKS) or found(ADAPTER_MARKS)
    if not kinds:
        return None
    if len(kinds) > 1:
        raise PortError(f"{path}: holds tensors of several components or naming schemes")
    component, scheme = kinds.pop()
    if component == "decoder":  # TAEHV has an encoder, too, which is of no use here
        entries = {k: e for k, e in entries.items() if not k.startswith("encoder.")}
    return Source(path, component, scheme, read_facts(folder / "config.json"), entries)


def dequantised(path: Path, entries: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Replaces tensors of 8 bits by float32, multiplied by their scales if they have some.

    A scale is one number, or one for each output (row) of the tensor.

    Raises:
        PortError: If there is a scale without its tensor, or one of another shape.
    """
    small = [name for name, entry in entries.items() if entry.dtype.startswith("float8")]
    scales = {SCALES.sub(".weight", n): e for n, e in entries.items() if SCALES.search(n)}
    if lonely := scales.keys() - entries.keys():
        raise PortError(f"{path}: has a scale for {min(lonely)}, but no such tensor")
    for name, scale in scales.items():
        rows = (*entries[name].shape[:1], *[1] * (len(scale.shape) - 1))
        if math.prod(scale.shape) != 1 and scale.shape != rows:
            raise PortError(
                f"{path}: the scale of {name} has shape {scale.shape}, expected one number, or one "
                f"for each of {rows[0]} rows"
            )

    def read(entry: TensorEntry, scale: TensorEntry | None) -> np.ndarray:
        array = entry.read().astype(np.float32)
        if scale is None:
            return array
        # One number, or (rows,) or (rows, 1): both broadcast over the inputs of each output.
        factors = scale.read().astype(np.float32)
        return array * factors.reshape(-1, *[1] * (array.ndim - 1))

    found = {k: e for k, e in entries.items() if not SCALES.search(k) and not k.endswith(UNUSED)}
    # Integers are left alone, and refused later: their formats need more than a factor.
    scaled = {name for name in scales if entries[name].dtype in DTYPES.values()}
    changed = found.keys() & {*small, *scaled}
    for name in changed:
        entry = found[name]
        reader = functools.partial(read, entry, scales.get(name))
        found[name] = dataclasses.replace(entry, dtype="float32", read=reader)
    if changed:
        log.warning("%s: %d tensors of 8 bits are dequantised to float32", path, len(changed))
    return found


def list_tensors(file: Path) -> dict[str, TensorEntry]:
    """Lists the tensors of a file.

    Raises:
        PortError: If the file is damaged or not a weight file.
    """
    check_kind(file)
    if file.suffix in (".pth", ".pt"):
        return {
            name: TensorEntry(
                file,
                tensor.shape,
                str(tensor.dtype),
                functools.partial(torch_file.read_tensor, file, tensor),
            )
            for name, tensor in torch_file.read_descriptions(file).items()
        }
    try:
        with safe_open(file, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}
            return {
                name: TensorEntry(
                    file,
                    tuple(piece.get_shape()),
                    DTYPES.get(str(piece.get_dtype()), str(piece.get_dtype())),
                    functools.partial(read_safetensor, file, name),
                )
                for name, piece in slices.items()
            }
    except SafetensorError as error:
        raise PortError(f"{file}: truncated or damaged safetensors file ({error})") from error


def check_kind(file: Path) -> None:
    """Refuses files that are often found in place of weights.

    Raises:
        PortError: If the file is one of these.
    """
    if kind := not_weights(file):
        raise PortError(f"{file}: {kind}")


def read_safetensor(file: Path, name: str) -> np.ndarray:
    """Reads one tensor. The file is opened anew each time, so that no page of it stays mapped."""
    with safe_open(file, framework="numpy") as opened:
        kind = DTYPES.get(str(opened.get_slice(name).get_dtype()), "")
        if not kind.startswith("float8"):
            return opened.get_tensor(name)
    return read_raw_safetensor(file, name, kind)


def read_raw_safetensor(file: Path, name: str, dtype: str) -> np.ndarray:
    """Reads one tensor of a type that the library cannot give to NumPy, but ml_dtypes has.

    Layout: length of the header in 8 bytes, a JSON header with places relative to its end, data.
    """
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        facts = json.loads(opened.read(length))[name]
        start, end = facts["data_offsets"]
        opened.seek(8 + length + start)
        return np.frombuffer(opened.read(end - start), dtype).reshape(facts["shape"])


def read_facts(path: Path) -> dict:
    """Reads the config.json of a model folder; empty if there is none.

    Raises:
        PortError: If the file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text())
        if not isinstance(facts, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise PortError(f"{path}: not a configuration ({error})") from error
    return facts
