"""Decodes a stream with exported programs: python decode_exported.py PROGRAMS STREAM OUT.npy

Only the container and the entropy decoder come from gnvc_jax; the networks are the programs that
`gnvc export-programs` wrote. Frames go to a NumPy file, uint8 (frames, height, width, 3).
"""

import json
import sys
from pathlib import Path

import numpy as np
from jax import export
from safetensors.numpy import load_file

from gnvc_jax.bitstream import EntropyCoder, StreamReader, Tables, decode_group
from gnvc_jax.motion import expand
from gnvc_jax.motion.coding import MotionDecoder


def decode(folder: Path, stream: str) -> np.ndarray:
    manifest = json.loads((folder / "manifest.json").read_text())
    arrays, tables = load_file(folder / "weights.safetensors"), np.load(folder / "tables.npz")
    coder = EntropyCoder(Tables(**tables, k_skip=manifest["k_skip"]))
    loaded = {}

    def call(name: str, **inputs) -> dict:
        """Calls a program of the decoder, loading it first if needed."""
        facts = manifest["programs"][f"decoder/{name}"]
        if name not in loaded:
            part = facts["weights"] + "/"
            weights = {k.removeprefix(part): x for k, x in arrays.items() if k.startswith(part)}
            program = export.deserialize((folder / facts["file"]).read_bytes())
            loaded[name] = lambda inputs: program.call(weights, inputs)
        return loaded[name]({k: inputs[k] for k in facts["inputs"]})

    shapes = manifest["programs"]["decoder/scale_index_inter"]["inputs"]
    z_shape, y_shape = (tuple(shapes[k]["shape"]) for k in ("z", "previous_y"))

    def scale_index(kind, q_index, z, previous_y, previous_index) -> np.ndarray:
        none = np.zeros(y_shape, np.int32)
        before = [none if x is None else x.astype(np.int32) for x in (previous_y, previous_index)]
        inputs = dict(zip(("previous_y", "previous_index"), before))
        q = np.int32(q_index)
        name = f"scale_index_{'inter' if kind else 'intra'}"
        return np.asarray(call(name, q_index=q, z=z.astype(np.int32), **inputs)["index"])

    video = []
    with StreamReader(stream) as reader:
        for group in reader.groups():
            motion = MotionDecoder(group.motion, coder) if manifest["motion"] else None
            state, left = {}, group.n_frames
            for i, s in enumerate(decode_group(group, coder, scale_index, z_shape, y_shape)):
                kind = "inter" if i else "intra"
                if i and motion:
                    field = motion.next((y_shape[0] // 2, y_shape[1] // 2))
                    state |= call("predict", reference=state["frames"][:, -1],
                                  vectors=expand(field)[None])  # fmt: skip
                symbols = {"y": s.y.astype(np.int32), "z": s.z.astype(np.int32)}
                q_index = np.full(1, s.q_index, np.int32)
                state |= call(f"reconstruct_{kind}", **symbols, q_index=q_index, **state)
                state["previous_latent"] = state["latent"]
                state |= call(f"frames_{kind}", **state)
                shown = np.asarray(state["frames"])[0, :left]
                video += list(shown[:, : manifest["height"], : manifest["width"]])
                left -= len(shown)
    return np.stack(video)


if __name__ == "__main__":
    np.save(sys.argv[3], decode(Path(sys.argv[1]), sys.argv[2]))
