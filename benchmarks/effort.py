"""What `gnvc encode --effort 1` gains, and how long it takes.

    python benchmarks/effort.py [--data data/train] [--frames 97] [--qp 24,32,40,48] [--out FILE]

The middle 256x256 pixels of three clips that the shipped model was not trained on. BD-rates of
effort 1 against 0: PSNR without refinement, and LPIPS (AlexNet, every eighth frame) without and
with it. Seconds are those of the codec, the part of encoding that effort changes; of their ratio,
the median over levels is given, since the first includes compilation.
"""

import io
import json
from pathlib import Path

import numpy as np
from helpers import clips, options

from gnvc_jax.analysis import Analysis
from gnvc_jax.bitstream import StreamReader
from gnvc_jax.decoder import Timing
from gnvc_jax.evaluation.bd_rate import bd_rate
from gnvc_jax.evaluation.environment import environment
from gnvc_jax.pretrained import Codec, load_pretrained
from gnvc_jax.rate_control import frame_metric

CLIPS = ("juggle", "cat_play", "polevault")
MEASURES = ("psnr", "lpips", "refined_lpips")


def point(codec: Codec, frames: np.ndarray, qp: int, effort: int, analysis: Analysis) -> dict:
    """Codes a clip and measures it."""
    out, header = io.BytesIO(), codec.header(clips.SIDE, clips.SIDE, (25, 1))
    codec.timing = Timing()
    codec.encode_frames(frames, out, header, qp, analysis=analysis, effort=effort)
    result = {"qp": qp, "effort": effort, "bytes": out.tell(), "seconds": codec.timing.codec}
    reader = StreamReader(out.getvalue())
    pairs = [p for g in reader.groups() for p in codec.decode_group_both(reader.header, g, 1)]
    decoded, refined = (np.stack(side) for side in zip(*pairs))
    result["psnr"] = float(np.mean(frame_metric("psnr")(frames, decoded)))
    for name, shown in (("lpips", decoded), ("refined_lpips", refined)):
        result[name] = float(np.mean(frame_metric("lpips")(frames[::8], shown[::8])))
    return result


def main() -> None:
    args = options.parse(__doc__, "effort", data="data/train", frames=97, qp="24,32,40,48")
    codec, rows = load_pretrained("small"), {}
    for clip in CLIPS:
        frames, _ = clips.load(Path(args.data, f"{clip}.mp4"), args.frames)
        points: list[dict] = []
        for qp in map(int, args.qp.split(",")):
            analysis = Analysis()  # both have the same motion
            for effort in (0, 1):
                points.append(point(codec, frames, qp, effort, analysis))
                print(clip, points[-1], flush=True)
        row: dict = {"points": points}
        for measure in MEASURES:
            sign = 1 if measure == "psnr" else -1  # a lower LPIPS is better
            curves = (
                [(p["bytes"], sign * p[measure]) for p in points if p["effort"] == effort]
                for effort in (0, 1)
            )
            row[measure], note = bd_rate(*curves)
            print(clip, measure, row[measure], note, flush=True)
        ratios = [b["seconds"] / a["seconds"] for a, b in zip(points[::2], points[1::2])]
        rows[clip] = row | {"time_ratio": float(np.median(ratios))}
        facts = {"frames": args.frames, **environment()}
        args.out.write_text(json.dumps({**facts, "clips": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
