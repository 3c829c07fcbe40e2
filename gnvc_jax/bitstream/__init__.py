"""The file format and its entropy coder. Knows integers and bytes, and no neural network."""

from gnvc_jax.bitstream.container import Entry, StreamReader, StreamWriter
from gnvc_jax.bitstream.entropy import (
    EntropyCoder,
    PlainCoder,
    QuantisedLatent,
    SegmentDecoder,
    words_of,
)
from gnvc_jax.bitstream.errors import BitstreamError
from gnvc_jax.bitstream.group import (
    Group,
    ScaleIndex,
    decode_group,
    encode_group,
    parse_group,
)
from gnvc_jax.bitstream.header import Header
from gnvc_jax.bitstream.tables import Tables, frequencies_from_probabilities, gaussian_frequencies

__all__ = [
    "BitstreamError",
    "EntropyCoder",
    "Entry",
    "Group",
    "Header",
    "PlainCoder",
    "QuantisedLatent",
    "ScaleIndex",
    "SegmentDecoder",
    "StreamReader",
    "StreamWriter",
    "Tables",
    "decode_group",
    "encode_group",
    "frequencies_from_probabilities",
    "gaussian_frequencies",
    "parse_group",
    "words_of",
]
