"""What refinement costs: seconds per step and per frame by number of tokens, for 0, 1 and 5 steps.

    python benchmarks/refiner.py [--model tiny] [--sizes 256x256,832x480] [--repeats 3] [--out FILE]

Decodes a group of 25 frames (7 latents) in memory, with each number of steps, after one decoding
that compiles; medians. The group without refinement is the peer: `ratio` is how many times longer
decoding takes. Tokens: of one window of latents, all of which attend to each other.
"""

import argparse
import io
import statistics
import time
from pathlib import Path

from codec_speed import scene

from gnvc_jax.bitstream import StreamReader
from gnvc_jax.evaluation.environment import environment
from gnvc_jax.evaluation.records import write_json
from gnvc_jax.pretrained import load_pretrained

FRAMES = 25
STEPS = (0, 1, 5)


def measure(model: str, width: int, height: int, repeats: int) -> list[dict]:
    codec, stream = load_pretrained(model), io.BytesIO()
    if codec.model.refiner is None:
        raise SystemExit(f"benchmarks/refiner.py: {model} has no refiner")
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--sizes", default="256x256,832x480")
    parser.add_argument("--repeats", type=int, default=3)
    out = Path(__file__).parent / "results/refiner.json"
    parser.add_argument("--out", type=Path, default=out)
    args = parser.parse_args()
    print("size       tokens  steps    s/step  refiner s/frame  decode s/frame   ratio")
    rows = []
    for size in args.sizes.split(","):
        rows += measure(args.model, *map(int, size.split("x")), args.repeats)
    facts = {"model": args.model, "repeats": args.repeats, **environment()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, {"facts": facts, "rows": rows})


if __name__ == "__main__":
    main()
