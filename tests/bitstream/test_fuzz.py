"""Thousands of damaged files: an error of ours or the very symbols, in bounded memory and time."""

import io
import time
import tracemalloc
import warnings

import numpy as np
import pytest

from gnvc_jax.bitstream import BitstreamError, StreamReader
from gnvc_jax.bitstream.errors import IndexRebuilt

CASES = 300  # per kind of damage
MEMORY = 8 << 20
SECONDS = 5.0


def flip(rng, data, chunks):
    for _ in range(rng.integers(1, 4)):
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))


def truncate(rng, data, chunks):
    start = rng.integers(len(data))
    del data[start : None if rng.random() < 0.5 else start + rng.integers(1, 64)]


def insert(rng, data, chunks):
    at = rng.integers(len(data) + 1)
    data[at:at] = rng.bytes(rng.integers(1, 40))


def duplicate(rng, data, chunks):
    if rng.random() < 0.5:
        at, size = chunks[rng.integers(len(chunks))]
    else:
        at, size = rng.integers(len(data)), rng.integers(1, 200)
    to = chunks[rng.integers(len(chunks))][0] if rng.random() < 0.5 else rng.integers(len(data))
    data[to:to] = data[at : at + size]


def lengths(rng, data, chunks):
    """Sizes and counts: of the header, of an entry, of chunks, latents, segments, the index."""
    at, _ = chunks[rng.integers(len(chunks))]
    field, width = [
        (12, 4), (130, 2), (at + 4, 4), (at + 4, 4), (at + 8, 1), (at + 9, 1), (at + 10, 1),
        (at + 19, 1), (at + 20, 1), (at + 23, 1), (len(data) - 24, 8), (len(data) - 16, 4),
    ][rng.integers(12)]  # fmt: skip
    old = int.from_bytes(data[field : field + width], "little")
    near = old + int(rng.integers(-9, 10))
    top = 256**width - 1
    value = [near, 0, top, top >> 1, int(rng.integers(0, 70000)), 1 << 28][rng.integers(6)]
    data[field : field + width] = (value & top).to_bytes(width, "little")


def outcome(read):
    """What read() returns, or None after a BitstreamError; anything else fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IndexRebuilt)
        try:
            return read()
        except BitstreamError:
            return None


@pytest.mark.parametrize("audio", [b"", bytes(range(200))], ids=["silent", "audio"])
@pytest.mark.parametrize("damage", [flip, truncate, insert, duplicate, lengths])
def test_random_damage_raises_bitstream_errors_only(toy, damage, audio):
    rng = np.random.default_rng(sum(damage.__name__.encode()))
    whole = toy.with_audio(audio)
    chunks, intact = toy.chunks(whole), list(StreamReader(whole).groups())
    errors = survivors = 0
    tracemalloc.start()
    try:
        for case in range(CASES):
            data = bytearray(whole)
            damage(rng, data, chunks)
            data = toy.mend(bytes(data)) if case % 2 else bytes(data)
            tracemalloc.reset_peak()
            before, start = tracemalloc.get_traced_memory()[0], time.process_time()

            symbols = outcome(lambda d=data: toy.decode(d))
            assert symbols is None or symbols == toy.symbols
            errors, survivors = errors + (symbols is None), survivors + (symbols is not None)

            reader = outcome(lambda d=data: StreamReader(io.BytesIO(d)))
            if reader:  # from here on, tolerant reading raises nothing
                tolerant(reader)
            number = case % 3
            group = outcome(lambda d=data, n=number: pick(d, n))
            if case % 2 == 0 and group is not None:  # CRC32 not mended: nothing false comes out
                assert group == intact[number]

            assert tracemalloc.get_traced_memory()[1] - before < MEMORY
            assert time.process_time() - start < SECONDS
    finally:
        tracemalloc.stop()
    assert errors > CASES // 4
    assert errors + survivors == CASES


def tolerant(reader: StreamReader) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IndexRebuilt)
        for item in reader.groups(tolerant=True):
            assert item.n_frames is None or 0 <= item.n_frames <= reader.header.gop_frames


def pick(data: bytes, number: int):
    try:
        return StreamReader(data).group(number)
    except IndexError:  # documented: fewer groups are left
        return None
