"""Commands on many videos: encode them, cache their latents, pack them into shards.

Processes that are started together (on the hosts of a TPU slice, by Slurm, Open MPI or Kubernetes,
see `gnvc_jax.runtime.join_processes`) divide the videos among themselves. A video that cannot be
read is left out and reported, since one bad file should not stop a run of hours.
"""

import sys

from gnvc_jax.commands.options import EXIT_PARTIAL, check_range


def encode_all(
    *,
    data: str,
    to: str,
    qp: int = 24,
    gop: int = 97,
    model: str = "small",
    no_progress: bool = False,
) -> int:
    """Encode many videos, and list them in manifest.csv.

    Example: gnvc encode-all --data clips --to streams --qp 24

    All videos get the same quality level and no audio. For a target, or with audio, use
    gnvc encode.
    Videos that cannot be read are left out, with exit code 3. Processes that are started together
    share the work.

    Args:
        data: Folder of videos, list of videos (.txt), or a single video.
        to: Output folder; rerun the same command to resume.
        qp: Quality level from 0 to 63; lower is better and larger.
        gop: Frames per group, 1 + 4k.
        model: Name of a shipped model, or path of a model file.
        no_progress: Hide the progress bar.
    """
    from gnvc_jax import encode_dataset
    from gnvc_jax.pretrained import load_pretrained
    from gnvc_jax.runtime import join_processes

    join_processes()
    coder = load_pretrained(model)
    failed = encode_dataset.encode_all(data, to, coder, qp, gop, not no_progress)
    return report_left_out(failed)


def cache_latents(
    *, data: str, to: str, vae: str, frames: int = 13, no_progress: bool = False
) -> int:
    """Encode many videos to latents by a frozen VAE, to train on them later.

    Example: gnvc cache-latents --data clips --vae weights/vace --to cache

    Videos that cannot be read are left out, with exit code 3. Processes that are started together
    share the work.

    Args:
        data: Folder of videos, list of videos (.txt), or a single video.
        to: Output folder; rerun the same command to resume.
        vae: Folder made by `gnvc port`, run folder of the stage `vae`, name of a shipped model, or
            path of a model file.
        frames: Frames per clip, 1 + 4k.
        no_progress: Hide the progress bar.
    """
    from gnvc_jax.cache_latents import cache_latents as run
    from gnvc_jax.runtime import join_processes

    check_range("--frames", frames, 1)
    join_processes()
    return report_left_out(run(data, to, vae, frames, not no_progress))


def cache_coded(
    *,
    data: str,
    to: str,
    model: str = "small",
    frames: int = 97,
    size: int = 256,
    parts: int = 1,
    no_progress: bool = False,
) -> int:
    """Code many videos by a model, to train its refiner on what it decodes.

    Example: gnvc cache-coded --data clips --to coded --model runs/small/joint.safetensors

    Videos are divided into clips. Of each, random parts are coded, at random quality levels, and
    kept with the source: about half a megabyte per frame of 256x256. Training takes the folder as
    --data.latents. Videos that cannot be read are left out, with exit code 3. Processes that are
    started together share the work.

    Args:
        data: Folder of videos, list of videos (.txt), or a single video.
        to: Output folder; rerun the same command to resume.
        model: Name of a shipped model with block motion, or path of a model file.
        frames: Frames per clip, 1 + 4k.
        size: Largest height and width of a part, a multiple of 64.
        parts: Parts of each clip.
        no_progress: Hide the progress bar.
    """
    from gnvc_jax.cache_coded import cache_coded as run
    from gnvc_jax.runtime import join_processes

    check_range("--frames", frames, 1)
    check_range("--parts", parts, 1)
    join_processes()
    return report_left_out(run(data, to, model, frames, size, parts, not no_progress))


def make_shards(
    *, data: str, to: str, licence: str, shard_mib: int = 256, no_progress: bool = False
) -> int:
    """Pack many videos into shards, tar files in WebDataset's layout, to train on.

    Example: gnvc make-shards --data clips --to gs://bucket/shards --licence CC-BY-4.0

    Training takes the folder as --data.path. manifest.csv lists the videos with their licence, and
    shards.csv the shards. Videos that cannot be read are left out, with exit code 3. Processes that
    are started together share the work.

    Args:
        data: Folder of videos, list of videos (.txt), or a single video.
        to: Output folder; rerun the same command to resume.
        licence: Licence of the videos.
        shard_mib: Size of a shard in MiB.
        no_progress: Hide the progress bar.
    """
    import jax

    from gnvc_jax.buckets import as_path
    from gnvc_jax.data import shards
    from gnvc_jax.data.index import find_videos
    from gnvc_jax.runtime import join_processes

    check_range("--shard-mib", shard_mib, 1)
    join_processes()
    videos = sorted(set(find_videos(as_path(data))))
    processes = jax.process_index(), jax.process_count()
    size = shard_mib * shards.MIB
    return report_left_out(
        shards.make_shards(videos, to, licence, size, processes, not no_progress)
    )


def report_left_out(failed: dict[str, str]) -> int:
    """Prints the reason for each video that was left out, and returns the exit code."""
    for reason in failed.values():
        print(f"gnvc: left out: {reason}", file=sys.stderr)
    return EXIT_PARTIAL if failed else 0
