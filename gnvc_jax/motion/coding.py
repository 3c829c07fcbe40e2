"""Motion fields <-> symbols, each coded with one row of the motion tables of a model.

`code_field` visits the numbers of a field in coding order, for encoder and decoder alike: the
encoder's callback notes each value, the decoder's reads it. Every context is computed from integers
that both sides have, so parsing never depends on floating point. `encode_fields` and
`MotionDecoder` use it for the motion segment of a group, `bits` and `counts` for estimates and
statistics; `probabilities` are the tables.

Order: coarse vectors block by block, split flags, the quarters of split blocks, the node of the
second frame (a flag first), the shifts of whole frames.
"""

from collections.abc import Callable, Sequence

import numpy as np

from gnvc_jax.bitstream import EntropyCoder, words_of
from gnvc_jax.bitstream.errors import EntropyError
from gnvc_jax.motion.field import FRAMES, MAX_VECTOR, MotionField, no_motion

SYMBOLS = 2 * MAX_VECTOR + 1  # values -127..127; residuals wrap around

# First row of the tables for each kind of value; a kind has as many rows as contexts.
COARSE, SPLIT, QUARTER, NODE, MIDDLE, SHIFT = 0, 11, 14, 17, 19, 26
# The last context takes all larger activities.
LEVELS = {COARSE: 11, QUARTER: 3, MIDDLE: 7}  # contexts by activity

# Distribution of each row, measured on training clips: the share of 0, the share of -1 and 1 among
# the rest, and the factor by which each larger value is less frequent. The code lengths are within
# 2 % of the entropy of the counts.
LAPLACE = (
    (0.934, 0.707, 0.901), (0.642, 0.760, 0.739), (0.502, 0.579, 0.696), (0.430, 0.443, 0.714),
    (0.383, 0.376, 0.726), (0.339, 0.309, 0.759), (0.301, 0.248, 0.815), (0.262, 0.205, 0.850),
    (0.234, 0.165, 0.880), (0.190, 0.146, 0.905), (0.163, 0.110, 0.950),  # coarse
    None, None, None,  # split
    (0.590, 0.459, 0.865), (0.582, 0.609, 0.841), (0.539, 0.408, 0.843),  # quarter
    None, None,  # node
    (0.910, 0.665, 0.819), (0.635, 0.704, 0.754), (0.499, 0.583, 0.742), (0.419, 0.478, 0.729),
    (0.417, 0.439, 0.779), (0.365, 0.359, 0.795), (0.266, 0.197, 0.913),  # middle
    (0.848, 0.653, 0.433), (0.531, 0.640, 0.383),  # shift
)  # fmt: skip
# Probability of 1, for rows that code a flag.
FLAGS = {SPLIT: 0.046, SPLIT + 1: 0.418, SPLIT + 2: 0.749, NODE: 0.347, NODE + 1: 0.869}
ROWS = len(LAPLACE)

# (row, value, which a decoder ignores) -> value
Code = Callable[[int, int], int]


def wrap(value: int) -> int:
    """Wraps a residual to the number in -127..127 that is congruent to it modulo 255.

    Differences of two vectors reach -254..254, but the prediction is known, so the residual modulo
    255 tells the vector.
    """
    return (value + MAX_VECTOR) % SYMBOLS - MAX_VECTOR


def median(a: int, b: int, c: int) -> int:
    """Median of three numbers."""
    return max(min(a, b), min(max(a, b), c))


# Activity of the neighbourhood -> context, about two contexts per doubling.
# A table rather than a logarithm per value: floating point must not decide how a stream is parsed,
# and the entries are far enough from ties to be the same on every machine.
LEVEL_OF = [0, *(np.round(2.2 * np.log2(np.arange(2, 1025))).astype(int) - 1).tolist()]


def level(activity: int, row: int) -> int:
    """Context of a value, counted from 0.

    Args:
        activity: How much the neighbourhood moves and disagrees, see `_vectors`.
        row: First row of the tables for this kind of value.
    """
    return min(LEVEL_OF[min(activity, len(LEVEL_OF) - 1)], LEVELS[row] - 1)


def probabilities() -> np.ndarray:
    """Probabilities (ROWS, SYMBOLS) of the values -127..127 for all rows, in float64."""
    # |value| for each symbol; positive and negative values are equally likely.
    size = np.abs(np.arange(-MAX_VECTOR, MAX_VECTOR + 1))
    rows = []
    for row, shape in enumerate(LAPLACE):
        if shape is None:  # a flag: only the values 0 and 1 have a probability
            one = FLAGS[row]
            rows.append(np.where(size == 0, 1 - one, 0.0))
            rows[-1][MAX_VECTOR + 1] = one
            continue
        zero, unit, decay = shape
        # Geometric from 2 on. What lies beyond 127 is missing, which normalisation makes up for.
        rest = (1 - unit) * (1 - decay) * decay ** np.maximum(size - 2.0, 0.0)
        tail = np.where(size == 1, unit, rest)
        rows.append(np.where(size == 0, zero, (1 - zero) / 2 * tail))
    return np.stack(rows)


def code_field(
    code: Code, shape: tuple[int, int], previous: MotionField | None, field: MotionField | None
) -> MotionField:
    """Visits the numbers of one field in coding order.

    Args:
        code: Called with a row and the value to write, which a decoder ignores; returns the value.
        shape: Grid of coarse blocks.
        previous: Field of the latent before, None after an intra latent.
        field: Field to encode, None to decode.

    Returns:
        The field, as decoded.
    """
    # A decoder passes zeros where the encoder passes values, and ignores them. Contexts may only
    # use `out` and `previous`, which both sides have.
    given = no_motion(*shape) if field is None else field
    out = no_motion(*shape)
    # Coarse vectors: the motion of the fourth frame, block by block.
    before = None if previous is None else previous.coarse.tolist()
    _vectors(code, COARSE, given.coarse, before, out.coarse)

    # Flags of split blocks, row by row.
    split, wanted = out.split, given.split
    for i, j in np.ndindex(shape):
        # Context: how many of the left and upper neighbours are split.
        around = int(j > 0 and split[i, j - 1]) + int(i > 0 and split[i - 1, j])
        split[i, j] = code(SPLIT + around, int(wanted[i, j]))
    # The quarters of each split block: top left, top right, bottom left, bottom right.
    for i, j in np.argwhere(split).tolist():
        activity = 0  # sum of what was coded in this block so far
        for di, dj in ((0, 0), (0, 1), (1, 0), (1, 1)):
            at = 2 * i + di, 2 * j + dj
            for axis in (0, 1):
                value = code(QUARTER + level(activity, QUARTER), int(given.fine[*at, axis]))
                out.fine[*at, axis] = value
                activity += abs(value)

    # Vectors of the second frame are likely if the field before had some (0.87 against 0.35).
    had = previous is not None and bool(previous.middle.any())
    if code(NODE + had, int(given.middle.any())):
        _vectors(code, MIDDLE, given.middle, None, out.middle)
    # Shifts of whole frames. Context: whether an earlier frame has one along this axis.
    for i in range(FRAMES - 1):
        for axis in (0, 1):
            past = int(np.abs(out.shift[:i, axis]).max(initial=0))
            out.shift[i, axis] = code(SHIFT + (past > 0), int(given.shift[i, axis]))
    return out


def _vectors(code: Code, row: int, given: np.ndarray, before: list | None, out: np.ndarray) -> None:
    """Codes a grid of vectors (h, w, 2) as residuals of a prediction from known neighbours.

    Args:
        code: See `code_field`.
        row: First row of the tables for these vectors.
        given: Vectors to encode.
        before: Vectors of the field before, as nested lists, if they help to predict.
        out: Array that receives the decoded vectors.
    """
    # Nested lists: indexing single elements of NumPy arrays is several times slower.
    h, w, _ = given.shape
    given, done = given.tolist(), [[[0, 0] for _ in range(w)] for _ in range(h)]
    residuals = [[[0, 0] for _ in range(w)] for _ in range(h)]
    for i in range(h):
        for j in range(w):
            for axis in (0, 1):
                # Left, above, and the field before; without one, above right (at the edge, left).
                known = [done[i][j - 1][axis]] if j else []
                known += [done[i - 1][j][axis]] if i else []
                if before is not None:
                    known.append(before[i][j][axis])
                elif i:
                    known.append(done[i - 1][j + 1 if j + 1 < w else j - 1][axis])
                if len(known) == 3:
                    guess = median(*known)
                else:
                    guess = sum(known) // max(1, len(known))
                # How far the neighbours disagree (a little, for the first vector, which has none),
                # and how large their residuals were.
                activity = max(known) - min(known) if known else 3
                activity += abs(residuals[i][j][0]) if axis else 0
                activity += abs(residuals[i][j - 1][axis]) if j else 0
                activity += abs(residuals[i - 1][j][axis]) if i else 0
                residual = wrap(given[i][j][axis] - guess)
                residual = code(row + level(activity // 2, row), residual)
                residuals[i][j][axis] = residual
                # Vectors lie in -127..127, so wrapping restores the one that is meant.
                done[i][j][axis] = wrap(guess + residual)
    out[:] = done


def encode_fields(fields: Sequence[MotionField], coder: EntropyCoder) -> bytes:
    """Encodes the fields of a group.

    Args:
        fields: Fields of the predicted latents, in order.
        coder: Entropy coder of the model.

    Returns:
        The motion segment of the group, empty if there are no fields.
    """
    symbols, previous = [], None

    def note(row: int, value: int) -> int:
        symbols.append((row, value))
        return value

    for field in fields:
        previous = code_field(note, field.split.shape, previous, field)
    ans = coder.backend()
    # The coder is a stack: the last symbol goes in first.
    for row, value in reversed(symbols):
        # One symbol at a time, each with the table of its own row.
        ans.push(np.asarray([value + MAX_VECTOR]), coder.motion_models[row])
    return np.asarray(ans.get_words(), "<u4").tobytes()


class MotionDecoder:
    """Decodes the fields of a motion segment one by one.

    Raises:
        EntropyError: If the bytes cannot be a motion segment.
    """

    def __init__(self, data: bytes, coder: EntropyCoder) -> None:
        self.models, self.previous = coder.motion_models, None
        self.ans = coder.backend(words_of(data))

    def next(self, shape: tuple[int, int]) -> MotionField:
        """Decodes the next field, on a grid of `shape` coarse blocks."""

        def read(row: int, _: int) -> int:
            return int(self.ans.pop(1, self.models[row])[0]) - MAX_VECTOR

        # A row depends on values read before, so symbols are popped one by one, too.
        self.previous = code_field(read, shape, self.previous, None)
        return self.previous

    def finish(self) -> None:
        """Checks that the segment is used up exactly.

        Raises:
            EntropyError: If it holds more than was decoded.
        """
        if not self.ans.is_empty():
            raise EntropyError("a motion segment holds more than its fields")


def bits(field: MotionField, previous: MotionField | None, table: np.ndarray) -> float:
    """Information content of a field in bits.

    Args:
        field: The field.
        previous: Field of the latent before, None after an intra latent.
        table: Probabilities (ROWS, SYMBOLS).
    """
    total = 0.0

    def count(row: int, value: int) -> int:
        nonlocal total
        total -= np.log2(table[row, value + MAX_VECTOR])
        return value

    code_field(count, field.split.shape, previous, field)
    return total


def counts(sequences: list[list[MotionField]]) -> np.ndarray:
    """Counts how often each value is coded with each row in groups of fields: (ROWS, SYMBOLS)."""
    table = np.zeros((ROWS, SYMBOLS), np.int64)

    def count(row: int, value: int) -> int:
        table[row, value + MAX_VECTOR] += 1
        return value

    for fields in sequences:
        previous = None
        for field in fields:
            code_field(count, field.split.shape, previous, field)
            previous = field
    return table
