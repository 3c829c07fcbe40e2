"""Encoder and decoder of a model as serialized programs (`jax.export`, StableHLO).

Frameworks other than this package, or a later version of it, can run them: each file holds the
compiled-from form of one function for frames of one size, and `weights.safetensors` the arrays that
they take. `manifest.json` says how to call them:

    weights.safetensors             arrays by path: "vae/...", "codec/...", "scales/KIND/..."
    tables.npz                      probability tables of the entropy coder (y, z, motion)
    decoder/NAME.stablehlo          `jax.export.deserialize(bytes).call(weights, inputs) -> outputs`
    encoder/NAME.stablehlo

`weights` is a dictionary of the arrays whose paths begin with the program's part, without it;
`inputs` and `outputs` are dictionaries of arrays. Programs of one latent exist twice, for the first
latent of a group ("intra") and for the others ("inter"). `examples/decode_exported.py` decodes a
stream with them. Refinement is not exported.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax import export
from safetensors.numpy import save_file

from gnvc_jax.arrays import Array, Tree
from gnvc_jax.codec import scales
from gnvc_jax.codec.config import LATENT_MULTIPLE
from gnvc_jax.codec.entropy import LatentSymbols
from gnvc_jax.codec.model import CodecState, pad_latents
from gnvc_jax.codec.transform import DecodedLatent
from gnvc_jax.errors import UsageError
from gnvc_jax.files import atomic_output
from gnvc_jax.model import KINDS, Model, to_arrays
from gnvc_jax.programs import codec_programs

FORMAT = "gnvc-programs/1"
PLATFORMS = ("cpu", "cuda", "tpu")


@dataclasses.dataclass(frozen=True)
class Program:
    """A function to export.

    Attributes:
        part: Name of the weights it takes: "vae", "codec", "scales/intra" or "scales/inter".
        function: Function (weights, inputs) -> outputs, dictionaries of arrays.
        inputs: Shapes of the inputs.
    """

    part: str
    function: Callable[[dict[str, Array], dict[str, Array]], dict[str, Array]]
    inputs: Tree

    def outputs(self, weights: Tree) -> Tree:
        """Shapes of the outputs."""
        return jax.eval_shape(self.function, weights, self.inputs)


def part_of(arrays: dict[str, np.ndarray], part: str) -> dict[str, np.ndarray]:
    """Arrays whose paths begin with "PART/", by the rest of their paths."""
    return {k.removeprefix(f"{part}/"): x for k, x in arrays.items() if k.startswith(f"{part}/")}


def exported_arrays(model: Model) -> dict[str, np.ndarray]:
    """Weights of the programs by path; floats in float32, integers as they are."""
    parts = ("vae/", "codec/", "scales/", "decoder/")
    arrays = {k: x for k, x in to_arrays(model).items() if k.startswith(parts)}
    return {
        k: x.astype(np.float32) if np.issubdtype(x.dtype, np.floating) else x
        for k, x in arrays.items()
    }


def make_programs(model: Model, height: int, width: int) -> dict[str, dict[str, Program]]:
    """Makes the programs of "encoder" and "decoder" by name, for frames of one size.

    Args:
        model: Model.
        height: Height of the frames that the programs see, a multiple of what one hyperlatent
            stands for with motion, else of the VAE's stride.
        width: Width of the frames, a multiple of the same.
    """
    used, vae, cfg = codec_programs(model), model.vae_config, model.codec_config
    motion, stride = cfg.motion is not None, vae.temporal_stride
    arrays = exported_arrays(model)
    h, w = height // vae.stride, width // vae.stride
    # The VAE sees latents of h x w, the codec the same ones padded to whole hyperlatents.
    rows, columns = (side + -side % LATENT_MULTIPLE for side in (h, w))

    def shape(*sizes: int, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    # A cell of y stands for 2x2 latents, one of z for 8x8. Symbols have no batch axis, as in
    # streams.
    y = shape(rows // 2, columns // 2, cfg.y_channels, dtype=jnp.int32)
    z = shape(rows // 8, columns // 8, cfg.z_channels, dtype=jnp.int32)
    q_index = shape(1, dtype=jnp.int32)
    latent = shape(1, rows, columns, cfg.latent_channels)
    one = shape(1, rows, columns, 1)
    frames = {"intra": shape(1, 1, height, width, 3), "inter": shape(1, stride, height, width, 3)}
    # What a later latent takes from the one before: with motion, a given prediction; without, the
    # latent itself and the memory of the recurrence.
    memory = {} if motion else {"memory": shape(1, rows, columns, cfg.width)}
    prediction = {"prediction": latent} if motion else {"previous_latent": latent}

    def params(weights: dict[str, Array]) -> Tree:
        return unflatten_dict(weights, sep="/")

    def before(inputs: dict[str, Array], kind: str) -> tuple[CodecState | None, Array | None]:
        """Codec state and prediction of a latent from the inputs of its program."""
        if kind == "intra":
            return None, None
        # The next latent never sees this z, and y and index only where it is analysed.
        no_z = jnp.zeros((1, *z.shape))
        none = jnp.zeros((1, *y.shape))
        previous = LatentSymbols(
            no_z,
            *(
                inputs[k][None].astype(jnp.float32) if k in inputs else none
                for k in ("previous_y", "previous_index")
            ),
        )
        last = inputs["prediction" if motion else "previous_latent"]
        return CodecState(last, inputs.get("memory"), previous), inputs.get("prediction")

    def reconstruct(kind: str) -> Program:
        def function(weights: dict, inputs: dict) -> dict:
            # The table indices only tell how symbols were read; the reconstruction does not use
            # them.
            symbols = LatentSymbols(inputs["z"], inputs["y"], jnp.zeros_like(inputs["y"]))
            state, predicted = before(inputs, kind)
            given = symbols, state, inputs["q_index"], predicted
            decoded, state = used.reconstruct(params(weights), *given)
            out = {"latent": decoded.latent, "memory": state.memory}
            out |= {"fresh": decoded.fresh, "detail": decoded.detail}
            return {name: x for name, x in out.items() if x is not None}

        later = prediction | memory if kind == "inter" else {}
        return Program("codec", function, {"y": y, "z": z, "q_index": q_index} | later)

    def analyse(kind: str) -> Program:
        def function(weights: dict, inputs: dict) -> dict:
            state, predicted = before(inputs, kind)
            # `analyse` pads by itself, from the latents that the VAE gave.
            given = inputs["latent"][:, :h, :w], state, inputs["q_index"], predicted
            symbols = used.analyse(params(weights), *given)
            return {"z": symbols.z, "y": symbols.y}

        later = prediction | memory | {"previous_y": y, "previous_index": y}
        later = later if kind == "inter" else {}
        return Program("codec", function, {"latent": latent, "q_index": q_index} | later)

    def scale_index(kind: str) -> Program:
        def function(weights: dict, inputs: dict) -> dict:
            order = ("q_index", "z", "previous_y", "previous_index")
            return {"index": scales.scale_index(cfg, weights, *(inputs[name] for name in order))}

        q = shape(dtype=jnp.int32)
        inputs = {"q_index": q, "z": z, "previous_y": y, "previous_index": y}
        return Program(f"scales/{kind}", function, inputs)

    def encode_video(kind: str, cache: Tree) -> Program:
        def function(weights: dict, inputs: dict) -> dict:
            cache = inputs.get("cache") if kind == "inter" else None
            latents, cache = used.encode_video(params(weights), cache, inputs["frames"])
            return {"latent": pad_latents(latents)[:, 0], "cache": cache}

        later = {"cache": cache} if kind == "inter" else {}
        return Program("vae", function, {"frames": frames[kind]} | later)

    def decode_latents(kind: str, cache: Tree) -> Program:
        def function(weights: dict, inputs: dict) -> dict:
            cache = inputs.get("cache") if kind == "inter" else None
            # (1, rows, columns, c) -> (1, t = 1, h, w, c): the padding goes, and the VAE wants a
            # time axis.
            latents = inputs["latent"][:, None, :h, :w]
            shown, cache = used.decode_latents(params(weights), cache, latents)
            return {"frames": shown, "cache": cache}

        later = {"cache": cache} if kind == "inter" else {}
        part = "vae" if model.decoder_config is None else "decoder"
        return Program(part, function, {"latent": latent} | later)

    def predict() -> Program:
        def function(weights: dict, inputs: dict) -> dict:
            given = inputs["reference"], inputs["vectors"]
            predicted, latent = used.predict(params(weights), *given)
            return {"predicted": predicted, "prediction": latent}

        # One vector per block of 16x16 pixels and frame, see `gnvc_jax.motion.expand`.
        reference = shape(1, height, width, 3, dtype=jnp.uint8)
        vectors = shape(1, stride, height // 16, width // 16, 2, dtype=jnp.int16)
        return Program("vae", function, {"reference": reference, "vectors": vectors})

    def compensate() -> Program:
        def function(weights: dict, inputs: dict) -> dict:
            no_feature: Any = None  # compensation needs none
            decoded = DecodedLatent(inputs["latent"], no_feature, inputs["fresh"], inputs["detail"])
            given = decoded, inputs["prediction"], inputs["predicted"]
            return {"frames": used.compensate(params(weights), *given)}

        inputs = {"latent": latent, "fresh": one, "detail": one, "prediction": latent}
        return Program("vae", function, inputs | {"predicted": frames["inter"]})

    def cache_of(program: Program) -> Tree:
        return program.outputs(part_of(arrays, program.part))["cache"]

    encode_intra, decode_intra = encode_video("intra", None), decode_latents("intra", None)
    decoder = {f"reconstruct_{kind}": reconstruct(kind) for kind in KINDS}
    decoder |= {f"scale_index_{kind}": scale_index(kind) for kind in KINDS}
    decoder["frames_intra"] = decode_intra
    if motion:
        # Motion needs a linear VAE, which has no cache: later frames come from the prediction.
        decoder |= {"predict": predict(), "frames_inter": compensate()}
    else:
        decoder["frames_inter"] = decode_latents("inter", cache_of(decode_intra))
    encoder = {f"analyse_{kind}": analyse(kind) for kind in KINDS}
    encoder["encode_intra"] = encode_intra
    encoder["encode_inter"] = encode_video("inter", cache_of(encode_intra))
    return {"encoder": encoder, "decoder": decoder}


def describe(tree: Tree) -> Tree:
    """Describes shapes and types of a tree of arrays for JSON."""
    return jax.tree.map(lambda x: {"shape": list(x.shape), "dtype": str(np.dtype(x.dtype))}, tree)


def export_model(
    model: Model,
    out: str | Path,
    height: int,
    width: int,
    platforms: Sequence[str] = PLATFORMS,
) -> None:
    """Writes the programs of a model for frames of one size into a new folder.

    Args:
        model: Model.
        out: Folder to create.
        height: Height of the frames.
        width: Width of the frames.
        platforms: Platforms to export for: "cpu", "cuda", "rocm", "tpu".

    Raises:
        FileExistsError: If the folder exists.
        UsageError: If a size is not positive.
    """
    if min(height, width) < 1:
        raise UsageError(f"size must be positive, got {width}x{height}")
    if Path(out).exists():
        raise FileExistsError(f"{out}: exists")
    cfg, vae = model.codec_config, model.vae_config
    # Without motion the codec pads latents. With it, predicted frames must give latents of the
    # padded size, so the frames are padded.
    unit = vae.stride * (LATENT_MULTIPLE if cfg.motion else 1)
    padded = [side + -side % unit for side in (height, width)]
    programs, arrays = make_programs(model, *padded), exported_arrays(model)
    manifest = {
        "format": FORMAT,
        "model": model.name,
        "codec_fingerprint": model.fingerprints[0].hex(),
        "vae_fingerprint": model.fingerprints[1].hex(),
        "height": height,
        "width": width,
        "padded_height": padded[0],
        "padded_width": padded[1],
        "motion": cfg.motion,
        "k_skip": cfg.k_skip,
        "platforms": list(platforms),
        "programs": {},
    }
    with atomic_output(Path(out)) as folder:
        folder.mkdir(parents=True)
        for side, group in programs.items():
            (folder / side).mkdir()
            for name, program in group.items():
                weights = part_of(arrays, program.part)
                function = jax.jit(program.function)
                made = export.export(function, platforms=list(platforms))(weights, program.inputs)
                path = f"{side}/{name}.stablehlo"
                (folder / path).write_bytes(made.serialize())
                manifest["programs"][f"{side}/{name}"] = {
                    "file": path,
                    "weights": program.part,
                    "inputs": describe(program.inputs),
                    "outputs": describe(program.outputs(weights)),
                }
        save_file(arrays, folder / "weights.safetensors")
        tables = model.tables
        np.savez(folder / "tables.npz", y=tables.y, z=tables.z, motion=tables.motion)
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
