"""The file format and its entropy coder. Knows integers and bytes, and no neural network."""

from gnvc_jax.bitstream.container import IndexEntry, StreamReader, StreamWriter
from gnvc_jax.bitstream.entropy import (
    EntropyCoder,
    PlainCoder,
    QuantisedLatent,
    SegmentDecoder,
    words_of,
)
from gnvc_jax.bitstream.errors import BitstreamError
from gnvc_jax.bitstream.group import (
    GroupPayload,
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
    "GroupPayload",
    "Header",
    "IndexEntry",
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
