"""LoRA files, merged into the tensors of a DiT: W + scale * alpha / rank * up @ down.

Low-rank adaptation is described by Hu et al. 2021, arXiv 2106.09685. A file holds a pair of
matrices for each layer that it changes, and may add plain differences:

    LAYER.lora_A.weight    down, (rank, in, *window); also LAYER.lora_down.weight
    LAYER.lora_B.weight    up, (out, rank, ...); also LAYER.lora_up.weight
    LAYER.alpha            a number; the rank if it is missing
    LAYER.diff, .diff_b, .diff_m    differences of a weight, a bias, a table of modulation

LAYER is a public name of either scheme behind one of several prefixes (diffusers, PEFT, lightx2v),
or the same with underscores in place of dots (kohya: `lora_unet_blocks_0_self_attn_q`).
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors import safe_open

from gnvc_jax.porting.architectures import Architecture
from gnvc_jax.porting.errors import PortError
from gnvc_jax.porting.names import SCHEMES, Tensor
from gnvc_jax.porting.sources import Source, TensorEntry, list_tensors, read_facts

DOWN, UP, ALPHA = "down", "up", "alpha"
# What stands at the end of a key: the part of a pair, or the tensor of the layer that it changes.
ENDINGS = {
    ".lora_A.weight": DOWN,
    ".lora_A.default.weight": DOWN,
    ".lora_down.weight": DOWN,
    ".lora_B.weight": UP,
    ".lora_B.default.weight": UP,
    ".lora_up.weight": UP,
    ".alpha": ALPHA,
    ".diff": "weight",
    ".diff_b": "bias",
    ".diff_m": "modulation",
}
PREFIX = re.compile(
    r"^(base_model\.model\.|lora_unet_|lora_transformer_)?"
    r"(model\.diffusion_model\.|diffusion_model\.|transformer\.|model\.)?"
)
LISTED = 20  # problems at most in a message: a LoRA of another model has hundreds


def merge_lora(
    source: Source, architecture: Architecture, file: str | Path, scale: float = 1.0
) -> Source:
    """Merges a LoRA into a source. Nothing is read before the tensors of the result are.

    Args:
        source: Source whose tensors fit `architecture`.
        architecture: Architecture of the source.
        file: LoRA file.
        scale: Factor of the whole change.

    Returns:
        The source with changed tensors. They are computed in float32 and rounded once, when they
        are stored.

    Raises:
        FileNotFoundError: If there is no such file.
        PortError: If a key belongs to no tensor of the source, a pair is incomplete, or a shape
            does not fit; the message names the file and the keys.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    # Dots and underscores are alike in the names of kohya's files.
    targets = {flat(t.name(scheme)): t for t in architecture.tensors for scheme in SCHEMES}
    entries, problems = dict(source.entries), []
    pairs: dict[str, dict[str, TensorEntry]] = {}

    def change(tensor: Tensor, delta: Callable[[], np.ndarray]) -> None:
        name = tensor.name(source.scheme)
        entry = entries[name]
        reader = functools.partial(read_sum, entry, delta, tensor.shape)
        origin = f"{entry.origin} + {scale:g} * {file}"
        # A key later in the file changes what this one made, so changes add up.
        entries[name] = dataclasses.replace(entry, read=reader, origin=origin)

    for key, entry in list_tensors(file).items():
        ending = next((e for e in ENDINGS if key.endswith(e)), "")
        layer, role = key.removesuffix(ending), ENDINGS.get(ending)
        # A pair and its alpha change the weight of their layer.
        kind = "weight" if role in (DOWN, UP, ALPHA) else role
        tensor = targets.get(flat(f"{PREFIX.sub('', layer)}.{kind}"))
        if role is None or tensor is None:
            what = "no known part of a LoRA" if role is None else "no such layer in the model"
            problems.append(f"{key}: {what}")
        elif role in (DOWN, UP, ALPHA):
            pairs.setdefault(layer, {})[role] = entry
        elif entry.shape != tensor.shape:
            problems.append(f"{key}: shape {entry.shape}, expected {tensor.shape}")
        else:
            change(tensor, functools.partial(difference, entry, scale))

    # Pairs last: only now are both halves, which a file may hold in any order, known.
    known_alpha = configured_alpha(file)
    for layer, parts in pairs.items():
        tensor = targets[flat(f"{PREFIX.sub('', layer)}.weight")]
        if problem := misfit(parts, tensor.shape):
            problems.append(f"{layer}: {problem}")
        else:
            change(tensor, functools.partial(low_rank, parts, scale, known_alpha))
    if problems:
        more = [f"and {len(problems) - LISTED} more"] if len(problems) > LISTED else []
        text = "\n  ".join([*problems[:LISTED], *more])
        raise PortError(
            f"{file}: {len(problems)} keys of this LoRA do not fit the {source.component} of "
            f"{source.path}:\n  {text}"
        )
    return dataclasses.replace(source, entries=entries)


def flat(name: str) -> str:
    """A name as kohya's files have it."""
    return name.replace(".", "_")


def misfit(parts: dict[str, TensorEntry], shape: tuple[int, ...]) -> str | None:
    """Says in words what is wrong with a pair of matrices for a kernel of a shape, if anything."""
    if absent := [role for role in (DOWN, UP) if role not in parts]:
        return f"the {' and the '.join(absent)} matrix is missing"
    down, up = parts[DOWN].shape, parts[UP].shape
    # Windows of convolutions are flattened: (rank, in * window) and (out, rank * 1).
    fits = down and up and up[0] == shape[0] and math.prod(down[1:]) == math.prod(shape[1:])
    if not fits or math.prod(up[1:]) != down[0]:
        return f"shapes {up} and {down} of the pair do not multiply to {shape}"
    if ALPHA in parts and math.prod(parts[ALPHA].shape) != 1:
        return f"alpha has shape {parts[ALPHA].shape}, expected one number"
    return None


def low_rank(parts: dict[str, TensorEntry], scale: float, alpha: float | None) -> np.ndarray:
    """Computes scale * alpha / rank * up @ down, with windows flattened: (out, in * window)."""
    down, up = (parts[role].read().astype(np.float32) for role in (DOWN, UP))
    rank = len(down)
    if ALPHA in parts:
        alpha = float(parts[ALPHA].read().reshape(()))
    factor = scale * (rank if alpha is None else alpha) / rank
    return np.float32(factor) * (up.reshape(len(up), rank) @ down.reshape(rank, -1))


def difference(entry: TensorEntry, scale: float) -> np.ndarray:
    """Reads a plain difference."""
    return np.float32(scale) * entry.read().astype(np.float32)


def read_sum(
    entry: TensorEntry, delta: Callable[[], np.ndarray], shape: tuple[int, ...]
) -> np.ndarray:
    """Reads a tensor and adds a change to it, in float32 or the tensor's type if it is wider."""
    array = entry.read()
    return array.astype(np.result_type(array, np.float32)) + delta().reshape(shape)


def configured_alpha(file: Path) -> float | None:
    """Reads the alpha of all layers, from the metadata of diffusers or from PEFT's configuration.

    Raises:
        PortError: If it is not one number for all, the factor is not alpha / rank, or the
            description is damaged.
    """
    facts: dict = {}
    if file.suffix == ".safetensors":
        with safe_open(file, framework="numpy") as opened:
            text = (opened.metadata() or {}).get("lora_adapter_metadata", "{}")
        try:
            facts = dict(json.loads(text))
        except (TypeError, ValueError) as error:
            raise PortError(f"{file}: damaged lora_adapter_metadata ({error})") from error
    if file.name.startswith("adapter_model."):
        facts = facts or read_facts(file.with_name("adapter_config.json"))
    facts = {key.removeprefix("transformer."): value for key, value in facts.items()}
    if special := [k for k in ("alpha_pattern", "use_rslora", "use_dora") if facts.get(k)]:
        raise PortError(f"{file}: {special[0]} = {facts[special[0]]!r} is not supported")
    return facts.get("lora_alpha")
