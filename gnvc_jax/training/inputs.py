"""Training data of the stages: batches of clips or of their latents, and their shapes.

`clips`, `clips_or_latents` and `coded_clips` make the `Data` of a stage; a run takes its batches
from `Clips`, in order and with clips that grow.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import grain
import jax
import numpy as np

from gnvc_jax.arrays import Tree
from gnvc_jax.data.clips import clip_dataset
from gnvc_jax.data.index import ClipIndex
from gnvc_jax.data.latents import CODED, latent_dataset, read_info
from gnvc_jax.data.left_out import LeftOut
from gnvc_jax.errors import UsageError
from gnvc_jax.training.bucket_runs import log_folder
from gnvc_jax.training.config import ClipShape, DataConfig, Experiment


class Data(NamedTuple):
    """Training data.

    Attributes:
        batches: Function (shape of clips) -> endless data set of this process's part of each
            batch, in a fixed order, whose iterator can save and restore its place.
        shapes: Function (shape of clips) -> a batch of all processes as shapes. Nothing is read.
    """

    batches: Callable[[ClipShape], grain.IterDataset]
    shapes: Callable[[ClipShape], Tree]


class Clips:
    """The batches of a run, in order; a new iterator wherever clips change their shape.

    The new iterator goes on with the number of the next clip: draws are numbered through the whole
    run. One that began again at 0 would draw the same clips in every phase.

    Attributes:
        shape: Shape of the clips of the batch that was taken last.
    """

    def __init__(self, data: Data, config: DataConfig, step: int, position: dict | None):
        """Starts after some steps.

        Args:
            data: Training data.
            config: Settings of the data.
            step: Number of steps done.
            position: Position that `get_state` gave there, None for a new run.

        Raises:
            UsageError, TooMuchLeftOut: If the data do not hold clips of all shapes.
        """
        self.data, self.config = data, config
        # Data that lack a later shape are refused now, and not after days.
        for shape in config.shapes:
            data.batches(shape)
        self.start(config.shape_at(step), position and position["batches"])

    def start(self, shape: ClipShape, batches: dict | None) -> None:
        """Starts an iterator where the one before stood, as its state `batches` says."""
        self.shape, self.batches = shape, iter(self.data.batches(shape))
        if batches is not None:
            self.batches.set_state(batches)

    def take(self, step: int) -> Tree:
        """Takes the batch of the step that follows `step` others."""
        shape = self.config.shape_at(step)
        if shape != self.shape:
            self.start(shape, self.batches.get_state())
        return next(self.batches)

    def get_state(self) -> dict:
        """Position to start from later; JSON-ready."""
        return {"batches": self.batches.get_state()}


def left_out(experiment: Experiment) -> LeftOut:
    """List of the data that this process could not read, kept in the run folder."""
    # One file for each process, which its decoding workers share.
    file = log_folder(experiment.run.out) / f"left_out-{jax.process_index()}.jsonl"
    return LeftOut(experiment.data.max_left_out, file)


def clips(experiment: Experiment, motion: bool = False) -> Data:
    """Data of random clips of videos.

    Batches are uint8 (b, t, h, w, 3) or, with `motion`, dictionaries as
    `gnvc_jax.data.clips.with_motion` makes them. The videos are looked at once, on first use.
    """
    data = experiment.data

    @functools.cache  # one index, and one list of what is left out, for all shapes of clips
    def index() -> ClipIndex:
        # A mixture names its paths with weights; without one there is a single path.
        paths = [path for path, _ in data.mixture] or data.path
        return ClipIndex(paths, data.decode_cache, left_out(experiment))

    def batches(clip: ClipShape) -> grain.IterDataset:
        return clip_dataset(
            index(),
            frames=clip.frames,
            size=clip.size,
            # This process's rows; the loop makes global arrays of those of all processes.
            batch=data.batch // jax.process_count(),
            seed=data.seed,
            num_workers=data.workers,
            downscale_prob=data.downscale_prob,
            motion=motion,
            weights=[weight for _, weight in data.mixture],
            shard=(jax.process_index(), jax.process_count()),
        )

    def shapes(clip: ClipShape) -> Tree:
        shape = jax.ShapeDtypeStruct
        video = shape((data.batch, *clip, 3), np.uint8)
        if not motion:
            return video
        # Vectors are those of 4 frames per latent, in blocks of 16 pixels.
        latents, blocks = (clip.frames - 1) // 4, tuple(side // 16 for side in clip.size)
        return {
            "video": video,
            "vectors": shape((data.batch, latents, 4, *blocks, 2), np.int16),
            "motion_bits": shape((data.batch, latents), np.float32),
            "q_index": shape((data.batch,), np.int32),
        }

    return Data(batches, shapes)


def clips_or_latents(experiment: Experiment, vae_fingerprint: Callable[[], str]) -> Data:
    """Data of clips, or of cached latents of such clips where `data.latents` names a cache.

    Latents are float32 (b, t, h, w, c), normalised.

    Args:
        experiment: Experiment.
        vae_fingerprint: Function that gives the fingerprint of the experiment's VAE. A cache made
            by another VAE raises UsageError when it is opened.
    """
    data, vae = experiment.data, experiment.vae
    folder = data.latents
    if folder is None:
        return clips(experiment)

    def check() -> None:
        info = read_info(folder)
        if info.codec is not None:
            raise UsageError(f"{folder}: expected latents of gnvc cache-latents, found coded clips")
        if info.vae != vae_fingerprint():
            raise UsageError(
                f"{folder}: these latents were made by another VAE than that of the experiment"
            )

    def shapes(clip: ClipShape) -> Tree:
        shape = data.batch, *experiment.latents(clip), vae.latent_channels
        return jax.ShapeDtypeStruct(shape, np.float32)

    return Data(_cached(experiment, folder, check), shapes)


def coded_clips(experiment: Experiment, codec_fingerprint: Callable[[], str]) -> Data:
    """Data of clips that the experiment's codec coded, see `gnvc_jax.cache_coded`.

    Batches are dictionaries with the names of `gnvc_jax.data.latents.CODED`.

    Args:
        experiment: Experiment with a codec and a refiner.
        codec_fingerprint: Function that gives the fingerprint of the experiment's codec. A cache
            made by another one raises UsageError when it is opened.
    """
    data, codec = experiment.data, experiment.codec
    assert data.latents is not None and codec is not None
    folder = data.latents

    def check() -> None:
        if read_info(folder).codec != codec_fingerprint():
            raise UsageError(
                f"{folder}: expected clips that the codec of the experiment coded, found others; "
                "make them with gnvc cache-coded"
            )

    def shapes(clip: ClipShape) -> Tree:
        latents = data.batch, *experiment.latents(clip)
        channels = experiment.vae.latent_channels
        shape = {name: (*latents, channels) for name in ("latents", "decoded")}
        shape |= {name: (data.batch, *clip, 3) for name in ("video", "frames")}
        shape |= {"features": (*latents, codec.width), "levels": latents[:2]}
        types = {name: np.float32 if t == np.float16 else t for name, t in CODED.items()}
        return {name: jax.ShapeDtypeStruct(shape[name], t) for name, t in types.items()}

    return Data(_cached(experiment, folder, check), shapes)


def _cached(
    experiment: Experiment, folder: str, check: Callable[[], None]
) -> Callable[[ClipShape], grain.IterDataset]:
    """Makes `Data.batches` of a cache.

    Args:
        experiment: Experiment.
        folder: Folder of the cache.
        check: Function that raises if the cache does not fit. It is called when the cache is opened
            and not before, since it needs weights, which planning does without.
    """
    data, unread = experiment.data, functools.cache(lambda: left_out(experiment))

    def batches(clip: ClipShape) -> grain.IterDataset:
        check()
        return latent_dataset(
            folder,
            frames=clip.frames,
            size=clip.size,
            left_out=unread(),
            batch=data.batch // jax.process_count(),
            seed=data.seed,
            num_workers=data.workers,
            shard=(jax.process_index(), jax.process_count()),
        )

    return batches
