"""Random clips from videos, as a Grain pipeline.

`clip_dataset` is what training calls. An element is a pure function of the seed and its number:
worker processes, resuming and the number of hosts change who computes it and nothing else.
`RandomRead` handles data that cannot be read; `endless_batches` is the pipeline, which
`gnvc_jax.data.latents` shares. Nothing here uses JAX, so decoding processes stay small.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from gnvc_jax.data.index import ClipIndex, Video
from gnvc_jax.data.left_out import LeftOut, TooMuchLeftOut
from gnvc_jax.errors import UsageError

__all__ = ["ClipIndex", "RandomClip", "clip_dataset"]

log = logging.getLogger(__name__)

Sample = dict[str, np.ndarray | np.int32]  # see `with_motion`

MARGIN = 16  # pixels around a crop that its motion search sees
RATE_JITTER = 0.3  # standard deviation of the logarithm of the search's rate, for variety
PARENT_CHECK_S = 1.0  # between looks of a worker at whether the training is still there
MAX_TRIES = 1000  # then reading has failed, whatever share of failures is accepted


@functools.cache  # once in each process
def end_with_parent() -> None:
    """Makes a worker process end soon after the process that started it, even if that was killed.

    Does nothing in other processes. Grain ends its workers itself, but not after a SIGKILL.
    """
    parent = multiprocessing.parent_process()
    if parent is None or not multiprocessing.current_process().daemon:
        return

    def watch() -> None:
        # A process whose parent is gone gets another one.
        while os.getppid() == parent.pid:
            time.sleep(PARENT_CHECK_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


class RandomRead(grain.transforms.RandomMap):
    """Draws from data numbered 0 to `count` - 1, parts of which may not be readable.

    If reading fails, another number is drawn from the same generator. So an element stays a pure
    function of its number, the seed and the files: the replacement is the same after a restart and
    with any number of processes.

    Attributes:
        count: Size of the data.
        left_out: Account of data that could not be read.
    """

    count: int
    left_out: LeftOut

    def name(self, element: int) -> str:
        """Name of the file that counts as left out if this element cannot be read."""
        raise NotImplementedError

    def read(self, element: int, rng: np.random.Generator) -> np.ndarray:
        """Reads an element; may raise anything."""
        raise NotImplementedError

    def random_map(self, element: int, rng: np.random.Generator) -> np.ndarray:
        """Reads an element, or another one in its place.

        Raises:
            TooMuchLeftOut: If too much cannot be read.
        """
        end_with_parent()
        for _ in range(MAX_TRIES):
            try:
                return self.read(element, rng)
            except Exception as error:
                self.left_out.add(self.name(element), error)
            element = int(rng.integers(self.count))
        raise TooMuchLeftOut(f"{MAX_TRIES} draws in a row could not be read")


@dataclasses.dataclass(frozen=True)
class RandomClip(RandomRead):
    """Draws a clip, uint8 (frames, h, w, 3), from the video that a frame number belongs to.

    Frames are numbered over all videos, so that long videos are drawn more often. The frames of a
    clip are consecutive; start, crop, downscaling and mirroring are random.

    Attributes:
        videos: Videos to draw from, in proportion to their numbers of frames.
        frames: Number of frames of a clip.
        size: Height and width of a crop.
        downscale_prob: Probability of a crop twice as large, reduced by 2x2 means.
        left_out: Account of data that could not be read.
        motion: Whether elements are the dictionaries of `with_motion`.
    """

    videos: tuple[Video, ...]
    frames: int
    size: tuple[int, int]
    downscale_prob: float
    left_out: LeftOut
    motion: bool = False
    _ends: np.ndarray = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "_ends", np.cumsum([video.frames for video in self.videos]))

    @property
    def count(self) -> int:
        """Number of frames of all videos."""
        return int(self._ends[-1])

    def video(self, element: int) -> Video:
        """Finds the video that a frame number belongs to."""
        return self.videos[int(np.searchsorted(self._ends, element, side="right"))]

    def name(self, element: int) -> str:
        """Path of the video."""
        return self.video(element).path

    def random_map(self, element: int, rng: np.random.Generator) -> np.ndarray | Sample:
        """Draws a clip; with motion, the dictionary of `with_motion`."""
        clip = super().random_map(element, rng)
        return with_motion(clip, MARGIN, rng) if self.motion else clip

    def read(self, element: int, rng: np.random.Generator) -> np.ndarray:
        """Reads a random clip of the video that frame `element` belongs to."""
        video, size = self.video(element), self.size
        if self.motion:
            # The search sees a little beyond the edge of the crop, as it does in whole frames.
            size = tuple(side + 2 * MARGIN for side in size)
        # Always the same draws in the same order: a clip is a function of element and generator
        # alone.
        halve, mirror = rng.random() < self.downscale_prob, rng.random() < 0.5
        full = (video.height, video.width)
        # Twice the crop, if the video is that large; a smaller video gives what it has and is
        # padded.
        scale = 2 if halve and all(2 * s <= f for s, f in zip(size, full)) else 1
        height, width = (min(scale * s, f) for s, f in zip(size, full))
        start = int(rng.integers(video.frames - self.frames + 1))
        top, left = (int(rng.integers(f - s + 1)) for f, s in zip(full, (height, width)))
        clip = video.read(start, self.frames, (top, left, height, width))
        # Uncropped sides are halved here, mirrored and padded below: (frames, *size, 3) in the end.
        if scale == 2:
            clip = _halve(clip)
        if mirror:
            clip = clip[:, :, ::-1]
        pad = [(0, side - part) for side, part in zip(size, clip.shape[1:3])]
        return np.ascontiguousarray(np.pad(clip, ((0, 0), *pad, (0, 0)), mode="edge"))


def with_motion(clip: np.ndarray, margin: int, rng: np.random.Generator) -> Sample:
    """Makes a training sample for codecs with motion.

    Args:
        clip: Clip, uint8 (1 + 4k, h + 2 * margin, w + 2 * margin, 3).
        margin: Number of pixels around the sample that only the search sees.
        rng: Generator that draws the quality level.

    Returns:
        A dictionary: "video" uint8 (1 + 4k, h, w, 3); "vectors" int16 (k, 4, h/16, w/16, 2) and
        "motion_bits" float32 (k,) of the fields that the encoder would find at the quality level
        "q_index", an int32.
    """
    # Imported here: OpenCV is needed for motion only.
    from gnvc_jax.motion import expand
    from gnvc_jax.motion.search import QUALITIES, estimate_bits, search, search_rate

    q_index = int(rng.integers(QUALITIES))
    # The rate varies around that of the level: the codec meets sparser and denser fields.
    rate = search_rate(q_index) * np.exp(rng.normal(0.0, RATE_JITTER))
    fields, previous = [], None
    # Frames t + 1 to t + 4 belong to one latent and are predicted from frame t.
    for t in range(0, len(clip) - 1, 4):
        previous = search(clip[t + 1 : t + 5], clip[t], rate, previous)
        fields.append(previous)
    _, height, width, _ = clip.shape
    inside = slice(margin, height - margin), slice(margin, width - margin)
    # `expand` gives a vector per 16x16 block, and the margin is one block: (k, 4, h/16, w/16, 2).
    blocks = tuple(slice(s.start // 16, s.stop // 16) for s in inside)
    # The bits are those of the clip with its margin; the sample gets its share of the area.
    share = (height - 2 * margin) * (width - 2 * margin) / (height * width)
    return {
        "video": np.ascontiguousarray(clip[:, *inside]),
        "vectors": np.stack([expand(field)[:, *blocks] for field in fields]),
        "motion_bits": np.asarray([share * estimate_bits(field) for field in fields], np.float32),
        "q_index": np.int32(q_index),
    }


def _halve(clip: np.ndarray) -> np.ndarray:
    """Averages 2x2 pixels, rounded half up: (t, 2h, 2w, 3) -> (t, h, w, 3)."""
    # Sums of four bytes need more than 8 bits; + 2 before dividing by 4 rounds half up.
    rows = clip[:, 0::2].astype(np.uint16) + clip[:, 1::2]
    return ((rows[:, :, 0::2] + rows[:, :, 1::2] + 2) // 4).astype(np.uint8)


def clip_dataset(
    index: ClipIndex,
    *,
    frames: int,
    size: tuple[int, int],
    batch: int,
    seed: int,
    shuffle: bool = True,
    num_workers: int = 0,
    worker_buffer: int = 2,
    downscale_prob: float = 0.5,
    motion: bool = False,
    weights: Sequence[float] = (),
    shard: tuple[int, int] = (0, 1),
) -> grain.experimental.ElasticIterator:
    """Makes endless batches of random clips, uint8 (batch, frames, h, w, 3).

    The iterator's state is the number of the next clip, {"global_next_index": n}: get_state and
    set_state resume with exactly the next batch, whatever the number of workers or of processes.

    Args:
        index: Videos to draw from, in proportion to their numbers of frames. If a clip cannot be
            read, another is drawn, and the video is added to `index.left_out`.
        frames: Number of frames of a clip; shorter videos are ignored.
        size: Height and width of a clip in pixels. A smaller video is padded below and to the right
            by its edge.
        batch: Number of clips in a batch of one process.
        seed: Seed of all random draws.
        shuffle: Whether to draw in random order.
        num_workers: Number of decoding processes; with 0, one thread of this process decodes.
        worker_buffer: Number of batches that each of them keeps ready.
        downscale_prob: Probability of a crop twice as large, if the video allows it, reduced by 2x2
            means.
        motion: Whether elements are the dictionaries of `with_motion`.
        weights: Share of the clips that each path of the index gives, in any unit; without them,
            all frames count alike.
        shard: Number of this process, and number of processes, which together read the global
            batch.

    Raises:
        UsageError: If no video, or none of a path with a weight, has enough frames. The iterator
            raises TooMuchLeftOut.
    """
    videos = tuple(video for video in index if video.frames >= frames)
    if not videos:
        raise UsageError(f"none of the {len(index)} training videos has {frames} frames")
    if len(videos) < len(index):
        log.warning(
            "left out: %d of %d videos with fewer than %d frames",
            len(index) - len(videos),
            len(index),
            frames,
        )
    draw = RandomClip(videos, frames, size, downscale_prob, index.left_out, motion)
    parts = [(draw.count, 1.0)]
    if weights:
        # Elements are numbered through all videos in the order of the paths, so each path's are a
        # range of numbers. A video has as many elements as frames; see `RandomClip`.
        ends = np.cumsum([0, *index.counts])
        counts = [
            sum(video.frames for video in index.videos[first:last] if video.frames >= frames)
            for first, last in itertools.pairwise(ends)
        ]
        if 0 in counts:
            raise UsageError(
                f"data.mixture: no video of path {1 + counts.index(0)} has {frames} frames"
            )
        parts = list(zip(counts, weights, strict=True))
    return endless_batches(
        parts,
        draw,
        batch=batch,
        seed=seed,
        shuffle=shuffle,
        num_workers=num_workers,
        worker_buffer=worker_buffer,
        shard=shard,
    )


class RowsOfProcesses(grain.MapDataset):
    """Reorders elements so that a global batch is the same for any number of processes.

    Grain gives process p of n the elements p, p + n, p + 2n, ... In this order these are the rows
    p * rows to (p + 1) * rows of each batch.
    """

    def __init__(self, parent: grain.MapDataset, rows: int, processes: int) -> None:
        super().__init__(parent)
        self.rows, self.processes = rows, processes

    def __len__(self) -> int:
        return len(self.parents[0])

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        # index = (batch * rows + row) * processes + process, by Grain's order.
        batch, place = divmod(index, self.rows * self.processes)
        row, process = divmod(place, self.processes)
        return self.parents[0][(batch * self.processes + process) * self.rows + row]


def endless_batches(
    parts: int | Sequence[tuple[int, float]],
    draw: grain.transforms.RandomMap,
    *,
    batch: int,
    seed: int,
    shuffle: bool = True,
    num_workers: int = 0,
    worker_buffer: int = 2,
    shard: tuple[int, int] = (0, 1),
) -> grain.experimental.ElasticIterator:
    """Makes endless batches of elements that `draw` makes from numbers from 0 on.

    Args:
        parts: Number of elements in an epoch; or for each part of a mixture, whose elements are
            numbered one after another, their number and the weight with which it is drawn.
        draw: Transformation that makes an element from its number and a random generator.
        batch, seed, shuffle, num_workers, worker_buffer, shard: See `clip_dataset`, which also says
            what the state of the iterator is.
    """
    # Numbers first, shuffled anew in each epoch, then the elements: reading happens last, in
    # workers.
    # Each part of a mixture has its own epochs: a small one with a large weight is seen more often.
    orders, first = [], 0
    for count, _ in [(parts, 1.0)] if isinstance(parts, int) else parts:
        one = grain.MapDataset.range(first, first + count).seed(seed)
        orders.append((one.shuffle() if shuffle else one).repeat())
        first += count
    # `mix` interleaves in fixed proportions, so the part of an element depends on its number alone.
    order = orders[0]
    if not isinstance(parts, int) and len(orders) > 1:
        order = grain.MapDataset.mix(orders, weights=[weight for _, weight in parts]).seed(seed)
    if num_workers and not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags; we have no others
    number, processes = shard
    workers = grain.multiprocessing.MultiprocessingOptions(
        num_workers=num_workers, per_worker_buffer_size=worker_buffer
    )
    # Batches are those of all processes; each iterator yields its own rows of them.
    return grain.experimental.ElasticIterator(
        RowsOfProcesses(order.random_map(draw), batch, processes),
        batch * processes,
        grain.sharding.ShardOptions(number, processes),
        read_options=grain.ReadOptions(num_threads=1, prefetch_buffer_size=worker_buffer),
        multiprocessing_options=workers if num_workers else None,
    )
