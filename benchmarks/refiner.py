"""What refinement costs: seconds per step and per frame by number of tokens, for 0, 1 and 5 steps.

    python benchmarks/refiner.py [--model small] [--sizes 256x256,832x480] [--repeats 3] [--out F]

Decodes a group of 25 frames (7 latents) in memory, with each number of steps, after one decoding
that compiles; medians. The group without refinement is the peer: `ratio` is how many times longer
decoding takes. Tokens: of one window of latents, all of which attend to each other. A model without
a refiner gets one of REFINER's sizes with random weights.
"""

import dataclasses
import io
import statistics
import time

import jax
import numpy as np
from codec_speed import scene
from helpers import options

from gnvc_jax.bitstream import StreamReader
from gnvc_jax.coder import Coder
from gnvc_jax.evaluation.environment import environment
from gnvc_jax.files import write_json
from gnvc_jax.pretrained import load_pretrained
from gnvc_jax.refiner import DiTConfig, Refiner, RefinerConfig

DIT = DiTConfig(192, 576, 3, 4, 64, text_length=0, context_every=2, context_channels=16)
REFINER = RefinerConfig(DIT, window=5, deviation=0.3)
FRAMES = 25
STEPS = (0, 1, 5)


def with_refiner(codec: Coder) -> Coder:
    """The same with a refiner of random weights."""
    width, channels = codec.model.codec_config.width, DIT.channels
    config = dataclasses.replace(REFINER, features=width)
    latents, one = np.zeros((1, 1, 2, 2, channels)), np.zeros(1)
    inputs = latents, one, latents, np.zeros((1, 1, 2, 2, width)), one.astype(int)
    shapes = jax.eval_shape(Refiner(config).init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(0)
    weights = jax.tree.map(lambda x: rng.normal(0, 0.02, x.shape).astype(np.float32), shapes)
    return Coder(dataclasses.replace(codec.model, refiner_config=config, refiner=weights))


def measure(model: str, width: int, height: int, repeats: int) -> list[dict]:
    codec, stream = load_pretrained(model), io.BytesIO()
    if codec.model.refiner is None:
        codec = with_refiner(codec)
    header = codec.header(width, height, (25, 1), gop=FRAMES)
    codec.encode_frames(scene(width, height, FRAMES), stream, header, 32)
    reader = StreamReader(stream.getvalue())
    config, latents = codec.model.refiner_config, 1 + FRAMES // 4
    h, w = (8 * -(-side // 64) for side in (height, width))
    tokens = config.dit.tokens(min(latents, config.window), h, w)
    rows = []
    for steps in STEPS:
        seconds, refining = [], []
        for run in range(repeats + 1):
            codec.timing = type(codec.timing)()
            start = time.perf_counter()
            for _ in codec.decode_frames(reader, steps):
                pass
            if run:  # the first one compiles
                seconds.append(time.perf_counter() - start)
                refining.append(codec.timing.refiner)
        total, refiner = statistics.median(seconds), statistics.median(refining)
        row = {
            "size": f"{width}x{height}",
            "tokens": tokens,
            "steps": steps,
            "s_per_step": refiner / steps if steps else None,
            "refiner_s_per_frame": refiner / FRAMES,
            "decode_s_per_frame": total / FRAMES,
            "ratio": total / FRAMES / (rows[0]["decode_s_per_frame"] if rows else total / FRAMES),
        }
        rows.append(row)
        step = f"{row['s_per_step']:10.3f}" if steps else " " * 10
        print(
            f"{row['size']:9}{tokens:8}{steps:7}{step}{row['refiner_s_per_frame']:16.4f}"
            f"{row['decode_s_per_frame']:16.4f}{row['ratio']:8.2f}",
            flush=True,
        )
    return rows


def main() -> None:
    args = options.parse(__doc__, "refiner", model="small", sizes="256x256,832x480", repeats=3)
    print("size       tokens  steps    s/step  refiner s/frame  decode s/frame   ratio")
    rows = []
    for size in args.sizes.split(","):
        rows += measure(args.model, *map(int, size.split("x")), args.repeats)
    facts = {"model": args.model, "repeats": args.repeats, **environment()}
    write_json(args.out, {"facts": facts, "rows": rows})


if __name__ == "__main__":
    main()
