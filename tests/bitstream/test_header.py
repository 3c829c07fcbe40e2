"""The header of a stream: fields, limits, versions, and the model that it names."""

import io
import struct

import pytest

from gnvc_jax.bitstream import StreamReader
from gnvc_jax.bitstream.errors import (
    HeaderCorrupt,
    LimitExceeded,
    ModelCorrupt,
    NotThisFormat,
    UnsupportedVersion,
    WrongModel,
)


def test_header_round_trip(toy):
    reader = StreamReader(toy.data)
    assert reader.header == toy.header() and reader.start == 140
    plain = toy.header(frame_count=None, extra={})
    file = io.BytesIO(plain.pack())
    assert StreamReader(file).header == plain


def test_other_files_raise_not_this_format(toy):
    for data in (b"", b"\x89GNV", b"RIFF" + bytes(200), toy.data[:131]):
        with pytest.raises(NotThisFormat):
            StreamReader(data)
    for damaged in (toy.data.replace(b"\r\n", b"\n"), toy.data.replace(b"\n", b"\r\n")):
        with pytest.raises(NotThisFormat, match="line ends"):
            StreamReader(damaged)


def test_unknown_version_or_flags_raise_unsupported_version(toy):
    for at, value in ((8, b"\3"), (8, b"\0"), (16, b"\1"), (19, b"\x80"), (117, b"\x3f"),
                      (118, b"\x7e"), (119, b"\2")):  # fmt: skip
        with pytest.raises(UnsupportedVersion):
            StreamReader(toy.mend(toy.edit(toy.data, at, value)))
    for at, value in ((10, b"\7"), (20, b"\xff" * 4), (120, b"\xff" * 8)):  # minor, optional
        assert toy.decode(toy.mend(toy.edit(toy.data, at, value))) == toy.symbols


def test_flipped_bytes_raise_header_corrupt(toy):
    with pytest.raises(HeaderCorrupt):
        StreamReader(toy.edit(toy.data, 24, b"\x81"))


U16, U32 = "<H", "<I"


@pytest.mark.parametrize(
    "at, form, good, bad",
    [
        (12, U32, [140], [0, 128, 131, 141, 65537, 65540, 2**32 - 1]),
        (24, U32, [16, 16384], [0, 15, 16385, 2**32 - 1]),
        (28, U32, [16, 16384], [0, 15, 16385, 2**32 - 1]),
        (32, U32, [1, 1000], [0, 1001, 2**32 - 1]),
        (36, U32, [1, 25000], [0, 25001, 2**32 - 1]),
        (40, "<Q", [1, 2**48, 2**64 - 1], [0, 2**48 + 1, 2**64 - 2]),
        (48, U16, [3, 256], [0, 2, 257, 2**16 - 1]),
        (50, U16, [1, 9], [0, 10, 2**16 - 1]),
        (52, "B", [1, 8, 64], [0, 65, 255]),
        (53, "B", [1, 255], [0]),
        (54, "B", [4, 16], [0, 3, 17, 255]),
        (59, "B", [0, 1], [2, 255]),
        (60, U16, [4, 512], [0, 3, 513, 2**16 - 1]),
        (62, U16, [1, 512], [0, 513, 2**16 - 1]),
        (116, "B", [0, 64], [65, 255]),
        (130, U16, [3], [5, 2**16 - 1]),
    ],
)
def test_header_fields_out_of_range_raise_limit_exceeded(toy, at, form, good, bad):
    for value in good:
        StreamReader(toy.mend(toy.edit(toy.data, at, struct.pack(form, value))))
    for value in bad:
        with pytest.raises(LimitExceeded, match=r"\d"):
            StreamReader(toy.mend(toy.edit(toy.data, at, struct.pack(form, value))))


def test_combined_limits_of_fields_are_checked(toy):
    for width, height, good in ((16384, 8192, True), (16384, 8208, False)):
        data = toy.mend(toy.edit(toy.data, 24, struct.pack("<II", width, height)))
        if good:
            StreamReader(data)
        else:
            with pytest.raises(LimitExceeded, match="width"):
                StreamReader(data)
    for changes in ({"codec_fingerprint": bytes(31)}, {"vae_fingerprint": bytes(17)}):
        with pytest.raises(LimitExceeded, match="fingerprint"):
            toy.header(**changes).pack()
    for changes in ({"width": 15}, {"fps": (1, 0)}, {"extra": {1: bytes(65530)}},
                    {"extra": {1: bytes(70000)}}, {"gop_frames": 10}):  # fmt: skip
        with pytest.raises(LimitExceeded):
            toy.header(**changes).pack()


def test_header_of_the_largest_size_is_readable(toy):
    header = toy.header(extra={1: bytes(range(256)) * 255, 65535: b""})
    assert StreamReader(header.pack()).header == header


def test_check_model_refuses_another_model(toy):
    header, crc = StreamReader(toy.data).header, toy.coder.tables.crc32()
    codec, vae = toy.fingerprints
    header.check_model(codec, vae, crc)
    with pytest.raises(WrongModel, match=r"codec 00010203.* ffffffff"):
        header.check_model(b"\xff" * 32, vae, crc)
    with pytest.raises(WrongModel, match="VAE"):
        header.check_model(codec, b"\xff" * 16, crc)
    with pytest.raises(ModelCorrupt):
        header.check_model(codec, vae, crc ^ 1)
