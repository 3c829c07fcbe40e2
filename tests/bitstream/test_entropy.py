"""The entropy coder: constriction against plain integers, against its own bytes, against theory."""

import numpy as np
import pytest

from gnvc_jax.bitstream import (
    EntropyCoder,
    PlainCoder,
    QuantisedLatent,
    SegmentDecoder,
    frequencies_from_probabilities,
)
from gnvc_jax.bitstream import entropy as module
from gnvc_jax.bitstream.errors import EntropyError

constriction = pytest.importorskip("constriction")


def encode(coder, kind, q_index, z, y, index):
    return coder.encode([QuantisedLatent(kind, q_index, z, y, index)])


def decode(coder, kind, q_index, segment, z_shape, index):
    decoder = SegmentDecoder(coder, segment)
    z, y = decoder.z(kind, q_index, z_shape), decoder.y(index)
    decoder.finish()
    return z, y


def draw(rng, tables, z_shape, low=0, high=64):
    """Symbols drawn from the tables themselves."""
    h, w, c = z_shape
    index = rng.integers(low, high, (4 * h, 4 * w, 8)).astype(np.uint8)
    y = np.zeros(index.shape, np.int8)
    for k in range(tables.k_skip, 64):
        at = index == k
        y[at] = rng.choice(np.arange(-127, 128), at.sum(), p=tables.y[k] / 2**24)
    p = tables.z_rows(1, 33) / 2**24
    z = np.stack([rng.choice(np.arange(-15, 16), (h, w), p=p[i]) for i in range(c)], -1)
    return z.astype(np.int8), y, index


@pytest.mark.parametrize("k_skip", [0, 8, 64])
@pytest.mark.parametrize("z_shape", [(1, 1, 2), (3, 5, 2)])
def test_constriction_and_plain_read_each_other(toy, k_skip, z_shape):
    tables = toy.tables(k_skip)
    fast, plain = EntropyCoder(tables, module.ConstrictionCoder), EntropyCoder(tables, PlainCoder)
    z, y, index = draw(np.random.default_rng(k_skip), tables, z_shape)
    segment = encode(fast, 1, 33, z, y, index)
    assert encode(plain, 1, 33, z, y, index) == segment
    for coder in (fast, plain):
        for got, want in zip(decode(coder, 1, 33, segment, z_shape, index), (z, y)):
            assert got.dtype == np.int8
            np.testing.assert_array_equal(got, want)


def test_extreme_tables_and_symbols():
    """Tables where one symbol has nearly everything, and symbols of the smallest frequency."""
    rng = np.random.default_rng(1)
    p = np.concatenate([np.eye(31)[[0, 15, 30]], rng.dirichlet(np.full(31, 0.02), 5)])
    for row in frequencies_from_probabilities(p):
        symbols = rng.integers(0, 31, 200)
        fast, plain = module.ConstrictionCoder(), PlainCoder()
        fast.push(symbols, fast.model(row))
        plain.push(symbols, plain.model(row))
        assert fast.get_words().tolist() == plain.get_words()
        fast, plain = module.ConstrictionCoder(plain.get_words()), PlainCoder(plain.get_words())
        np.testing.assert_array_equal(fast.pop(200, fast.model(row)), symbols)
        assert plain.pop(200, plain.model(row)) == symbols.tolist()
        assert fast.is_empty() and plain.is_empty()


def test_both_coders_decode_random_words_alike(toy):
    """Damaged words must not split the two readers: both give the same wrong symbols."""
    rng = np.random.default_rng(2)
    tables = toy.tables()
    _, _, index = draw(rng, tables, (1, 2, 2))
    for length in (0, 1, 2, 3, 40):
        words = rng.integers(1, 2**32, length, np.uint32)
        readers = [
            SegmentDecoder(EntropyCoder(tables, backend), words.astype("<u4").tobytes())
            for backend in (module.ConstrictionCoder, PlainCoder)
        ]
        np.testing.assert_array_equal(*(r.z(0, 5, (1, 2, 2)) for r in readers))
        np.testing.assert_array_equal(*(r.y(index) for r in readers))
        assert readers[0].ans.is_empty() == readers[1].ans.is_empty()


# Written once; a change of these bytes is a change of the format.
GOLDEN = (
    "9f018a29a0b9d4befdc4268cb4a7f6d8c50efd671d1a6b3239fbff317c0000d82b010088d817009e"
    "b4a4798bfdfbffe0c5feff6077ffffb77f0000457d00003ef7a304a7a930efb1cd0c00d7609fec00"
)


@pytest.mark.parametrize("backend", [module.ConstrictionCoder, PlainCoder])
def test_bytes_match_golden_values(toy, backend):
    coder = EntropyCoder(toy.tables(), backend)
    z = np.array([[[-15, 0], [3, 15]]], np.int8)
    index = (np.arange(4 * 8 * 3).reshape(4, 8, 3) * 7 % 64).astype(np.uint8)
    y = np.where(index >= 8, (np.arange(96).reshape(4, 8, 3) * 5 % 11 - 5) * index // 32, 0)
    y = y.astype(np.int8)
    assert encode(coder, 0, 40, z, y, index).hex() == GOLDEN
    got = decode(coder, 0, 40, bytes.fromhex(GOLDEN), z.shape, index)
    np.testing.assert_array_equal(got[0], z)
    np.testing.assert_array_equal(got[1], y)


@pytest.mark.parametrize("low, high", [(8, 24), (8, 64), (40, 64)])
def test_size_is_close_to_the_information_content(toy, low, high):
    """Within 0.1 % of the information content, which in turn is that of scipy's normal."""
    import scipy.stats

    coder = EntropyCoder(toy.tables())
    z, y, index = draw(np.random.default_rng(high), coder.tables, (40, 40, 2), low, high)
    assert y.size >= 200_000
    bits = 8 * len(encode(coder, 1, 33, z, y, index))
    ideal = coder.ideal_bits(QuantisedLatent(1, 33, z, y, index))
    assert ideal <= bits <= 1.001 * ideal + 64
    sigma = 0.11 * (16 / 0.11) ** (index / 63)
    a = np.abs(y.astype(float))
    mass = scipy.stats.norm.sf((a - 0.5) / sigma) - scipy.stats.norm.sf((a + 0.5) / sigma)
    y_bits = -np.log2(np.maximum(mass, 2**-24)).sum()
    z_bits = ideal - coder.ideal_bits(QuantisedLatent(1, 33, z[:0], y, index))
    assert ideal - z_bits == pytest.approx(y_bits, rel=2e-3)


def test_symbols_are_coded_in_canonical_order(toy):
    """z by channel, then y by index, raster inside an index: one coder call per table, in order."""
    tables = toy.tables()
    z, y, index = draw(np.random.default_rng(4), tables, (2, 2, 2))
    reader = PlainCoder(
        np.frombuffer(encode(EntropyCoder(tables), 1, 33, z, y, index), "<u4").tolist()
    )
    for c in range(2):
        for value in z[:, :, c].ravel():
            assert reader.pop(1, tables.z_rows(1, 33)[c].tolist()) == [int(value) + 15]
    for k in range(tables.k_skip, 64):
        for value in y.ravel()[index.ravel() == k]:
            assert reader.pop(1, tables.y[k].tolist()) == [int(value) + 127]
    assert reader.is_empty()


@pytest.mark.parametrize("backend", [module.ConstrictionCoder, PlainCoder])
def test_symbols_out_of_range_are_refused(toy, backend):
    coder = EntropyCoder(toy.tables(), backend)
    z, y, index = draw(np.random.default_rng(6), coder.tables, (1, 2, 2))
    for name, value in (("z", -16), ("z", 16), ("y", -128)):
        changed = {"z": z.copy(), "y": y.copy()}
        changed[name][0, 0, 0] = value
        with pytest.raises(ValueError, match=f"symbols of {name} must be in"):
            encode(coder, 1, 33, index=index, **changed)


def test_latents_of_a_group_share_a_segment(toy):
    """They come out in order, and cost no more than the coder's state beyond their information."""
    rng, tables = np.random.default_rng(8), toy.tables()
    coder = EntropyCoder(tables)
    latents = [QuantisedLatent(1, 33, *draw(rng, tables, (2, 2, 2), 20)) for _ in range(5)]
    segment = coder.encode(latents)
    decoder = SegmentDecoder(coder, segment)
    for latent in latents:
        np.testing.assert_array_equal(decoder.z(1, 33, (2, 2, 2)), latent.z)
        np.testing.assert_array_equal(decoder.y(latent.index), latent.y)
    decoder.finish()
    ideal = sum(map(coder.ideal_bits, latents))
    assert ideal <= 8 * len(segment) <= ideal + 64


def test_symbol_below_k_skip_is_refused(toy):
    z, y, index = draw(np.random.default_rng(9), toy.coder.tables, (1, 2, 2))
    changed = np.where(index < toy.coder.tables.k_skip, 1, y).astype(np.int8)
    assert (changed != y).any()
    with pytest.raises(ValueError, match="must be 0 where"):
        encode(toy.coder, 1, 33, z, changed, index)


def test_impossible_segments_are_refused(toy):
    z, y, index = draw(np.random.default_rng(5), toy.coder.tables, (1, 2, 2))
    segment = encode(toy.coder, 1, 33, z, y, index)
    for bad, words in ((segment[:-1], "words of 4 bytes"), (segment + bytes(4), "zero word")):
        with pytest.raises(EntropyError, match=words):
            SegmentDecoder(toy.coder, bad)
    with pytest.raises(EntropyError, match="more than its symbols"):
        decode(toy.coder, 1, 33, b"\1\0\0\0" + segment, z.shape, index)
