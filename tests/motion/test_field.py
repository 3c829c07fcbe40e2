"""Motion fields: their expansion against interpolation in floating point, and their coding."""

import cv2
import numpy as np
import pytest

from gnvc_jax.bitstream import EntropyCoder, PlainCoder, Tables, frequencies_from_probabilities
from gnvc_jax.bitstream.errors import EntropyError
from gnvc_jax.motion import MotionField, expand, no_motion
from gnvc_jax.motion.coding import MotionDecoder, bits, encode_fields, probabilities

SHAPE = (3, 5)


def draw(seed: int, size: float = 6.0) -> MotionField:
    """A field with something of everything."""
    rng, (h, w) = np.random.default_rng(seed), SHAPE
    split = rng.random(SHAPE) < 0.4
    own = np.repeat(np.repeat(split, 2, 0), 2, 1)[..., None]

    def vectors(*shape):
        return np.clip(np.round(rng.normal(0, size, (*shape, 2))), -127, 127).astype(np.int16)

    middle = vectors(h, w) * np.int16(seed % 2)
    return MotionField(vectors(h, w), split, vectors(2 * h, 2 * w) * own, middle, vectors(3))


@pytest.fixture(scope="module")
def coder():
    y = frequencies_from_probabilities(np.ones((64, 255)))
    z = frequencies_from_probabilities(np.ones((2, 1, 1, 31)))
    return EntropyCoder(Tables(y, z, 0, frequencies_from_probabilities(probabilities())))


def test_expansion_is_bilinear_and_linear_in_time():
    """Against OpenCV's bilinear resize of the same vectors, in pels."""
    field = draw(1)

    def doubled(vectors):
        return cv2.resize(vectors.astype(np.float32) / 2, None, fx=2, fy=2)

    last = doubled(field.coarse) + field.fine / 2
    second = last / 2 + doubled(field.middle)
    want = np.stack([second / 2, second, (second + last) / 2, last])
    want[:3] += field.shift[:, None, None] / 4
    np.testing.assert_allclose(expand(field) / 16, want, atol=1 / 32 + 1e-6)


def test_no_motion_expands_to_zeros():
    vectors = expand(no_motion(*SHAPE))
    assert vectors.shape == (4, 6, 10, 2) and not vectors.any()


@pytest.mark.parametrize("backend", [None, PlainCoder])
@pytest.mark.parametrize("size", [0.3, 6.0, 200.0])
def test_motion_segment_round_trip(coder, backend, size):
    reading = coder if backend is None else EntropyCoder(coder.tables, backend)
    fields = [draw(seed, size) for seed in range(4)]
    data = encode_fields(fields, coder)
    decoder = MotionDecoder(data, reading)
    for field in fields:
        for got, want in zip(decoder.next(SHAPE), field):
            np.testing.assert_array_equal(got, want)
    decoder.finish()


def test_motion_segment_is_as_long_as_the_tables_say(coder):
    fields = [draw(seed, 2.0) for seed in range(6)]
    table = coder.tables.motion / 2.0**24
    ideal = sum(bits(f, p, table) for f, p in zip(fields, [None, *fields]))
    assert ideal <= 8 * len(encode_fields(fields, coder)) <= ideal + 64


def test_still_pictures_cost_little(coder):
    """Zero fields: well under a tenth of a bit per symbol."""
    fields = [no_motion(16, 26) for _ in range(24)]
    assert 8 * len(encode_fields(fields, coder)) < 0.3 * 24 * 16 * 26


def test_damaged_segments_are_errors_or_fields(coder):
    """Whatever the bytes: a field within its limits, or EntropyError."""
    rng, data = np.random.default_rng(0), encode_fields([draw(1), draw(2)], coder)
    errors = 0
    for _ in range(200):
        changed = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            changed[rng.integers(len(changed))] ^= 1 << int(rng.integers(8))
        changed = changed[: rng.integers(len(changed) + 1)] if rng.random() < 0.3 else changed
        try:
            decoder = MotionDecoder(bytes(changed), coder)
            for _ in range(2):
                assert np.abs(decoder.next(SHAPE).coarse).max() <= 127
            decoder.finish()
        except EntropyError:
            errors += 1
    assert errors > 150
