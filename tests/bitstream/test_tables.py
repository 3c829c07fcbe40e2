"""Integer tables against float64 probabilities of scipy."""

import dataclasses
import zlib

import numpy as np
import pytest
import scipy.stats

from gnvc_jax.bitstream import Tables, frequencies_from_probabilities, gaussian_frequencies
from gnvc_jax.bitstream.errors import ModelCorrupt

SCALES = 0.11 * (16 / 0.11) ** (np.arange(64) / 63)


def check(freq, n):
    assert freq.dtype == np.uint32 and freq.shape[-1] == n
    assert freq.min() >= 1
    assert (freq.sum(-1, dtype=np.int64) == 1 << 24).all()


def test_gaussian_tables_are_bin_masses():
    freq = gaussian_frequencies(SCALES)
    check(freq, 255)
    symbols = np.arange(-127, 128)
    # the tails belong to the end symbols; the survival function keeps small masses exact
    inner = scipy.stats.norm.sf((np.abs(symbols) - 0.5)[None] / SCALES[:, None])
    outer = scipy.stats.norm.sf((np.abs(symbols) + 0.5)[None] / SCALES[:, None])
    mass = np.where(np.abs(symbols) == 127, inner, inner - outer)
    mass[:, 127] = 2 * scipy.stats.norm.cdf(0.5 / SCALES) - 1
    # one count per symbol is set aside and rounding down leaves at most one more for each
    np.testing.assert_allclose(freq[:, :127], mass[:, :127] * (2**24 - 255) + 0.5, atol=0.51)
    np.testing.assert_allclose(freq[:, 127], mass[:, 127] * 2**24, atol=256)
    np.testing.assert_array_equal(freq[:, :127], freq[:, :127:-1])


def test_end_symbols_hold_the_tails():
    freq = gaussian_frequencies(np.array([100.0]))
    check(freq, 255)
    tail = scipy.stats.norm.sf(126.5 / 100)
    np.testing.assert_allclose(freq[0, [0, -1]] / 2**24, tail, atol=256 / 2**24)


@pytest.mark.parametrize("n", [2, 31, 255])
def test_frequencies_are_positive_and_sum_to_the_total(n):
    p = np.random.default_rng(n).dirichlet(np.full(n, 0.05), 40)
    freq = frequencies_from_probabilities(p)
    check(freq, n)
    assert np.abs(freq / 2**24 - p).max() <= 2 * n / 2**24
    np.testing.assert_array_equal(freq.argmax(-1), p.argmax(-1))
    certain = frequencies_from_probabilities(np.eye(n)[:1])
    np.testing.assert_array_equal(certain[0], [2**24 - n + 1] + [1] * (n - 1))


def test_z_rows_depend_on_kind_and_quality_group(toy):
    tables = toy.tables()
    for q_index, row in ((0, 0), (15, 0), (16, 1), (47, 2), (63, 3)):
        np.testing.assert_array_equal(tables.z_rows(1, q_index), tables.z[1, row])


def test_crc_covers_everything(toy):
    tables = toy.tables()
    data = tables.y.astype("<u4").tobytes() + tables.z.astype("<u4").tobytes() + b"\x08"
    assert tables.crc32() == zlib.crc32(data)
    assert toy.tables(k_skip=9).crc32() != tables.crc32()


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: {"y": t.y[:63]},
        lambda t: {"y": t.y.astype(np.int64)},
        lambda t: {"z": t.z[0]},
        lambda t: {"z": t.z[:, [0, 0, 0]]},
        lambda t: {"y": t.y + np.uint32(1)},
        lambda t: {"z": np.where(np.arange(31) == 15, t.z + t.z[..., :1], t.z * (np.arange(31) > 0))
                   .astype(np.uint32)},
        lambda t: {"k_skip": 65},
        lambda t: {"k_skip": -1},
    ],
)  # fmt: skip
def test_impossible_tables_are_refused(toy, damage):
    tables = toy.tables()
    with pytest.raises(ModelCorrupt):
        dataclasses.replace(tables, **damage(tables))
    assert isinstance(tables, Tables)
