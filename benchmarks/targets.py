"""How closely `gnvc encode` meets targets: 24 pairs of clip and target, and rates in one pass.

    python benchmarks/targets.py [--data data/train] [--frames 113] [--out FILE]

The middle 256x256 pixels of six clips that the shipped model was not trained on. For each target:
the value that came out, its deviation in % (in dB for PSNR), and level and number of passes. Rates
are also met in one pass, with and without knowledge of the number of frames. The default length, a
group of 97 frames and one of 16, is the hardest one for that.
"""

import io
import json
import math
from pathlib import Path

from helpers import clips, options

from gnvc_jax.errors import UsageError
from gnvc_jax.evaluation.environment import environment
from gnvc_jax.leaky_bucket import LeakyBucket
from gnvc_jax.pretrained import load_pretrained
from gnvc_jax.rate_control import Target, encode_to_target, measure

CLIPS = ("juggle", "polevault", "cat_play", "hiker", "magician", "skyscraper_pan")
TARGETS = (
    Target("bitrate", 30e3),
    Target("bpp", 0.01),
    Target("size", 20_000),
    Target("psnr", 24),
)


def deviation(target: Target, value: float) -> float:
    """How far a value is from the target: in dB for PSNR, otherwise in %."""
    surplus = target.surplus(value)
    return surplus if target.kind == "psnr" else 100 * math.expm1(surplus)


def main() -> None:
    args = options.parse(__doc__, "targets", data="data/train", frames=113)
    coder, rows = load_pretrained("small"), []

    def add(clip: str, target: Target, way: str, value: float, **more: float) -> None:
        row = {"clip": clip, "target": str(target), "way": way, "value": value}
        rows.append(row | {"deviation": deviation(target, value), **more})
        print(*(f"{v:.4g}" if isinstance(v, float) else v for v in rows[-1].values()), flush=True)

    for clip in CLIPS:
        frames, fps = clips.load(Path(args.data, f"{clip}.mp4"), args.frames)
        header = coder.header(clips.SIDE, clips.SIDE, fps)
        for target in TARGETS:
            passes: list[str] = []

            def begin(text: str, passes: list[str] = passes):
                passes.append(text)
                return lambda n: None

            try:
                trial = encode_to_target(coder, lambda f=frames: f, header, target, begin)
            except UsageError as error:
                print(clip, error)
                rows.append({"clip": clip, "target": str(target), "way": str(error)})
                continue
            count = sum(text.startswith("encoding") for text in passes)
            add(clip, target, "search", trial.value, qp=trial.qp, passes=count)
            trial.file.close()
            if target.kind not in ("bitrate", "bpp"):
                continue
            for way, known in (("one pass", len(frames)), ("one pass, unknown length", None)):
                out, bits = io.BytesIO(), target.bitrate(header)
                bucket = LeakyBucket(coder.model.codec_config, header, bits, known)
                coder.encode_frames(frames, out, header, bucket)
                given = header, target.kind, out, len(frames), begin, 0
                add(clip, target, way, measure(coder, lambda f=frames: f, *given))
        facts = {"frames": args.frames, "side": clips.SIDE, **environment()}
        args.out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
