"""Training clips per second, without training: from video files, decoded frames, cached latents.

    python benchmarks/input_pipeline.py [--videos 8] [--batches 8] [--repeats 3] [--out FILE]

Clips of 13 frames 256x256 in batches of eight, as configs/wan_1_3b/latent.py takes them, from
videos of 65 frames 480x272 that are made here (a pan over noise, H.264). Each source is read in
this process (0 workers) and by worker processes; medians after a first batch. `over video`: how
many times faster than reading video files in this process.
"""

import statistics
import tempfile
import time
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np
from coding import scene
from helpers import options

from gnvc_jax.data.clips import ClipIndex, clip_dataset
from gnvc_jax.data.latents import CacheInfo, latent_dataset, write_latents
from gnvc_jax.evaluation.environment import environment
from gnvc_jax.files import write_json
from gnvc_jax.media.writer import open_writer

FRAMES, SIZE, BATCH = 13, (256, 256), 8
CHANNELS = 16
WORKERS = (0, 1, 2)


def make_videos(folder: Path, count: int) -> None:
    folder.mkdir()
    frames = list(scene(480, 272, 65))
    for i in range(count):
        with open_writer(folder / f"{i}.mp4", 480, 272, Fraction(25)) as writer:
            for frame in frames:
                writer.write(frame)


def random_latents(clip: np.ndarray) -> np.ndarray:
    t, h, w, _ = clip.shape
    shape = 1 + (t - 1) // 4, h // 8, w // 8, CHANNELS
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def clips_per_second(dataset: Iterable, batches: int, repeats: int) -> float:
    iterator, rates = iter(dataset), []
    next(iterator)  # starts workers
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(batches):
            next(iterator)
        rates.append(batches * BATCH / (time.perf_counter() - start))
    return statistics.median(rates)


def main() -> None:
    args = options.parse(__doc__, "input_pipeline", videos=8, batches=8, repeats=3)
    clips = {"frames": FRAMES, "size": SIZE, "batch": BATCH, "seed": 0}
    rows = []
    print("source           workers   clips/s  over video")
    with tempfile.TemporaryDirectory(prefix="gnvc-input-") as name:
        videos, decoded, latents = (Path(name) / part for part in ("videos", "decoded", "latents"))
        make_videos(videos, args.videos)
        info = CacheInfo(FRAMES, "none", (0.0,) * CHANNELS, (1.0,) * CHANNELS)
        write_latents(videos, latents, info, random_latents, progress=False)
        sources = {
            "video files": lambda n: clip_dataset(ClipIndex(videos), num_workers=n, **clips),
            "decoded frames": lambda n: clip_dataset(
                ClipIndex(videos, decoded), num_workers=n, **clips
            ),
            "cached latents": lambda n: latent_dataset(latents, num_workers=n, **clips),
        }
        for source, dataset in sources.items():
            for workers in WORKERS:
                rate = clips_per_second(dataset(workers), args.batches, args.repeats)
                over = rate / (rows[0]["clips_per_s"] if rows else rate)
                row = {"source": source, "workers": workers, "clips_per_s": rate, "ratio": over}
                rows.append(row)
                print(f"{source:16}{workers:8}{rate:10.1f}{over:12.2f}", flush=True)
    facts = {"videos": args.videos, "batches": args.batches, "repeats": args.repeats}
    write_json(args.out, {"facts": facts | environment(), "rows": rows})


if __name__ == "__main__":
    main()
