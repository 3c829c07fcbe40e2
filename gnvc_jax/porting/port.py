"""Public weights converted to checkpoint folders, tensor by tensor (`gnvc port`).

`port` opens the files (`sources`), recognises what they hold (`architectures`), compares every name
and shape with what that must have (`names`), and changes entries for a LoRA or an adapter. Only
then does it read: one of our parameters at a time is gathered, checked, and written (`checkpoint`).
Nothing is left behind if any of this fails.
"""

import csv
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gnvc_jax.errors import UsageError
from gnvc_jax.porting.architectures import Architecture, recognise
from gnvc_jax.porting.checkpoint import (
    PROMPT,
    leaves_by_path,
    load_prompt,
    new_folder,
    write_component,
)
from gnvc_jax.porting.errors import PortError
from gnvc_jax.porting.lora import merge_lora
from gnvc_jax.porting.sources import Source, TensorEntry, open_sources
from gnvc_jax.porting.vace import add_adapter
from gnvc_jax.refiner import DiTConfig

DTYPES = ("stored", "float32", "bfloat16")
FLOATS = ("float64", "float32", "float16", "bfloat16")
COLUMNS = "file tensor dtype shape parameter row stored_dtype stored_shape".split()


@dataclasses.dataclass(frozen=True)
class Ported:
    """Summary of one ported component.

    Attributes:
        architecture: Architecture of the component.
        source: Origin of the weights.
        tensors: Number of public tensors.
        parameters: Number of parameters.
        bytes: Size of the parameters in bytes.
    """

    architecture: Architecture
    source: Source
    tensors: int
    parameters: int
    bytes: int


def port(
    path: str | Path,
    target: str | Path | None,
    dtype: str = "stored",
    heads: int | None = None,
    prompt: str | Path | None = None,
    progress: bool = True,
    lora: Sequence[tuple[str | Path, float]] = (),
    vace: str | Path | None = None,
    low_noise: bool = False,
) -> list[Ported]:
    """Converts public weights to a checkpoint folder, one parameter after the other.

    Memory: about four times the largest parameter, which is one kernel of all layers.

    Args:
        path: File or folder with public weights.
        target: Folder to create; None to check everything, every value included, and write nothing.
        dtype: "stored" keeps the type of each tensor, so that `export` gives the same bytes;
            "float32" and "bfloat16" convert.
        heads: Number of attention heads, see `recognise`.
        prompt: File with a text condition, see `load_prompt`.
        progress: Whether to show a progress bar.
        lora: LoRA files to merge into the DiT, each with its scale, see `merge_lora`.
        vace: File or folder with VACE's adapter, to add to a DiT without one.
        low_noise: Whether to take the expert for low noise of a Wan2.2 model.

    Returns:
        A summary of each component.

    Raises:
        FileNotFoundError: If there is nothing at `path`, or no LoRA file.
        FileExistsError: If the target exists.
        UsageError: If there is a LoRA, but no DiT, or no expert to choose.
        PortError: If tensors are missing, unexpected or of a wrong shape (all of them are listed),
            or contain NaN or infinities (the first one is named). Nothing is written.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    sources = open_sources(path, low_noise)
    if vace is not None:
        sources = add_adapter(sources, vace)
    found = [(source, recognise(source, heads)) for source in sources]
    # Everything is checked by names and shapes before the first tensor is read or written.
    for source, architecture in found:
        check(source, architecture)
    dits = [a.config for _, a in found if isinstance(a.config, DiTConfig)]
    if lora and not dits:
        raise UsageError(f"{path}: a LoRA changes a DiT, and there is none")
    for file, scale in lora:
        found = [
            (merge_lora(s, a, file, scale) if s.component == "dit" else s, a) for s, a in found
        ]
    text = load_prompt(prompt, *dits) if prompt else None
    if target is None:
        return [port_one(s, a, None, dtype, progress) for s, a in found]
    with new_folder(target) as folder:
        if text is not None:
            np.save(folder / PROMPT, text)
        return [port_one(s, a, folder / s.component, dtype, progress) for s, a in found]


def check(source: Source, architecture: Architecture) -> None:
    """Checks that a source has just the tensors of an architecture.

    Raises:
        PortError: If tensors are missing, unexpected or do not fit; all of them are listed.
    """
    wanted = {t.name(source.scheme): t for t in architecture.tensors}
    problems = [f"missing: {name}" for name in sorted(wanted.keys() - source.entries.keys())]
    problems += [f"unexpected: {name}" for name in sorted(source.entries.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & source.entries.keys()):
        entry = source.entries[name]
        if entry.shape != wanted[name].shape:
            problems.append(f"shape: {name} is {entry.shape}, expected {wanted[name].shape}")
        if entry.dtype not in FLOATS:
            problems.append(f"type: {name} is {entry.dtype}, expected one of {', '.join(FLOATS)}")
    if problems:
        text = "\n  ".join(problems)
        raise PortError(
            f"{source.path}: {len(problems)} tensors do not fit a {architecture.component} with "
            f"{architecture.config}:\n  {text}"
        )


def check_finite(entry: TensorEntry, name: str, array: np.ndarray) -> None:
    """Checks that a converted array is finite.

    Raises:
        PortError: If it is not; the message names the tensor.
    """
    bad = array.size - np.count_nonzero(np.isfinite(array))
    if bad:
        raise PortError(
            f"{entry.origin}: {name} has {bad} of {array.size} values that are NaN or infinite as "
            f"{array.dtype}"
        )


def port_one(
    source: Source, architecture: Architecture, folder: Path | None, dtype: str, progress: bool
) -> Ported:
    """Writes one component whose tensors fit, or only reads it if there is no folder."""
    # Of whole parameters: those of scanned blocks have an axis for the blocks.
    shapes = {k: x.shape for k, x in leaves_by_path(architecture.abstract()).items()}
    report, size = [], 0

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        nonlocal size
        # By parameter, not by file: one is complete, written and released before the next.
        for path, tensors in architecture.by_parameter().items():
            entries = [source.entries[t.name(source.scheme)] for t in tensors]
            # One type for all layers of a scanned parameter, which holds each of theirs.
            stored = np.result_type(*(np.dtype(e.dtype) for e in entries))
            # "bfloat16" is a type of NumPy once ml_dtypes is imported, as JAX does.
            array = np.empty(shapes[path], stored if dtype == "stored" else dtype)
            for tensor, entry in zip(tensors, entries):
                # A view, so that tensors are converted straight into their rows.
                place = array[... if tensor.index is None else tensor.index]
                with np.errstate(over="ignore"):  # reported below, by name
                    place[...] = tensor.forward(entry.read(), place.shape)
                name = tensor.name(source.scheme)
                check_finite(entry, name, place)
                origin = entry.origin, name, entry.dtype, size_text(entry.shape)
                goal = path, tensor.index, array.dtype, size_text(place.shape)
                report.append((*origin, *goal))
                bar.update()
            size += array.nbytes
            yield path, array
            # Otherwise it stays in memory while the next one is made.
            del array

    with tqdm(
        total=len(source.entries),
        unit="tensor",
        desc=source.component,
        disable=not progress or None,
    ) as bar:
        if folder is None:
            for _ in arrays():
                pass
        else:
            write_component(folder, architecture, arrays())
            with open(folder / "report.csv", "w", newline="") as file:
                csv.writer(file).writerows([COLUMNS, *report])
    parameters = sum(int(np.prod(shape)) for shape in shapes.values())
    return Ported(architecture, source, len(report), parameters, size)


def size_text(shape: tuple[int, ...]) -> str:
    """A shape as text, such as "3x16"."""
    return "x".join(map(str, shape))
