"""Speed and memory of the whole codec on this machine, beside x265 on the same frames.

    python benchmarks/coding.py [--model small] [--qp 32] [--out FILE]

Speed: median frames per second over one group after a first group that is not counted, each run in
a process of its own; compilation is what the first group took longer. Decoding is measured without
refinement and, for a model with a refiner, with it. Parts are shares of the time. x265 runs with
preset veryslow at the nearest rate, its process included, as in eval.py. Memory: the largest
resident size of a process that codes and decodes clips of 34 and 340 frames of the larger size;
source frames are made one by one, decoded ones are dropped.
"""

import argparse
import dataclasses
import io
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from gnvc_jax.files import write_json

GOP = 17
SIZES = ((256, 256), (832, 480))
MEMORY_FRAMES = (34, 340)


def scene(width: int, height: int, frames: int) -> Iterator[np.ndarray]:
    """A pan over smooth noise with some texture, uint8 (h, w, 3) frame by frame."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(height + 64, width + 64, 3))
    canvas = 900 * gaussian_filter(noise, (16, 16, 0)) + 60 * gaussian_filter(noise, (1, 1, 0))
    canvas = np.clip(128 + canvas, 0, 255).astype(np.uint8)
    for t in range(frames):
        x, y = t % 64, t // 2 % 64
        yield canvas[y : y + height, x : x + width]


def child(model: str, qp: int, width: int, height: int, groups: int) -> dict:
    """Codes `groups` groups of GOP frames both ways; seconds of each, parts of the last, memory.

    The ways are "encode", "decode" and, for a model with a refiner, "refine".
    """
    from gnvc_jax.bitstream import StreamReader
    from gnvc_jax.pretrained import load_pretrained

    codec, stream = load_pretrained(model), io.BytesIO()
    laps: list[tuple[float, dict]] = []

    def lap() -> None:
        laps.append((time.perf_counter(), dataclasses.asdict(codec.timing)))
        codec.timing = type(codec.timing)()

    def marked(frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """The frames; a lap at the first one of each group."""
        for t, frame in enumerate(frames):
            if t % GOP == 0:
                lap()
            yield frame

    def result() -> dict:
        """Between a lap at the start of each group and one at the end."""
        lap()
        seconds = np.diff([at for at, _ in laps]).tolist()
        parts = laps[-1][1]
        laps.clear()
        return {"seconds": seconds, "parts": parts}

    header = codec.header(width, height, (25, 1), gop=GOP)
    # The encoder asks for a frame when everything before it is done.
    codec.encode_frames(marked(scene(width, height, groups * GOP)), stream, header, qp)
    ways = {"encode": result()}
    for way, steps in (("decode", 0), ("refine", codec.steps)):
        if way == "refine" and not steps:
            continue
        # The decoder gives the last frame of a group when all of the group is done.
        lap()
        for t, _ in enumerate(codec.decode_frames(StreamReader(stream.getvalue()), steps), 1):
            if t % GOP == 0 and t < groups * GOP:
                lap()
        ways[way] = result()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"ways": ways, "bytes": stream.tell(), "peak_mib": peak}


def run_child(args: argparse.Namespace, size: tuple[int, int], groups: int) -> dict:
    command = [sys.executable, __file__, "--model", args.model, "--qp", str(args.qp)]
    command += ["--child", *map(str, (*size, groups))]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1])


def speed(args: argparse.Namespace, size: tuple[int, int]) -> list[dict]:
    from gnvc_jax.evaluation.anchors import match_rate

    runs = [run_child(args, size, 2) for _ in range(args.repeats)]
    bytes_of_group = runs[0]["bytes"] // 2
    frames = np.stack(list(scene(*size, GOP)))
    peer = match_rate("x265", frames, Fraction(25), bytes_of_group).result
    rows = []
    for way in runs[0]["ways"]:
        peer_seconds = peer.encode_seconds if way == "encode" else peer.decode_seconds
        seconds = float(np.median([run["ways"][way]["seconds"][-1] for run in runs]))
        first = float(np.median([run["ways"][way]["seconds"][0] for run in runs]))
        parts = runs[-1]["ways"][way]["parts"]
        total = sum(parts.values())
        rows.append(
            {
                "size": "x".join(map(str, size)),
                "way": way,
                "fps": GOP / seconds,
                "shares": {name: value / total for name, value in parts.items()},
                "first_group_extra_s": first - seconds,
                "x265_fps": GOP / peer_seconds,
                "ratio_to_x265": peer_seconds / seconds,
            }
        )
        row = rows[-1]
        shares = "  ".join(f"{name} {share:4.0%}" for name, share in row["shares"].items())
        print(
            f"{row['size']:9}{way:8}{row['fps']:8.2f}{row['first_group_extra_s']:9.1f}"
            f"{row['x265_fps']:9.2f}{row['ratio_to_x265']:8.2f}   {shares}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="small")
    parser.add_argument("--qp", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/coding.json")
    parser.add_argument("--child", type=int, nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.model, args.qp, *args.child)))
        return
    print("size     way      frames/s  first+s   x265/s   ratio   shares of the time")
    rows = [row for size in SIZES for row in speed(args, size)]
    memory = []
    for frames in MEMORY_FRAMES:
        peak = run_child(args, SIZES[-1], frames // GOP)["peak_mib"]
        memory.append({"frames": frames, "peak_mib": peak})
        size = "x".join(map(str, SIZES[-1]))
        print(f"peak memory, {frames} frames of {size}: {peak:.0f} MiB", flush=True)
    facts = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "model": args.model,
        "qp": args.qp,
        "repeats": args.repeats,
    }
    write_json(args.out, {"facts": facts, "rows": rows, "memory": memory})


if __name__ == "__main__":
    main()
