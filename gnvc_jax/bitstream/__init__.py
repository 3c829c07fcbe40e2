"""The file format and its entropy coder; docs/bitstream.md is the specification.

This package works on integers and bytes and knows no neural network.

- Writing a stream: `encode_group` turns the `QuantisedLatent`s of a group into a payload, and
  `StreamWriter` puts payloads into a file.
- Reading a stream: `StreamReader` yields a `GroupPayload` for each group, and `decode_group` turns
  it back into latents.

Both directions need an `EntropyCoder` with the `Tables` of a model, and a function `ScaleIndex`
that runs the model's integer network. What can go wrong is listed in `errors`.
"""

from gnvc_jax.bitstream.container import IndexEntry
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
from gnvc_jax.bitstream.reader import StreamReader
from gnvc_jax.bitstream.tables import Tables, frequencies_from_probabilities, gaussian_frequencies
from gnvc_jax.bitstream.writer import StreamWriter

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
