"""Training data: random clips of videos, and latents computed once.

- `index` finds and probes videos, and can keep their decoded frames; `video` reads one of them.
- `shards` packs videos into few large files, and finds them there.
- `clips` draws random clips as a Grain pipeline.
- `latents` does the same for a cache of latents, which it also writes.
- `jobs` runs one piece of work for each of many videos.
- `left_out` keeps account of what cannot be read.

Nothing here imports JAX, so decoding processes stay small.
"""
