"""Makes the golden model, stream and digest anew: python -m pytest tests/golden/make.py

Only for a new version of the format: what is here must stay readable.
"""

import io
import sys
from pathlib import Path

import numpy as np

from gnvc_jax.bitstream import EntropyCoder, PlainCoder
from gnvc_jax.codec import scales
from gnvc_jax.coder import Coder
from gnvc_jax.model_file import save_model

FOLDER = Path(__file__).parent


def test_make(tiny_model, monkeypatch):
    model = tiny_model(7, motion=True)
    coder, out = Coder(model), io.BytesIO()
    rng = np.random.default_rng(7)
    canvas = rng.integers(0, 256, (16, 16, 3), np.uint8).repeat(10, 0).repeat(10, 1)
    video = np.stack([canvas[t : t + 80, 2 * t : 2 * t + 120] for t in range(11)])
    coder.encode_frames(video, out, coder.header(120, 80, (25, 1), gop=9), qp=12)
    save_model(FOLDER / "model.safetensors", model)
    (FOLDER / "stream.gnvc").write_bytes(out.getvalue())

    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    from test_golden import digest

    coder.entropy = EntropyCoder(model.tables, PlainCoder)
    coder.functions._network = lambda tables, q_index, *v: scales.scale_index_numpy(
        model.codec_config, tables, q_index, *v
    )
    (FOLDER / "symbols.sha256").write_text(digest(coder) + "\n")
