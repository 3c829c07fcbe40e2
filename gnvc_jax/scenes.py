"""Where groups begin: after so many frames, and at scene cuts.

A cut is found by integer arithmetic on small pictures of the frames, so that it does not depend on
the machine. It is a change between two frames that is large, larger than the changes around it
(camera and objects move smoothly, even if fast), and lasting (after a flash the old picture
returns). A decision needs a few frames behind the cut, which are held back: memory does not depend
on the length of the video.
"""

import collections
import itertools
import operator
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Int, UInt8

GRID = 16  # rows and columns of the small pictures
# Chosen on clips without cuts and on splices of these: smaller cells see more motion, larger ones
# fewer cuts.
CHANGE = 14  # mean difference of 8-bit values at a cut, at least
RATIO = 2  # how many times larger than the changes around it
REACH = 3  # frames before and behind a cut that are looked at

Frame = UInt8[np.ndarray, "h w 3"]


def split_groups(
    frames: Iterable[Frame], length: int, scene_cuts: bool = True
) -> Iterator[Iterator[Frame]]:
    """Splits frames into groups.

    Args:
        frames: Frames of a video, of one size.
        length: Largest number of frames in a group.
        scene_cuts: Whether a scene cut begins a group, too.

    Yields:
        The frames of each group, at least one; a group must be used up before the next.
    """

    def numbered() -> Iterator[tuple[int, Frame]]:
        group = count = 0
        for frame, cut in find_cuts(frames) if scene_cuts else ((x, False) for x in frames):
            if cut or count == length:
                group, count = group + 1, 0
            count += 1
            yield group, frame

    for _, pairs in itertools.groupby(numbered(), key=operator.itemgetter(0)):
        yield (frame for _, frame in pairs)


def find_cuts(frames: Iterable[Frame]) -> Iterator[tuple[Frame, bool]]:
    """Finds scene cuts.

    Args:
        frames: Frames of a video, of one size.

    Yields:
        Each frame, and whether a shot begins with it. The first frame of the video is none.
    """
    waiting: collections.deque[Frame] = collections.deque()
    # Small pictures of the frames before the one to decide on, of itself, and of those behind it.
    around: collections.deque[np.ndarray] = collections.deque()
    before = 0  # number of those before
    for frame in frames:
        waiting.append(frame)
        around.append(small_picture(frame))
        if len(waiting) > REACH:
            yield waiting.popleft(), _is_cut(list(around), before)
            before += 1
            if before > REACH + 1:
                around.popleft()
                before -= 1
    while waiting:
        yield waiting.popleft(), _is_cut(list(around), before)
        before += 1


def small_picture(frame: Frame) -> Int[np.ndarray, "rows columns 3"]:
    """Means of a frame over the cells of a grid, rounded down, int32."""
    h, w, _ = frame.shape
    rows, columns = (np.unique(np.arange(GRID) * side // GRID) for side in (h, w))
    sums = np.add.reduceat(frame, rows, axis=0, dtype=np.uint32)
    sums = np.add.reduceat(sums, columns, axis=1)
    area = np.diff(rows, append=h)[:, None, None] * np.diff(columns, append=w)[:, None]
    return (sums // area).astype(np.int32)


def _is_cut(pictures: list[np.ndarray], place: int) -> bool:
    """Whether a shot begins with one of some small pictures in a row."""
    if place == 0:
        return False

    def difference(i: int, j: int) -> int:
        return int(np.abs(pictures[i] - pictures[j]).sum())

    change = difference(place - 1, place)
    if change < CHANGE * pictures[0].size:
        return False
    first, last = max(place - 1 - REACH, 0), min(place + REACH, len(pictures) - 1)
    around = sorted(difference(i, i + 1) for i in range(first, last) if i != place - 1)
    # The largest is left out: it may be another cut, or the other side of a flash.
    usual = around[-2:][:1]
    if not usual or change <= RATIO * usual[0]:
        return False
    # Neither does the last picture before the cut return, nor was the first behind it there before.
    back = [difference(place - 1, i) for i in range(place + 1, last + 1)]
    back += [difference(i, place) for i in range(first, place - 1)]
    return all(2 * x >= change for x in back)
