"""Motion search of the encoder: uint8 frames -> `MotionField`, the same integers on every run.

`search` does it in four steps. Optical flow (OpenCV's DIS) gives a first guess; a rate-distortion
search over a few candidates per block (`search_coarse`) finds vectors that are cheap to code and
predict nearly as well; blocks are split where that pays (`split_blocks`); and the frames in between
get corrections (`add_middle`, `add_shifts`). Every step minimises

    sum of absolute differences of grey values + rate * bits

where the bits are an estimate (`vector_bits`): the cost of a vector's difference to the median of
its neighbours. `search_rate` gives the rate for a quality level.
"""

from collections.abc import Sequence

import cv2
import numpy as np
from einops import rearrange

from gnvc_jax.bitstream.tables import QUALITIES
from gnvc_jax.motion.field import (
    COARSE,
    FINE,
    FRAMES,
    MAX_VECTOR,
    PEL,
    MotionField,
    expand,
    no_motion,
    upsample,
)

STEPS = np.array(((1, 0), (-1, 0), (0, 1), (0, -1)))  # directions in which vectors are varied
REACH = (6, 2, 1)  # half pels that a vector may move by in the first, second and third sweep
# Approximate cost in bits of a split flag that is set, and of one that is not.
# Blocks are mostly whole, so only a set flag is expensive.
SPLIT_BITS, WHOLE_BITS = 3.0, 0.3


def search_rate(q_index: float) -> float:
    """Grey levels of absolute difference that a bit of motion is worth at a quality level.

    The constants were chosen on training clips, by LPIPS and DISTS of decoded frames at q_index 13
    and 27. It falls faster than the square root of lambda: exact motion is worth more where what it
    moves is sharp.
    """
    return 2600.0 * np.exp(-6.4 * q_index / (QUALITIES - 1))


def search(
    frames: np.ndarray, reference: np.ndarray, rate: float, previous: MotionField | None = None
) -> MotionField:
    """Searches the motion of four frames relative to the frame before them.

    Args:
        frames: Frames of one latent, uint8 (4, h, w, 3); h and w are multiples of 32.
        reference: Frame before them, uint8 (h, w, 3); encoders pass what `track` makes.
        rate: Grey levels of absolute difference that a bit must save.
        previous: Field of the latent before, whose vectors are among the candidates.

    Returns:
        The motion field.
    """
    h, w, _ = reference.shape
    field = no_motion(h // COARSE, w // COARSE)
    reference = cv2.cvtColor(reference, cv2.COLOR_RGB2GRAY)
    # Optical flow takes grey images, and comparing them is a third of the work.
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    # Flow of the frames whose vectors the field states, the fourth and the second. The first and
    # the third only have a shift.
    last, second = optical_flow(grey[3], reference), optical_flow(grey[1], reference)
    start = half_pels(last, COARSE)
    known = () if previous is None else (previous.coarse,)
    coarse = search_coarse(grey[3], reference, start, rate, known)
    field = field._replace(coarse=coarse)
    # Each step takes the result of the one before as given.
    field = split_blocks(field, grey[3], reference, half_pels(last, FINE), rate)
    field = add_middle(field, grey, reference, half_pels(second, COARSE), rate)
    return add_shifts(field, grey, reference, rate)


def track(
    source: np.ndarray, tracked: np.ndarray, field: MotionField, coded: np.ndarray
) -> np.ndarray:
    """Makes the frame that the motion of the next latent is searched from.

    Vectors are rounded and chosen by their bits, so what is only copied comes to lie beside the
    place where it is in the source. Searching between source frames would not see this, and the
    errors would add up from latent to latent. Decoded frames show where everything lies, but are
    too blurred to search in. The result stands for them: sharp as the source, moved as they are.

    Args:
        source: Last frame of a latent, uint8 (h, w, 3).
        tracked: What the motion of this latent was searched from, uint8 (h, w, 3).
        field: Motion of this latent.
        coded: Pixels that more arrived for than motion, bool (h, w). They lie where the source has
            them.

    Returns:
        The frame, uint8 (h, w, 3).
    """
    copied = displaced(tracked, dense(expand(field)[-1]), cv2.INTER_CUBIC)
    return np.where(coded[..., None], source, copied)


def optical_flow(frame: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Dense inverse search (DIS; Kroeger et al., ECCV 2016) of grey images: (h, w, 2) in pels."""
    # DIS divides an image among threads and does not look across the seams, so its result depends
    # on their number.
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        preset = cv2.DISOPTICAL_FLOW_PRESET_FAST
        flow = cv2.DISOpticalFlow_create(preset)  # pyright: ignore[reportAttributeAccessIssue]
        return flow.calc(frame, reference, None)
    finally:
        cv2.setNumThreads(threads)


def estimate_bits(field: MotionField) -> float:
    """Estimated size of a field in bits."""
    bits = vector_bits(field.coarse, field.coarse).sum()
    bits += np.where(field.split, SPLIT_BITS, WHOLE_BITS).sum()
    own = np.repeat(np.repeat(field.split, 2, 0), 2, 1)  # (2h, 2w), the quarters of split blocks
    bits += (residual_bits(field.fine) * own).sum()
    if field.middle.any():
        bits += vector_bits(field.middle, field.middle).sum()
    return float(bits + 1 + residual_bits(field.shift).sum())


def half_pels(flow: np.ndarray, side: int) -> np.ndarray:
    """Median of a dense flow (h, w, 2) in pels over each block, in half pels as int16.

    The median ignores what belongs to the other of two objects in a block.
    """
    blocks = rearrange(flow, "(h i) (w j) c -> h w (i j) c", i=side, j=side)
    # (h / side, w / side, side^2, 2) -> (h / side, w / side, 2).
    vectors = np.round(2 * np.median(blocks, axis=2))
    return np.clip(vectors, -MAX_VECTOR, MAX_VECTOR).astype(np.int16)


def residual_bits(residual: np.ndarray) -> np.ndarray:
    """Estimated bits (...) of vectors (..., 2) that are coded without a prediction.

    A rough model of the adaptive coder in `gnvc_jax.motion.coding`: a zero is cheap, other values
    cost more with their logarithm.
    """
    size = np.abs(residual.astype(np.float32))
    # Per component, summed over x and y.
    return np.where(size == 0, 0.6, 2.2 + 1.6 * np.log2(1 + size)).sum(-1)


def vector_bits(vectors: np.ndarray, field: np.ndarray) -> np.ndarray:
    """Estimated bits (h, w) of candidates (h, w, 2), predicted from their neighbours in `field`."""
    return residual_bits(vectors - median_of_neighbours(field))


def median_of_neighbours(field: np.ndarray) -> np.ndarray:
    """Median of the vectors left, above and above right, zero outside: (h, w, 2)."""
    h, w, _ = field.shape
    # A row of zeros above, a column of zeros left and right: (h + 1, w + 2, 2).
    x = np.pad(field, ((1, 0), (1, 1), (0, 0)))
    left, above, right = x[1:, :w], x[:h, 1 : w + 1], x[:h, 2:]
    # The median of three is max(min(a, b), min(max(a, b), c)).
    low, high = np.minimum(left, above), np.maximum(left, above)
    return np.maximum(low, np.minimum(high, right))


def block_sums(error: np.ndarray, side: int) -> np.ndarray:
    """Sums an image (h, w) over blocks, to float32 (h / side, w / side)."""
    return rearrange(error, "(h i) (w j) -> h i w j", i=side, j=side).sum((1, 3), dtype=np.float32)


def differences(
    frame: np.ndarray, reference: np.ndarray, vectors: np.ndarray, side: int
) -> np.ndarray:
    """Sum of absolute differences per block, for one vector per block in half pels."""
    # (h, w, 2): all pixels of a block move by its vector. The codec interpolates between blocks,
    # but then a block's error would depend on its neighbours.
    displacement = np.repeat(np.repeat(vectors.astype(np.float32) / 2, side, 0), side, 1)
    return block_sums(cv2.absdiff(frame, displaced(reference, displacement)), side)


def displaced(
    reference: np.ndarray, displacement: np.ndarray, kernel: int = cv2.INTER_LINEAR
) -> np.ndarray:
    """Samples the reference (h, w) or (h, w, 3) at pixel + displacement (h, w, 2) in pels.

    The codec predicts bicubically (`gnvc_jax.motion.warp.warp`); the search needs only the order of
    the candidates, for which bilinear samples are good enough and several times faster.
    """
    h, w = reference.shape[:2]
    x = displacement[..., 0] + np.arange(w, dtype=np.float32)
    y = displacement[..., 1] + np.arange(h, dtype=np.float32)[:, None]
    return cv2.remap(reference, x, y, kernel, borderMode=cv2.BORDER_REPLICATE)


def search_coarse(
    frame: np.ndarray,
    reference: np.ndarray,
    start: np.ndarray,
    rate: float,
    known: Sequence[np.ndarray] = (),
) -> np.ndarray:
    """Searches the coarse vectors that minimise differences plus rate.

    Args:
        frame, reference: Grey images (h, w).
        start: First guess, int16 (h / 32, w / 32, 2) in half pels.
        rate: Grey levels per bit, see `search`.
        known: Further candidates of the same shape.

    Returns:
        Vectors like `start`.
    """
    vectors = start.copy()
    cost = differences(frame, reference, vectors, COARSE)
    # Colours of a checkerboard over the blocks, 0 and 1.
    parity = np.add.outer(*(np.arange(n) for n in vectors.shape[:2])) % 2
    for reach in REACH:
        # Each candidate is tried for all blocks at once: no motion, the cheapest vector to code,
        # global motion, the vectors of the four neighbours, and small steps.
        whole = np.broadcast_to(np.round(np.median(vectors, axis=(0, 1))), vectors.shape)
        candidates = [np.zeros_like(vectors), median_of_neighbours(vectors), whole, *known]
        # (np.roll wraps around at the border, which is harmless: these are only candidates.)
        candidates += [np.roll(vectors, s, axis) for axis in (0, 1) for s in (1, -1)]
        candidates += [vectors + reach * step for step in STEPS]
        for candidate in candidates:
            candidate = np.clip(candidate, -MAX_VECTOR, MAX_VECTOR).astype(np.int16)
            if np.array_equal(candidate, vectors):
                continue  # no block would change
            # The differences do not depend on the neighbours; only the bits below do.
            found = differences(frame, reference, candidate, COARSE)
            # A block's cost depends on its neighbours, so only one colour of a checkerboard may
            # change at a time.
            for colour in (0, 1):
                better = (parity == colour) & (
                    found + rate * vector_bits(candidate, vectors)
                    < cost + rate * vector_bits(vectors, vectors)
                )
                vectors[better], cost[better] = candidate[better], found[better]
    return vectors


def split_blocks(
    field: MotionField, frame: np.ndarray, reference: np.ndarray, flow: np.ndarray, rate: float
) -> MotionField:
    """Gives the quarters of a block vectors of their own where that pays.

    Args:
        field: Field with coarse vectors.
        frame, reference: Grey images (h, w).
        flow: First guess for the quarters, int16 (h / 16, w / 16, 2) in half pels.
        rate: Grey levels per bit, see `search`.

    Returns:
        The field with `split` and `fine`.
    """
    # What the quarters have without corrections, (2h, 2w, 2), not rounded.
    base = upsample(field.coarse) / 16.0  # half pels
    fine = np.zeros_like(field.fine)
    whole = differences(frame, reference, base, FINE)
    # From here on cost includes the bits of a vector for each quarter, even one of zero.
    cost = whole + rate * residual_bits(fine)
    # First the correction that optical flow suggests, then small steps from the best so far.
    moves = [np.round(flow - base), *(reach * step for reach in REACH for step in STEPS)]
    for i, move in enumerate(moves):
        candidate = move if i == 0 else fine + move
        candidate = np.clip(candidate, -MAX_VECTOR, MAX_VECTOR).astype(np.int16)
        found = differences(frame, reference, base + candidate, FINE)
        found += rate * residual_bits(candidate)
        better = found < cost
        fine[better], cost[better] = candidate[better], found[better]
    # What each block saves by its four quarters, less the price of the flag.
    gain = block_sums(whole - cost, 2) - rate * (SPLIT_BITS - WHOLE_BITS)
    chosen = gain > 0
    # The corrections of blocks that stay whole are dropped: (h, w) -> (2h, 2w, 1).
    fine *= np.repeat(np.repeat(chosen, 2, 0), 2, 1)[..., None]
    return field._replace(split=chosen, fine=fine)


def prediction_errors(field: MotionField, frames: list, reference: np.ndarray) -> np.ndarray:
    """Sums of absolute differences of the first three frames under the whole field, (3,)."""
    # Here the vectors are expanded and interpolated as in the codec, though sampled bilinearly.
    pairs = zip(frames[: FRAMES - 1], expand(field))
    warped = ((frame, displaced(reference, dense(vectors))) for frame, vectors in pairs)
    return np.array([cv2.absdiff(*pair).sum(dtype=np.float64) for pair in warped])


def dense(vectors: np.ndarray) -> np.ndarray:
    """Interpolates block vectors (h, w, 2) in 1/16 pel to displacements (16h, 16w, 2) in pels.

    OpenCV aligns pixel areas as `gnvc_jax.motion.warp.dense` does: vectors stand at block centres.
    """
    return cv2.resize(vectors / np.float32(PEL), None, fx=FINE, fy=FINE)


def add_middle(
    field: MotionField, frames: list, reference: np.ndarray, flow: np.ndarray, rate: float
) -> MotionField:
    """Adds vectors of the second frame if motion is not linear in time and they pay.

    Args:
        field: Field with coarse and fine vectors.
        frames: Grey images (h, w) of the four frames.
        reference: Grey image (h, w) of the frame before.
        flow: First guess of the second frame's motion, int16 (h / 32, w / 32, 2) in half pels.
        rate: Grey levels per bit, see `search`.
    """
    # Half the motion of the fourth frame, (h, w, 2) in half pels.
    linear = field.coarse / 2.0
    start = np.round(flow - linear)
    cost = differences(frames[1], reference, linear, COARSE)
    middle = np.zeros_like(field.middle)
    for sweep in range(2):
        candidates = [start, median_of_neighbours(middle)] if sweep == 0 else []
        candidates += [middle + step for step in STEPS]
        for candidate in candidates:
            candidate = np.clip(candidate, -MAX_VECTOR, MAX_VECTOR).astype(np.int16)
            found = differences(frames[1], reference, linear + candidate, COARSE)
            better = found + rate * vector_bits(candidate, middle) < cost + rate * vector_bits(
                middle, middle
            )
            middle[better], cost[better] = candidate[better], found[better]
    # The loop saw the second frame alone; the first and the third frame move along with it.
    with_middle = field._replace(middle=middle)
    saved = prediction_errors(field, frames, reference) - prediction_errors(
        with_middle, frames, reference
    )
    # One bit for the flag that says that there are such vectors.
    bits = vector_bits(middle, middle).sum() + 1
    return with_middle if saved.sum() > rate * bits else field


def add_shifts(field: MotionField, frames: list, reference: np.ndarray, rate: float) -> MotionField:
    """Adds a displacement to each of the first three frames, by a descent in quarter pels.

    Arguments as for `add_middle`. The frames do not depend on each other, so all three take a step
    at once, and each keeps it if it pays.
    """
    best = prediction_errors(field, frames, reference)
    cost = best + rate * residual_bits(field.shift)
    # One pel, half a pel, a quarter of a pel.
    for size in (4, 2, 1):
        for step in STEPS:
            shift = (field.shift + size * step).astype(np.int16)
            candidate = field._replace(shift=shift)
            found = prediction_errors(candidate, frames, reference)
            found += rate * residual_bits(shift)
            better = found < cost
            field = field._replace(shift=np.where(better[:, None], shift, field.shift))
            cost = np.where(better, found, cost)
    return field
